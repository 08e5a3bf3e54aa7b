# yolo_qc_plugin, AGPL-3.0
"""The deployed form: a quantized convolution and all that follows it in one scale and one bias per output channel.

With xhat = act_scale * (code_x - zero_point), what = s * code_w, the correction's gamma and beta, and batch norm's
a = bn.weight / sqrt(var + eps):

    BN(gamma * (conv(xhat, what) + bias) + beta) = act_scale * scale * conv(code_x - zero_point, code_w) + shift
        scale = a * gamma * s                                         per output channel, negative where a * gamma is
        shift = a * (gamma * bias + beta - mean) + bn.bias

The integer codes never move, which folding batch norm into the weight (as for a float convolution) would do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import QCError
from .functional import to_codes, widen
from .layers import ChannelAffine, KeepWide, QuantActivation, QuantConv2d
from .quantizer import ActQuantizer
from .trace import traced_convolve, traced_quantize

OFF = 2**30  # a channel is off where its shift is this many units of its integer sums
MANTISSA = 10  # bits of a multiplier in `snap`, which moves it by 0.2% at most


class FixedQuantizer(nn.Module):
    """An activation quantizer whose parameters are plain numbers, as a graph holds them.

    Rounds x / scale and then adds the zero point, as QuantizeLinear does.

    Attributes:
        bits: Width.
        scale: Positive.
        zero_point: The code of 0.
        quant_min: Smallest code.
        quant_max: Largest code.
    """

    def __init__(self, quantizer: ActQuantizer):
        super().__init__()
        self.bits, self.scale, self.zero_point = quantizer.bits, quantizer.scale.item(), quantizer.zero_point
        self.quant_min, self.quant_max = quantizer.quant_min, quantizer.quant_max

    def steps(self, x: Tensor) -> Tensor:
        """Codes minus the zero point, i.e. whole steps from 0, as floats of FP32 at least."""
        low, high = self.quant_min - self.zero_point, self.quant_max - self.zero_point
        return to_codes(widen(x), self.scale, None, low, high)

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize x of any shape."""
        if torch.jit.is_tracing():
            return traced_quantize(x, self.scale, self.zero_point, self.quant_min, self.quant_max)
        return self.steps(x).mul_(self.scale).to(x.dtype)

    def extra_repr(self) -> str:
        return f"range=[{self.quant_min}, {self.quant_max}], scale={self.scale:.4g}, zero_point={self.zero_point}"


