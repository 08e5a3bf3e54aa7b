# yolo_qc_plugin, AGPL-3.0
"""Fold batch normalisation behind a quantized convolution into its per-channel output scale and shift.

    BN(gamma * y + beta) = (gamma * a) * y + (a * (beta - mean) + bn.bias),   a = bn.weight / sqrt(var + eps)

The weight is not touched, so the integer codes never move (which folding BN into the weight, as for a float
convolution, would do).
"""

from __future__ import annotations

import torch
from torch import nn

from .layers import ChannelAffine, QuantConv2d


@torch.no_grad()
def fold_bn(conv: QuantConv2d, bn: nn.BatchNorm2d) -> QuantConv2d:
    """Give `conv` the statistics and affine of `bn`, in place; with it bn is to be left out.

    Args:
        conv: Quantized convolution, corrected or not.
        bn: The batch norm that reads its output, in eval mode.

    Returns:
        `conv`, whose output now equals bn's.
    """
    a = bn.weight.double() / torch.sqrt(bn.running_var.double() + bn.eps)
    gamma, beta = (1.0, 0.0) if conv.correction is None else (conv.correction.gamma, conv.correction.beta)
    folded = ChannelAffine(conv.out_channels).to(conv.weight)
    folded.gamma.copy_(a * gamma)
    folded.beta.copy_(a * (beta - bn.running_mean.double()) + bn.bias)
    conv.correction = folded.requires_grad_(False)
    conv.folded = True
    return conv.requires_grad_(False)
