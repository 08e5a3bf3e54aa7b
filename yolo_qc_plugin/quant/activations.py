# yolo_qc_plugin, AGPL-3.0
"""Activation functions whose input, a convolution's output, is quantized."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from . import kernels
from .functional import quantized_silu
from .observers import binary_range, whole_binary_range
from .precision import KeepWide
from .quantizer import ActQuantizer


class QuantSiLU(nn.Module):
    """SiLU with its sigmoid rounded to whole 256ths: x * round(256 * sigmoid(x)) / 256.

    Of 8-bit codes x, integer runtimes compute the sigmoid by a table and the product in integers.

    Args:
        quant: Quantizer of the sigmoid; a new one if None.
    """

    __module__ = "yolo_qc_plugin"  # by which checkpoints name it

    def __init__(self, quant: nn.Module | None = None):
        super().__init__()
        if quant is None:
            quant = ActQuantizer(8, offset=False)
            quant.set_signed(False)
            quant.fix(2.0**-8)
        self.quant = quant

    def forward(self, x: Tensor) -> Tensor:
        """Activate x of any shape."""
        return x * self.quant(x.sigmoid())


class RoundedSiLU(nn.Module):
    """SiLU rounded to whole multiples of a unit, for runtimes that compute it in floats behind their convolution.

    Attributes:
        unit: A power of two, so that sums of the results are exact (see `unit_of`).
    """

    __module__ = "yolo_qc_plugin"  # by which checkpoints name it

    def __init__(self):
        super().__init__()
        self.unit = 2.0**-24  # no rounding to speak of, until the grid is known

    def forward(self, x: Tensor) -> Tensor:
        """Activate x of any shape; gradients are SiLU's."""
        exact = nn.functional.silu(x)
        rounded = (exact * (1 / self.unit)).round() * self.unit
        return exact + (rounded - exact).detach() if exact.requires_grad else rounded


class HeadOutput(nn.Identity):
    """In the place of an activation function behind a bare convolution of a head, whose output is logits.

    Attributes:
        lowest: Where the grid of the logits begins, or None for the lowest that is seen.

    Args:
        lowest: As the attribute.
    """

    __module__ = "yolo_qc_plugin"  # by which checkpoints name it

    def __init__(self, lowest: float | None = None):
        super().__init__()
        self.lowest = lowest


class QuantActivation(KeepWide, nn.Module):
    """An activation function whose input, a convolution's output after batch norm if it has one, is quantized.

    Integer convolutions of today's runtimes give 8-bit results; this is that rounding, so that the model measured is
    the model deployed. The step is a power of two: what SiLU or LeakyReLU makes of the codes, and sums of that, are
    then short binary fractions, which every runtime's floats hold exactly.

    Attributes:
        quant: ActQuantizer with offset.
        act: The activation function itself.
        function: What is computed: `in_256ths(act)`, or RoundedSiLU.

    Args:
        act: The activation function.
        bits: Width of the grid.
        rounded_silu: Whether SiLU is rounded as a whole, not its sigmoid.
    """

    __module__ = "yolo_qc_plugin"  # by which checkpoints name it

    def __init__(self, act: nn.Module, bits: int, rounded_silu: bool = False):
        super().__init__()
        self.quant = ActQuantizer(bits, offset=True)
        self.act = act
        self.function = RoundedSiLU() if rounded_silu and isinstance(act, nn.SiLU) else in_256ths(act)

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and activate x of any shape."""
        if self._in_one_pass(x):
            quant = self.quant
            return quantized_silu(x, quant.scale, cast(Tensor, quant.offset), quant.quant_min, quant.quant_max)
        return self.function(self.quant(x))

    def _in_one_pass(self, x: Tensor) -> bool:
        """Whether x is to be trained through (by QC, which keeps scales), and in what one pass can do."""
        plain = isinstance(self.function, QuantSiLU) and self.quant.enabled and not self.quant.scale.requires_grad
        return plain and torch.is_grad_enabled() and x.dtype == torch.float32 and kernels.worth_compiling(x)

    @torch.no_grad()
    def calibrate(self, values: Tensor, low: float, high: float) -> None:
        """Set the grid from a sample of the input, shape (n,), and its extremes."""
        function = self.act if isinstance(self.function, RoundedSiLU) else self.function  # its unit is not known yet
        if isinstance(function, HeadOutput):
            lowest = low if function.lowest is None else function.lowest
            scale, offset = whole_binary_range(lowest, high, self.quant.quant_max)
        else:
            scale, offset = binary_range(values, low, high, self.quant.quant_max, function)
        self.quant.scale.fill_(scale)
        cast(Tensor, self.quant.offset).fill_(offset)
        if isinstance(self.function, RoundedSiLU):
            self.function.unit = unit_of(scale, self.quant.quant_max)


def unit_of(step: float, most: int) -> float:
    """A small power of two, in whose multiples floats round SiLU of whole steps as exact numbers would.

    For each unit other values lie near a threshold between two multiples. Of an eighth of a step to a 64th, this is the
    unit to whose thresholds they come least near: for steps of 2^-12 to 4 not within 5e-7 of themselves, which is twice
    what PyTorch and OpenVINO are off by at most. ONNX Runtime's sigmoid is off by 6e-8, whatever its size, which moves
    no value over a threshold either.

    Args:
        step: Of the grid of SiLU's input, a power of two.
        most: The largest number of steps from 0.
    """
    return max((step / 2**n for n in range(3, 7)), key=lambda unit: from_thresholds(step, most, unit))


def from_thresholds(step: float, most: int, unit: float) -> float:
    """How near to a threshold between two multiples of a unit SiLU of whole steps comes, as a share of its values.

    Args:
        step: As for `unit_of`.
        most: As for `unit_of`.
        unit: A power of two.
    """
    x = step * torch.arange(-most, most + 1, dtype=torch.float64)
    multiples = x * x.sigmoid() / unit
    distance = (multiples - multiples.floor() - 0.5).abs()
    return float((distance / multiples.abs().clamp(min=0.25)).min())


def in_256ths(act: nn.Module) -> nn.Module:
    """An activation function whose factors are whole 256ths: SiLU's sigmoid, LeakyReLU's slope; any other as it is.

    A slope moves by 1/512 at most, which is half a step of an 8-bit grid where the input is 255 steps below 0.
    """
    if isinstance(act, nn.SiLU):
        return QuantSiLU()
    if isinstance(act, nn.LeakyReLU):
        return nn.LeakyReLU(round(256 * act.negative_slope) / 256)
    return act


def silu_is_rounded(model: nn.Module) -> bool | None:
    """Whether SiLU is rounded as a whole in a model, trained or deployed; None where it has no SiLU behind a grid."""
    kinds = {type(m) for m in model.modules()}
    return True if RoundedSiLU in kinds else False if QuantSiLU in kinds else None


def quant_activations(model: nn.Module) -> Iterator[tuple[str, QuantActivation]]:
    """Name and module of every activation with a quantized input, in model order."""
    return ((n, m) for n, m in model.named_modules() if isinstance(m, QuantActivation))
