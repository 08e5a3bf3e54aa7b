# yolo_qc_plugin, AGPL-3.0
"""Activation functions whose input, a convolution's output, is quantized."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from . import kernels
from .functional import quantized_silu
from .observers import binary_range
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


class QuantActivation(KeepWide, nn.Module):
    """An activation function whose input, a convolution's output after batch norm, is quantized.

    Integer convolutions of today's runtimes give 8-bit results; this is that rounding, so that the model measured is
    the model deployed. The step is a power of two: what SiLU or LeakyReLU makes of the codes, and sums of that, are
    then short binary fractions, which every runtime's floats hold exactly.

    Attributes:
        quant: ActQuantizer with offset.
        act: The activation function itself.
        function: What is computed: `in_256ths(act)`.
    """

    __module__ = "yolo_qc_plugin"  # by which checkpoints name it

    def __init__(self, act: nn.Module, bits: int):
        super().__init__()
        self.quant = ActQuantizer(bits, offset=True)
        self.act = act
        self.function = in_256ths(act)

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
        scale, offset = binary_range(values, low, high, self.quant.quant_max, self.function)
        self.quant.scale.fill_(scale)
        cast(Tensor, self.quant.offset).fill_(offset)


def in_256ths(act: nn.Module) -> nn.Module:
    """An activation function whose factors are whole 256ths: SiLU's sigmoid, LeakyReLU's slope; any other as it is.

    A slope moves by 1/512 at most, which is half a step of an 8-bit grid where the input is 255 steps below 0.
    """
    if isinstance(act, nn.SiLU):
        return QuantSiLU()
    if isinstance(act, nn.LeakyReLU):
        return nn.LeakyReLU(round(256 * act.negative_slope) / 256)
    return act


def quant_activations(model: nn.Module) -> Iterator[tuple[str, QuantActivation]]:
    """Name and module of every activation with a quantized input, in model order."""
    return ((n, m) for n, m in model.named_modules() if isinstance(m, QuantActivation))
