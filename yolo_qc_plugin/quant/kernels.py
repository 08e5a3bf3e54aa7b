# yolo_qc_plugin, AGPL-3.0
"""The two passes of fake quantization over memory, each compiled into one loop: of C on a CPU (`native`), by Triton on
a GPU (`gpu`); and a quantized SiLU, by torch.compile.

Forward reads x and writes xhat; backward reads the gradient and x and writes a gradient, with the two sums by scale and
offset taken on the way. Written as separate tensor operations, the same takes some twenty passes. The values are those
of separate operations, bit for bit; but where torch.compile works for a GPU, an input of SiLU at a threshold may get
the neighbouring code, which is noise of training alone: what is measured, deployed and exported is computed apart.

Where SiLU made x of u, backward reads u in place of x and goes on through SiLU at no cost, since memory is what is
waited for: so u alone is kept of u and x, and SiLU's own pass and the second computation of xhat are saved.

For torch.compile all arguments are tensors of one dimension with dynamic sizes, the grid (quant_min, quant_max)
included, so that one compilation serves every layer and batch. Where nothing can be compiled, or YOLO_QC_COMPILE=0 is
in the environment, callers take their own way.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import gpu, native

MIN_SIZE = 2**16  # elements below which a call of what torch.compile made costs what it saves

enabled = os.environ.get("YOLO_QC_COMPILE", "1") != "0"

_log = logging.getLogger("ultralytics")  # Ultralytics'; this file works without it


def _silu_forward(u: Tensor, scale: Tensor, offset: Tensor, grid: Tensor) -> Tensor:
    offset = _grid_offset(offset, scale, grid)
    x = _nearest_codes((u - offset) / scale, grid) * scale + offset
    return x * (_sigmoid_code(x.sigmoid()) * 2.0**-8)


def _silu_backward(grad: Tensor, u: Tensor, scale: Tensor, offset: Tensor, grid: Tensor) -> Tensor:
    offset = _grid_offset(offset, scale, grid)
    v = (u - offset) / scale
    x = _nearest_codes(v, grid) * scale + offset
    sigmoid = x.sigmoid()
    slope = torch.where((sigmoid > 0) & (256 * sigmoid < 255), x * sigmoid * (1 - sigmoid), 0.0)
    by_x = grad * (_sigmoid_code(sigmoid) * 2.0**-8 + slope)
    return torch.where((v > grid[0]) & (v < grid[1]), by_x, 0.0)


def _grid_offset(offset: Tensor, scale: Tensor, grid: Tensor) -> Tensor:
    """`functional.grid_offset`, once more for each value: free, where memory is what is waited for."""
    return torch.minimum(torch.maximum((offset / scale).round(), -grid[1]), -grid[0]) * scale


def _nearest_codes(v: Tensor, grid: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(v.round(), grid[0]), grid[1])


def _sigmoid_code(sigmoid: Tensor) -> Tensor:
    return (256 * sigmoid).round().clamp_max(255)


@cache
def _compiled(f: Callable) -> Callable:
    # dynamo's own limit of 8 counts every mode of determinism and number of threads that a process has seen
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # its name before torch 2.6
    setattr(config, limit, max(getattr(config, limit), 64))
    return torch.compile(f, dynamic=True, fullgraph=True)


@cache
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def usable(x: Tensor, scale: Tensor, offset: Tensor | None) -> bool:
    """Whether x (any shape) is to be fake-quantized by the compiled passes."""
    passes = native if x.is_cpu else gpu
    return enabled and passes.takes(x, scale, offset) and _there(passes)


def by_c(tensors: Iterable[Tensor], scales: Iterable[Tensor]) -> bool:
    """Whether all are for the functions of `native`."""
    return all(x.is_cpu and usable(x, scale, None) for x, scale in zip(tensors, scales))


@cache
def _there(passes: Any) -> bool:
    """Whether `native` or `gpu` has what it compiles with; where not, that is said once."""
    if missing := passes.missing():
        _warn(missing)
    return not missing


def worth_compiling(x: Tensor) -> bool:
    """Whether torch.compile is to be asked, which it is not within a model that is compiled as a whole."""
    return enabled and x.numel() >= MIN_SIZE and not torch.compiler.is_compiling()


def forward(x: Tensor, scale: Tensor, offset: Tensor | None, quant_min: int, quant_max: int) -> Tensor | None:
    """Fake-quantize x; arguments as of `functional.fake_quantize`. None where it cannot be compiled."""
    x = _dense(x).detach()
    if x.is_cpu:
        return native.forward(x, scale, offset, quant_min, quant_max)
    return _unless_given_up(gpu.forward, x, scale, offset, quant_min, quant_max)


def backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    quant_min: int,
    quant_max: int,
    grad_scale: float,
    silu: bool = False,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Gradients by x, scale and offset, shape (scales,) each of the latter; or None.

    With `silu` x is what SiLU was taken of before it was quantized, and SiLU's own backward is part of the pass.
    """
    x = _dense(x).detach()
    grad = in_order_of(x, grad).detach()
    if x.is_cpu:
        return native.backward(grad, x, scale, offset, quant_min, quant_max, grad_scale, silu)
    return _unless_given_up(gpu.backward, grad, x, scale, offset, quant_min, quant_max, grad_scale, silu)


