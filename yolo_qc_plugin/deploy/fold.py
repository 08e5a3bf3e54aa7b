# yolo_qc_plugin, AGPL-3.0
"""The deployed form: integer codes, and one scale and one bias per output channel for all behind their convolution.

With xhat = act_scale * (code_x - zero_point), what = s * code_w, the correction's gamma and beta, and batch norm's
a = bn.weight / sqrt(var + eps):

    BN(gamma * (conv(xhat, what) + bias) + beta) = act_scale * scale * conv(code_x - zero_point, code_w) + shift
        scale = a * gamma * s                                         per output channel, negative where a * gamma is
        shift = a * (gamma * bias + beta - mean) + bn.bias

The integer codes stay as they are. Batch norm folded into the weight, as for a float convolution, would change them.
"""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy
from threading import Lock
from typing import cast

import torch
from torch import Tensor, nn

from ..config import QCError
from ..quant.activations import QuantActivation, QuantSiLU
from ..quant.functional import along_channels, to_codes, widen
from ..quant.layers import Deployed, QuantConv2d
from ..quant.precision import KeepWide
from ..quant.quantizer import ActQuantizer
from .trace import traced_convolve, traced_quantize

WITHOUT_FP64 = {"mps"}  # kinds of devices
EXACT = 2**24  # FP32 holds every integer of up to this magnitude
OFF = 2**30  # a channel is off where its shift is this many units of its integer sums
STEPS = 2**20  # of such a channel's shift: with few, its scale over the output's would be more than runtimes take


class _WithoutCuDNN:
    """Convolutions that sum integers as they are: cuDNN's may be Winograd's, or Fourier's.

    The switch is the process's: threads that predict side by side keep it off until the last of them is done.
    (torch.backends.cudnn.flags fails where the user has set FP32's precision by torch's newer names.)
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._before = Lock(), 0, True

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before, torch.backends.cudnn.enabled = torch.backends.cudnn.enabled, False
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                torch.backends.cudnn.enabled = self._before


without_cudnn = _WithoutCuDNN()


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
        wide = widen(x)
        scale = wide.new_full((), self.scale)  # by a number CUDA would not divide, but multiply by 1 / scale
        return to_codes(wide, scale, None, *self.range)

    @property
    def range(self) -> tuple[int, int]:
        """The smallest and the largest of all `steps`."""
        return self.quant_min - self.zero_point, self.quant_max - self.zero_point

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize x of any shape."""
        if torch.jit.is_tracing():
            return traced_quantize(x, self.scale, self.zero_point, self.quant_min, self.quant_max)
        return self.steps(x).mul_(self.scale).to(x.dtype)

    def extra_repr(self) -> str:
        return f"range=[{self.quant_min}, {self.quant_max}], scale={self.scale:.4g}, zero_point={self.zero_point}"


class DeployedConv2d(Deployed, KeepWide, nn.Module):
    """Integer codes convolved, then one scale and one shift per output channel.

    The convolution of codes is exact, so this is what integer hardware computes. FP32 holds all integers up to 2^24; a
    layer whose sums can be larger (8-bit weights and inputs, some hundred channels) computes them in FP64, which takes
    longer, and on a device that has none in FP32, inexactly. On CUDA it is PyTorch's own convolution, a product of
    matrices: cuDNN may choose Winograd's or FFT, which multiply by fractions. Parameters of the convolution (stride,
    padding, ...) are those of nn.Conv2d.

    Attributes:
        name: The layer's name in its model.
        bits: Width of the weight.
        act_quant: FixedQuantizer of the input.
        weight_codes: int8, shape of the weight.
        wide_sums: Whether the sums need FP64.
        scale: Shape (out_channels,): weight scale, correction and batch norm; of either sign.
        shift: Shape (out_channels,).
        act: What `deploy_activation` makes of the convolution's own `act`, where it has one; else there is no such
            submodule.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: str | tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def __init__(self, conv: QuantConv2d, scale: Tensor, shift: Tensor, name: str):
        super().__init__()
        self.name, self.bits = name, conv.weight_quant.bits
        self.act_quant = FixedQuantizer(conv.act_quant)
        for key in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
            setattr(self, key, getattr(conv, key))
        # parameters, so that a model's summary counts them; floats first, as Ultralytics reads a model's dtype there
        self.scale, self.shift = nn.Parameter(scale, False), nn.Parameter(shift, False)
        self.weight_codes = nn.Parameter(conv.weight_codes(), False)
        self.wide_sums = largest_sum(self.weight_codes, *self.act_quant.range) > EXACT
        if (act := conv._modules.get("act")) is not None:
            self.act = deploy_activation(cast(QuantActivation, act))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x of shape (batch, in, height, width), and quantize the output where it has a grid."""
        y, act = self.scaled_sums(x), self._modules.get("act")
        return y if act is None else act(y)

    def scaled_sums(self, x: Tensor) -> Tensor:
        """What `forward` gives but for the output's grid."""
        if torch.jit.is_tracing():
            return traced_convolve(self.act_quant(x), self)
        steps = self.act_quant.steps(x)
        steps = steps.double() if self.wide_sums and x.device.type not in WITHOUT_FP64 else steps
        kind = steps.device.type
        plain = without_cudnn if steps.is_cuda else nullcontext()
        single = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
        with plain, single:
            sums = self.convolve(steps, self.weight_codes.to(steps.dtype))
        scale = (self.act_quant.scale * self.scale).to(steps.dtype)
        return torch.addcmul(along_channels(self.shift).to(steps.dtype), sums, along_channels(scale)).to(x.dtype)

    def positive_scale(self, lowest: int, highest: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes, scale and sign with scale > 0, for formats that want that.

        A channel of negative scale gets negated codes. Where one of them would leave [lowest, highest], as 8 = -(-8)
        leaves a 4-bit container, no codes are negated, and the convolution's output is to be multiplied by the sign.

        A channel that is `off` gets zero codes, and a scale of which its shift is a whole multiple.

        Returns:
            Codes (int16, shape of the weight), scale (out_channels,), sign (out_channels,) of +1 and -1, or None.
        """
        off, size = self.off, self.shift.double().abs()
        whole = torch.where(size > 0, size / self.act_quant.scale / STEPS, 1.0).to(self.scale.dtype)
        scale = torch.where(off, whole, self.scale.abs())
        sign = torch.where(self.scale < 0, -1, 1).to(torch.int16)
        codes = self.weight_codes.to(torch.int16) * ~off.view(-1, 1, 1, 1)
        negated = codes * sign.view(-1, 1, 1, 1)
        if negated.min() >= lowest and negated.max() <= highest:
            return negated, scale, None
        return codes, scale, sign.to(scale.dtype)

    @property
    def off(self) -> Tensor:
        """Which output channels have a scale of 0, or one so small that their shift would not fit an INT32 bias."""
        unit = self.act_quant.scale * self.scale.double().abs()
        return (unit == 0) | (self.shift.double().abs() >= unit * OFF)

    @property
    def pads(self) -> list[int]:
        """Zeros added at top, left, bottom and right."""
        if self.padding == "same":
            total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size)]
            return [*(n // 2 for n in total), *(n - n // 2 for n in total)]
        return [0, 0, 0, 0] if isinstance(self.padding, str) else [*self.padding, *self.padding]

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The plain convolution with this layer's stride, padding, dilation and groups."""
        return nn.functional.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"groups={self.groups}, bits={self.bits}"
        )


