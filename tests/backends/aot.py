"""Compiles every Triton kernel for a GPU that need not be there; run as ``python -m tests.backends.aot CAPABILITY``.

Triton decides when it is imported whether it compiles or interprets, so this runs in a process of its own. Prints a
JSON list with one entry per kernel and dtype: its name, the loads and stores that its PTX holds, the size of the
binary and the bytes of stack (what registers were spilled to).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pat_fast.backends.triton import OPTIONS, SUM_DEPTH, kernels
from pat_fast.backends.triton.work import SUM_SLOTS, Shape

# Triton's name in signatures, dtype, accumulator, bytes.
TYPES = (
    ("fp32", tl.float32, "fp32", 4),
    ("fp64", tl.float64, "fp64", 8),
    ("bf16", tl.bfloat16, "fp32", 2),
    ("fp16", tl.float16, "fp32", 2),
)
ACCUMULATORS = {"fp32": tl.float32, "fp64": tl.float64}
FUNCTIONS = (("pow", 1.0), ("pow", 2.0), ("pow", 0.7), ("mul", 0.0), ("absmul", 0.0), ("sqmul", 0.0))
BITS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}
ADDRESSES = ("xs", "ys", "outs", "items", "sums")


def variants(thorough: bool) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Each kernel as it is launched: label, kernel, types of the pointers that are no addresses, constants."""
    for name, dtype, accumulator, size in TYPES:
        block = _block(size)
        types = {"TYPE": dtype, "ACC": ACCUMULATORS[accumulator]}
        for f, p in FUNCTIONS if thorough or name == "fp32" else (("pow", 2.0), ("mul", 0.0)):
            constants = {"F": f, "P": p, **types, **block}
            yield f"reduce {f} {p} {name}", kernels.reduce_items, {"partials": f"*{accumulator}"}, constants
        yield f"axpy {name}", kernels.axpy_items, {"values": f"*{accumulator}"}, {**types, **block}
        yield f"scale {name}", kernels.scale_items, {"values": f"*{accumulator}"}, {**types, **block}
    for accumulator, dtype in ACCUMULATORS.items():
        pointers = {"partials": f"*{accumulator}", "out": f"*{accumulator}"}
        constants = {"ACC": dtype, "DEPTH": SUM_DEPTH, "SLOTS": SUM_SLOTS}
        yield f"add {accumulator}", kernels.add_partials, pointers, constants
    for size, dtype in BITS.items():
        yield f"copy {8 * size}", kernels.copy_items, {"index": "*i32"}, {"TYPE": dtype, **_block(size)}


def _block(size: int) -> dict[str, int]:
    shape = Shape.of(size)
    return {"HEIGHT": shape.rows, "WIDTH": shape.width, "VECTOR": shape.vector}


def compile_for(capability: int, thorough: bool) -> list[dict[str, Any]]:
    """Compile all variants, with every pointer argument a multiple of 16 as PyTorch allocates them, and with none."""
    found = []
    for label, kernel, pointers, constants in variants(thorough):
        names = kernel.arg_names
        signature = dict.fromkeys(names, "constexpr") | {n: "*i64" for n in names if n in ADDRESSES} | pointers
        indexed = {(names.index(name),): value for name, value in constants.items()}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name][0] == "*"}
        for attributes in (aligned, {}) if thorough else (aligned,):
            source = ASTSource(kernel, signature, constexprs=indexed, attrs=attributes)
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=OPTIONS)
            moves = re.findall(r"\b(?:ld|st)\.global[.\w:]*", compiled.asm["ptx"])
            binary = compiled.asm["cubin"]
            found.append(
                {"label": label, "moves": Counter(moves), "bytes": len(binary), "stack": stack_bytes(binary)}
            )
    return found


def stack_bytes(binary: bytes) -> int | None:
    """Stack of the kernel in a cubin, or None if Triton brings no tool that tells."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        told = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    stacks = re.findall(r"STACK:(\d+)", told)
    return max(map(int, stacks)) if stacks else None


if __name__ == "__main__":
    print(json.dumps(compile_for(int(sys.argv[1]), "thorough" in sys.argv[2:])))
