# yolo_qc_plugin, AGPL-3.0
"""Starting values of scales and offsets, from data.

Two initialisations: LSQ's 2 * mean|x| / sqrt(quant_max) (Esser et al. 2020, section 2.1), and the scale (and offset)
of least squared quantization error (LSQ+, Bhalgat et al. 2020, section 3.2), found by search.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .functional import fake_quantize, nearest_codes_

TINY = torch.finfo(torch.float32).eps  # the smallest scale: keeps the scale of an all-zero tensor positive
SEARCH_STEPS = 100  # candidates of one search, i.e. steps of 1% of the largest magnitude


class SampleObserver:
    """Remembers a bounded sample of what passes, and its extremes.

    Args:
        capacity: Values kept of each tensor seen (spread evenly over it).
    """

    def __init__(self, capacity: int = 8192):
        self.capacity = capacity
        self.samples: list[Tensor] = []
        self.low, self.high = float("inf"), float("-inf")

    def update(self, x: Tensor) -> None:
        """Take a sample of `x` (any shape and dtype).

        Raises:
            ValueError: If a value is not finite.
        """
        flat = x.detach().reshape(-1).float()
        low, high = float(flat.min()), float(flat.max())  # not a number where one of the values is none
        if not math.isfinite(high - low):
            raise ValueError(f"values from {low} to {high} were observed, of which no grid can be made")
        self.low, self.high = min(self.low, low), max(self.high, high)
        # an odd stride walks through rows and channels alike, where a power of two would see one column of each
        stride = max(flat.numel() // self.capacity, 1) | 1
        self.samples.append(flat[::stride].clone())

    @property
    def values(self) -> Tensor:
        """The sample, shape (n,).

        Raises:
            RuntimeError: When nothing was observed.
        """
        if not self.samples:
            raise RuntimeError("nothing observed: the layer did not run on the calibration batches")
        return torch.cat(self.samples)


def lsq_scale(x: Tensor, quant_max: int) -> Tensor:
    """LSQ's initial scale of each row of `x`.

    Args:
        x: Shape (rows, n).
        quant_max: Largest code.

    Returns:
        Shape (rows,), at least TINY.
    """
    return (2 * x.abs().mean(1) / quant_max**0.5).clamp(min=TINY)


def mse_scale(x: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """The scale of least squared error for each row of `x`, with offset 0.

    Args:
        x: Shape (rows, n).
        quant_min: Smallest code.
        quant_max: Largest code.

    Returns:
        Shape (rows,), at least TINY.
    """
    # the scale that clips nothing; below it, clipping error is traded for rounding error
    full = x.amax(1) / quant_max
    if quant_min:
        full = torch.maximum(full, x.amin(1) / quant_min)
    full = full.clamp(min=TINY)
    best, best_error = full.clone(), torch.full_like(full, float("inf"))
    for step in range(1, SEARCH_STEPS + 1):
        scale = (full * step / SEARCH_STEPS).clamp(min=TINY)
        error = (fake_quantize(x, scale, None, quant_min, quant_max) - x).square().mean(1)
        best = torch.where(error < best_error, scale, best)
        best_error = torch.minimum(error, best_error)
    return best


def mse_scale_offset(x: Tensor, quant_max: int) -> tuple[Tensor, Tensor]:
    """Scale and offset of least squared error on the grid [0, quant_max].

    The offset is a whole number of steps in [-quant_max, 0], so that 0 is a grid point: it searches the zero point and,
    for each, the scale.

    Args:
        x: Shape (n,).
        quant_max: Largest code.

    Returns:
        Scale and offset, shape (1,) each.
    """
    low, high = min(float(x.min()), 0.0), max(float(x.max()), TINY)
    best = (float("inf"), 1.0, 0.0)
    # with `zero` steps below 0 the grid covers [-zero, quant_max - zero] * scale; past the share of the range that is
    # negative, more steps below 0 are wasted
    most = min(quant_max, round(quant_max * -low / (high - low)) + 1)
    for zero in sorted({round(most * i / 8) for i in range(9)}):
        reach = max(high / max(quant_max - zero, 1), -low / max(zero, 1) if zero else 0.0, TINY)
        for step in range(2, SEARCH_STEPS + 1, 2):
            scale = max(reach * step / SEARCH_STEPS, TINY)
            grid = nearest_codes_(x / scale, -zero, quant_max - zero).mul_(scale)
            error = float((grid - x).square_().mean())
            if error < best[0]:
                best = (error, scale, -zero * scale)
    return x.new_tensor([best[1]]), x.new_tensor([best[2]])


def whole_binary_range(low: float, high: float, quant_max: int) -> tuple[float, float]:
    """The smallest scale that is a power of two, and the offset, of a grid [0, quant_max] that cuts nothing.

    Args:
        low: Smallest value; the grid begins there, and reaches beyond `high` where it is longer than the values.
        high: Largest value.
        quant_max: Largest code.

    Returns:
        Scale, and offset: a whole number of steps in [-quant_max, 0].
    """
    low, high = min(low, 0.0), max(high, quant_max * TINY)
    scale = 2.0 ** math.ceil(math.log2((high - low) / quant_max))
    return scale, -round(-low / scale) * scale


def binary_range(
    x: Tensor, low: float, high: float, quant_max: int, function: Callable[[Tensor], Tensor]
) -> tuple[float, float]:
    """Scale, a power of two, and offset of least squared error behind a function, on the grid [0, quant_max].

    An activation function forgives errors where it is flat, SiLU far below 0: there the range is cut.

    Args:
        x: Sample of the function's input, shape (n,).
        low: Smallest input seen.
        high: Largest input seen.
        quant_max: Largest code.
        function: Elementwise; may work in place.

    Returns:
        Scale, and offset: a whole number of steps in [-quant_max, 0].
    """
    low, high = min(low, 0.0), max(high, quant_max * TINY)
    wanted = function(x.clone())
    largest = math.ceil(math.log2((high - low) / quant_max))  # the first that cuts nothing

    def error(grid: tuple[float, float]) -> float:
        scale, offset = map(x.new_tensor, ([v] for v in grid))
        return float((function(fake_quantize(x, scale, offset, 0, quant_max)) - wanted).square().mean())

    candidates = []
    for scale in (2.0 ** (largest - n) for n in range(4)):
        most, least = round(-low / scale), quant_max - math.ceil(high / scale)  # steps below 0 that cut nothing below
        zeros = {min(max(round(least + (most - least) * i / 16), 0), quant_max) for i in range(17)}
        candidates += [(scale, -zero * scale) for zero in sorted(zeros)]
    return min(candidates, key=error)
