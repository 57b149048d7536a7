"""Which multiples of channels a device computes fastest with, by its type and the dtype."""

from __future__ import annotations

import torch

# Channels of one vector register in float32: what oneDNN's blocked layouts are made of.
VECTOR_BYTES = {"AVX512": 64, "AVX2": 32}


def fast_multiple(device: torch.device, dtype: torch.dtype) -> tuple[int, int, str]:
    """The multiple for wide layers, the least that is worth keeping, and why.

    On a GPU with tensor cores rows of 16 bytes can be loaded as they are, and rows of 128 bytes fill their tiles (from
    compute capability 8.0): NVIDIA, "Matrix Multiplication Background User's Guide", section 4.1. float32 is taken for
    16 bits there, so that the model is fast under autocast, too; for TF32 4 would do. On a CPU it is the vector width,
    the block of oneDNN's layouts ``nChw8c`` and ``nChw16c``.
    """
    size = dtype.itemsize
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        name = f"{torch.cuda.get_device_name(device)} in {str(dtype).removeprefix('torch.')}"
        aligned = max(16 // min(size, 2), 1) if size <= 4 else 2
        if capability < (7, 0):
            return 4, 1, f"{name}: no tensor cores, loads of 16 bytes"
        if capability < (8, 0) or size > 4:
            return aligned, aligned, f"{name}: tensor cores take rows of 16 bytes"
        return 8 * aligned, aligned, f"{name}: tensor cores take rows of 16 bytes, tiles are 128 bytes wide"
    if device.type == "cpu":
        capability_name = torch.backends.cpu.get_cpu_capability()
        lanes = VECTOR_BYTES.get(capability_name.upper().replace(" ", ""), 16) // max(size, 4)
        return lanes, max(lanes // 4, 1), f"CPU with {capability_name} in {str(dtype).removeprefix('torch.')}"
    return 8, 8, f"{device.type}: nothing is known of it"


def multiple_for(channels: int, widest: int, least: int) -> int:
    """The multiple for a group of ``channels``: ``widest`` or, where that is more than a quarter, less by halves.

    Never under ``least``; 1 for a group that is smaller than that.
    """
    multiple = widest
    while multiple > least and 4 * multiple > channels:
        multiple = max(multiple // 2, least)
    return multiple if multiple <= channels else 1
