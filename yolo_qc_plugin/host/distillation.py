# yolo_qc_plugin, AGPL-3.0
"""Distillation: losses that draw a model's raw outputs, and its features, to those of a float teacher.

The teacher is the float model that training starts from (`teacher`), or Ultralytics' own (distill_model), which itself
compares the features before the head. The teacher's outputs stand in for labels. For each place of the feature maps, q
and p are class probabilities of teacher and student, Q and P their distributions of the distance to each side of the
box, and c = max q:

    outputs  = (cls * sum (BCE(p, q) - H(q))  +  dfl * sum c * mean over sides KL(Q || P)) / sum c
    others   = mean over keypoints, angles, mask coefficients and places of their error in units of their spread
    features = mean over layers, channels, images and places of (student - teacher)^2 / spread of the channel

Soft labels as in Hinton et al. 2015, distributions of sides as in localization distillation (Zheng et al., CVPR 2022);
`cls` and `dfl` are Ultralytics' gains of its own losses of the same outputs. The layers are the top-level ones, and the
spread is the variance of a channel of the teacher, so that every layer and channel counts alike. Both losses are 0
where the two agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from ultralytics.nn.modules import Classify, Detect
from ultralytics.nn.tasks import BaseModel

from ..config import QCError
from ..quant.layers import is_quantized
from . import architecture
from .checkpoints import open_checkpoint
from .teacher import Teacher, feature_layers

HEAD = -1  # its place among the layers that are watched


def scores_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Binary cross-entropy against the teacher's probabilities, less their own entropy, summed; a 0-dim tensor.

    Args:
        student: Logits of shape (batch, classes, places).
        teacher: The same.
    """
    probabilities = teacher.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(teacher, probabilities, reduction="sum")
    return F.binary_cross_entropy_with_logits(student, probabilities, reduction="sum") - entropy


def sides_loss(student: Tensor, teacher: Tensor, reg_max: int) -> Tensor:
    """Divergence of the teacher's distributions of the distance to a side, mean over the four: (batch, places).

    Args:
        student: Logits of shape (batch, 4 * reg_max, places).
        teacher: The same.
        reg_max: Bins of a distribution.
    """
    batch, _, places = student.shape
    log_p, log_q = (x.view(batch, 4, reg_max, places).log_softmax(2) for x in (student, teacher))
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(2).mean(1)


def distances_loss(student: Tensor, teacher: Tensor, sizes: Tensor) -> Tensor:
    """Mean absolute difference of distances to the four sides, in sizes of the image: (batch, places).

    For heads without distributions (reg_max 1, YOLO26).

    Args:
        student: Distances of shape (batch, 4, places), in strides.
        teacher: The same.
        sizes: Stride over the image's width or height, shape (4, places).
    """
    return ((student - teacher).abs() * sizes).mean(1)


def outputs_loss(student: dict, teacher: dict, reg_max: int, cls: float, dfl: float) -> Tensor:
    """The loss above; a 0-dim tensor.

    Args:
        student: Raw outputs of Ultralytics' head: `scores` (batch, classes, places), `boxes` (batch, 4 * reg_max,
            places), `feats`, a list of (batch, channels, height, width).
        teacher: The same, of the same places.
        reg_max: Bins of a distribution of sides; 1 where distances are given themselves.
        cls: Gain of class probabilities.
        dfl: Gain of box sides.
    """
    s, t = ({k: outputs[k].float() for k in ("scores", "boxes")} for outputs in (student, teacher))
    confidence = t["scores"].sigmoid().amax(1)
    if reg_max > 1:
        sides = sides_loss(s["boxes"], t["boxes"], reg_max)
    else:
        shapes = [f.shape[2:] for f in student["feats"]]  # stride over the image's size is 1 over the feature map's
        # filled on the device, as a tensor made of numbers is a copy that waits for it
        filled = [[s["boxes"].new_full((h * w,), 1 / side) for side in (w, h)] for h, w in shapes]
        sides = distances_loss(s["boxes"], t["boxes"], torch.cat([torch.stack(pair * 2) for pair in filled], 1))
    total = cls * scores_loss(s["scores"], t["scores"]) + dfl * (sides * confidence).sum()
    return total / confidence.sum().clamp_min(1)


