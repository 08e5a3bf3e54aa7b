# yolo_qc_plugin, AGPL-3.0
"""What a cell tries that no option of the plugin gives: stages of a run, other gradients and losses, other starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from ultralytics.nn.modules import DFL
from ultralytics.utils.metrics import bbox_iou
from ultralytics.utils.tal import dist2bbox

from yolo_qc_plugin.host import distillation
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


class Fork(torch.autograd.Function):
    """Hands a tensor to several branches, and has the gradient that each gives back count alike.

    Each is brought to the mean of their norms before they are added.
    """

    @staticmethod
    def forward(ctx, x: Tensor, branches: int) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for _ in range(branches))

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None]:
        norms = torch.stack([g.norm() for g in gradients])
        shares = norms.mean() / norms.clamp_min(1e-12)  # of a branch that gives back nothing it must stay finite
        return sum(share * g for share, g in zip(shares, gradients)), None


def gradients_balanced(trainer) -> None:
    """Where several top-level layers read the output of one, their gradients count alike."""
    from ultralytics.utils.torch_utils import unwrap_model

    layers = list(unwrap_model(trainer.model).model)
    given = [m.f if isinstance(m.f, list) else [m.f] for m in layers]
    read = {i: [i - 1 if f == -1 else f for f in of] for i, of in enumerate(given)}  # layer -> those that it reads
    handed: dict[tuple[int, int], Tensor] = {}  # (source, reader) -> what this reader gets

    def hand(source: int, readers: list[int], layer: nn.Module, args: tuple, output: Tensor) -> None:
        handed.update(zip([(source, r) for r in readers], Fork.apply(output, len(readers))))

    def take(reader: int, layer: nn.Module, args: tuple) -> tuple:
        given = args[0] if isinstance(args[0], list) else [args[0]]
        taken = [handed.pop((source, reader), x) for source, x in zip(read[reader], given)]
        return (taken if isinstance(args[0], list) else taken[0], *args[1:])

    for source, layer in enumerate(layers):
        readers = [r for r, sources in read.items() if source in sources]
        if len(readers) > 1:
            layer.register_forward_hook(partial(hand, source, readers))
    for reader, layer in enumerate(layers):
        layer.register_forward_pre_hook(partial(take, reader))


def distances(boxes: Tensor, reg_max: int) -> Tensor:
    """Distances to the four sides, in strides, (batch, 4, places), of what a head gives for boxes."""
    return DFL(reg_max).to(boxes)(boxes) if reg_max > 1 else boxes


def overlap(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of boxes by their distances to the sides from the same places: (batch, places)."""
    corners = (dist2bbox(x, torch.zeros_like(x[:, :2]), xywh=False, dim=1) for x in (first, second))
    return bbox_iou(*(x.transpose(1, 2) for x in corners), xywh=False).squeeze(-1)


def aligned_loss(plain: Callable, student: dict, teacher: dict, reg_max: int, cls: float, dfl: float) -> Tensor:
    """The loss of outputs with the teacher's scores times the overlap of the student's box with the teacher's.

    A place whose box the student finds less well is to score less, so that it loses to its neighbours in suppression.
    """
    with torch.no_grad():
        same = overlap(*(distances(outputs["boxes"].float(), reg_max) for outputs in (student, teacher)))
        scores = teacher["scores"].float().sigmoid() * same[:, None]
    aligned = {**teacher, "scores": scores.logit(eps=1e-6)}
    return plain(student, aligned, reg_max, cls, 0.0) + plain(student, teacher, reg_max, 0.0, dfl)


def scores_aligned(trainer) -> None:
    """Training, and nothing after it, draws the model to scores by overlap."""
    distillation.outputs_loss = partial(aligned_loss, OUTPUTS_LOSS)


def scores_plain(trainer) -> None:
    """What is measured of a model knows nothing of it."""
    distillation.outputs_loss = OUTPUTS_LOSS


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


OUTPUTS_LOSS = distillation.outputs_loss
CALLBACKS = {
    "activations last": {"on_train_epoch_start": activations_last},
    "activations in stages": {"on_train_epoch_start": activations_in_stages},
    "weights rest": {"on_train_epoch_start": weights_rest},
    "gradients balanced": {"on_train_start": gradients_balanced},
    "scores by overlap": {"on_train_start": scores_aligned, "on_train_end": scores_plain},
}
STARTS = {
    "starts by L2.4": (by_power, by_power_with_offset),
    "starts by percentiles": (by_percentile, by_percentile_with_offset),
}


def add_trial(yolo, name: str | None) -> None:
    """Have a run try what a name says, one of CALLBACKS or STARTS; None is a run as any other."""
    if name in STARTS:
        starts(*STARTS[name])
    elif name:
        for event, callback in CALLBACKS[name].items():
            yolo.add_callback(event, callback)
