# yolo_qc_plugin, AGPL-3.0
"""The quantized convolution: the float convolution with a quantized input and a quantized weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .functional import recomputed_in_backward
from .modules import hooked, twin
from .precision import KeepWide
from .quantizer import ActQuantizer, Quantizer, WeightQuantizer


class ChannelAffine(nn.Module):
    """y = gamma * x + beta, per output channel or for the whole tensor.

    QC's correction (our reading of the paper: after the convolution and its bias, before BN).

    Args:
        channels: Length of gamma and beta: the layer's output channels, or 1.
    """

    __module__ = "yolo_qc_plugin"  # by which checkpoints name it

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x of shape (batch, channels, height, width); keeps its dtype."""
        return torch.addcmul(self.beta.view(1, -1, 1, 1), x, self.gamma.view(1, -1, 1, 1)).to(x.dtype)

    def widened(self, channels: int) -> ChannelAffine:
        """The same with one gamma and one beta per channel, without gradients."""
        wide = ChannelAffine(channels).to(self.gamma).requires_grad_(False)
        wide.gamma.copy_(self.gamma.expand(channels))
        wide.beta.copy_(self.beta.expand(channels))
        return wide


class QuantConv2d(KeepWide, nn.Conv2d):
    """nn.Conv2d whose input and weight are fake-quantized.

    Made by `from_float`, undone by `to_float`; both share the very Parameter objects.

    Attributes:
        weight: Latent weight; `weight_quant(weight)` is what convolves, or `given_weight` where there is one.
        given_weight: What convolves in the passes to come, from whoever computes it for all layers (`qat.prepare`,
            `qat.annealed_rounding`) and takes it back before the weight changes. Copies of the layer and files lack it.
        weight_quant: WeightQuantizer.
        act_quant: ActQuantizer of the input.
        correction: ChannelAffine of the output, or None.
        act: QuantActivation of the output, where there is no batch norm behind and the output is quantized. Other
            layers, and those of checkpoints of earlier versions, have no such submodule.
    """

    __module__ = "yolo_qc_plugin"  # by which checkpoints name it

    weight_quant: WeightQuantizer
    act_quant: ActQuantizer
    correction: ChannelAffine | None
    given_weight: Tensor | None = None

    def __getstate__(self) -> dict:
        return {k: v for k, v in vars(self).items() if k != "given_weight"}

    @classmethod
    def from_float(
        cls,
        conv: nn.Conv2d,
        weight_bits: int,
        act_bits: int,
        per_channel: bool,
        act_offset: bool,
        narrow: bool = False,
        symmetric: bool = False,
    ) -> QuantConv2d:
        """The quantized twin of `conv`: same parameters, same attributes, plus quantizers (not calibrated).

        Args:
            conv: The float convolution.
            weight_bits: Width of the weight.
            act_bits: Width of the input.
            per_channel: One weight scale per output channel.
            act_offset: Learn an offset for the input.
            narrow: Keep codes of a weight in [-127, 127].
            symmetric: Keep codes of an input in INT8.
        """
        self = twin(conv, cls)
        self.weight_quant = WeightQuantizer(weight_bits, conv.out_channels if per_channel else 1, narrow)
        self.act_quant = ActQuantizer(act_bits, act_offset, symmetric)
        self.register_module("correction", None)
        nn.Module.to(self.weight_quant, conv.weight.device)
        nn.Module.to(self.act_quant, conv.weight.device)
        return self

    def to_float(self) -> nn.Conv2d:
        """The float convolution this was made from: the same parameters, without quantizers."""
        conv = twin(self, nn.Conv2d)
        for name in ("weight_quant", "act_quant", "correction", "act"):
            conv._modules.pop(name, None)
        vars(conv).pop("given_weight", None)
        return conv

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x of shape (batch, in, height, width)."""
        weight = self.weight_quant(self.weight) if self.given_weight is None else self.given_weight
        weight = weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        x = self.act_quant(x)
        with recomputed_in_backward(x, values=weight.requires_grad):  # what the weight's gradient is made of
            y = self._conv_forward(x, weight, bias)
        y = y if self.correction is None else self.correction(y)
        act = self._modules.get("act")
        return y if act is None else act(y)

    def weight_codes(self) -> Tensor:
        """Integer codes of the weight, int8, shape of the weight."""
        return self.weight_quant.codes(self.weight)


class Deployed:
    """Base of the layers that take the place of quantized ones in a deployed model; nothing undoes that."""


def quant_convs(model: nn.Module) -> Iterator[tuple[str, QuantConv2d]]:
    """Name and module of every quantized convolution, in model order."""
    return ((n, m) for n, m in model.named_modules() if isinstance(m, QuantConv2d))


def is_quantized(model: nn.Module) -> bool:
    """Whether the model has quantized convolutions, deployed or not."""
    return is_deployed(model) or any(True for _ in quant_convs(model))


def is_deployed(model: nn.Module) -> bool:
    """Whether the model's quantized convolutions are deployed."""
    return any(isinstance(m, Deployed) for m in model.modules())


@torch.no_grad()
def multiplications(model: nn.Module, image: Tensor) -> dict[str, int]:
    """How often each quantized convolution multiplies for an image, by its name.

    Args:
        model: In eval mode, since this runs it.
        image: One image as the model takes it, shape (1, channels, height, width).
    """
    found: dict[str, int] = {}

    def count(name: str, conv: QuantConv2d, output: Tensor) -> None:
        found[name] = conv.weight.numel() * output.shape[2] * output.shape[3]

    convs = quant_convs(model)
    with hooked(c.register_forward_hook(lambda m, _, out, name=n: count(name, m, out)) for n, c in convs):
        model(image)
    return found


def scale_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Scales and offsets of all quantizers, in model order."""
    return [p for m in model.modules() if isinstance(m, Quantizer) for p in m.parameters(recurse=False)]
