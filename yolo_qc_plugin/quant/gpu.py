# yolo_qc_plugin, AGPL-3.0
"""Fake quantization in few passes, on a GPU, by Triton, which PyTorch brings along where it knows the GPU.

Values and gradients by x are those of separate operations, bit for bit but for the sign of a zero: division is rounded
correctly, and no product is joined with a sum. Sums by scale and offset are taken in a fixed order. torch.compile would
make the same passes, but a call of what it makes takes longer than the kernel, of which a step has some hundred and
fifty: where a step is small, or the GPU fast, it is the processor that it waits for, and what a launch costs there.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

try:
    import triton  # type: ignore[import-untyped]
    import triton.language as tl  # type: ignore[import-untyped]
except ImportError:  # as beside a CPU's PyTorch
    triton = None

BLOCK = 4096  # elements of a program
PARTS = 1024  # parts of a sum that are read at once
WARPS = 8
DTYPES = torch.float32, torch.float16, torch.bfloat16


def takes(x: Tensor, scale: Tensor, offset: Tensor | None) -> bool:
    """Whether the functions below are for these; x of any shape and memory order."""
    if not x.is_cuda or x.dtype not in DTYPES or scale.dtype != torch.float32:
        return False
    if not 0 < x.numel() < 2**31 or torch.compiler.is_compiling():
        return False
    return offset is None or (offset.dtype == torch.float32 and offset.numel() == scale.numel())


def missing() -> str | None:
    """In words, what there is not on this machine to compile with; None where all is there."""
    return "no Triton" if triton is None else None


def forward(x: Tensor, scale: Tensor, offset: Tensor | None, quant_min: int, quant_max: int) -> Tensor:
    """Fake-quantize a dense x; arguments as of `functional.fake_quantize`."""
    out = torch.empty_like(x)
    grid, columns = _grid(x, scale)
    shift = _no_offset(scale) if offset is None else offset
    _launch(_forward, grid, (x, out, scale, shift), columns, float(quant_min), float(quant_max))
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
    """
    grid, columns = _grid(x, scale)
    by_x = torch.empty_like(x)
    sums = torch.empty(2, grid[1], dtype=torch.float32, device=x.device)
    parts, counts = _workspace(x.device, _stream(x.device), *_powers_of_two(grid))
    shift = _no_offset(scale) if offset is None else offset
    tensors = grad, x, by_x, sums, parts, counts, scale, shift
    kernel = _silu_backward if silu else _backward
    _launch(kernel, grid, tensors, columns, float(quant_min), float(quant_max), float(grad_scale))
    by_scale, by_offset = sums.unbind()
    return by_x, by_scale, by_offset


