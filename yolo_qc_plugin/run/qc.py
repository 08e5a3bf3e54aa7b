# yolo_qc_plugin, AGPL-3.0
"""Train QC in a run: over the trainer's own loader, with its loss, its precision and its progress bar."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import LOGGER, TQDM

from ..config import QCConfig
from ..deploy.snap import snap
from ..host import architecture
from ..host.distributed import whole
from ..host.teacher import Teacher
from ..qat.correction import (
    corrected_in_norms,
    freeze_statistics,
    insert_correction,
    train_correction,
)
from ..qat.prepare import weights_quantized_once
from .steps import distillation


def take_all_images(trainer: BaseTrainer) -> None:
    """Give rank 0 of several processes loaders of all images in place of those of its share."""
    if trainer.world_size > 1:
        for loader in (trainer.train_loader, trainer.test_loader):
            loader.close()
        trainer.train_loader, trainer.test_loader = (
            whole(trainer.train_loader, shuffle=True),
            whole(trainer.test_loader, shuffle=False),
        )
        trainer.validator.dataloader = trainer.test_loader


def train_qc(trainer: BaseTrainer, config: QCConfig, source: Path, teacher: Teacher | None = None) -> nn.Module:
    """Train QC on the checkpoint `source` over the trainer's own loader, with its own loss and precision.

    Args:
        trainer: Set up.
        config: The options.
        source: Checkpoint to correct.
        teacher: The float model that the run starts from, where it teaches: its losses join, weighted as in training.

    Returns:
        The corrected model, in eval mode.

    Raises:
        FloatingPointError: If the loss is not finite.
    """
    model, _ = load_checkpoint(source, device=trainer.device)
    architecture.take_memory_format(model, architecture.student(trainer.model))
    record_args, model.args = model.args, trainer.args  # the criterion reads hyperparameters as attributes
    parameters = insert_correction(
        model, config.correction == "channel", config.correction_scale, config.correction_shift
    )
    freeze_statistics(model)
    model.criterion = model.init_criterion()
    if hasattr(model.criterion, "update"):  # the end-to-end loss shifts its weights by the epoch: use the last one's
        model.criterion.updates = trainer.epoch - 1
        model.criterion.update()

    dtype = architecture.amp_dtype(trainer)
    begun = trainer.scaler.get_scale() if trainer.scaler.is_enabled() else 2.0**16  # what training has come to
    scaler = torch.amp.GradScaler(trainer.device.type, begun, enabled=dtype == torch.float16)
    shown: dict = {}
    taught = distillation(trainer, config, model, teacher) if teacher else None

    def loss(batch: dict) -> torch.Tensor:
        with torch.autocast(trainer.device.type, dtype) if dtype else nullcontext():
            batch = trainer.preprocess_batch(batch)
            if taught:
                taught.prepare()
            value, items = model(batch)
        shown.update(items=items, instances=batch["cls"].shape[0], imgsz=batch["img"].shape[-1])
        return value.sum()

    epochs = (_progress(trainer, epoch, config.correction_epochs, shown) for epoch in range(config.correction_epochs))
    accumulate = max(trainer.world_size, 1)  # batches of one device make one of the run
    steps = config.correction_epochs * math.ceil(len(trainer.train_loader) / accumulate)
    with weights_quantized_once(model, dtype), corrected_in_norms(architecture.normed_blocks(model)):
        train_correction(parameters, epochs, loss, config.correction_lr, steps, scaler, accumulate)
    model.criterion, model.args = None, record_args
    snap(model, architecture.blank_image(model))
    model.to(memory_format=torch.contiguous_format)  # as Ultralytics writes checkpoints, whatever it trained in
    return model.eval().requires_grad_(False)  # as a stripped checkpoint is


def _progress(trainer: BaseTrainer, epoch: int, epochs: int, shown: dict) -> Iterator[dict]:
    """The training loader with the bar of training: epoch, memory, mean losses, instances, size."""
    LOGGER.info(trainer.progress_string())
    trainer.train_loader.reset()
    bar = TQDM(trainer.train_loader, total=len(trainer.train_loader))
    mean: dict[str, float] = {}
    for i, batch in enumerate(bar):
        yield batch
        mean = {k: (mean.get(k, 0.0) * i + v.detach()) / (i + 1) for k, v in shown["items"].items()}
        bar.set_description(
            ("%11s" * 2 + "%11.4g" * (2 + len(mean)))
            % (
                f"QC {epoch + 1}/{epochs}",
                f"{trainer._get_memory():.3g}G",
                *mean.values(),
                shown["instances"],
                shown["imgsz"],
            )
        )
