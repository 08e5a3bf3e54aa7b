# yolo_qc_plugin, AGPL-3.0
"""Oscillation of quantized weights (Nagel et al., ICML 2022): which codes flip back and forth, and how often.

change      = sign(code - code one step ago)
oscillation = change is opposite to the weight's last change that was not 0
frequency  <- (1 - momentum) * frequency + momentum * oscillation         after each optimizer step
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..quant import kernels, native
from .prepare import TrainedWeights

MOMENTUM = 0.01  # of the frequency, as the authors' TrackOscillation has it; their command line's default is 0.001
OSCILLATING = 0.005  # frequency above which Nagel et al. count a weight as oscillating
WARM_START = 0.25  # share of a run before dampening and freezing set in: the authors' default anneal_start


def annealed(start: float, end: float, progress: float) -> float:
    """The authors' schedule: `start` for a quarter of the run, then half a cosine to `end`.

    Args:
        start: First value.
        end: Last value.
        progress: Share of the run that is done; 1 where it is above.
    """
    done = (min(progress, 1.0) - WARM_START) / (1 - WARM_START)
    return end + (start - end) * (0.5 + 0.5 * math.cos(math.pi * max(done, 0.0)))


class Oscillation:
    """Counts changes of the codes of all trained quantized weights of a model.

    All are counted in flat buffers, in model order: one pass over each, and nothing waits for the device.

    Args:
        weights: The weights.
        momentum: Of the frequency, in (0, 1].
        threshold: Frequency above which a weight counts as oscillating.

    Attributes:
        names: Names of the convolutions; what is per layer below is in this order.
        codes: Codes at the last step, int8, flat.
        direction: Sign of each code's last change that was not 0, int8, flat; 0 before the first one.
        frequency: Frequency of oscillations in [0, 1], FP32, flat.
        change: Sign of each code's change in the last step, int8, flat.
        flipped: Share of each layer's codes that changed in the last step: (layers,), FP32, on the model's device.
        oscillating: Share of each layer's weights that oscillate: (layers,), FP32, on the model's device.
    """

    def __init__(self, weights: TrainedWeights, momentum: float = MOMENTUM, threshold: float = OSCILLATING):
        self.weights, self.names, self.by_layer = weights, weights.names, weights.by_layer
        self.momentum, self._threshold = momentum, threshold
        self.codes = weights.codes.clone()
        self._numbers = torch.tensor([weights.sizes] * 2, device=self.codes.device)
        self.direction = torch.zeros_like(self.codes)
        self.frequency = torch.zeros_like(self.codes, dtype=torch.float32)
        self.change = torch.zeros_like(self.codes)
        self.flipped = self.oscillating = torch.zeros(len(self.names), device=self.codes.device)

    @torch.no_grad()
    def step(self) -> None:
        """Take in the codes that `weights` has read; call it once per optimizer step."""
        before, now = self.codes, self.weights.codes
        if kernels.by_c([self.frequency], [self.frequency]):
            buffers = now, before, self.change, self.direction, self.frequency
            counts = native.oscillate(*buffers, self._numbers[0], self.momentum, self._threshold)
            self.flipped, self.oscillating = (count / self._numbers[0] for count in counts)
            return
        # not the sign of a difference: 8-bit codes may be 255 apart
        torch.sub((now > before).view(torch.int8), (now < before).view(torch.int8), out=self.change)
        opposite = (self.change * self.direction).clamp_max_(0)  # -1 where it is an oscillation, else 0
        self.frequency.mul_(1 - self.momentum).sub_(opposite, alpha=self.momentum)
        self.direction.mul_(1 - self.change.abs()).add_(self.change)  # faster than a masked copy
        self.flipped, self.oscillating = self._shares(self.change, (self.frequency > self._threshold).view(torch.int8))
        self.codes.copy_(now)

    def _state(self) -> dict[str, Tensor]:
        """The flat buffers that the next steps depend on."""
        return {"codes": self.codes, "direction": self.direction, "frequency": self.frequency}

    def state_dict(self) -> dict[str, Tensor]:
        """What the next steps depend on."""
        return {name: self.weights.saved(flat) for name, flat in self._state().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up what `state_dict` gave for this model."""
        for name, flat in self._state().items():
            self.weights.load(flat, state[name])

    def _shares(self, first: Tensor, second: Tensor) -> list[Tensor]:
        """Of each, int8: share of each layer's weights that are marked, by 1 or -1."""
        marked = torch.cat([first, second]).abs_().float()  # whole numbers: their sums are exact in FP32 up to 2^24
        counts = torch.segment_reduce(marked, "sum", lengths=self._numbers.view(-1), unsafe=True)
        return [*(counts.view_as(self._numbers) / self._numbers)]
