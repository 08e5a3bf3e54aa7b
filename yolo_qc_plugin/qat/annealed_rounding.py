# yolo_qc_plugin, AGPL-3.0
"""Annealed rounding: over a run, the rounding of weights hardens from almost none to the nearest grid point.

    v      = clip(w / scale, quant_min, quant_max)
    f      = v - floor(v)
    h(f)   = (1 + tanh((f - 1/2) / (2 T)) / tanh(1 / (4 T))) / 2
    what   = scale * (floor(v) + h(f))

h rises from 0 to 1. At a temperature T above about 1 it is f itself and the weights are those of the float model; as T
falls it becomes a step at 1/2, which is rounding. Gradients are those of the formula, not straight-through: a weight
halfway between two grid points is drawn to the one that serves the loss, and the others adapt to it while they can.
Nothing jumps back and forth over a threshold, as it does under rounding with straight-through gradients (oscillation).

The function is that of differentiable soft quantization (Gong et al., ICCV 2019, equations 4 to 7), where its sharpness
is learned. Here the temperature falls exponentially until nine tenths of the run; from then on weights are rounded to
the nearest grid point, with straight-through gradients.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..quant import kernels, native
from .prepare import TrainedWeights

START, END = 0.4, 0.001  # temperature at the beginning, and when rounding becomes hard
HARD = 0.9  # share of the run after which it is


def temperature(progress: float) -> float | None:
    """Temperature after a share of the run, in [0, 1]; None where weights are rounded to the nearest grid point."""
    return START * (END / START) ** (progress / HARD) if progress < HARD else None


class AnnealedRounding:
    """Hands out weights of annealed rounding in place of `TrainedWeights`, which takes them back.

    Args:
        weights: Of a model that is injected and calibrated.
    """

    def __init__(self, weights: TrainedWeights):
        self.weights = weights

    def hand_out(self, temperature: float, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """Give each convolution `what` of the formula, with gradients by its weight and its scale.

        A gradient by a scale is multiplied by LSQ's gradient scale, as that of hard rounding is.

        Args:
            temperature: T, above 0.
            dtype: As of `TrainedWeights.hand_out`.

        Returns:
            The weights.
        """
        layers = self.weights
        return layers.give(_Annealed.apply(layers, temperature, dtype, *layers.weights, *layers.scales))


class _Annealed(torch.autograd.Function):
    """Layer by layer in C, or all in one flat buffer: some twenty operations, whatever the number of layers."""

    @staticmethod
    def forward(ctx, layers, temperature, dtype, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)  # a weight that nothing used gets no gradient
        ctx.layers, ctx.temperature = layers, temperature
        n = len(layers.convs)
        weights, scales = tensors[:n], tensors[n:]
        ctx.by_c = dtype is None and kernels.by_c(weights, scales)
        if ctx.by_c:
            return tuple(native.anneal(w, s, *grid) for w, s, grid in zip(weights, scales, _grids(layers, temperature)))
        ctx.positions = layers.positions()
        value, _ = _steps(layers.clip_(ctx.positions.clone()), temperature)
        return layers.values(value, scales, dtype)

    @staticmethod
    def backward(ctx, *grads):
        layers, n = ctx.layers, len(grads)
        weights, scales = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        if ctx.by_c:
            found: list[Tensor | None] = [None] * 2 * n
            for i, (g, w, s, grid) in enumerate(zip(grads, weights, scales, _grids(layers, ctx.temperature))):
                if g is not None:
                    arguments = kernels.in_order_of(w, g), w, s, *grid, layers.quants[i].grad_scale(w)
                    found[i], found[n + i] = native.anneal_backward(*arguments)
            return None, None, None, *found
        grad, position = layers.gradients(grads), ctx.positions
        clipped = layers.clip_(position.clone())
        value, soft = _steps(clipped, ctx.temperature)
        slope = (1 - soft.square_()).div_(4 * ctx.temperature * _top(ctx.temperature))
        by_weight = slope.mul_(position == clipped).mul_(grad)
        by_scale = value.mul_(grad).sub_(position * by_weight)
        return None, None, None, *layers.by_parameter(grads, by_weight, by_scale)


def _grids(layers: TrainedWeights, temperature: float) -> list[tuple[int, int, float, float]]:
    """Of each layer, its range, the temperature, and the tanh at f = 1."""
    return [(q.quant_min, q.quant_max, temperature, _top(temperature)) for q in layers.quants]


def _steps(position: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """floor(v) + h(f) of clipped positions, and the tanh in it."""
    lower = position.floor()
    soft = (position - lower).sub_(0.5).div_(2 * temperature).tanh_()
    return lower.add_(soft / (2 * _top(temperature))).add_(0.5), soft


def _top(temperature: float) -> float:
    """The tanh at f = 1."""
    return math.tanh(1 / (4 * temperature))
