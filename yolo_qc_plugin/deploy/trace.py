# yolo_qc_plugin, AGPL-3.0
"""What an export's tracing records of a deployed model.

For ONNX: one node of our own domain per quantizer and per convolution, which `qdq` replaces by standard nodes (the
exporter knows no 4-bit types, and would turn integer weights into float ones). For TorchScript: integer weights and
torch's own fake-quantize operator.
"""

from __future__ import annotations

import torch
from torch import Tensor

DOMAIN = "yolo_qc_plugin"
QUANTIZE, CONVOLVE = "FakeQuantize", "QuantConv"


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, zero_point, quant_min, quant_max):
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, quant_min, quant_max)

    @staticmethod
    def symbolic(g, x, scale, zero_point, quant_min, quant_max):
        integers = dict(zero_point_i=zero_point, quant_min_i=quant_min, quant_max_i=quant_max)
        return g.op(f"{DOMAIN}::{QUANTIZE}", x, scale_f=scale, **integers).setType(x.type())


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_codes, scale, shift, layer):
        return _convolve(x, weight_codes, scale, shift, layer)

    @staticmethod
    def symbolic(g, x, weight_codes, scale, shift, layer):
        y = g.op(f"{DOMAIN}::{CONVOLVE}", x, layer_s=layer.name)
        sizes = x.type().sizes()
        if sizes is None or None in sizes:  # dynamic axes
            return y
        ends = zip(layer.pads[:2], layer.pads[2:])
        geometry = zip(sizes[2:], layer.kernel_size, layer.stride, ends, layer.dilation)
        sides = [(n + sum(pads) - dilation * (k - 1) - 1) // stride + 1 for n, k, stride, pads, dilation in geometry]
        return y.setType(x.type().with_sizes([sizes[0], layer.out_channels, *sides]))


def traced_quantize(x: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int) -> Tensor:
    """Fake-quantize `x` by scale * (clip(round(x / scale) + zero_point, quant_min, quant_max) - zero_point)."""
    if torch.onnx.is_in_onnx_export():
        return _Quantize.apply(x, scale, zero_point, quant_min, quant_max)
    return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, quant_min, quant_max)


def traced_convolve(x: Tensor, layer) -> Tensor:
    """The convolution of a DeployedConv2d on its fake-quantized input."""
    if torch.onnx.is_in_onnx_export():
        # as arguments, because a trace knows what a Function is given, not what it finds elsewhere
        return _Convolve.apply(x, layer.weight_codes, layer.scale, layer.shift, layer)
    return _convolve(x, layer.weight_codes, layer.scale, layer.shift, layer)


def _convolve(x, weight_codes, scale, shift, layer):
    weight = weight_codes.to(x.dtype) * scale.to(x.dtype).view(-1, 1, 1, 1)
    return layer.convolve(x, weight, shift.to(x.dtype))
