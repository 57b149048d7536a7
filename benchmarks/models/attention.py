"""Networks with LayerNorm: ConvNeXt, ViT and a text classifier.

Channel counts follow Liu et al. 2022 (arXiv:2201.03545), Dosovitskiy et al. 2021 (arXiv:2010.11929) and,
for the small ViT, Touvron et al. 2021 (arXiv:2012.12877).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, LayerNorm, MLP in channels-last order, layer scale (a bare Parameter [C]), residual."""

    def __init__(self, dim: int, hidden: int, layer_scale: float) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, hidden)
        self.pwconv2 = nn.Linear(hidden, dim)
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """ConvNeXt for [B, 3, H, W] images; the default, ConvNeXt-T, has 28.59 M parameters."""

    def __init__(
        self,
        widths: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (3, 3, 9, 3),
        expansion: int = 4,
        layer_scale: float = 1e-6,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        stages: list[nn.Module] = [
            nn.Conv2d(3, widths[0], 4, 4),
            LayerNorm2d(widths[0], eps=1e-6),
        ]
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            if i > 0:
                stages += [
                    LayerNorm2d(widths[i - 1], eps=1e-6),
                    nn.Conv2d(widths[i - 1], width, 2, 2),
                ]
            stages += [ConvNeXtBlock(width, expansion * width, layer_scale) for _ in range(depth)]
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(widths[-1], eps=1e-6)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stages(x).mean((2, 3))))


class Attention(nn.Module):
    """Multi-head self-attention on [B, N, D], with separate q, k, v or one fused projection.

    Heads are counted from the projection's width (`-1` in the view), so that whole heads can be removed
    without touching an attribute; pruning inside heads needs `head_dim` set anew.
    """

    def __init__(self, dim: int, num_heads: int, head_dim: int, fused_qkv: bool) -> None:
        super().__init__()
        inner = num_heads * head_dim
        self.num_heads, self.head_dim, self.fused_qkv = num_heads, head_dim, fused_qkv
        if fused_qkv:
            self.qkv = nn.Linear(dim, 3 * inner)
        else:
            self.q = nn.Linear(dim, inner)
            self.k = nn.Linear(dim, inner)
            self.v = nn.Linear(dim, inner)
        self.proj = nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        if self.fused_qkv:
            q, k, v = self.qkv(x).reshape(b, n, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (
                layer(x).view(b, n, -1, self.head_dim).transpose(1, 2) for layer in (self.q, self.k, self.v)
            )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(b, n, -1))


class EncoderBlock(nn.Module):
    """Pre-norm transformer block on [B, N, D]."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, hidden: int, fused_qkv: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, head_dim, fused_qkv)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """Vision transformer for [B, 3, image, image]; the default, ViT-S/16, has 22.05 M parameters.

    The class token [1, 1, D] and the position embedding [1, N + 1, D] are bare Parameters.
    """

    def __init__(
        self,
        image: int = 224,
        patch: int = 16,
        dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        head_dim: int = 64,
        hidden: int = 1536,
        fused_qkv: bool = False,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, patch, patch)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim).normal_(std=0.02))
        self.pos_embed = nn.Parameter(torch.empty(1, (image // patch) ** 2 + 1, dim).normal_(std=0.02))
        self.blocks = nn.Sequential(
            *(EncoderBlock(dim, num_heads, head_dim, hidden, fused_qkv) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class TextClassifier(nn.Module):
    """Embedding, residual MLP blocks with LayerNorm, mean over tokens; [B, T] int64 -> [B, num_classes]."""

    def __init__(
        self,
        vocab: int = 30522,
        dim: int = 256,
        hidden: int = 1024,
        depth: int = 2,
        num_classes: int = 4,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth))
        self.fc1 = nn.ModuleList(nn.Linear(dim, hidden) for _ in range(depth))
        self.fc2 = nn.ModuleList(nn.Linear(hidden, dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for norm, fc1, fc2 in zip(self.norms, self.fc1, self.fc2, strict=True):
            x = x + fc2(F.gelu(fc1(norm(x))))
        return self.head(self.norm(x).mean(1))
