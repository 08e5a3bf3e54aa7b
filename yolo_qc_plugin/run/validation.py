# yolo_qc_plugin, AGPL-3.0
"""Measuring by Ultralytics' own validator: always a model's deployed form, always in FP32.

A low-bit model enlarges the last digits of floats: sums in another order, or batch norm folded or not, move values over
rounding thresholds here and there, and what follows moves more. The deployed form sums integers, exactly, and is the
same in a run, in a file and in a graph; so that is what every figure is of.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from copy import copy, deepcopy
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.engine.validator import BaseValidator
from ultralytics.nn.tasks import BaseModel
from ultralytics.utils import RANK

from ..coco.records import Record, all_metrics, in_coco_form, recording
from ..host import log
from ..host.architecture import deploy_model
from ..host.distillation import Distillation
from ..host.distributed import at_rank_0
from ..quant.layers import scale_parameters
from ..report.record import figures_of


def validate(trainer: BaseTrainer, model: nn.Module | Path, coco: bool = False) -> dict[str, Any]:
    """Measure a model on the validation set as Ultralytics' final evaluation does.

    Args:
        trainer: Set up; its validator and loader are used.
        model: Checkpoint, or a module (fused in the course of it, so give a copy).
        coco: Measure the same predictions by pycocotools too; by all processes of a run, or none.

    Returns:
        The task's figures, as `figures_of` names them; and "coco" where that is asked for (see `_coco_figures`), in a
        run of several processes on rank 0.
    """
    validator = trainer.validator
    # arguments of its own: a measurement outside training sets some of them for good (save_json on COCO, say)
    args, validator.args = validator.args, copy(validator.args)
    validator.args.plots = validator.args.save_json = False
    try:
        with recording(validator) if coco else nullcontext() as records:
            validator(model=model)
    finally:
        validator.args = args
    figures: dict[str, Any] = figures_of(validator.metrics.results_dict)
    if records is not None:
        records = at_rank_0(records)
        figures |= {"coco": _coco_figures(validator, records)} if RANK in {-1, 0} else {}
    return figures


def _coco_figures(validator: BaseValidator, records: list[Record]) -> dict[str, Any]:
    """`coco_metrics` by what is compared, and "ground_truth", what they are held against: a file or "labels"."""
    truth, results = in_coco_form(validator, records)
    found = all_metrics(validator, truth, results)
    source = truth["info"]["description"]
    told = ", ".join(f"{kind} {100 * (metrics['AP'] or 0):.2f}" for kind, metrics in found.items())
    log.info(f"AP by pycocotools, in points: {told} (ground truth: {source})")
    return {"ground_truth": source, **found}


def training_images(trainer: BaseTrainer, batches: int) -> Iterator[torch.Tensor]:
    """Images of so many batches of the run, as the model takes them; of several processes' run, by one of them."""
    for batch in islice(trainer.train_loader, batches * max(trainer.world_size, 1)):
        yield trainer.preprocess_batch(batch)["img"]


class EpochValidation:
    """Has Ultralytics' validation after each epoch run the averaged model's deployed form."""

    _averaged: BaseModel
    _layers: nn.Module | None = None  # of the averaged model, while their deployed copies are in their place

    def expect(self, averaged: BaseModel) -> None:
        """Take note of the model that is about to be validated."""
        self._averaged = averaged

    def begin(self, validator: BaseValidator) -> None:
        """Put deployed copies of the layers in their place, and have this and the final validation run in FP32."""
        if not validator.training:
            return
        validator.args.quantize = None  # mixed precision; `yolo val` of the file takes FP32
        model = self._averaged
        if not all(p.isfinite().all() for p in scale_parameters(model)):
            return  # no grid to deploy; Ultralytics sees the NaN and recovers
        if getattr(model, "criterion", None) is None:
            model.criterion = model.init_criterion()  # now: it may hold parts of the layers
        self._layers, model.model = model.model, deepcopy(model.model)
        deploy_model(model)

    def end_batch(self, validator: BaseValidator, taught: bool) -> None:
        """After the last batch, put the layers back: on every process, and before anything is saved.

        Args:
            validator: Has measured a batch.
            taught: Whether a teacher's loss is among those of training; validation has none.
        """
        if validator.training and taught:
            validator.loss[Distillation.SHOWN] += torch.zeros((), device=validator.device)  # results.csv has a column
        if validator.training and validator.batch_i + 1 == len(validator.dataloader):
            self.put_back()

    def put_back(self) -> None:
        """Put the layers back, if they are not in their place; also after a validation that ended in an error."""
        if self._layers is not None:
            self._averaged.model, self._layers = self._layers, None
