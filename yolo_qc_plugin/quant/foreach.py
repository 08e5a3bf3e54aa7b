# yolo_qc_plugin, AGPL-3.0
"""The formulas of `functional` for all weights or offsets of a model at once.

A detector has some seventy of each, most so small that calling operations one by one takes longer than computing them:
these are a few operations on lists, or C where that is possible (`kernels`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import kernels
from .functional import dot, per_slice, widen


def to_codes_all(
    weights: Sequence[Tensor], scales: Sequence[Tensor], ranges: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """`functional.to_codes` of many tensors without offset, by operations on lists.

    Args:
        weights: Any shapes.
        scales: Of each, shape (1,) or (C,).
        ranges: (quant_min, quant_max) of each.
    """
    factors = [per_slice(s, w) for s, w in zip(scales, weights)]
    return _codes_of_all(torch._foreach_div([widen(w) for w in weights], factors), ranges)


def fake_quantize_all(
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    ranges: Sequence[tuple[int, int]],
    grad_scales: Sequence[float],
    free: Sequence[Tensor] | None = None,
    values: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """`functional.fake_quantize` of many tensors without offset: the same values and gradients.

    Args:
        weights: Any shapes.
        scales: Of each, shape (1,) or (C,).
        ranges: (quant_min, quant_max) of each.
        grad_scales: LSQ's gradient scale of each.
        free: Of each, 1 where the weight is free and 0 where its code is fixed, in its shape; None if all are free. A
            fixed weight has the gradient of one that is clipped to its code: 0 by itself, code by the scale.
        values: What this gave before for the same weights and scales, detached: only the graph is made anew.
    """
    return _FakeQuantizeAll.apply(ranges, grad_scales, free, values, *weights, *scales)


def snap_all(offsets: Sequence[Tensor], scales: Sequence[Tensor], most: Sequence[int]) -> tuple[Tensor, ...]:
    """Each offset as a whole number of steps in [-most, 0], by operations on lists; gradient straight through.

    Args:
        offsets: Any shapes.
        scales: Of each, positive, its shape.
        most: Steps of each below 0 at most, >= 0.
    """
    return _SnapAll.apply(scales, most, *offsets)


class _FakeQuantizeAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ranges, grad_scales, free, values, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)  # a weight that nothing used gets no gradient
        ctx.ranges, ctx.grad_scales, ctx.free = ranges, grad_scales, free
        if values is not None:
            return tuple(value.detach() for value in values)
        weights, scales = tensors[: len(ranges)], tensors[len(ranges) :]
        if (out := kernels.forward_all(weights, scales, ranges)) is not None:
            return tuple(out)
        out = to_codes_all(weights, scales, ranges)
        torch._foreach_mul_(out, [per_slice(s, w) for s, w in zip(scales, weights)])
        return tuple(y.to(w.dtype) for y, w in zip(out, weights))

    @staticmethod
    def backward(ctx, *grads):
        n = len(ctx.ranges)
        used = [i for i, g in enumerate(grads) if g is not None]
        saved = ctx.saved_tensors
        weights, scales = ([saved[k + i] for i in used] for k in (0, n))
        g, ranges, grad_scales = ([kept[i] for i in used] for kept in (grads, ctx.ranges, ctx.grad_scales))
        pairs = kernels.backward_all(g, weights, scales, ranges, grad_scales) if ctx.free is None else None
        if pairs is None:
            free = None if ctx.free is None else [ctx.free[i] for i in used]
            pairs = _gradients_all(g, weights, scales, ranges, grad_scales, free)
        found = [None] * (4 + 2 * n)
        for i, (by_weight, by_scale) in zip(used, pairs):
            found[4 + i], found[4 + n + i] = by_weight, by_scale
        return tuple(found)


def _gradients_all(grads, weights, scales, ranges, grad_scales, free):
    """Gradients by each weight and scale, by operations on lists."""
    slices = [s.numel() for s in scales]
    v = torch._foreach_div([widen(w) for w in weights], [per_slice(s, w) for s, w in zip(scales, weights)])
    g = [grad.to(position.dtype) for grad, position in zip(grads, v)]
    inside = [torch.ops.aten.hardtanh_backward(*pair, *bounds) for *pair, bounds in zip(g, v, ranges)]
    if free is not None:
        torch._foreach_mul_(inside, free)
    parts = [dot(*pair, k) for *pair, k in zip(inside, v, slices)]
    codes = _codes_of_all(v, ranges)  # in the place of v
    by_scale = torch._foreach_sub([dot(*pair, k) for *pair, k in zip(g, codes, slices)], parts)
    torch._foreach_mul_(by_scale, grad_scales)
    return [(by_weight.to(weight.dtype), s) for by_weight, weight, s in zip(inside, weights, by_scale)]


def _codes_of_all(v, ranges):
    torch._foreach_round_(v)
    torch._foreach_clamp_min_(v, [low for low, _ in ranges])
    torch._foreach_clamp_max_(v, [high for _, high in ranges])
    return v


class _SnapAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scales, most, *offsets):
        ctx.set_materialize_grads(False)
        steps = torch._foreach_div(torch._foreach_neg(offsets), scales)
        torch._foreach_round_(steps)
        torch._foreach_clamp_min_(steps, 0.0)
        torch._foreach_clamp_max_(steps, [float(n) for n in most])
        torch._foreach_mul_(steps, scales)
        torch._foreach_neg_(steps)
        return tuple(steps)

    @staticmethod
    def backward(ctx, *grads):
        return None, None, *grads
