# yolo_qc_plugin, AGPL-3.0
"""The quantizers: learned scale (LSQ) for weights, learned scale and offset (LSQ+) for activations."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .functional import fake_quantize, grid_offset, grid_position, per_slice, to_codes, widen
from .observers import lsq_scale, mse_scale, mse_scale_offset


class Quantizer(nn.Module):
    """State common to both quantizers: a positive scale, the integer range, and a switch.

    Args:
        bits: Width, 2 to 8.
        channels: Length of the scale: 1 for the tensor, or one per output channel.
        signed: Range [-2^(bits-1), 2^(bits-1) - 1] if true, else [0, 2^bits - 1].

    Attributes:
        scale: Parameter of shape (channels,), FP32, positive; a buffer once `fix` made it constant.
        quant_range: Buffer (quant_min, quant_max); a buffer because it changes what forward does.
        enabled: False lets values pass unquantized (calibration, float comparison).
    """

    scale: Tensor
    quant_range: Tensor

    def __init__(self, bits: int, channels: int = 1, signed: bool = True):
        super().__init__()
        self.bits = bits
        self.enabled = True
        self.scale = nn.Parameter(torch.ones(channels))
        self.register_buffer("quant_range", torch.zeros(2, dtype=torch.int32))
        self.set_signed(signed)

    def set_bits(self, bits: int) -> None:
        """Change the width, signed as before; the scale is to be started anew."""
        self.bits = bits
        self.set_signed(self.quant_min < 0)

    def set_signed(self, signed: bool) -> None:
        """Choose the signed or the unsigned range of this width."""
        half = 2 ** (self.bits - 1)
        self.quant_range.copy_(torch.tensor([-half, half - 1] if signed else [0, 2 * half - 1]))
        self._read_range()

    def _read_range(self) -> None:
        # plain ints beside the buffer: reading a tensor in every forward would wait for the device
        self.quant_min, self.quant_max = self.quant_range.tolist()

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self._read_range()

    @property
    def learned(self) -> bool:
        """Whether the scale is a parameter."""
        return "scale" in self._parameters

    def fix(self, scale: float) -> None:
        """Make the scale a constant, and an offset 0: buffers of the same names, neither calibrated nor trained."""
        for name, value in {"scale": scale, "offset": 0.0}.items():
            if (parameter := self._parameters.get(name)) is not None:
                del self._parameters[name]
                self.register_buffer(name, parameter.detach().fill_(value))

    def _start_scale(self, rows: Tensor, method: str) -> None:
        """Start the scale from rows (scales, n) by `method`, without offset."""
        lsq = method == "lsq"
        self.scale.copy_(lsq_scale(rows, self.quant_max) if lsq else mse_scale(rows, self.quant_min, self.quant_max))

    def _share_outside(self, v: Tensor) -> Tensor:
        """Share of grid positions that clip to the range, rounding included: a 0-dim tensor in [0, 1]."""
        return ((v < self.quant_min - 0.5) | (v > self.quant_max + 0.5)).float().mean()

    def extra_repr(self) -> str:
        return f"bits={self.bits}, range=[{self.quant_min}, {self.quant_max}], scales={self.scale.numel()}"


class WeightQuantizer(Quantizer):
    """Signed, symmetric, per tensor (channels=1) or per output channel.

    LSQ's gradient scale counts the weights that share a scale.

    Args:
        bits: Width, 2 to 8.
        channels: Length of the scale.
        int8: Leave out -128, the code of 8 bits that has no positive counterpart.
    """

    __module__ = "yolo_qc_plugin"  # by which checkpoints name it

    int8 = False  # of checkpoints written before it was kept; their range is

    def __init__(self, bits: int, channels: int = 1, int8: bool = False):
        super().__init__(bits, channels)
        self.int8 = int8
        self.set_signed(True)

    def set_signed(self, signed: bool) -> None:
        """Choose the signed or the unsigned range of this width."""
        super().set_signed(signed)
        if self.int8 and self.bits == 8:
            self.quant_range[0] += 1
            self._read_range()

    def forward(self, weight: Tensor) -> Tensor:
        """Fake-quantize a weight of shape (out, ...)."""
        if not self.enabled:
            return weight
        return fake_quantize(weight, self.scale, None, self.quant_min, self.quant_max, self.grad_scale(weight))

    def grad_scale(self, weight: Tensor) -> float:
        """LSQ's gradient scale, 1 / sqrt(weights of a scale * quant_max)."""
        return (weight.numel() / self.scale.numel() * self.quant_max) ** -0.5

    @torch.no_grad()
    def calibrate(self, weight: Tensor, method: str) -> None:
        """Start the scale from the weight itself by `method` ("mse" or "lsq")."""
        self._start_scale(weight.detach().float().reshape(self.scale.numel(), -1), method)

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Tensor:
        """Integer codes of `weight`, int8, in its shape."""
        return to_codes(widen(weight), self.per_weight(weight), None, self.quant_min, self.quant_max).to(torch.int8)

    @torch.no_grad()
    def clipped(self, weight: Tensor) -> Tensor:
        """Share of `weight` outside the range, rounding included: a 0-dim tensor in [0, 1]."""
        return self._share_outside(widen(weight) / self.per_weight(weight))

    def per_weight(self, weight: Tensor) -> Tensor:
        """The scale as it broadcasts to a weight of shape (out, ...)."""
        return per_slice(self.scale, weight)


