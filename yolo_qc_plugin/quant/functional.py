# yolo_qc_plugin, AGPL-3.0
"""Fake quantization with learned scale and offset, as pure tensor functions.

    offset <- scale * clip(round(offset / scale), -quant_max, -quant_min)
    v      = (x - offset) / scale
    code   = clip(round(v), quant_min, quant_max)
    xhat   = scale * code + offset

The first line, straight-through in training, brings the offset to a whole number of steps, so that 0 is a grid point:
zero padding is exact, and the deployed form has an integer zero point. Our reading; LSQ+ leaves the offset free.

Sources: LSQ (Esser et al., ICLR 2020, equations 1 to 3), LSQ+ (Bhalgat et al., CVPR Workshops 2020, equations 4 to 7).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from . import kernels

RECOMPUTED_SIZE = 2**19  # elements below which the call that computes again costs more than the memory is worth


def to_codes(x: Tensor, scale: Tensor | float, offset: Tensor | None, quant_min: int, quant_max: int) -> Tensor:
    """Integer codes of `x`, as floats in [quant_min, quant_max]; rounds half to even.

    Args:
        x: Any shape.
        scale: Positive, broadcastable to `x`.
        offset: Broadcastable to `x`, or None for 0.
        quant_min: Smallest code.
        quant_max: Largest code.
    """
    return nearest_codes_(grid_position(x, scale, offset), quant_min, quant_max)


def grid_offset(offset: Tensor, scale: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """The offset that is used: the nearest whole number of steps for which the code of 0 is in the range."""
    return to_codes(offset, scale, None, -quant_max, -quant_min).mul_(scale)


def from_codes(codes: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """The values that `codes` stand for: scale * codes + offset."""
    return codes * scale if offset is None else codes * scale + offset


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    quant_min: int,
    quant_max: int,
    grad_scale: float = 1.0,
) -> Tensor:
    """Quantize and dequantize `x`, differentiable in `x`, `scale` and `offset`.

    Gradients (LSQ equation 3, LSQ+ equation 5), with "inside" meaning quant_min < v < quant_max:
        by x: 1 inside, 0 outside (straight-through);
        by scale: code - v inside, quant_min or quant_max outside, times `grad_scale`;
        by offset: 0 inside, 1 outside, times `grad_scale`; straight through its rounding.

    Where x is what SiLU made of u, and nothing needs the gradient by x alone, both are one step of backward: u is kept
    in place of x, as SiLU keeps it anyway, and SiLU's backward is part of the quantizer's pass.

    Worked numbers: x = 0.26, scale = 0.1, offset = 0, range [-8, 7] gives v = 2.6, code = 3, xhat = 0.3, and a gradient
    by scale of 3 - 2.6 = 0.4.

    Args:
        x: Any shape, any floating dtype; computed in FP32 at least.
        scale: Positive. Shape (1,) for the tensor, or (C,) for one per slice of x's first axis.
        offset: Shape of `scale`, or None; `grid_offset` of it is used.
        quant_min: Smallest code.
        quant_max: Largest code.
        grad_scale: LSQ's gradient scale, 1 / sqrt(numel * quant_max).

    Returns:
        Tensor of x's shape and dtype.
    """
    arguments = scale, offset, quant_min, quant_max, grad_scale
    made_by = x.grad_fn
    if isinstance(made_by, _SILU) and kernels.usable(x, scale, offset):
        return _FakeQuantizeOfSiLU.apply(made_by._saved_self, x.detach(), *arguments)
    return _FakeQuantize.apply(x, *arguments)


def gradients(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    quant_min: int,
    quant_max: int,
    grad_scale: float,
    free: Tensor | None = None,
    compiled: bool = False,
    needed: tuple[bool, bool] = (True, True),
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of `fake_quantize` by x, scale and offset.

    Args:
        grad: By the result, in its shape.
        x: As of `fake_quantize`.
        scale: As of `fake_quantize`.
        offset: As of `fake_quantize`.
        quant_min: Smallest code.
        quant_max: Largest code.
        grad_scale: As of `fake_quantize`.
        free: 1 or, where the code of x is fixed, 0, in the shape of x; None if all are free. A fixed x has the gradient
            of one that is clipped to its code: 0 by itself, code by the scale.
        compiled: Whether `kernels` is asked first, which knows nothing of fixed codes.
        needed: Whether the gradient by scale and the one by offset are needed.
    """
    if compiled and (found := kernels.backward(grad, x, scale, offset, quant_min, quant_max, grad_scale)) is not None:
        return found
    wide = widen(x)
    g = grad.to(wide.dtype)
    v = grid_position(wide, *_on_slices(x, scale, offset, quant_min, quant_max))
    # one fused pass: g where quant_min < v < quant_max, else 0
    inside = torch.ops.aten.hardtanh_backward(g, v, quant_min, quant_max)
    if free is not None:
        inside.mul_(free)
    by_scale = by_offset = None
    slices = scale.numel()
    if needed[1]:
        outside = g.sum() - inside.sum() if slices == 1 else (g - inside).flatten(1).sum(1)
        by_offset = outside.view(slices) * grad_scale
    if needed[0]:
        v_part = dot(inside, v, slices)
        codes = nearest_codes_(v, quant_min, quant_max)  # v is not needed any more
        by_scale = (dot(g, codes, slices) - v_part) * grad_scale
    return inside.to(x.dtype), by_scale, by_offset


