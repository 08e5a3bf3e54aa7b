# yolo_qc_plugin, AGPL-3.0
"""Oscillation of quantized weights (Nagel et al., ICML 2022): which codes flip back and forth, and how often.

change      = sign(code - code one step ago)
oscillation = change is opposite to the weight's last change that was not 0
frequency  <- (1 - momentum) * frequency + momentum * oscillation         after each optimizer step
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..quant import kernels
from ..quant.foreach import to_codes_all
from .weights import trained_convs

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
    """Follows the codes of all trained quantized weights of a model.

    All weights are followed in flat buffers, in model order: one pass over each, and nothing waits for the device.

    Args:
        model: Injected and calibrated model, whose frozen layers are frozen already.
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

    def __init__(self, model: nn.Module, momentum: float = MOMENTUM, threshold: float = OSCILLATING):
        convs = trained_convs(model)
        self.names, self.momentum, self._threshold = list(convs), momentum, threshold
        self._weights = [conv.weight for conv in convs.values()]
        self._quants = [conv.weight_quant for conv in convs.values()]
        self._ranges = [(q.quant_min, q.quant_max) for q in self._quants]
        self._sizes = [w.numel() for w in self._weights]
        total, device = sum(self._sizes), next(model.parameters()).device
        self._numbers = torch.tensor(self._sizes, device=device)
        self.codes = torch.empty(total, dtype=torch.int8, device=device)
        self._read(self.codes)
        self._spare = torch.empty_like(self.codes)  # the next step's
        self.direction = torch.zeros_like(self.codes)
        self.frequency = torch.zeros(total, device=device)
        self.change = torch.zeros_like(self.codes)
        self.flipped = self.oscillating = torch.zeros(len(convs), device=device)

    @torch.no_grad()
    def step(self) -> None:
        """Take in the codes of now; call it once per optimizer step."""
        before, now = self.codes, self._spare
        self._read(now)
        flat = before, now, self.change, self.direction, self.frequency
        rates = self.momentum, 1 - self.momentum, self._threshold
        counts = kernels.follow_codes(*flat, self._numbers, *rates) or self._follow(before, now)
        self.flipped, self.oscillating = (found / self._numbers for found in counts)
        self.codes, self._spare = now, before

    def by_layer(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat buffer, one per layer, in the shapes of the weights."""
        return [part.view(w.shape) for part, w in zip(flat.split(self._sizes), self._weights)]

    def state_dict(self) -> dict[str, Tensor]:
        """What the next steps depend on."""
        return {"codes": self.codes, "direction": self.direction, "frequency": self.frequency}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up what `state_dict` gave for this model."""
        for name, value in self.state_dict().items():
            value.copy_(state[name])

    @torch.no_grad()
    def _read(self, codes: Tensor) -> None:
        scales, parts = [q.scale for q in self._quants], self.by_layer(codes)
        if not kernels.write_codes_all(self._weights, scales, self._ranges, parts):
            torch._foreach_copy_(parts, to_codes_all(self._weights, scales, self._ranges))

    def _follow(self, before: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
        """Move change, direction and frequency on by tensor operations; counts of `flipped` and `oscillating`."""
        # not the sign of a difference: 8-bit codes may be 255 apart
        torch.sub((now > before).view(torch.int8), (now < before).view(torch.int8), out=self.change)
        opposite = (self.change * self.direction).clamp_max_(0)  # -1 where it is an oscillation, else 0
        self.frequency.mul_(1 - self.momentum).sub_(opposite, alpha=self.momentum)
        self.direction.mul_(1 - self.change.abs()).add_(self.change)  # faster than a masked copy
        marked = self.change, self.frequency > self._threshold
        return tuple(torch.stack([part.count_nonzero() for part in m.split(self._sizes)]) for m in marked)
