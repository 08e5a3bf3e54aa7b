# yolo_qc_plugin, AGPL-3.0
"""Oscillation dampening (Nagel et al., ICML 2022): a loss that draws latent weights to their grid points.

loss = weight * sum over all layers of || what - clip(w, scale * quant_min, scale * quant_max) ||^2

Its gradient goes to w alone: scales learn nothing from it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .prepare import TrainedWeights


def dampening_loss(
    weights: Sequence[Tensor], quantized: Sequence[Tensor], scales: Sequence[Tensor], ranges: Sequence[tuple[int, int]]
) -> Tensor:
    """The sum above, differentiable in `weights` alone, with gradient 2 (clip(w) - what).

    Args:
        weights: Latent weights, of any shapes.
        quantized: Their fake-quantized values.
        scales: Of each, broadcastable to the weight.
        ranges: (quant_min, quant_max) of each.

    Returns:
        A 0-dim tensor.
    """
    return _DampeningLoss.apply(quantized, scales, ranges, *weights)


class _DampeningLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, quantized, scales, ranges, *weights):
        away = torch._foreach_maximum(weights, [s * low for s, (low, _) in zip(scales, ranges)])
        torch._foreach_minimum_(away, [s * high for s, (_, high) in zip(scales, ranges)])
        torch._foreach_sub_(away, quantized)
        ctx.away = away
        return torch.stack(torch._foreach_norm(away)).square().sum()

    @staticmethod
    def backward(ctx, grad):
        return None, None, None, *torch._foreach_mul(ctx.away, 2 * grad)  # 0 where w is outside the range


class Dampening:
    """Adds the loss to what a model returns in training.

    It counts once per image, as Ultralytics' loss is summed over the images of a batch: gradients then add up over
    accumulated batches and devices as those of Ultralytics, and mixed precision and clipping see one loss. Our reading.

    Args:
        model: Injected model; called with a batch, it returns (loss, what is shown of it).
        weights: Its trained weights.
        summed: False where Ultralytics' loss is the mean over a batch's images.
    """

    def __init__(self, model: nn.Module, weights: TrainedWeights, summed: bool = True):
        self.model, self.weights, self.summed = model, weights, summed
        self.weight = 0.0
        self.quantized: list[Tensor] = []
        self._hook: RemovableHandle | None = None

    def prepare(self, weight: float, quantized: Sequence[Tensor]) -> None:
        """Add the loss times `weight` in the next forward pass, which computes with the weights `quantized`."""
        self._remove_hook()  # of a pass that ended in an error
        self.weight, self.quantized = weight, [q.detach() for q in quantized]
        # for one pass: a hook that stayed would be carried along by copies of the model
        self._hook = self.model.register_forward_hook(self._add) if weight else None

    def loss(self) -> Tensor:
        """The loss, before its weight, of the weights as they were quantized for the pass."""
        w = self.weights
        scales = [q.per_weight(weight) for q, weight in zip(w.quants, w.weights)]
        ranges = [(q.quant_min, q.quant_max) for q in w.quants]
        return dampening_loss(w.weights, self.quantized, scales, ranges)

    def _remove_hook(self) -> None:
        if self._hook:
            self._hook.remove()

    def _add(self, model: nn.Module, args: tuple, output: tuple) -> tuple:
        self._remove_hook()
        factor = self.weight * (len(args[0]["img"]) if self.summed else 1)
        return output[0].sum() + factor * self.loss(), output[1]