def others_loss(student: dict, teacher: dict) -> Tensor:
    """What a head gives beside classes and boxes: squared errors over the teacher's variance, a 0-dim tensor.

    Mask coefficients, keypoints and angles, of shape (batch, n, places), are weighted by the teacher's confidence, and
    mask prototypes, of shape (batch, n, height, width), not. Each counts alike; the loss is 0 where there are none.

    Args:
        student: Raw outputs of Ultralytics' head.
        teacher: The same, of the same places.
    """
    # in training alone YOLO26 has spreads of keypoints, and a semantic mask beside the prototypes
    student = {k: v[0] if isinstance(v, tuple) else v for k, v in student.items() if k in teacher}
    others = sorted(student.keys() - {"boxes", "scores", "feats"})
    total = student["scores"].new_zeros((), dtype=torch.float32)
    if not others:
        return total
    confidence = teacher["scores"].float().sigmoid().amax(1)
    for name in others:
        target = teacher[name].float()
        places = tuple(range(2, target.ndim))
        error = (student[name].float() - target).square() / target.var((0, *places), keepdim=True).clamp_min(1e-6)
        weight = confidence if target.ndim == 3 else torch.ones_like(error[:, 0])
        total = total + (error.mean(1) * weight).sum() / weight.sum().clamp_min(1)
    return total


def features_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], spreads: Sequence[Tensor]) -> Tensor:
    """The loss above; a 0-dim tensor.

    Args:
        student: Outputs of layers, each of shape (batch, channels, height, width).
        teacher: The same, without gradients.
        spreads: Of each, shape (channels,).
    """
    return torch.stack([_SpreadError.apply(*of_layer) for of_layer in zip(student, teacher, spreads)]).mean()


class _SpreadError(torch.autograd.Function):
    """mean((x - target)^2 / spread): one pass forward and one backward where autograd would take several."""

    @staticmethod
    def forward(ctx, x: Tensor, target: Tensor, spread: Tensor) -> Tensor:
        error = x - target.to(x.dtype)
        ctx.save_for_backward(error, spread)
        return (error.float().square().sum((0, 2, 3)) / spread).sum() / error.numel()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        error, spread = ctx.saved_tensors
        return error * (grad * 2 / error.numel() / spread).to(error.dtype).view(-1, 1, 1), None, None


@dataclass(frozen=True)
class Gains:
    """Weights of the parts of the training loss.

    Args:
        outputs: Of the loss of outputs.
        features: Of the loss of features; with Ultralytics' teacher its own `dis` takes this place.
        labels: Of Ultralytics' loss.
        cls: Of class probabilities among the outputs.
        dfl: Of box sides among the outputs.
    """

    outputs: float
    features: float
    labels: float
    cls: float
    dfl: float


