# yolo_qc_plugin, AGPL-3.0
"""The two passes of fake quantization over memory, each compiled into one loop: of C for FP32 on a CPU (`native`), else
by torch.compile.

Forward reads x and writes xhat; backward reads the gradient and x and writes a gradient, with the two sums by scale and
offset taken on the way. Written as separate tensor operations, the same takes some twenty passes.

For torch.compile all arguments are tensors of one or two dimensions with dynamic sizes, the grid (quant_min,
quant_max, LSQ's gradient scale) and an absent offset included, so that one compilation (of each dtype) serves every
layer and batch. Where nothing can be compiled, or YOLO_QC_COMPILE=0 is in the environment, callers take their own way.

On a CPU values are those of separate operations, bit for bit. On a GPU a compiler may divide to within two units in the
last place and round a product and its sum once, so that a value at a threshold gets the neighbouring code. That is
noise of training alone: what is measured, deployed and exported is computed by separate operations. FP64 would be
exact, and has a small fraction of FP32's rate on the GPUs that most people have.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from . import native

MIN_SIZE = 2**16  # elements below which a call of what torch.compile made costs what it saves

enabled = os.environ.get("YOLO_QC_COMPILE", "1") != "0"

_log = logging.getLogger("ultralytics")  # Ultralytics'; this file works without it


def _forward(x: Tensor, scale: Tensor, offset: Tensor, grid: Tensor) -> Tensor:
    wide, offset = x.to(torch.promote_types(x.dtype, torch.float32)), _grid_offset(offset, scale, grid)
    return (_nearest_codes((wide - offset) / scale, grid) * scale + offset).to(x.dtype)


def _grid_offset(offset: Tensor, scale: Tensor, grid: Tensor) -> Tensor:
    """`functional.grid_offset`, once more for each value: free, where memory is what is waited for."""
    steps = torch.minimum(torch.maximum((offset / scale).round(), -grid[1]), -grid[0])
    return (steps * scale).to(offset.dtype)


def _nearest_codes(v: Tensor, grid: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(v.round(), grid[0]), grid[1])


def _backward(grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor, grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    g = grad.to(wide.dtype)
    v = (wide - _grid_offset(offset, scale, grid)) / scale
    inside = (v > grid[0]) & (v < grid[1])
    code = _nearest_codes(v, grid)
    by_scale = (g * torch.where(inside, code - v, code)).sum(-1, keepdim=True) * grid[2]
    by_offset = torch.where(inside, 0.0, g).sum(-1, keepdim=True) * grid[2]
    return torch.where(inside, g, 0.0).to(x.dtype), by_scale.view(-1), by_offset.view(-1)


def _silu_forward(u: Tensor, scale: Tensor, offset: Tensor, grid: Tensor) -> Tensor:
    x = _forward(u, scale, offset, grid)
    return x * (_sigmoid_code(x.sigmoid()) * 2.0**-8)


def _silu_backward(grad: Tensor, u: Tensor, scale: Tensor, offset: Tensor, grid: Tensor) -> Tensor:
    offset = _grid_offset(offset, scale, grid)
    v = (u - offset) / scale
    x = _nearest_codes(v, grid) * scale + offset
    sigmoid = x.sigmoid()
    slope = torch.where((sigmoid > 0) & (256 * sigmoid < 255), x * sigmoid * (1 - sigmoid), 0.0)
    by_x = grad * (_sigmoid_code(sigmoid) * 2.0**-8 + slope)
    return torch.where((v > grid[0]) & (v < grid[1]), by_x, 0.0)


def _sigmoid_code(sigmoid: Tensor) -> Tensor:
    return (256 * sigmoid).round().clamp_max(255)


@cache
def _compiled(f: Callable) -> Callable:
    # dynamo's own limit of 8 counts every dtype, rank and mode of determinism that a process has seen
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # its name before torch 2.6
    setattr(config, limit, max(getattr(config, limit), 64))
    return torch.compile(f, dynamic=True, fullgraph=True)


@cache
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def usable(x: Tensor, scale: Tensor, offset: Tensor | None) -> bool:
    """Whether x (any shape) is to be fake-quantized by the compiled passes."""
    return worth_compiling(x) or (enabled and native.takes(x, scale, offset))


def worth_compiling(x: Tensor) -> bool:
    """Whether torch.compile is to be asked, which it is not within a model that is compiled as a whole."""
    return enabled and x.numel() >= MIN_SIZE and not torch.compiler.is_compiling()


def forward(x: Tensor, scale: Tensor, offset: Tensor | None, quant_min: int, quant_max: int) -> Tensor | None:
    """Fake-quantize x; arguments as of `functional.fake_quantize`. None where it cannot be compiled."""
    x = _dense(x, scale)
    if native.takes(x, scale, offset):
        return native.forward(x, scale, offset, quant_min, quant_max)
    x = x.detach()
    out = _run(_forward, (x,), scale, offset, quant_min, quant_max)
    return None if out is None else out.as_strided_(x.shape, x.stride())


def backward(
    grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor | None, quant_min: int, quant_max: int, grad_scale: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Gradients by x, scale and offset, shape (scales,) each of the latter; or None."""
    x = _dense(x, scale)
    grad = _like(grad, x)
    if native.takes(x, scale, offset) and grad.dtype == x.dtype:
        return native.backward(grad, x, scale, offset, quant_min, quant_max, grad_scale)
    grad, x = grad.detach(), x.detach()
    found = _run(_backward, (grad, x), scale, offset, quant_min, quant_max, grad_scale)
    if found is None:
        return None
    by_x, by_scale, by_offset = found
    return by_x.as_strided_(x.shape, x.stride()), by_scale, by_offset


