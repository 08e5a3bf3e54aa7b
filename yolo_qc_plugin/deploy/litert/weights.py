# yolo_qc_plugin, AGPL-3.0
"""A deployed convolution's integers in a LiteRT file: INT4 or INT8 weights, INT32 biases."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..fold import DeployedConv2d
from .flatbuffer import Flatbuffer
from .layout import Geometry, as_filter, is_depthwise


@dataclass(frozen=True)
class Weight:
    """A layer's integer weight.

    Attributes:
        index: Of the tensor.
        kind: "INT4" or "INT8".
        scale: For each output channel.
        sign: What each output channel is to be multiplied by, or None: 1 for all.
        specified: Whether the codes are in [-127, 127], as LiteRT's specification of 8 bits has them.
    """

    index: int
    kind: str
    scale: np.ndarray
    sign: np.ndarray | None
    specified: bool


def write_weight(file: Flatbuffer, layer: DeployedConv2d, packed: bool) -> Weight:
    """Write a layer's weight, INT4 where that is asked for and holds its codes with positive scales, else INT8."""
    codes, scale, sign = layer.positive_scale(-8, 7)
    kind = "INT4"
    if not packed or layer.bits > 4 or sign is not None:
        codes, scale, sign = layer.positive_scale(-128, 127)
        kind = "INT8"
    filters = as_filter(codes.to(torch.int8).cpu().numpy(), layer.groups, layer.in_channels)
    axis = 3 if is_depthwise(layer.groups, layer.in_channels) else 0
    index = file.constant(f"{layer.name}.weight_codes", filters, kind, _array(scale), axis=axis)
    return Weight(index, kind, _array(scale), None if sign is None else _array(sign), bool(codes.min() > -128))


def write_bias(file: Flatbuffer, layer: DeployedConv2d, weight: Weight, input_scale: float, output_scale: float) -> int:
    """Write a layer's bias in whole units of its sums."""
    unit = input_scale * weight.scale.astype(np.float64)
    bias = np.round(layer.shift.detach().double().cpu().numpy() / unit)
    if weight.kind == "INT4":  # which built-in kernels alone compute
        bias -= rounds_twice(unit / output_scale)
    return file.constant(f"{layer.name}.bias_codes", bias.astype(np.int32), scale=unit)


def rounds_twice(multiplier: np.ndarray) -> np.ndarray:
    """Whether a built-in kernel rounds the product of a sum and this multiplier twice.

    It writes the multiplier as f * 2^-s with f in [1/2, 1), rounds f * sum to a whole number and that, over 2^s, to a
    code; both half up. Where s > 0, that equals one rounding of f * sum + 1/2. With a sum that is less by 1, it is one
    of f * sum + 1/2 - f, which is nearer and falls short as f * sum + 1/2 exceeds.
    """
    return np.frexp(multiplier)[1] < 0


def geometry_of(layer: DeployedConv2d) -> Geometry:
    """A layer's geometry."""
    top, left, bottom, right = layer.pads
    return Geometry(layer.kernel_size, layer.stride, layer.dilation, (top, left, bottom, right))


def shift_of(layer: DeployedConv2d) -> np.ndarray:
    """What a layer adds to each output channel."""
    return _array(layer.shift)


def _array(x: torch.Tensor) -> np.ndarray:
    return x.detach().float().cpu().numpy()
