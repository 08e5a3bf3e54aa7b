# yolo_qc_plugin, AGPL-3.0
"""What keeps FP32, whatever a model is cast to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .modules import replace_modules, twin


class KeepWide(nn.Module):
    """Keeps a module's parameters and buffers in FP32 (or wider), whatever the model is cast to.

    A latent weight near a rounding threshold changes its code when it is rounded to FP16, and a small scale loses its
    digits.
    """

    def _apply(self, fn, recurse: bool = True):
        return super()._apply(lambda t: _keep_wide(t, fn(t)), recurse)


class WideBatchNorm2d(KeepWide, nn.BatchNorm2d):
    """nn.BatchNorm2d in FP32 (or wider); it takes inputs of any precision as it is."""

    __module__ = "yolo_qc_plugin"  # by which checkpoints name it


class OwnPrecision(KeepWide):
    """Keeps FP32 (or wider) and computes in it, whatever the precision of the input, which the result has too."""

    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """What the layer makes of x."""
        if x.dtype == self.weight.dtype:  # no casts in an exported graph
            return super().forward(x)
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class WideConv2d(OwnPrecision, nn.Conv2d):
    """A convolution left in float."""

    __module__ = "yolo_qc_plugin"  # by which checkpoints name it


class WideConvTranspose2d(OwnPrecision, nn.ConvTranspose2d):  # type: ignore[misc]  # its forward takes a size too
    """nn.ConvTranspose2d, of heads with masks."""

    __module__ = "yolo_qc_plugin"  # by which checkpoints name it


class WideLinear(OwnPrecision, nn.Linear):
    """nn.Linear, of heads that classify."""

    __module__ = "yolo_qc_plugin"  # by which checkpoints name it


# Layers that are not quantized, but whose rounding to FP16 would move the codes of activations behind them: what a
# checkpoint holds would not be what was measured in training.
WIDE = {
    nn.BatchNorm2d: WideBatchNorm2d,
    nn.Conv2d: WideConv2d,
    nn.ConvTranspose2d: WideConvTranspose2d,
    nn.Linear: WideLinear,
}


def keep_wide(model: nn.Module) -> None:
    """Put twins of WIDE, in place, for layers that are not quantized, so that they keep FP32 when a model is cast."""
    replace_modules(model, {m: twin(m, WIDE[type(m)]) for m in model.modules() if type(m) in WIDE})


def undo_keep_wide(model: nn.Module) -> None:
    """Put the plain layers back, with the very parameters."""
    plain = {wide: kind for kind, wide in WIDE.items()}
    replace_modules(model, {m: twin(m, plain[type(m)]) for m in model.modules() if type(m) in plain})


def _keep_wide(before: Tensor, after: Tensor) -> Tensor:
    """Undo a cast below FP32 and keep the rest of what was done, such as a move to another device."""
    return before.to(after.device) if after.dtype in (torch.float16, torch.bfloat16) else after