def quantized_silu(u: Tensor, scale: Tensor, offset: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """SiLU, sigmoid in whole 256ths, of the fake-quantized u (`activations.QuantActivation`): FP32, one scale."""
    return _each(_silu_forward, (_dense(u, scale).detach(),), scale, offset, quant_min, quant_max)


def quantized_silu_backward(
    grad: Tensor, u: Tensor, scale: Tensor, offset: Tensor, quant_min: int, quant_max: int
) -> Tensor:
    """Gradient of `quantized_silu` by u alone."""
    u = _dense(u, scale).detach()
    return _each(_silu_backward, (_like(grad, u).detach(), u), scale, offset, quant_min, quant_max)


def _each(f: Callable, tensors: tuple[Tensor, ...], scale: Tensor, offset: Tensor, low: int, high: int) -> Tensor:
    """f of each element, in the memory order of the tensors; not compiled where it cannot be."""
    out = _run(f, tensors, scale, offset, low, high)
    if out is None:
        grid = _constant((low, high, 1.0), torch.float32, scale.device)
        return f(*tensors, scale.detach(), offset.detach(), grid)
    return out.as_strided_(tensors[0].shape, tensors[0].stride())


def _run(
    f: Callable,
    tensors: tuple[Tensor, ...],
    scale: Tensor,
    offset: Tensor | None,
    low: int,
    high: int,
    grad_scale: float = 1.0,
):
    global enabled
    if not enabled:  # given up since
        return None
    if offset is None:
        offset = _constant((0.0,), scale.dtype, scale.device)
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    grid = _constant((low, high, grad_scale), wide, scale.device)
    scale, offset = scale.detach(), offset.detach()
    try:
        with torch.no_grad():
            flat = [_flat(t, scale) for t in tensors]
            if scale.numel() > 1:
                scale, offset = scale.view(-1, 1), offset.view(-1, 1)
            return _compiled(f)(*flat, scale, offset, grid)
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # whatever a missing or broken compiler makes of it
        enabled = False
        reason = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
        _log.warning(f"QC: quantizers are not compiled, training will be slower ({reason[:120]})")
        return None


def _dense(x: Tensor, scale: Tensor) -> Tensor:
    """x itself where its memory can be walked in one line, else a copy."""
    if scale.numel() == 1 and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def _like(grad: Tensor, x: Tensor) -> Tensor:
    """`grad` in the memory order of x."""
    if grad.stride() == x.stride():
        return grad
    return torch.empty_strided(x.shape, x.stride(), dtype=grad.dtype, device=grad.device).copy_(grad)


def _flat(x: Tensor, scale: Tensor) -> Tensor:
    """One line, or one row per scale."""
    columns = x.numel() // scale.numel()
    shape, stride = ([columns], [1]) if scale.numel() == 1 else ([scale.numel(), columns], [columns, 1])
    # the same memory, but no view: of a view, dynamo compiles for the shape of its base
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), shape, stride)
