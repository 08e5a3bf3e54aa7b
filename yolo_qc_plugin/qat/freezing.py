# yolo_qc_plugin, AGPL-3.0
"""Iterative weight freezing (Nagel et al., ICML 2022): a weight that oscillates too often keeps one code.

freeze where frequency > threshold, which falls during the run; code <- round(EMA of codes); w = scale * code ever after
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .oscillation import MOMENTUM, WARM_START, Oscillation, annealed
from .prepare import TrainedWeights

FIRST_THRESHOLD = 0.1  # of the authors' 3- and 4-bit runs


def freeze_threshold(final: float, progress: float) -> float | None:
    """Threshold of the frequency: None in the first quarter of a run, then from 0.1 (or `final`, if above) to `final`.

    Args:
        final: Last value.
        progress: Share of the run that is done.
    """
    return None if progress < WARM_START else annealed(max(FIRST_THRESHOLD, final), final, progress)


class Freezing(Oscillation):
    """An Oscillation that freezes weights.

    A frozen weight has no gradient, and gives its scale that of a weight clipped to its code (`TrainedWeights.fixed`);
    `put_back` undoes what else moves it: momentum, weight decay, averaging.

    Args:
        weights: The weights, whose codes it fixes.
        bits: Widest weights that are frozen; the first and last layers' 8 bits are left alone, as by the authors.

    Attributes:
        threshold: Frequency above which `step` freezes a weight; None freezes none.
        free: 0 where a weight is frozen, else 1, int8, flat.
        held: Codes of frozen weights, 0 elsewhere, int8, flat.
        mean: EMA of the codes, FP32, flat.
    """

    def __init__(self, weights: TrainedWeights, bits: int):
        super().__init__(weights)
        self.threshold: float | None = None
        self.free = torch.ones_like(self.codes)
        self.held = torch.zeros_like(self.codes)
        self.mean = self.codes.float()
        self._may = torch.ones_like(self.codes)
        weights.fixed = self.free, self.held
        for part, quant in zip(self.by_layer(self._may), weights.quants):
            part.fill_(quant.bits <= bits)

    @torch.no_grad()
    def step(self) -> None:
        """Take in the codes that were read and freeze; call it once per optimizer step, and `put_back` after it."""
        super().step()
        if self.threshold is not None:
            new = (self.frequency > self.threshold).view(torch.int8) * self.free * self._may
            self.held.add_(self.mean.round().to(torch.int8) * new)
            self.free.sub_(new)
        self.mean.lerp_(self.codes.float(), MOMENTUM)

    @torch.no_grad()
    def put_back(self, model: nn.Module) -> None:
        """Set frozen latent weights to scale * code, with the scales of `model`: the one in training or its average."""
        for name, free, held in zip(self.names, self.by_layer(self.free), self.by_layer(self.held)):
            conv: Any = model.get_submodule(name)
            conv.weight.mul_(free).add_(held * conv.weight_quant.per_weight(held))  # faster than a masked copy

    def _state(self) -> dict[str, Tensor]:
        return {**super()._state(), "free": self.free, "held": self.held, "mean": self.mean}
