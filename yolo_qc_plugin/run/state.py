# yolo_qc_plugin, AGPL-3.0
"""The state of one run, and exact resume: a run that was killed, whenever it was, ends as if it had not been.

From last.pt alone Ultralytics goes on with the average, in half precision, in place of the weights, and with new random
numbers, another order of images, rounded optimizer state and steps after other batches. weights/resume.pt holds what
last.pt leaves out. It is written at the start of each epoch and deleted as the last act of a run: whatever was killed
(an epoch, the writing of a checkpoint, the correction) is done again from the start of that epoch.

    on_model_setup            `open` reads last.pt and resume.pt; Ultralytics then sets up as for a new run
    on_pretrain_routine_end   `restore` puts back what a run consists of
    on_train_epoch_start      `rewind` puts back what goes on from batch to batch, in the first epoch; `save` otherwise
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import torch
from torch import nn
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.utils import RANK
from ultralytics.utils.torch_utils import unwrap_model

from ..config import QCConfig, QCError
from ..files import AtomicPath
from ..host import log
from ..host.architecture import student
from ..host.record import QuantRecord, own_record, record_of, write_checkpoint
from ..host.teacher import FILE as TEACHER
from ..host.teacher import Teacher, teacher_of
from ..quant.layers import scale_parameters
from .randomness import random_state, set_random_state
from .resume import FILE, FORMAT, conclude, drop_rows, find_state, has_ended, mend_best
from .steps import Steps

DISTILL_MODEL = "teacher_model."  # read again from its own file
# what Ultralytics lets a user change on resume, and what the batches depend on
ARGUMENTS = "batch", "imgsz", "device", "workers", "cache", "close_mosaic", "freeze", "val", "time"


class RunState:
    """What one run has beside the trainer's own state.

    Args:
        config: The options that were asked for.

    Attributes:
        config: The options in force; of a resumed run those of its checkpoint.
        steps: What is done around each optimizer step, once the trainer is set up.
        resumed: What resume.pt holds, from `open` until the first epoch has begun; None in a new run, and in one that
            goes on from last.pt alone.
        teacher: The float model that the run starts from, where it teaches.
    """

    steps: Steps

    def __init__(self, config: QCConfig):
        self.config = config
        self.resumed: dict | None = None
        self.teacher: Teacher | None = None
        self._transforms: tuple | None = None  # a data set, and its transforms before the mosaic was closed

    def open(self, trainer: BaseTrainer, checkpoint: dict) -> None:
        """Read what a run is resumed from, and take its options.

        A run that was killed in its last acts is brought to its end, and the checkpoint marked as finished.

        Args:
            trainer: A trainer that resumes; its model is made, but not yet injected.
            checkpoint: What it resumes from.

        Raises:
            QCError: If it is no run of the plugin.
        """
        record = record_of(checkpoint.get("ema"))
        if record is None:
            raise QCError(
                f"QC: {trainer.args.model} is no unfinished run of callbacks=qc and cannot be resumed as one; start "
                "from a float checkpoint without resume."
            )
        self._take_options(record.options)
        last = Path(trainer.args.resume)
        if has_ended(last, record.run):
            if RANK in {-1, 0}:
                conclude(AtomicPath(last))
            checkpoint["epoch"] = -1
            return
        if RANK in {-1, 0}:
            mend_best(last)
        self.resumed, why = find_state(last, checkpoint)
        if self.resumed is None:
            log.warning(
                f"{why}: going on from the average in {last.name}, as Ultralytics does, not exactly as the "
                "uninterrupted run would."
            )

    def find_teacher(self, trainer: BaseTrainer) -> None:
        """Take the teacher of the resumed run from beside its checkpoint, which may have been moved; to be in the run's
        folder too.

        Raises:
            QCError: If it is missing, and the run is known to have one.
        """
        beside = Path(trainer.args.resume).parent
        if own_record(student(unwrap_model(trainer.model))).taught:
            self.teacher = Teacher.read(beside, trainer.device)
        else:  # of an earlier version there is a file where the start taught
            self.teacher = teacher_of(beside, self.config, trainer.device)
        if self.teacher and RANK in {-1, 0} and not (trainer.wdir / TEACHER).exists():
            self.teacher.write(trainer.wdir)

    def take_average(self, checkpoint: dict, model: nn.Module, trainer: BaseTrainer) -> QuantRecord:
        """Load the checkpoint's averaged model into the injected `model`; returns its record.

        Raises:
            QCError: If optimizer state is to be taken from last.pt and is of other scales than the model has.
        """
        averaged = student(checkpoint["ema"])
        model.load_state_dict(averaged.float().state_dict())
        groups = (checkpoint.get("optimizer") or {}).get("param_groups", [])
        scales = [g["params"] for g in groups if g.get("param_group") == "scale"]
        if not self.resumed and any(len(group) != len(scale_parameters(model)) for group in scales):
            raise QCError(
                f"QC: {trainer.args.model} was begun with another version of yolo-qc-plugin, whose scales are not "
                "those of this one, and cannot be resumed; start from the float checkpoint."
            )
        return own_record(averaged)

    def restore(self, trainer: BaseTrainer) -> None:
        """Put back what a run consists of, where `open` found it; at on_pretrain_routine_end."""
        state = self.resumed
        if state is None:
            if self.steps.telemetry:
                self.steps.telemetry.reread(trainer.ema.updates)
            lay_out(trainer.optimizer)  # which Ultralytics has loaded
            return
        model = unwrap_model(trainer.model)
        model.load_state_dict({**model.state_dict(), **state["weights"]})
        trainer.ema.ema.load_state_dict(state["ema"])
        trainer.ema.updates = state["updates"]
        for saved, group in zip(state["optimizer"]["param_groups"], trainer.optimizer.param_groups):
            saved["fused"] = group.get("fused")  # as Ultralytics has it: the device chooses the kernel
        trainer.optimizer.load_state_dict(state["optimizer"])
        lay_out(trainer.optimizer)
        if state["scaler"]:  # empty where it was disabled
            trainer.scaler.load_state_dict(state["scaler"])
        trainer.best_fitness = state["best_fitness"]
        trainer.stopper.__dict__.update(state["stopper"])
        if state["criterion_updates"] is not None:
            model.criterion = model.init_criterion()
            model.criterion.updates = state["criterion_updates"] - 1
            model.criterion.update()
        trainer.start_epoch = state["epoch"]
        trainer.scheduler.last_epoch = trainer.start_epoch - 1
        state["close_mosaic"] = trainer.args.close_mosaic
        if state["mosaic_closed"]:
            self._mosaic_is_closed(trainer, trainer.start_epoch)  # takes note of the transforms before
            trainer._close_dataloader_mosaic()
            trainer.train_loader.reset()
            # until `_rewind`: Ultralytics would close it again and restart the loader, whose place is restored
            trainer.args.close_mosaic = 0
        self.steps.load_state_dict(state["steps"])
        if RANK in {-1, 0}:
            drop_rows(trainer.csv, trainer.start_epoch)
            for folder in (trainer.save_dir, trainer.wdir, trainer.save_dir / "qc"):
                for file in folder.glob(".*.tmp"):  # what was being written
                    file.unlink()
        log.info(
            f"resuming {trainer.args.resume} from epoch {trainer.start_epoch + 1} to {trainer.epochs}, "
            "with all of its state"
        )

    def begin_epoch(self, trainer: BaseTrainer) -> None:
        """Rewind a resumed run to the start of its first epoch; save any other epoch's start; at on_train_epoch_start.

        Args:
            trainer: As Ultralytics has it, which may have replaced parts in recovering.
        """
        resumed, self.resumed = self.resumed, None
        if resumed:
            self._rewind(trainer, resumed)
        self.steps.begin_epoch(trainer)
        if not resumed and RANK in {-1, 0}:
            self._save(trainer)

    def _take_options(self, saved: QCConfig) -> None:
        """Continue with the checkpoint's options; say so where others were given."""
        defaults = QCConfig()
        names = [f.name for f in fields(QCConfig) if getattr(self.config, f.name) != getattr(saved, f.name)]
        if ignored := [n for n in names if getattr(self.config, n) != getattr(defaults, n)]:
            log.warning(f"resume ignores {', '.join(ignored)} and uses the checkpoint's options.")
        self.config = saved

    def _save(self, trainer: BaseTrainer) -> None:
        """Write resume.pt: plain tensors and values, as torch.load(weights_only=True) takes them.

        A disk that has no room for it stops no run: the file stays what it was, and a warning says so.
        """
        model, stopper = unwrap_model(trainer.model), trainer.stopper
        state = {
            "format": FORMAT,
            "run": own_record(model).run,
            "epoch": trainer.epoch,
            "arguments": _arguments(trainer),
            "weights": {k: v for k, v in model.state_dict().items() if not k.startswith(DISTILL_MODEL)},
            "ema": trainer.ema.ema.state_dict(),
            "updates": trainer.ema.updates,
            "optimizer": trainer.optimizer.state_dict(),
            "scaler": trainer.scaler.state_dict(),
            "accumulate": trainer.accumulate,
            "mosaic_closed": self._mosaic_is_closed(trainer, trainer.epoch),
            "gradients": {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
            "best_fitness": None if trainer.best_fitness is None else float(trainer.best_fitness),
            "stopper": {
                "best_fitness": float(stopper.best_fitness),
                "best_epoch": stopper.best_epoch,
                "possible_stop": bool(stopper.possible_stop),
            },
            "criterion_updates": getattr(getattr(model, "criterion", None), "updates", None),  # end-to-end loss
            "random": random_state(trainer),
            "steps": self.steps.state_dict(),
        }
        try:
            write_checkpoint(state, trainer.wdir / FILE)
        except (OSError, RuntimeError) as error:  # torch raises a RuntimeError for a full disk
            log.warning(f"{FILE} could not be written ({error}); resuming would go on from an older state.")

    def _rewind(self, trainer: BaseTrainer, state: dict) -> None:
        """Put back what goes on from batch to batch, after all that draws random numbers."""
        trainer.args.close_mosaic = state["close_mosaic"]
        before, now = state["arguments"], _arguments(trainer)
        if changed := [name for name in before if before[name] != now[name]]:
            log.warning(
                "not exactly as the uninterrupted run, which had "
                f"{', '.join(f'{name}={before[name]} (now {now[name]})' for name in changed)}."
            )
            return
        parameters = dict(unwrap_model(trainer.model).named_parameters())
        for name, gradient in state["gradients"].items():
            parameters[name].grad = torch.empty_like(parameters[name]).copy_(gradient)
        if trainer.accumulate > 1:
            self.steps.accumulation.take_over(trainer)
        trainer.accumulate = state["accumulate"]
        if RANK in {-1, 0}:  # whose state it is
            set_random_state(trainer, state["random"])

    def _mosaic_is_closed(self, trainer: BaseTrainer, epoch: int) -> bool:
        """Whether, at the start of an epoch, the mosaic has been closed, which restarts the loader of images too.

        A data set has other transforms then than it had at first: versions of Ultralytics differ in when they close it
        where a run is shorter than close_mosaic. A classifier's has none to change, but its loader is restarted.
        """
        dataset, last = trainer.train_loader.dataset, trainer.args.close_mosaic
        if not hasattr(dataset, "transforms"):
            return bool(last) and epoch > max(0, trainer.epochs - last)
        transforms = dataset.transforms
        if self._transforms is None or self._transforms[0] is not dataset:  # a loader is made anew with a smaller batch
            self._transforms = dataset, transforms
        return self._transforms[1] is not transforms


def lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer's averages the memory format of their parameters, which fused steps want.

    Loading keeps that of the file, which may have been written on another device, where the model had another format.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            alike = isinstance(value, torch.Tensor) and value.shape == parameter.shape
            if alike and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _arguments(trainer: BaseTrainer) -> dict:
    return {n: getattr(trainer.args, n) for n in ARGUMENTS} | {"images": len(trainer.train_loader.dataset)}
