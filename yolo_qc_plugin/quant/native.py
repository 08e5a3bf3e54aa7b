# yolo_qc_plugin, AGPL-3.0
"""native.c: what training does to values and codes in few passes, for FP32 on a CPU, by the machine's C compiler.

Compiled in each process that trains, in under a second, into a folder of its own that goes at once: there is nothing
to keep, to share or to trust. A call costs microseconds where one of a function of torch.compile costs hundreds between
a network's convolutions (docs/results/quantizer.md).
"""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

COMPILERS = "cc", "gcc", "clang"  # tried in this order where CC is not in the environment
# values are to be those of PyTorch: nothing that lets a compiler change them, as -ffast-math does
EXACT = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]
FASTER = [["-march=native", "-fopenmp"], ["-march=native", "-fopenmp-simd"], []]  # the first that the compiler knows


@cache
def library() -> Any:
    """The compiled functions, a ctypes.CDLL, or None where there is no C compiler."""
    source = Path(__file__).with_suffix(".c")
    for compiler in map(shlex.split, _compilers()):
        for flags in FASTER:
            try:
                with TemporaryDirectory(prefix="yolo_qc_") as folder:
                    target = Path(folder, "native.so")
                    command = [*compiler, *EXACT, *flags, str(source), "-o", str(target), "-lm"]
                    subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL)
                    found = ctypes.CDLL(str(target))
            except (OSError, subprocess.CalledProcessError):
                continue
            sizes: list[Any] = [c_int64, c_int64, c_void_p, c_void_p]
            grid: list[Any] = [c_float, c_float]
            found.fake_quantize.argtypes = [*[c_void_p] * 2, *sizes, *grid, c_int]
            found.fake_quantize.restype = None
            for backward in (found.fake_quantize_backward, found.fake_quantize_silu_backward):
                backward.argtypes = [*[c_void_p] * 5, *sizes, *grid, c_float, c_int]
            sizes = sizes[:-1]  # no offset
            found.codes.argtypes = [*[c_void_p] * 2, *sizes, *grid]
            found.codes.restype = None
            found.anneal.argtypes = [*[c_void_p] * 2, *sizes, *grid, *[c_float] * 2]
            found.anneal.restype = None
            found.anneal_backward.argtypes = [*[c_void_p] * 4, *sizes, *grid, *[c_float] * 3]
            found.oscillate.argtypes = [*[c_void_p] * 6, c_int64, *[c_float] * 3, *[c_void_p] * 2]
            found.oscillate.restype = None
            return found
    return None


def missing() -> str | None:
    """In words, what there is not on this machine to compile with; None where all is there."""
    return f"no C compiler: tried {', '.join(_compilers())}" if library() is None else None


def _compilers() -> tuple[str, ...]:
    return (os.environ["CC"],) if os.environ.get("CC") else COMPILERS


def takes(x: Tensor, scale: Tensor, offset: Tensor | None) -> bool:
    """Whether the functions below are for these; x of any shape and memory order."""
    if not (x.is_cpu and x.dtype == scale.dtype == torch.float32 and x.numel()) or torch.compiler.is_compiling():
        return False
    return offset is None or (offset.dtype == torch.float32 and offset.numel() == scale.numel())


def forward(x: Tensor, scale: Tensor, offset: Tensor | None, quant_min: int, quant_max: int) -> Tensor:
    """Fake-quantize a dense x; arguments as of `functional.fake_quantize`."""
    out = torch.empty_like(x)
    library().fake_quantize(
        x.data_ptr(), out.data_ptr(), *_layout(x, scale, offset), quant_min, quant_max, torch.get_num_threads()
    )
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    quant_min: int,
    quant_max: int,
    grad_scale: float,
    silu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, scale and offset; `grad` and x dense and in the same memory order.

    With `silu` x is what SiLU was taken of before it was quantized.

    Raises:
        MemoryError: Without memory for the partial sums.
    """
    by_x, by_scale, by_offset = torch.empty_like(x), scale.new_empty(scale.numel()), scale.new_empty(scale.numel())
    outputs = by_x.data_ptr(), by_scale.data_ptr(), by_offset.data_ptr()
    grid = quant_min, quant_max, grad_scale, torch.get_num_threads()
    function = library().fake_quantize_silu_backward if silu else library().fake_quantize_backward
    if function(grad.data_ptr(), x.data_ptr(), *outputs, *_layout(x, scale, offset), *grid):
        raise MemoryError("no memory for the sums of a quantizer's gradients")
    return by_x, by_scale, by_offset


def read_codes(x: Tensor, scale: Tensor, quant_min: int, quant_max: int, out: Tensor) -> None:
    """Write the codes of a dense x, in the order of its memory, into a line of int8."""
    library().codes(x.data_ptr(), out.data_ptr(), *_rows(x, scale), quant_min, quant_max)


def anneal(weight: Tensor, scale: Tensor, quant_min: int, quant_max: int, temperature: float, top: float) -> Tensor:
    """Annealed rounding (`qat.annealed_rounding`) of a dense weight; `top` is its tanh at 1."""
    out, grid = torch.empty_like(weight), (quant_min, quant_max, temperature, top)
    library().anneal(weight.data_ptr(), out.data_ptr(), *_rows(weight, scale), *grid)
    return out


def anneal_backward(
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    quant_min: int,
    quant_max: int,
    temperature: float,
    top: float,
    grad_scale: float,
) -> tuple[Tensor, Tensor]:
    """Gradients by weight and scale; `grad` and weight dense and in the same memory order.

    Raises:
        MemoryError: Without memory for the partial sums.
    """
    by_weight, by_scale = torch.empty_like(weight), scale.new_empty(scale.numel())
    outputs, grid = (by_weight.data_ptr(), by_scale.data_ptr()), (quant_min, quant_max, temperature, top, grad_scale)
    sizes = _rows(weight, scale)
    if library().anneal_backward(grad.data_ptr(), weight.data_ptr(), *outputs, *sizes, *grid):
        raise MemoryError("no memory for the sums of a quantizer's gradients")
    return by_weight, by_scale


def oscillate(
    now: Tensor,
    before: Tensor,
    change: Tensor,
    direction: Tensor,
    frequency: Tensor,
    sizes: Tensor,
    momentum: float,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    """One step of `qat.oscillation.Oscillation` in its flat buffers, of all but the first of these.

    Returns:
        Of each layer, whose numbers of weights `sizes` has as int64: the number of codes that changed, and that of
        weights that oscillate; int64.
    """
    flipped, oscillating = torch.empty_like(sizes), torch.empty_like(sizes)
    buffers = (t.data_ptr() for t in (now, before, change, direction, frequency, sizes))
    numbers = 1 - momentum, momentum, threshold
    library().oscillate(*buffers, len(sizes), *numbers, flipped.data_ptr(), oscillating.data_ptr())
    return flipped, oscillating


def _rows(x: Tensor, scale: Tensor) -> tuple[int, int, int]:
    rows = scale.numel()
    return rows, x.numel() // rows, scale.data_ptr()


def _layout(x: Tensor, scale: Tensor, offset: Tensor | None) -> tuple[int, int, int, int | None]:
    return *_rows(x, scale), None if offset is None else offset.data_ptr()
