# yolo_qc_plugin, AGPL-3.0
"""What a cell tries that no option of the plugin gives: stages of a run, and other starts of the scales."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from yolo_qc_plugin.quant import quantizer
from yolo_qc_plugin.quant.calibrate import act_quantizers
from yolo_qc_plugin.quant.functional import fake_quantize
from yolo_qc_plugin.quant.layers import quant_convs
from yolo_qc_plugin.quant.quantizer import ActQuantizer

SEARCH_STEPS = 100
KEPT = 0.999  # share of the values that a start by percentiles does not cut
STAGES = 6, 5  # bits of activations in the first and the second quarter of the epochs


def rounded(trainer) -> Iterator[ActQuantizer]:
    """Quantizers of activations of the model that is trained, and of its average."""
    from ultralytics.utils.torch_utils import unwrap_model

    for model in (unwrap_model(trainer.model), trainer.ema.ema):
        yield from act_quantizers(model).values()


def activations_last(trainer) -> None:
    """Activations are rounded in the second half of the epochs alone."""
    for quant in rounded(trainer):
        quant.enabled = trainer.epoch >= trainer.epochs / 2


def activations_in_stages(trainer) -> None:
    """Activations lose a bit after a quarter of the epochs, and another after half of them; edges keep theirs."""
    quarter = int(4 * trainer.epoch / trainer.epochs)
    for quant in rounded(trainer):
        last = quant.__dict__.setdefault("last_bits", quant.bits)
        bits = max(last, STAGES[quarter]) if quarter < len(STAGES) else last
        if bits != quant.bits:
            before = quant.quant_max - quant.quant_min
            quant.set_bits(bits)
            with torch.no_grad():
                quant.scale.mul_(before / (quant.quant_max - quant.quant_min))


def weights_rest(trainer) -> None:
    """In the last fifth of the epochs, or the last one, scales, batch norm and biases train alone."""
    from ultralytics.utils.torch_utils import unwrap_model

    if trainer.epochs - trainer.epoch <= max(trainer.epochs // 5, 1):
        for _, conv in quant_convs(unwrap_model(trainer.model)):
            conv.weight.requires_grad_(False)


def by_power(x: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """The scale of least error to the power of 2.4 for each row of x (rows, n)."""
    full = x.abs().amax(1).clamp(min=1e-6) / quant_max
    best, least = full.clone(), torch.full_like(full, float("inf"))
    for step in range(1, SEARCH_STEPS + 1):
        scale = full * step / SEARCH_STEPS
        error = (fake_quantize(x, scale, None, quant_min, quant_max) - x).abs().pow(2.4).mean(1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def by_power_with_offset(x: Tensor, quant_max: int) -> tuple[Tensor, Tensor]:
    """The same with an offset, a whole number of steps, for values of shape (n,)."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 1e-6)
    most = min(quant_max, round(quant_max * -low / (high - low)) + 1)
    found = []
    for zero in {round(most * i / 8) for i in range(9)}:
        reach = max(high / max(quant_max - zero, 1), -low / max(zero, 1))
        for step in range(2, SEARCH_STEPS + 1, 2):
            scale = x.new_tensor([reach * step / SEARCH_STEPS])
            error = float((fake_quantize(x, scale, -zero * scale, 0, quant_max) - x).abs().pow(2.4).mean())
            found.append((error, float(scale), zero))
    _, best, zero = min(found)
    return x.new_tensor([best]), x.new_tensor([-zero * best])


def by_percentile(x: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """The scale that cuts one value of a thousand off each row of x (rows, n), none where it has fewer."""
    return (torch.quantile(x.abs(), KEPT, dim=1) / quant_max).clamp(min=1e-6)  # between the largest two of a short row


def by_percentile_with_offset(x: Tensor, quant_max: int) -> tuple[Tensor, Tensor]:
    """The same with an offset, for values of shape (n,), of which it cuts one of a thousand at each end."""
    ordered = x.sort().values
    low, high = (float(ordered[int(share * (len(x) - 1))]) for share in (1 - KEPT, KEPT))
    low, high = min(low, 0.0), max(high, 1e-6)
    scale = (high - low) / quant_max
    return x.new_tensor([scale]), x.new_tensor([-round(-low / scale) * scale])


def starts(scale: Callable, with_offset: Callable) -> None:
    """Have the quantizers of this process start by other functions than those of least squares."""
    quantizer.mse_scale, quantizer.mse_scale_offset = scale, with_offset  # type: ignore[assignment]


EPOCHS = {
    "activations last": activations_last,
    "activations in stages": activations_in_stages,
    "weights rest": weights_rest,
}
STARTS = {
    "starts by L2.4": (by_power, by_power_with_offset),
    "starts by percentiles": (by_percentile, by_percentile_with_offset),
}


def add_trial(yolo, name: str | None) -> None:
    """Have a run try what a name says, one of EPOCHS or STARTS; None is a run as any other."""
    if name in STARTS:
        starts(*STARTS[name])
    elif name:
        yolo.add_callback("on_train_epoch_start", EPOCHS[name])