def quantized_silu(u: Tensor, scale: Tensor, offset: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """SiLU, sigmoid in whole 256ths, of the fake-quantized u (`activations.QuantActivation`): FP32, one scale."""
    return _each(_silu_forward, (_dense(u).detach(),), scale, offset, quant_min, quant_max)


def quantized_silu_backward(
    grad: Tensor, u: Tensor, scale: Tensor, offset: Tensor, quant_min: int, quant_max: int
) -> Tensor:
    """Gradient of `quantized_silu` by u alone."""
    u = _dense(u).detach()
    return _each(_silu_backward, (in_order_of(u, grad).detach(), u), scale, offset, quant_min, quant_max)


def _each(f: Callable, tensors: tuple[Tensor, ...], scale: Tensor, offset: Tensor, low: int, high: int) -> Tensor:
    """f of each element, in the memory order of the tensors; not compiled where it cannot be."""
    grid = _constant((low, high), scale.dtype, scale.device)
    with torch.no_grad():
        arguments = (*map(_flat, tensors), scale.detach(), offset.detach(), grid)
        out = _unless_given_up(lambda *given: _compiled(f)(*given), *arguments)  # compiling may fail already
        return (f(*arguments) if out is None else out).as_strided_(tensors[0].shape, tensors[0].stride())


def _unless_given_up(f: Callable, *arguments: Any) -> Any:
    """What f makes of the arguments, or None, now and ever after, where it cannot be compiled."""
    global enabled
    if not enabled:  # given up since
        return None
    try:
        return f(*arguments)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as e:  # whatever a missing or broken compiler makes of it
        if "out of memory" in str(e).lower():  # as Triton says it; Ultralytics takes a smaller batch
            raise
        enabled = False
        reason = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
        _warn(reason[:120])
        return None


def _warn(reason: str) -> None:
    _log.warning(f"QC: quantizers are not compiled, training will be slower ({reason})")


def _dense(x: Tensor) -> Tensor:
    """x itself where its memory can be walked in one line, slice by slice of its first axis, else a copy."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x
    if x.dim() == 4 and x.stride(1) == 1:  # some of the channels of such a tensor
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()


def in_order_of(dense: Tensor, x: Tensor) -> Tensor:
    """x in the memory order of a dense tensor of its shape; x itself where it has it."""
    if x.stride() == dense.stride():
        return x
    return torch.empty_strided(dense.shape, dense.stride(), dtype=x.dtype, device=x.device).copy_(x)


def _flat(x: Tensor) -> Tensor:
    """One line: the same memory, but no view; of a view, dynamo compiles for the shape of its base."""
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), [x.numel()], [1])