class Distillation:
    """Adds the losses to what a model returns in training, and to what is shown of it.

    They count once per image, as Ultralytics' loss does (`dampening`). With a one-to-many and a one-to-one head the
    loss of outputs is the mean of both.

    Args:
        model: What is called with a batch in training: the student, or Ultralytics' student beside its own teacher.
        gains: Weights of the losses.
        teacher: The start of the run; None where `model` has a teacher of its own.
        summed: False where Ultralytics' loss is the mean over a batch's images.
    """

    SHOWN = "teacher_loss"  # among the losses that training shows

    def __init__(self, model: nn.Module, gains: Gains, teacher: Teacher | None = None, summed: bool = True):
        self.model, self.gains, self.teacher, self.summed = model, gains, teacher, summed
        self._seen: dict[str, dict[int, Any]] = {}  # "student" or "teacher" -> feature layer, or HEAD -> output
        self._hooks: list = []

    def prepare(self) -> None:
        """Add the losses in the next forward pass."""
        self._release()  # of a pass that ended in an error
        # for one pass: hooks that stayed would be carried along by copies of the model
        self._watch("student", architecture.student(self.model))
        if self.teacher is None:
            self._watch("teacher", self.model.teacher_model)
        self._hooks.append(self.model.register_forward_hook(self._add))

    def loss(self) -> Tensor:
        """The losses, weighted, of what both gave in the pass."""
        ours, theirs = ({**self._seen[name]} for name in ("student", "teacher"))
        outputs = head_loss(detector(architecture.student(self.model)), ours.pop(HEAD), theirs.pop(HEAD), self.gains)
        if self.teacher is None or not self.gains.features:
            return outputs
        features = features_loss([*ours.values()], [theirs[i] for i in ours], [self.teacher.spreads[i] for i in ours])
        return outputs + self.gains.features * features

    def _watch(self, name: str, model: BaseModel) -> None:
        seen = self._seen.setdefault(name, {})
        layers = dict(enumerate(feature_layers(model))) if self.teacher and self.gains.features else {}
        for place, layer in {**layers, HEAD: detector(model)}.items():
            self._hooks.append(layer.register_forward_hook(partial(self._keep, seen, place)))

    @staticmethod
    def _keep(seen: dict, place: int, layer: nn.Module, args: tuple, output) -> None:
        seen[place] = output

    def _add(self, model: nn.Module, args: tuple, output: tuple) -> tuple:
        images = args[0]["img"]
        if self.teacher:
            self._watch("teacher", self.teacher.model)
            with torch.no_grad():
                self.teacher.model(images)
        loss = self.loss()
        self._release()
        total, shown = output
        of_labels, of_teacher = (total.sum(), 0) if self.teacher else (total[:-1].sum(), total[-1])
        name = self.SHOWN if self.teacher else "dis_loss"
        shown = {**shown, name: shown.get(name, 0) + loss.detach()}
        times = len(images) if self.summed else 1
        return self.gains.labels * of_labels + of_teacher + times * loss, shown

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._seen = [], {}


def head_loss(head: Any, student: Any, teacher: Any, gains: Gains) -> Tensor:
    """The loss of outputs, weighted, of what a head of the student and one of the teacher returned.

    A classifier's is the divergence of the teacher's distribution over the classes, KL(q || p).
    """
    if not gains.outputs:
        return torch.zeros((), device=next(head.parameters()).device)
    if isinstance(head, Classify):
        log_p, log_q = ((x[1] if isinstance(x, tuple) else x).float().log_softmax(1) for x in (student, teacher))
        return gains.outputs * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    ours, theirs = branches(student), branches(teacher)
    losses = [
        outputs_loss(ours[k], theirs[k], head.reg_max, gains.cls, gains.dfl) + others_loss(ours[k], theirs[k])
        for k in ours
        if k in theirs
    ]
    return gains.outputs * torch.stack(losses).mean()


def branches(output: dict | tuple) -> dict[str, dict]:
    """Branch -> raw outputs, of what Ultralytics' head returns in training or (decoded, raw) in inference."""
    raw = output[1] if isinstance(output, tuple) else output
    return raw if "one2one" in raw else {"one2many": raw}


def detector(model: BaseModel) -> Detect:
    """The head of a model."""
    return model.model[-1]


def check_teacher(file: str, student: nn.Module, outputs: bool) -> None:
    """Refuse a teacher that is quantized, or whose outputs cannot be compared with the student's place by place.

    Args:
        file: Checkpoint of the teacher.
        student: The model to train.
        outputs: Whether outputs are to be compared.

    Raises:
        QCError: Naming what is wrong and what is accepted.
    """
    teacher = open_checkpoint("distill_model", file).model
    if is_quantized(teacher):
        raise QCError(f"QC: distill_model={file} is quantized; give a float checkpoint.")
    if not outputs:
        return
    for name, meaning in {"nc": "classes", "reg_max": "bins of a box side", "stride": "strides"}.items():
        ours, theirs = (torch.as_tensor(getattr(detector(m), name, 0)).tolist() for m in (student, teacher))
        if ours != theirs:
            raise QCError(
                f"QC: the teacher in distill_model has {theirs} {meaning}, the model {ours}; give a teacher with the "
                "same outputs, or distill_outputs=0 for Ultralytics' comparison of features alone."
            )