def largest_sum(codes: Tensor, low: int, high: int) -> int:
    """The largest magnitude of a channel's sum of products, complete or not, whatever the order of its terms.

    Args:
        codes: Integer weights, shape (out_channels, ...).
        low: The smallest number that they are multiplied by, <= 0.
        high: The largest, >= 0.
    """
    rows = codes.long().flatten(1)
    positive, negative = rows.clamp(min=0).sum(1), -rows.clamp(max=0).sum(1)
    return int(torch.maximum(positive * high - negative * low, negative * high - positive * low).max())


def fold(conv: QuantConv2d, bn: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor]:
    """Scale and shift of the header's formula, FP64, shape (out_channels,) each."""
    wide = torch.float64  # folding is done once: no digit is lost in it
    one = torch.ones(conv.out_channels, dtype=wide, device=conv.weight.device)
    gamma, beta = (1, 0) if conv.correction is None else (conv.correction.gamma.to(wide), conv.correction.beta.to(wide))
    bias = 0 if conv.bias is None else conv.bias.to(wide)
    scale, shift = one * gamma * conv.weight_quant.scale.to(wide), one * (gamma * bias + beta)
    if bn is not None:
        a = batch_norm_scale(bn)
        scale, shift = a * scale, a * (shift - bn.get_buffer("running_mean").to(wide)) + bn.bias.to(wide)
    return scale, shift


def batch_norm_scale(bn: nn.BatchNorm2d) -> Tensor:
    """What a batch norm in eval mode multiplies by, FP64, shape (channels,)."""
    return bn.weight.double() / torch.sqrt(bn.get_buffer("running_var").double() + bn.eps)


@torch.no_grad()
def deploy_conv(conv: QuantConv2d, bn: nn.BatchNorm2d | None, name: str) -> DeployedConv2d:
    """The deployed form of a quantized convolution; `conv` is left as it is.

    Args:
        conv: Quantized convolution, corrected or not.
        bn: The batch norm that reads its output, in eval mode, or None. It is part of what is returned.
        name: The layer's name in its model.

    Returns:
        A module whose output equals bn's (or the convolution's, without bn).

    Raises:
        QCError: If the convolution pads with anything but zeros.
    """
    if conv.padding_mode != "zeros":
        raise QCError(f"QC: {name} pads by {conv.padding_mode!r}; only zero padding can be deployed. Add it to skip.")
    device = conv.weight.device
    if device.type in WITHOUT_FP64:
        conv, bn = deepcopy(conv).cpu(), bn and deepcopy(bn).cpu()
    scale, shift = (v.to(conv.weight.dtype) for v in fold(conv, bn))
    return DeployedConv2d(conv, scale, shift, name).train(conv.training).to(device)


def deploy_activation(act: QuantActivation) -> nn.Sequential:
    """The deployed form of an activation with a quantized input."""
    function = act.function
    if isinstance(function, QuantSiLU):
        function = QuantSiLU(FixedQuantizer(cast(ActQuantizer, function.quant)))
    return nn.Sequential(FixedQuantizer(act.quant), function).train(act.training)


def deployed_convs(model: nn.Module) -> dict[str, DeployedConv2d]:
    """Name -> module of every deployed convolution, by the names they had when they were deployed."""
    return {m.name: m for m in model.modules() if isinstance(m, DeployedConv2d)}


def head_grids(model: nn.Module) -> dict[str, FixedQuantizer]:
    """Name of a head's bare convolution -> quantizer of its output, in a deployed model, where there is one."""
    acts = {name: layer._modules.get("act") for name, layer in deployed_convs(model).items()}
    return {name: cast(FixedQuantizer, act[0]) for name, act in acts.items() if isinstance(act, nn.Sequential)}