@dataclass
class _Kept:
    """What was quantized last, the versions of all that the result depends on, and the result."""

    x: Tensor
    versions: list[int]
    result: Tensor


class ActQuantizer(Quantizer):
    """Per tensor; symmetric without offset (LSQ), or with a learned one (LSQ+).

    Without offset the range is unsigned where the calibration data are non-negative, else signed. With offset it is
    unsigned, and `functional.grid_offset` of the offset is used.

    LSQ's gradient scale counts one sample's features.

    Args:
        bits: Width, 2 to 8.
        offset: Learn an offset.
        int8: Never choose the unsigned range of 8 bits, whose codes do not fit into INT8.

    Attributes:
        offset: Parameter of shape (1,), FP32, or None.
        readers: Number of convolutions that quantize their inputs by this. In training a tensor that they all read is
            quantized once, and the result let go of after as many calls.
    """

    __module__ = "yolo_qc_plugin"  # by which checkpoints name it

    int8 = False  # of checkpoints written before there was the choice
    readers = 1
    _kept: _Kept | None = None
    _reads = 0  # in this pass

    def __init__(self, bits: int, offset: bool, int8: bool = False):
        super().__init__(bits, signed=not offset)
        self.int8 = int8
        self.offset = nn.Parameter(torch.zeros(1)) if offset else None

    @property
    def zero_point(self) -> int:
        """The code of 0, in [quant_min, quant_max]."""
        offset = self.grid_offset()
        return 0 if offset is None else -round((offset / self.scale).item())

    @torch.no_grad()
    def grid_offset(self) -> Tensor | None:
        """The offset that forward uses: a whole number of steps in [-quant_max, 0]."""
        if self.offset is None:
            return None
        return grid_offset(self.offset, self.scale, self.quant_min, self.quant_max)

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize activations of shape (batch, ...)."""
        if not self.enabled:
            return x
        if self.readers == 1 or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            if self._kept is not None:  # of a pass that ended in an error
                self.let_go()
            return self._quantized(x)
        versions = [t._version for t in (x, self.scale, self.offset) if t is not None]  # as they are changed in place
        if self._kept is None or self._kept.x is not x or self._kept.versions != versions:
            self._kept = _Kept(x, versions, self._quantized(x))
        result = self._kept.result
        self._reads += 1
        if self._reads == self.readers:
            self.let_go()
        return result

    def let_go(self) -> None:
        """Forget the result that is kept for further readers, and with it what its backward pass needs."""
        self._kept, self._reads = None, 0

    def _quantized(self, x: Tensor) -> Tensor:
        grad_scale = (max(math.prod(x.shape[1:]), 1) * self.quant_max) ** -0.5
        return fake_quantize(x, self.scale, self.offset, self.quant_min, self.quant_max, grad_scale)

    def __getstate__(self) -> dict:
        return {k: v for k, v in vars(self).items() if k not in {"_kept", "_reads"}}

    @torch.no_grad()
    def calibrate(self, values: Tensor, low: float, method: str) -> None:
        """Start scale, offset and range from a sample.

        Args:
            values: Sample of the activations, shape (n,).
            low: Smallest of these seen, in the sample or not.
            method: "mse" or "lsq".
        """
        if self.offset is None:
            self.set_signed(low < 0 or (self.int8 and self.bits == 8))
            self._start_scale(values[None], method)
        elif method == "lsq":
            self.offset.fill_(min(low, 0.0))
            self._start_scale(values[None] - min(low, 0.0), method)
        else:
            scale, offset = mse_scale_offset(values, self.quant_max)
            self.scale.copy_(scale)
            self.offset.copy_(offset)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Integer codes of `x`, int16, in its shape."""
        return to_codes(widen(x), self.scale, self.grid_offset(), self.quant_min, self.quant_max).to(torch.int16)

    @torch.no_grad()
    def clipped(self, x: Tensor) -> Tensor:
        """Share of `x` outside the range, rounding included: a 0-dim tensor in [0, 1]."""
        return self._share_outside(grid_position(widen(x), self.scale, self.grid_offset()))