def recomputed_in_backward(xhat: Tensor, values: bool = True) -> AbstractContextManager:
    """Context in which an operation that keeps `xhat` for its backward keeps nothing: it is computed again there.

    `fake_quantize` keeps x, so that of x and xhat one is kept, as in float. The values are the same, bit for bit; the
    price is one more forward pass of `fake_quantize` for each such operation.

    Args:
        xhat: Result of `fake_quantize`; for any other tensor, and for one below RECOMPUTED_SIZE, nothing changes.
        values: False where backward reads no more of it than shape and dtype: it then gets x, at no price.
    """
    made_by = xhat.grad_fn
    if not isinstance(made_by, _FakeQuantize._backward_cls) or (values and xhat.numel() < RECOMPUTED_SIZE):
        return nullcontext()
    memory = xhat.data_ptr(), xhat.shape  # not xhat itself, lest the hooks keep it

    def pack(kept: Tensor) -> Tensor | None:
        return kept if (kept.data_ptr(), kept.shape) != memory else None

    def unpack(kept: Tensor | None) -> Tensor:
        if kept is not None:
            return kept
        return _FakeQuantize.again(made_by) if values else made_by.saved_tensors[0]

    return saved_tensors_hooks(pack, unpack)


def quantized_silu(u: Tensor, scale: Tensor, offset: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """SiLU of the fake-quantized `u` with its sigmoid rounded to whole 256ths, differentiable in `u` alone.

    In one pass over memory forward and one backward; in FP32 the values of `activations.QuantActivation` written out.

    Args:
        u: Any shape, FP32.
        scale: Positive, shape (1,).
        offset: Shape (1,); `grid_offset` of it is used.
        quant_min: Smallest code.
        quant_max: Largest code.
    """
    return _QuantizedSiLU.apply(u, scale, offset, quant_min, quant_max)


def widen(x: Tensor) -> Tensor:
    """`x` in FP32 at least: codes are never computed in half precision."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def grid_position(x: Tensor, scale: Tensor | float, offset: Tensor | None) -> Tensor:
    """v of the formula, in fresh memory: division, not multiplication by 1/scale, as QuantizeLinear has it."""
    return x / scale if offset is None else (x - offset).div_(scale)


def nearest_codes_(v: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """clip(round(v)) in the memory of v; the passes of `kernels` are tested against it."""
    return v.round_().clamp_(quant_min, quant_max)


def per_slice(p: Tensor, x: Tensor) -> Tensor:
    """View a (C,) parameter along x's first axis; a (1,) parameter broadcasts as it is."""
    return p if p.numel() == 1 else p.view(-1, *[1] * (x.dim() - 1))


def along_channels(v: Tensor) -> Tensor:
    """View (C,) values along the second axis of a tensor (batch, C, height, width)."""
    return v.view(1, -1, 1, 1)


def dot(a: Tensor, b: Tensor, slices: int) -> Tensor:
    """Sum of a * b over everything (slices = 1) or over each slice of the first axis; shape (slices,)."""
    if slices == 1:
        return torch.dot(a.reshape(-1), b.reshape(-1)).view(1)
    return (a * b).reshape(slices, -1).sum(1)


def _on_slices(x: Tensor, scale: Tensor, offset: Tensor | None, low: int, high: int) -> tuple[Tensor, Tensor | None]:
    """Scale, and offset as it is used, along x's first axis."""
    return per_slice(scale, x), None if offset is None else per_slice(grid_offset(offset, scale, low, high), x)


class _FakeQuantize(torch.autograd.Function):
    """Keeps x alone and recomputes v in backward: one saved tensor instead of three (see `recomputed_in_backward`)."""

    @staticmethod
    def forward(ctx, x, scale, offset, quant_min, quant_max, grad_scale):
        ctx.save_for_backward(x, scale, offset)
        ctx.quant_min, ctx.quant_max, ctx.grad_scale = quant_min, quant_max, grad_scale
        # measuring alone is not worth compiling
        ctx.compiled = any(ctx.needs_input_grad) and kernels.usable(x, scale, offset)
        return _values(x, scale, offset, quant_min, quant_max, ctx.compiled)

    @staticmethod
    @torch.no_grad()
    def again(ctx) -> Tensor:
        """The result of forward, computed once more."""
        x, scale, offset = ctx.saved_tensors
        return _values(x, scale, offset, ctx.quant_min, ctx.quant_max, ctx.compiled)

    @staticmethod
    def backward(ctx, grad):
        needed = ctx.needs_input_grad[:3]
        grid = ctx.quant_min, ctx.quant_max, ctx.grad_scale
        found = gradients(grad, *ctx.saved_tensors, *grid, compiled=ctx.compiled, needed=needed[1:])
        return *(g if need else None for g, need in zip(found, needed)), None, None, None


def _values(x, scale, offset, quant_min, quant_max, compiled):
    if compiled and (out := kernels.forward(x, scale, offset, quant_min, quant_max)) is not None:
        return out
    s, z = _on_slices(x, scale, offset, quant_min, quant_max)
    out = to_codes(widen(x), s, z, quant_min, quant_max).mul_(s)
    return (out if z is None else out.add_(z)).to(x.dtype)


_SILU: Any = type(nn.functional.silu(torch.zeros(1, requires_grad=True)).grad_fn)


class _FakeQuantizeOfSiLU(torch.autograd.Function):
    """Keeps u of x = SiLU(u), by which its gradient is."""

    @staticmethod
    def forward(ctx, u, x, scale, offset, quant_min, quant_max, grad_scale):
        ctx.save_for_backward(u, scale, offset)
        ctx.grid = quant_min, quant_max, grad_scale
        return _values(x, scale, offset, quant_min, quant_max, True)

    @staticmethod
    def backward(ctx, grad):
        u, scale, offset = ctx.saved_tensors
        found = kernels.backward(grad, u, scale, offset, *ctx.grid, silu=True)
        if found is None:
            by_x, *sums = gradients(grad, nn.functional.silu(u), scale, offset, *ctx.grid)
            found = torch.ops.aten.silu_backward(by_x, u), *sums
        by_u, by_scale, by_offset = found  # u has a gradient, or it would not have made a node
        _, _, of_scale, of_offset, *_ = ctx.needs_input_grad
        return by_u, None, by_scale if of_scale else None, by_offset if of_offset else None, None, None, None


class _QuantizedSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, scale, offset, quant_min, quant_max):
        ctx.save_for_backward(u, scale, offset)
        ctx.range = quant_min, quant_max
        return kernels.quantized_silu(u, scale, offset, quant_min, quant_max)

    @staticmethod
    def backward(ctx, grad):
        return kernels.quantized_silu_backward(grad, *ctx.saved_tensors, *ctx.range), *[None] * 4
