# yolo_qc_plugin, AGPL-3.0
"""Distillation of outputs: a loss that draws a detector's raw outputs to those of a float teacher.

The teacher is Ultralytics' (distill_model), which itself compares the features before the head. Here the teacher's
outputs stand in for labels. For each place of the feature maps, q and p are class probabilities of teacher and student,
Q and P their distributions of the distance to each side of the box, and c = max q:

    loss = (cls * sum (BCE(p, q) - H(q))  +  dfl * sum c * mean over sides KL(Q || P)) / sum c

Soft labels as in Hinton et al. 2015, distributions of sides as in localization distillation (Zheng et al., CVPR 2022);
`cls` and `dfl` are Ultralytics' gains of its own losses of the same outputs. The loss is 0 where both agree.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.nn.modules import Detect
from ultralytics.nn.tasks import BaseModel, load_checkpoint

from ..config import QCError
from ..quant.layers import is_quantized


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
        over = [s["boxes"].new_tensor([1 / w, 1 / h] * 2)[:, None].expand(4, h * w) for h, w in shapes]
        sides = distances_loss(s["boxes"], t["boxes"], torch.cat(over, 1))
    total = cls * scores_loss(s["scores"], t["scores"]) + dfl * (sides * confidence).sum()
    return total / confidence.sum().clamp_min(1)


class Distillation:
    """Adds the loss to what Ultralytics' model with a teacher returns in training, and to the `dis_loss` it shows.

    It counts once per image, as Ultralytics' loss does (`dampening`). With a one-to-many and a one-to-one head it is
    the mean of both.

    Args:
        model: Student and teacher.
        weight: Of the loss.
        cls: Gain of class probabilities.
        dfl: Gain of box sides.
    """

    def __init__(self, model: DistillationModel, weight: float, cls: float, dfl: float):
        self.model, self.weight = model, weight
        self.gains = {"cls": cls, "dfl": dfl}
        self._outputs: dict[str, Any] = {}
        self._hooks: list = []

    def prepare(self) -> None:
        """Add the loss in the next forward pass."""
        self._release()  # of a pass that ended in an error
        # for one pass: hooks that stayed would be carried along by copies of the model
        for name in ("student", "teacher"):
            head = detector(getattr(self.model, f"{name}_model"))
            self._hooks.append(head.register_forward_hook(partial(self._keep, name)))
        self._hooks.append(self.model.register_forward_hook(self._add))

    def loss(self) -> Tensor:
        """The loss, before its weight, of what both heads gave in the pass."""
        student, teacher = (branches(self._outputs[name]) for name in ("student", "teacher"))
        reg_max = detector(self.model.student_model).reg_max
        losses = [outputs_loss(student[k], teacher[k], reg_max, **self.gains) for k in student.keys() & teacher.keys()]
        return torch.stack(losses).mean()

    def _keep(self, name: str, head: nn.Module, args: tuple, output) -> None:
        self._outputs[name] = output

    def _add(self, model: nn.Module, args: tuple, output: tuple) -> tuple:
        loss = self.weight * self.loss()
        self._release()
        total, shown = output
        shown = {**shown, "dis_loss": shown["dis_loss"] + loss.detach()}
        return total.sum() + len(args[0]["img"]) * loss, shown

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._outputs = [], {}


def branches(output: dict | tuple) -> dict[str, dict]:
    """Branch -> raw outputs, of what Ultralytics' head returns in training or (decoded, raw) in inference."""
    raw = output[1] if isinstance(output, tuple) else output
    return raw if "one2one" in raw else {"one2many": raw}


def detector(model: BaseModel) -> Detect:
    """The head of a detection model, or of one of a task that builds on it."""
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
    teacher, _ = load_checkpoint(file)
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
