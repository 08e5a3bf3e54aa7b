# yolo_qc_plugin, AGPL-3.0
"""Move a model's numbers, by 0.8% at most, to where every runtime computes the same codes.

Float implementations of one graph differ in the order of their operations, and so in their rounding errors. Where a
value lies that near to a threshold between two codes, its code differs, and in a 4-bit network a tenth of all codes
behind it may differ then. So no value may come that near:

1. A convolution's output is m * (sum + b) steps of its 8-bit grid, where sum is one of integer products. b becomes
   whole, and m a power of two over an odd number q. Then the output is at least 1 / 2q of a step off every threshold
   n + 1/2.
2. That grid's step is a power of two (`QuantActivation`). SiLU's sigmoid and LeakyReLU's slope are whole 256ths, or
   SiLU is rounded as a whole (`RoundedSiLU`). So their products, concatenations and residual sums are multiples of a
   power of two, which FP32 holds exactly.
3. An input's scale becomes an odd multiple of a unit, a power of two that is no larger than the one that the values it
   is for are multiples of. Thresholds (n + 1/2) * scale then lie half a unit off all of them.
4. So do the scales of what residual sums add, where that is quantized (`Tap`): the sums are multiples of the smaller
   unit. These units are chosen large, lest those of sums of sums become too small for what integer runtimes add by.

Weights and their codes stay as they are. Not covered: what attention computes, and activation functions other than
SiLU, LeakyReLU and ReLU. Their values can be anywhere; a few codes in a million may move.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..quant.activations import QuantActivation, RoundedSiLU, quant_activations
from ..quant.layers import ChannelAffine, QuantConv2d
from ..quant.quantizer import ActQuantizer
from ..quant.watch import Watched
from .fold import batch_norm_scale, fold

MULTIPLIER_BITS = 10  # of q: a multiplier moves by one part in 2^9 at most; 1 / 2q is far above FP32's rounding
SCALE_BITS = 19  # of an input's scale and its codes together: 2^-20 of the largest input is above FP32's rounding
TAPPED_BITS = 16  # the same of what is added up, at least
MOST_BITS = 21  # the same of any input, whatever unit its values have


@torch.no_grad()
def snap(model: nn.Module, image: Tensor) -> None:
    """Snap all that the header names, in place; done in the model, it is in every figure measured on it.

    A model whose outputs are float stays as it is: its values lie anywhere, so that no scale is better than another.

    Args:
        model: Quantized model; blocks whose `act` is a QuantActivation are convolutions, or have a convolution `conv`
            and a batch norm `bn`.
        image: What the model takes, of any size; it runs on it once, in eval mode.
    """
    if not any(True for _ in quant_activations(model)):
        return
    for quant, unit in _units(model, image).items():
        snap_scale(quant, unit)
    blocks: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "act", None), QuantActivation)]
    for block in blocks:
        conv, bn = (block, None) if isinstance(block, QuantConv2d) else (block.conv, block.bn)
        snap_conv(conv, bn, block.act)


def _units(model: nn.Module, image: Tensor) -> dict[ActQuantizer, int]:
    """Of each scale of an input, or of what is added up, the exponent of the unit that it is to be a multiple of."""
    watched = Watched(model, image)
    sources: dict[Any, set] = {m.act_quant: set() for m in model.modules() if hasattr(m, "act_quant")}
    for tensor, quant in watched.reads:
        sources[quant] |= watched.sources(tensor)
    tapped = set().union(*sources.values())
    units: dict[Any, int] = {m: _unit_of_values(a) for _, a in quant_activations(model) for m in (a, a.function)}
    units |= {quant: unit_of_scale(quant, TAPPED_BITS if quant in tapped else SCALE_BITS) for quant in sources}
    smallest = {quant: unit_of_scale(quant, MOST_BITS) for quant in sources}
    for _ in sources:  # no chain is longer
        for quant, given in sources.items():
            units[quant] = max(min(units[m] for m in (quant, *given) if m in units), smallest[quant])
    return {quant: units[quant] for quant in sources}


def unit_of_scale(quant: ActQuantizer, bits: int = SCALE_BITS) -> int:
    """The exponent of the unit of which a scale, and codes, have that many bits together."""
    return math.frexp(quant.scale.item())[1] - (bits - quant.bits)


def _unit_of_values(act: QuantActivation) -> int:
    """The exponent of the unit that an activation function's values are multiples of."""
    if isinstance(act.function, RoundedSiLU):
        return math.frexp(act.function.unit)[1] - 1
    return math.frexp(act.quant.scale.item())[1] - 1 - 8  # 256ths


def snap_scale(quant: ActQuantizer, unit: int) -> None:
    """Snap an input's scale to an odd multiple of 2^unit, in place; the zero point stays."""
    zero_point = quant.zero_point
    multiple = _nearest_odd(math.ldexp(quant.scale.item(), -unit))
    quant.scale.fill_(math.ldexp(multiple, unit))  # on a GPU 2.0 ** tensor need not be a power of two
    if quant.offset is not None:
        quant.offset.copy_(-zero_point * quant.scale)


def snap_conv(conv: QuantConv2d, bn: nn.BatchNorm2d | None, act: QuantActivation) -> None:
    """Snap a convolution's multipliers and biases, in place.

    The correction takes that up (one is made where there is none), as it stays FP32 in checkpoints.
    """
    if conv.correction is None:
        conv.correction = ChannelAffine(1).to(conv.weight.device)
    conv.correction = conv.correction.widened(conv.out_channels)
    scale, _ = fold(conv, bn)
    multiplier = conv.act_quant.scale.double() * scale / act.quant.scale.double()
    exponent = (torch.log2(multiplier.abs()) + MULTIPLIER_BITS - 1).ceil()
    power = 2.0 ** exponent.clamp(min=0)  # below 1 it would spoil that q is odd
    factor = power / _nearest_odd(power / multiplier) / multiplier
    conv.correction.gamma.mul_(torch.where(factor.isfinite(), factor, 1.0))  # a channel of zero scale stays as it is

    scale, shift = fold(conv, bn)
    unit = conv.act_quant.scale.double() * scale
    change = torch.round(shift / unit) * unit - shift
    if bn is not None:
        change /= batch_norm_scale(bn)
    conv.correction.beta.add_(torch.where(change.isfinite(), change, 0.0))


def _nearest_odd(x):
    return 2 * (x // 2) + 1