def _grid(x: Tensor, scale: Tensor) -> tuple[tuple[int, int, int], int]:
    """Programs, blocks along each scale's row; and the length of a row."""
    rows = scale.numel()
    columns = x.numel() // rows
    return (-(-columns // BLOCK), rows, 1), columns


@cache
def _zeros(rows: int, device: torch.device) -> Tensor:
    return torch.zeros(rows, device=device)


def _no_offset(scale: Tensor) -> Tensor:
    return _zeros(scale.numel(), scale.device)


def _stream(device: torch.device) -> int:
    """The stream that a kernel is launched on."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def _powers_of_two(grid: tuple[int, int, int]) -> tuple[int, int]:
    """Parts and rows of a grid, enlarged so that few numbers of them occur."""
    return 1 << (2 * grid[0] * grid[1] - 1).bit_length(), 1 << (grid[1] - 1).bit_length()


@cache
def _workspace(device: torch.device, stream: int, parts: int, rows: int) -> tuple[Tensor, Tensor]:
    """Memory for the programs' parts of the sums, and counts of programs that are done, which each kernel leaves at 0.

    All kernels of a stream share it, as one begins when the other has ended.
    """
    return torch.empty(parts, dtype=torch.float32, device=device), torch.zeros(rows, dtype=torch.int32, device=device)


_compiled: dict[tuple, Any] = {}  # kernel, device and what Triton compiles anew for -> what it has compiled


def _launch(
    kernel: Any, grid: tuple[int, int, int], tensors: tuple[Tensor, ...], columns: int, *numbers: float
) -> None:
    """Launch a kernel; once it is compiled without asking Triton, which takes longer than the kernel.

    Compiled anew is for dtypes, and for pointers and integers that are multiples of 16 or not. What is called then is
    what Triton calls (`JITFunction.run`, from 3.0 to 3.8), with numbers in place of tensors, whose memory it would ask
    the driver about one by one, and without hooks of profilers, whose call costs as much again.
    """
    pointers = [t.data_ptr() for t in tensors]
    device = tensors[0].device
    aligned = not (columns % 16 or any(pointer % 16 for pointer in pointers))
    key = kernel, device, tensors[0].dtype, tensors[1].dtype
    if aligned and (compiled := _compiled.get(key)) and device.index == torch.cuda.current_device():
        function, metadata = compiled.function, compiled.packed_metadata
        compiled.run(*grid, _stream(device), function, metadata, None, None, None, *pointers, columns, *numbers)
        return
    with torch.cuda.device_of(tensors[0]):
        compiled = kernel[grid](*tensors, columns, *numbers, num_warps=WARPS, enable_fp_fusion=False)
    if aligned:
        _compiled[key] = compiled


if triton is not None:
    _BLOCK = tl.constexpr(BLOCK)
    _PARTS = tl.constexpr(PARTS)

    @triton.jit
    def _place(columns):
        """Indices of a program's elements, and which of them there are."""
        column = tl.program_id(0) * _BLOCK + tl.arange(0, _BLOCK)
        return tl.program_id(1) * columns + column, column < columns

    @triton.jit
    def _code(v, low, high):
        """clip(round(v)), half to even: next to 1.5 * 2^23 floats are whole numbers."""
        clipped = tl.maximum(v, low, propagate_nan=tl.PropagateNan.ALL)
        clipped = tl.minimum(clipped, high, propagate_nan=tl.PropagateNan.ALL)
        return (clipped + 12582912.0) - 12582912.0

    @triton.jit
    def _scale_and_shift(scales, offsets, low, high):
        """A row's scale, and its `functional.grid_offset`."""
        scale = tl.load(scales + tl.program_id(1))
        offset = tl.load(offsets + tl.program_id(1))
        return scale, _code(tl.div_rn(offset, scale), -high, -low) * scale

    @triton.jit
    def _forward(x, out, scales, offsets, columns, low, high):
        place, there = _place(columns)
        scale, shift = _scale_and_shift(scales, offsets, low, high)
        value = tl.load(x + place, mask=there).to(tl.float32)
        value = _code(tl.div_rn(value - shift, scale), low, high) * scale + shift
        tl.store(out + place, value.to(out.dtype.element_ty), mask=there)

    @triton.jit
    def _backward(grad, x, by_x, sums, parts, counts, scales, offsets, columns, low, high, grad_scale):
        place, there = _place(columns)
        value = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
        _gradients(grad, value, 1.0, by_x, parts, scales, offsets, columns, low, high, grad_scale)
        _sum_up(sums, parts, counts)

    @triton.jit
    def _silu_backward(grad, u, by_u, sums, parts, counts, scales, offsets, columns, low, high, grad_scale):
        place, there = _place(columns)
        value = tl.load(u + place, mask=there, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-value))
        slope = sigmoid * (1.0 + value * (1.0 - sigmoid))
        value = (value * sigmoid).to(u.dtype.element_ty).to(tl.float32)  # as it was quantized
        _gradients(grad, value, slope, by_u, parts, scales, offsets, columns, low, high, grad_scale)
        _sum_up(sums, parts, counts)

    @triton.jit
    def _gradients(grad, value, slope, by_x, parts, scales, offsets, columns, low, high, grad_scale):
        """Store parts of the sums, and gradients by what `value` was made of, whose derivative by that is `slope`."""
        place, there = _place(columns)
        scale, shift = _scale_and_shift(scales, offsets, low, high)
        g = tl.load(grad + place, mask=there, other=0.0).to(tl.float32)
        v = tl.div_rn(value - shift, scale)
        code = _code(v, low, high)
        inside = (v > low) & (v < high)
        tl.store(by_x + place, tl.where(inside, g * slope, 0.0).to(by_x.dtype.element_ty), mask=there)
        part = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        tl.store(parts + part, tl.sum(g * tl.where(inside, code - v, code)) * grad_scale)
        part += tl.num_programs(0) * tl.num_programs(1)
        tl.store(parts + part, tl.sum(tl.where(inside, 0.0, g)) * grad_scale)

    @triton.jit
    def _sum_up(sums, parts, counts):
        """Have the last program of a row that gets here add up the row's parts, in an order that is always the same.

        The count releases what a program has stored, and acquires what the others have.
        """
        row, blocks = tl.program_id(1), tl.num_programs(0)
        tl.debug_barrier()
        if tl.atomic_add(counts + row, 1) == blocks - 1:
            for which in tl.static_range(2):
                first = parts + (which * tl.num_programs(1) + row) * blocks
                total = tl.zeros((_PARTS,), tl.float32)
                for start in range(0, blocks, _PARTS):
                    part = start + tl.arange(0, _PARTS)
                    total += tl.load(first + part, mask=part < blocks, other=0.0, cache_modifier=".cg")
                tl.store(sums + which * tl.num_programs(1) + row, tl.sum(total))
            tl.store(counts + row, 0)
