# yolo_qc_plugin, AGPL-3.0
"""Move a model's numbers, by 0.2% at most, to where every runtime computes the same codes.

Float implementations of one graph differ in the order of their operations, and so in their rounding errors. Where a
value lies that near to a threshold between two codes, its code differs, and in a 4-bit network a tenth of all codes
behind it may differ then. So no value may come that near:

1. A convolution's output is m * (sum + b) steps of its 8-bit grid, where sum is one of integer products. b becomes
   whole, and m a power of two over an odd number q. Then the output is at least 1 / 2q of a step off every threshold
   n + 1/2.
2. That grid's step is a power of two (`QuantActivation`). SiLU's sigmoid and LeakyReLU's slope are whole 256ths, or
   SiLU is rounded as a whole (`RoundedSiLU`). So their products, concatenations and residual sums are multiples of a
   power of two, which FP32 holds exactly.
3. An input's scale becomes an odd multiple of a yet smaller power of two, so that thresholds (n + 1/2) * scale lie half
   a multiple off all those values.

Weights and their codes stay as they are. Not covered: what attention computes, and activation functions other than
SiLU, LeakyReLU and ReLU. Their values can be anywhere; a few codes in a million may move.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..quant.activations import QuantActivation, quant_activations
from ..quant.layers import ChannelAffine, QuantConv2d, quant_convs
from ..quant.quantizer import ActQuantizer
from .fold import batch_norm_scale, fold

MULTIPLIER_BITS = 10  # of q: a multiplier moves by one part in 2^9 at most; 1 / 2q is far above FP32's rounding
SCALE_BITS = 19  # of an input's scale and its codes together: 2^-20 of the largest input is above FP32's rounding


@torch.no_grad()
def snap(model: nn.Module) -> None:
    """Snap all that the header names, in place; done in the model, it is in every figure measured on it.

    A model whose outputs are float stays as it is: its values lie anywhere, so that no scale is better than another.

    Args:
        model: Quantized model; blocks whose `act` is a QuantActivation are convolutions, or have a convolution `conv`
            and a batch norm `bn`.
    """
    if not any(True for _ in quant_activations(model)):
        return
    for _, conv in quant_convs(model):
        snap_scale(conv.act_quant)
    blocks: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "act", None), QuantActivation)]
    for block in blocks:
        conv, bn = (block, None) if isinstance(block, QuantConv2d) else (block.conv, block.bn)
        snap_conv(conv, bn, block.act)


def snap_scale(quant: ActQuantizer) -> None:
    """Snap an input's scale, in place; the zero point stays."""
    zero_point = quant.zero_point
    mantissa, exponent = math.frexp(quant.scale.item())  # on a GPU 2.0 ** tensor need not be a power of two
    unit = 2.0 ** (SCALE_BITS - quant.bits)
    quant.scale.fill_(math.ldexp(_nearest_odd(mantissa * unit) / unit, exponent))
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
