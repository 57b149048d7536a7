"""Plain layers as the op that they run: the same results, and PyTorch's own way wherever that does more."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pat_fast.plan.layers import run_of
from pat_fast.plan.running import Still, as_ops

LAYERS = [
    (nn.Conv1d(4, 6, 3, padding="same"), (2, 4, 5)),
    (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False), (2, 4, 5, 5)),
    (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), (2, 4, 5, 5)),
    (nn.Conv3d(2, 3, 1, dilation=2), (1, 2, 3, 3, 3)),
    (nn.Linear(4, 3, bias=False), (2, 5, 4)),
    (nn.BatchNorm1d(4), (3, 4)),
    (nn.BatchNorm2d(4, affine=False), (2, 4, 3, 3)),
    (nn.BatchNorm2d(4, track_running_stats=False), (2, 4, 3, 3)),
    (nn.BatchNorm3d(4, momentum=None, eps=0.1), (2, 4, 2, 2, 2)),
    (nn.ReLU(), (3,)),
    (nn.ReLU6(inplace=True), (3,)),
    (nn.GELU(), (3,)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda value: str(value))
@pytest.mark.parametrize("training", [False, True])
def test_a_layer_run_as_its_op_gives_what_a_call_of_it_gives(
    layer: nn.Module, shape: tuple[int, ...], training: bool
) -> None:
    layer.train(training)
    for name, buffer in layer.named_buffers():
        if "running" in name:
            torch.nn.init.uniform_(buffer, 0.5, 1.5)
    x = torch.randn(shape)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    expected = layer(x.clone())
    after = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    layer.load_state_dict(before, strict=False)
    assert torch.equal(run_of(layer)(layer, x.clone()), expected)
    assert all(torch.equal(buffer, after[name]) for name, buffer in layer.named_buffers())


def test_relu_in_place_works_in_place() -> None:
    layer, x = nn.ReLU(inplace=True), torch.tensor([-1.0, 1.0])
    assert run_of(layer)(layer, x) is x
    assert x.tolist() == [0.0, 1.0]


def test_hooks_of_the_backward_and_checks_of_the_input_are_not_passed_by() -> None:
    layer, seen = nn.Linear(2, 2), []
    layer.register_full_backward_hook(lambda *_: seen.append(1))
    run_of(layer)(layer, torch.randn(1, 2, requires_grad=True)).sum().backward()
    assert seen
    norm = nn.BatchNorm2d(2).eval()
    with pytest.raises(ValueError, match="expected 4D input"):
        run_of(norm)(norm, torch.randn(1, 2, 3))


def test_what_a_layer_is_made_of_is_read_when_it_runs() -> None:
    """A model may set a layer's weight or stride on the way, or keep the weight as a plain attribute."""
    conv, x = nn.Conv2d(2, 3, 1), torch.randn(1, 2, 4, 4)
    run = run_of(conv)
    conv.stride, conv.weight = (2, 2), nn.Parameter(torch.randn(3, 2, 1, 1))
    assert torch.equal(run(conv, x), conv(x))
    weight = conv.weight.detach()
    del conv.weight
    conv.weight = weight  # type: ignore[assignment]
    assert torch.equal(run(conv, x), conv(x))


def test_a_model_of_such_layers_and_others_computes_the_same_as_ops() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[4](input=self.layers[:4](x))

    model, x = Model().eval(), torch.randn(2, 3, 3, 3)
    expected, before = model(x), [vars(m).copy() for m in model.modules()]
    with as_ops(Still(model)):
        assert torch.equal(model(x), expected)
    assert [vars(m).keys() for m in model.modules()] == [space.keys() for space in before]
