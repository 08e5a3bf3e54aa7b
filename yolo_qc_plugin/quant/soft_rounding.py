# yolo_qc_plugin, AGPL-3.0
"""Soft rounding of a finished model: what oscillation costs, without training (as in the paper).

v    = (x - offset) / scale, clipped to [quant_min, quant_max]
xhat = scale * round(v) + offset   where v lies within k steps of a grid point, else scale * v + offset

A value that is about as near to one grid point as to the next is one that a step of training may move from one to the
other. Where a model gains by leaving such values as they are, it pays for having to choose.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from .functional import from_codes, grid_position, per_slice, widen
from .layers import quant_convs
from .quantizer import ActQuantizer, Quantizer

SOFT, HARD = 0.45, 0.5  # k of the paper, and the one with which all is rounded


def round_within(model: nn.Module, k: float) -> None:
    """Have a model's weights and inputs of convolutions rounded only within k steps of a grid point, in place.

    Outputs of convolutions are rounded as ever. A deployed form knows nothing of it: the model is not to be fused.

    Args:
        model: Quantized model.
        k: In steps, 0 to 0.5; with 0.5 all is rounded, as in training.
    """
    for _, conv in quant_convs(model):
        for quant in conv.weight_quant, conv.act_quant:
            quant.forward = partial(soft_values, quant, k)  # type: ignore[method-assign]


def soft_values(quant: Quantizer, k: float, x: Tensor) -> Tensor:
    """What a quantizer makes of x, in its dtype, if it rounds only within k steps of a grid point.

    Worked numbers: scale 0.1 and k = 0.45 take 0.26 (2.6 steps) to 0.3, and leave 0.253 as it is.
    """
    scale = per_slice(quant.scale, x)
    offset = quant.grid_offset() if isinstance(quant, ActQuantizer) else None
    latent = grid_position(widen(x), scale, offset).clamp_(quant.quant_min, quant.quant_max)
    code = latent.round()
    return from_codes(latent.where((latent - code).abs() > k, code), scale, offset).to(x.dtype)