class DeployedConv2d(KeepWide, nn.Module):
    """Integer codes convolved, then one scale and one shift per output channel.

    The convolution of codes is exact in FP32 (its sums stay far below 2^24 for layers of YOLO's sizes), so that this is
    what integer hardware computes. Parameters of the convolution (stride, padding, ...) are those of nn.Conv2d.

    Attributes:
        name: The layer's name in its model.
        bits: Width of the weight.
        act_quant: FixedQuantizer of the input.
        weight_codes: int8, shape of the weight.
        scale: Shape (out_channels,): weight scale, correction and batch norm; of either sign.
        shift: Shape (out_channels,).
    """

    def __init__(self, conv: QuantConv2d, scale: Tensor, shift: Tensor, name: str):
        super().__init__()
        self.name, self.bits = name, conv.weight_quant.bits
        self.act_quant = FixedQuantizer(conv.act_quant)
        for key in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
            setattr(self, key, getattr(conv, key))
        # parameters, so that a model's summary counts them; floats first, because the host reads a model's dtype there
        self.scale, self.shift = nn.Parameter(scale, False), nn.Parameter(shift, False)
        self.weight_codes = nn.Parameter(conv.weight_codes(), False)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x of shape (batch, in, height, width)."""
        if torch.jit.is_tracing():
            return traced_convolve(self.act_quant(x), self)
        steps = self.act_quant.steps(x)
        sums = self.convolve(steps, self.weight_codes.to(steps.dtype))
        scale = (self.act_quant.scale * self.scale).to(steps.dtype)
        return torch.addcmul(_along_channels(self.shift).to(steps.dtype), sums, _along_channels(scale)).to(x.dtype)

    def positive_scale(self, lowest: int, highest: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes, scale and sign with scale > 0, for formats that want that.

        A channel of negative scale gets negated codes. Where one of those would leave [lowest, highest] (that of -8 in
        a 4-bit container, say), all codes stay and the sign is to be multiplied to the convolution's output.

        A channel that is switched off (of zero scale, or one whose sums vanish beside its shift, which then has no
        place in an INT32 bias) gets zero codes, and a scale of which its shift is a whole multiple.

        Returns:
            Codes (int16, shape of the weight), scale (out_channels,), sign (out_channels,) of +1 and -1, or None.
        """
        unit, size = self.act_quant.scale * self.scale.double().abs(), self.shift.double().abs()
        off = (unit == 0) | (size >= unit * OFF)
        whole = torch.where(size > 0, size / self.act_quant.scale, 1.0).to(self.scale.dtype)
        scale = torch.where(off, whole, self.scale.abs())
        sign = torch.where(self.scale < 0, -1, 1).to(torch.int16)
        codes = self.weight_codes.to(torch.int16) * ~off.view(-1, 1, 1, 1)
        negated = codes * sign.view(-1, 1, 1, 1)
        if negated.min() >= lowest and negated.max() <= highest:
            return negated, scale, None
        return codes, scale, sign.to(scale.dtype)

    @property
    def pads(self) -> list[int]:
        """Zeros added at top, left, bottom and right."""
        if self.padding == "same":
            total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size)]
            return [*(n // 2 for n in total), *(n - n // 2 for n in total)]
        return [0, 0, 0, 0] if self.padding == "valid" else [*self.padding, *self.padding]

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The plain convolution with this layer's stride, padding, dilation and groups."""
        return nn.functional.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"groups={self.groups}, bits={self.bits}"
        )


def fold(conv: QuantConv2d, bn: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor]:
    """Scale and shift of the header's formula, FP64, shape (out_channels,) each."""
    wide = torch.float64  # folding is done once: no digit is lost in it
    one = torch.ones(conv.out_channels, dtype=wide, device=conv.weight.device)
    gamma, beta = (1, 0) if conv.correction is None else (conv.correction.gamma.to(wide), conv.correction.beta.to(wide))
    bias = 0 if conv.bias is None else conv.bias.to(wide)
    scale, shift = one * gamma * conv.weight_quant.scale.to(wide), one * (gamma * bias + beta)
    if bn is not None:
        a = _batch_norm_scale(bn)
        scale, shift = a * scale, a * (shift - bn.running_mean.to(wide)) + bn.bias.to(wide)
    return scale, shift


def _batch_norm_scale(bn: nn.BatchNorm2d) -> Tensor:
    return bn.weight.double() / torch.sqrt(bn.running_var.double() + bn.eps)


@torch.no_grad()
def snap(conv: QuantConv2d, bn: nn.BatchNorm2d, output_scale: float) -> None:
    """Move the scale and shift of a convolution with a quantized output to where every runtime agrees, in place.

    In steps of the output, an integer convolution gives multiplier * (sum + bias) before rounding, with integer sum and
    bias. So, of each channel,

    - the bias becomes a whole number: half a unit is small beside a step of the output, but it moves codes;
    - the multiplier becomes an odd number of MANTISSA bits over a power of two. Products then are whole multiples of
      that power's inverse. The first of them at a rounding threshold is half the odd number, which is beyond the 8-bit
      range for 10 bits; all others keep that inverse as their distance, so that float implementations, whatever their
      order of operations, round them alike.

    Done here, it is in the model that is measured. The correction takes it up (one is made where there is none), as it
    stays FP32 in checkpoints.

    Args:
        conv: Quantized convolution.
        bn: The batch norm that reads its output.
        output_scale: Step of the output's quantizer.
    """
    if conv.correction is None:
        conv.correction = ChannelAffine(1).to(conv.weight.device)
    conv.correction = conv.correction.widened(conv.out_channels)
    scale, _ = fold(conv, bn)
    multiplier = conv.act_quant.scale.double() * scale / output_scale
    unit = 2.0 ** (torch.log2(multiplier.abs()).floor() - (MANTISSA - 1))
    snapped = (2 * torch.floor(multiplier / unit / 2) + 1) * unit  # the odd multiple nearest to it
    factor = snapped / multiplier
    used = factor.isfinite()  # a channel of zero scale stays as it is
    conv.correction.gamma.mul_(torch.where(used, factor, 1.0))

    scale, shift = fold(conv, bn)
    unit = conv.act_quant.scale.double() * scale
    change = (torch.round(shift / unit) * unit - shift) / _batch_norm_scale(bn)
    conv.correction.beta.add_(torch.where(change.isfinite(), change, 0.0))


@torch.no_grad()
def deploy_conv(conv: QuantConv2d, bn: nn.BatchNorm2d | None, name: str) -> DeployedConv2d:
    """The deployed form of a quantized convolution; `conv` is left as it is.

    Args:
        conv: Quantized convolution, corrected or not.
        bn: The batch norm that reads its output, in eval mode, or None; with it bn is to be left out.
        name: The layer's name in its model.

    Returns:
        A module whose output equals bn's (or the convolution's, without bn).

    Raises:
        QCError: If the convolution pads with anything but zeros.
    """
    if conv.padding_mode != "zeros":
        raise QCError(f"QC: {name} pads by {conv.padding_mode!r}; only zero padding can be deployed. Add it to skip.")
    scale, shift = fold(conv, bn)
    return DeployedConv2d(conv, scale.to(conv.weight.dtype), shift.to(conv.weight.dtype), name).train(conv.training)


def deploy_activation(act: QuantActivation) -> nn.Sequential:
    """The deployed form of an activation with a quantized input."""
    return nn.Sequential(FixedQuantizer(act.quant), act.act).train(act.training)


def deployed_convs(model: nn.Module) -> dict[str, DeployedConv2d]:
    """Name -> module of every deployed convolution, by the names they had when they were deployed."""
    return {m.name: m for m in model.modules() if isinstance(m, DeployedConv2d)}


def _along_channels(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)
