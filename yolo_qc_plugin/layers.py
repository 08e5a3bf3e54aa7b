# yolo_qc_plugin, AGPL-3.0
"""The quantized convolution: the float convolution with a quantized input and a quantized weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from . import kernels
from .functional import quantized_silu, recomputed_in_backward
from .observers import binary_range
from .quantizer import ActQuantizer, Quantizer, WeightQuantizer


class ChannelAffine(nn.Module):
    """y = gamma * x + beta, per output channel or for the whole tensor.

    QC's correction (our reading of the paper: after the convolution and its bias, before BN).

    Args:
        channels: Length of gamma and beta: the layer's output channels, or 1.
    """

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


class KeepWide:
    """Keeps a module's parameters and buffers in FP32 (or wider), whatever the model is cast to.

    A latent weight near a rounding threshold changes its code when it is rounded to FP16, and a small scale loses its
    digits.
    """

    def _apply(self, fn, recurse: bool = True):
        return super()._apply(lambda t: _keep_wide(t, fn(t)), recurse)


class QuantConv2d(KeepWide, nn.Conv2d):
    """nn.Conv2d whose input and weight are fake-quantized.

    Made by `from_float`, undone by `to_float`; both share the very Parameter objects.

    Attributes:
        weight: Latent weight; `weight_quant(weight)` is what convolves.
        weight_quant: WeightQuantizer.
        act_quant: ActQuantizer of the input.
        correction: ChannelAffine of the output, or None.
    """

    weight_quant: WeightQuantizer
    act_quant: ActQuantizer
    correction: ChannelAffine | None

    @classmethod
    def from_float(
        cls,
        conv: nn.Conv2d,
        weight_bits: int,
        act_bits: int,
        per_channel: bool,
        act_offset: bool,
        act_equalize: bool = False,
    ) -> QuantConv2d:
        """The quantized twin of `conv`: same parameters, same attributes, plus quantizers (not calibrated)."""
        self = cls.__new__(cls)
        self.__dict__ = _shared_state(conv)
        self.weight_quant = WeightQuantizer(weight_bits, conv.out_channels if per_channel else 1)
        self.act_quant = ActQuantizer(act_bits, act_offset, conv.in_channels if act_equalize else 0)
        self.register_module("correction", None)
        nn.Module.to(self.weight_quant, conv.weight.device)
        nn.Module.to(self.act_quant, conv.weight.device)
        return self

    def to_float(self) -> nn.Conv2d:
        """The float convolution this was made from: the same parameters, without quantizers.

        The weight, in place, takes back what an equalizer of the input has divided it by: this module is spent then.
        """
        if self.act_quant.equalizer is not None:
            self.multiply_inputs(self.act_quant.equalizer)
        conv = nn.Conv2d.__new__(nn.Conv2d)
        conv.__dict__ = _shared_state(self)
        for name in ("weight_quant", "act_quant", "correction"):
            conv._modules.pop(name)
        return conv

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x of shape (batch, in, height, width)."""
        weight = self.weight_quant(self.weight).to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        x = self.act_quant(x)
        with recomputed_in_backward(x, values=weight.requires_grad):  # what the weight's gradient is made of
            y = self._conv_forward(x, weight, bias)
        return y if self.correction is None else self.correction(y)

    @torch.no_grad()
    def multiply_inputs(self, factors: Tensor) -> None:
        """Multiply the weight by one factor per input channel, shape (in_channels,), in place."""
        self.weight.mul_(self._per_input(factors))

    def _per_input(self, factors: Tensor) -> Tensor:
        """Factors of input channels as they broadcast to the weight, (out, in / groups, height, width)."""
        by_group = factors.view(self.groups, 1, -1).expand(-1, self.out_channels // self.groups, -1)
        return by_group.reshape(self.out_channels, -1, 1, 1)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        # the weight of a float convolution, which any model can take up: powers of two come and go without a trace.
        # It is a copy; what is done to it in place does not reach this module (`ConstantEMA.mend`)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.act_quant.equalizer is not None:
            destination[f"{prefix}weight"] = destination[f"{prefix}weight"] * self._per_input(self.act_quant.equalizer)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        key = f"{prefix}weight"
        if self.act_quant.equalizer is not None and key in state_dict:
            equalizer = state_dict.get(f"{prefix}act_quant.equalizer", self.act_quant.equalizer)
            weight = state_dict[key]
            state_dict = {**state_dict, key: weight / self._per_input(equalizer.to(weight))}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def weight_codes(self) -> Tensor:
        """Integer codes of the weight, int8, shape of the weight."""
        return self.weight_quant.codes(self.weight)


class WideBatchNorm2d(KeepWide, nn.BatchNorm2d):
    """nn.BatchNorm2d in FP32 (or wider); it takes inputs of any precision as it is."""


class OwnPrecision(KeepWide):
    """Keeps FP32 (or wider) and computes in it, whatever the precision of the input, which the result has too."""

    def forward(self, x: Tensor) -> Tensor:
        """What the layer makes of x."""
        if x.dtype == self.weight.dtype:  # no casts in an exported graph
            return super().forward(x)
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class WideConv2d(OwnPrecision, nn.Conv2d):
    """A convolution left in float."""


class WideConvTranspose2d(OwnPrecision, nn.ConvTranspose2d):
    """nn.ConvTranspose2d, of heads with masks."""


class WideLinear(OwnPrecision, nn.Linear):
    """nn.Linear, of heads that classify."""


# Layers that are not quantized, but whose rounding to FP16 would move the codes of activations behind them: what a
# checkpoint holds would not be what was measured in training.
WIDE = {
    nn.BatchNorm2d: WideBatchNorm2d,
    nn.Conv2d: WideConv2d,
    nn.ConvTranspose2d: WideConvTranspose2d,
    nn.Linear: WideLinear,
}


def widen(model: nn.Module) -> None:
    """Let layers that are not quantized keep FP32 when a model is cast, in place: the same objects, other classes."""
    for m in model.modules():
        m.__class__ = WIDE.get(type(m), type(m))


def narrow(model: nn.Module) -> None:
    """Undo `widen`."""
    plain = {wide: kind for kind, wide in WIDE.items()}
    for m in model.modules():
        m.__class__ = plain.get(type(m), type(m))


class QuantSiLU(nn.Module):
    """SiLU with its sigmoid rounded to whole 256ths: x * round(256 * sigmoid(x)) / 256.

    Of 8-bit codes x, integer runtimes compute the sigmoid by a table and the product in integers.

    Args:
        quant: Quantizer of the sigmoid; a new one if None.
    """

    def __init__(self, quant: nn.Module | None = None):
        super().__init__()
        self.quant = quant
        if quant is None:
            self.quant = ActQuantizer(8, offset=False)
            self.quant.set_signed(False)
            self.quant.fix(2.0**-8)

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

    def __init__(self, act: nn.Module, bits: int):
        super().__init__()
        self.quant = ActQuantizer(bits, offset=True)
        self.act = act
        self.function = in_256ths(act)

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and activate x of any shape."""
        if self._in_one_pass(x):
            quant = self.quant
            return quantized_silu(x, quant.scale, quant.grid_offset(), quant.quant_min, quant.quant_max)
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
        self.quant.offset.fill_(offset)


def in_256ths(act: nn.Module) -> nn.Module:
    """An activation function whose factors are whole 256ths: SiLU's sigmoid, LeakyReLU's slope; any other as it is.

    A slope moves by 1/512 at most, which is half a step of an 8-bit grid where the input is 255 steps below 0.
    """
    if isinstance(act, nn.SiLU):
        return QuantSiLU()
    if isinstance(act, nn.LeakyReLU):
        return nn.LeakyReLU(round(256 * act.negative_slope) / 256)
    return act


def _shared_state(module: nn.Module) -> dict:
    """A module's __dict__ with containers of its own and the same contents."""
    return {k: v.copy() if isinstance(v, dict) else v for k, v in vars(module).items()}


def _keep_wide(before: Tensor, after: Tensor) -> Tensor:
    """Undo a cast below FP32 and keep the rest of what was done, such as a move to another device."""
    return before.to(after.device) if after.dtype in (torch.float16, torch.bfloat16) else after


def quant_convs(model: nn.Module) -> Iterator[tuple[str, QuantConv2d]]:
    """Name and module of every quantized convolution, in model order."""
    return ((n, m) for n, m in model.named_modules() if isinstance(m, QuantConv2d))


def quant_activations(model: nn.Module) -> Iterator[tuple[str, QuantActivation]]:
    """Name and module of every activation with a quantized input, in model order."""
    return ((n, m) for n, m in model.named_modules() if isinstance(m, QuantActivation))


def is_quantized(model: nn.Module) -> bool:
    """Whether the model has quantized convolutions (that are not deployed)."""
    return any(True for _ in quant_convs(model))


def scale_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Scales and offsets of all quantizers, in model order."""
    return [p for m in model.modules() if isinstance(m, Quantizer) for p in m.parameters(recurse=False)]
