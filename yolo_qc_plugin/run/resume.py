# yolo_qc_plugin, AGPL-3.0
"""Exact resume: a run that was killed, whenever it was, ends as if it had not been.

From last.pt alone the host goes on with the average, in half precision, in place of the weights, and with new random
numbers, another order of images, rounded optimizer state and steps after other batches. weights/resume.pt is what it
takes to go on as before. It is written at the start of each epoch and deleted as the last act of a run: whatever was
killed (an epoch, the writing of a checkpoint, the correction) is done again from the start of that epoch. It is beside
last.pt, so that both move together.

On resume the host gets no checkpoint: it sets up as for a new run, `restore` puts back what a run consists of, and
`rewind`, when the first epoch starts, what goes on from batch to batch.
"""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError  # the error alone

import torch
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import RANK
from ultralytics.utils.torch_utils import unwrap_model

from ..files import AtomicPath, replacing
from ..host import log
from ..host.record import record_of, strip, write_checkpoint
from ..quant.layers import quant_convs, scale_parameters
from .randomness import random_state, set_random_state

FILE = "resume.pt"
UNREADABLE = OSError, RuntimeError, EOFError, UnpicklingError
FORMAT = 2  # raise it when older files cannot be read as they are
TEACHER = "teacher_model."  # of distill_model: read again from its own file
# what the host lets a user change on resume, and what the batches depend on
ARGUMENTS = "batch", "imgsz", "device", "workers", "cache", "close_mosaic", "freeze", "val", "time"


class Accumulation:
    """Counts the micro-batches since the last call of the host's optimizer_step; makes these calls in a resumed run.

    The host counts from the start of the process, and would step after other micro-batches than before.

    Attributes:
        pending: Micro-batches whose gradients wait for a step.
    """

    def __init__(self):
        self.pending = 0
        self._step = None  # in a resumed run: the host's method

    def take_over(self, trainer: BaseTrainer) -> None:
        """From now on steps are made here, and the host's own calls do nothing."""
        self._step = trainer.optimizer_step
        trainer.optimizer_step = lambda: None

    def count(self, trainer: BaseTrainer) -> None:
        """Count one micro-batch; to be called when it ends."""
        self.pending += 1
        if self._step and self.pending >= trainer.accumulate:
            self._step()
        self.settle(trainer)

    def settle(self, trainer: BaseTrainer) -> None:
        """Nothing is pending where gradients are gone: after a step, and where the host starts an epoch again."""
        if all(p.grad is None for p in unwrap_model(trainer.model).parameters()):
            self.pending = 0


def watch_mosaic(trainer: BaseTrainer) -> None:
    """Note when the host closes the mosaic: its versions differ in that where a run is shorter than close_mosaic."""
    close, trainer.qc_mosaic_closed = trainer._close_dataloader_mosaic, False

    def close_and_note() -> None:
        trainer.qc_mosaic_closed = True
        close()

    trainer._close_dataloader_mosaic = close_and_note


def write_state(trainer: BaseTrainer, run: str, named: dict) -> None:
    """Write resume.pt: plain tensors and values, as torch.load(weights_only=True) takes them.

    A disk that has no room for it stops no run: the file stays what it was, and a warning says so.

    Args:
        trainer: At the start of an epoch.
        run: The run's id.
        named: State of parts of the plugin, by their names.
    """
    model, stopper = unwrap_model(trainer.model), trainer.stopper
    state = {
        "format": FORMAT,
        "run": run,
        "epoch": trainer.epoch,
        "arguments": _arguments(trainer),
        "weights": {k: v for k, v in model.state_dict().items() if not k.startswith(TEACHER)},
        "ema": trainer.ema.ema.state_dict(),
        "updates": trainer.ema.updates,
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "accumulate": trainer.accumulate,
        "mosaic_closed": trainer.qc_mosaic_closed,
        "gradients": {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        "best_fitness": None if trainer.best_fitness is None else float(trainer.best_fitness),
        "stopper": {
            "best_fitness": float(stopper.best_fitness),
            "best_epoch": stopper.best_epoch,
            "possible_stop": bool(stopper.possible_stop),
        },
        "criterion_updates": getattr(getattr(model, "criterion", None), "updates", None),  # end-to-end loss
        "random": random_state(trainer),
        "named": named,
    }
    try:
        write_checkpoint(state, trainer.wdir / FILE)
    except (OSError, RuntimeError) as error:  # torch raises a RuntimeError for a full disk
        log.warning(f"{FILE} could not be written ({error}); resuming would go on from an older state.")


def read_state(trainer: BaseTrainer, checkpoint: dict) -> dict | None:
    """The state to resume from, on the CPU; None, with a line that says why, where there is none for the checkpoint.

    A run that was killed in its last acts is brought to its end, and its checkpoint marked as finished for the host.

    Args:
        trainer: A trainer that resumes; its model is set up.
        checkpoint: What it resumes from, of a quantized run.
    """
    last = Path(trainer.args.resume)
    if _has_ended(last, record_of(checkpoint["ema"]).run):
        if RANK in {-1, 0}:
            conclude(AtomicPath(last))
        checkpoint["epoch"] = -1
        return None
    state, why = _find_state(last, checkpoint)
    if state is None:
        log.warning(
            f"{why}: going on from the average in {last.name}, as Ultralytics does, not exactly as the "
            "uninterrupted run would."
        )
    return state


def fits(checkpoint: dict, model: torch.nn.Module) -> bool:
    """Whether the optimizer state of a checkpoint, if there is one, is of the scales that the model has."""
    groups = (checkpoint.get("optimizer") or {}).get("param_groups", [])
    return all(len(g["params"]) == len(scale_parameters(model)) for g in groups if g.get("param_group") == "scale")


def _find_state(last: Path, checkpoint: dict) -> tuple[dict | None, str]:
    """The state beside last.pt, or None and why."""
    file = last.with_name(FILE)
    if last.name != "last.pt" or not file.exists():
        return None, f"there is no {FILE} for {last}"
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        return None, f"{file} cannot be read ({error})"
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        return None, f"{file} is of another version of yolo-qc-plugin"
    if state["run"] != record_of(checkpoint["ema"]).run:
        return None, f"{file} is of another run"
    if state["epoch"] < checkpoint["epoch"]:
        return None, f"{file} is older than {last.name}"
    return state, ""


def restore(trainer: BaseTrainer, state: dict) -> None:
    """Put back what a run consists of; at on_pretrain_routine_end."""
    model = unwrap_model(trainer.model)
    model.load_state_dict({**model.state_dict(), **state["weights"]})
    trainer.ema.ema.load_state_dict(state["ema"])
    trainer.ema.updates = state["updates"]
    for saved, group in zip(state["optimizer"]["param_groups"], trainer.optimizer.param_groups):
        saved["fused"] = group.get("fused")  # as the host has it: the device chooses the kernel
    trainer.optimizer.load_state_dict(state["optimizer"])
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
        trainer._close_dataloader_mosaic()
        trainer.train_loader.reset()
        trainer.args.close_mosaic = 0  # until `rewind`: the host would close it again, and restart the loader
    if RANK in {-1, 0}:
        _drop_rows(trainer.csv, trainer.start_epoch)
        for folder in (trainer.save_dir, trainer.wdir, trainer.save_dir / "qc"):
            for file in folder.glob(".*.tmp"):  # what was being written
                file.unlink()
    log.info(
        f"resuming {trainer.args.resume} from epoch {trainer.start_epoch + 1} to {trainer.epochs}, "
        "with all of its state"
    )


def rewind(trainer: BaseTrainer, state: dict, accumulation: Accumulation) -> None:
    """Put back what goes on from batch to batch; when the first epoch starts, after all that draws random numbers."""
    trainer.args.close_mosaic = state["close_mosaic"]
    before, now = state["arguments"], _arguments(trainer)
    if changed := [name for name in before if before[name] != now[name]]:
        log.warning(
            f"not exactly as the uninterrupted run, which had "
            f"{', '.join(f'{name}={before[name]} (now {now[name]})' for name in changed)}."
        )
        return
    parameters = dict(unwrap_model(trainer.model).named_parameters())
    for name, gradient in state["gradients"].items():
        parameters[name].grad = gradient.to(parameters[name].device)
    if trainer.accumulate > 1:
        accumulation.take_over(trainer)
    trainer.accumulate = state["accumulate"]
    if RANK in {-1, 0}:  # whose state it is
        set_random_state(trainer, state["random"])


def conclude(last: AtomicPath) -> None:
    """The last acts of a run, when all else is on disk: delete resume.pt and strip last.pt."""
    last.with_name(FILE).unlink(missing_ok=True)
    strip(last)


def _has_ended(last: Path, run: str) -> bool:
    """Whether best.pt is what `finish` made of it, the last thing it does: then the run was killed in `conclude`.

    Where it makes nothing of it (float outputs, no correction or none that was kept), a report and no resume.pt say so.
    """
    best, report = last.with_name("best.pt"), last.parent.with_name("qc") / "report.json"
    if last.name != "last.pt" or not best.exists():
        return False
    try:
        model = load_checkpoint(best)[0]
    except UNREADABLE:
        return False
    record = record_of(model)
    if record is None or record.run != run:
        return False
    finished = any(conv.correction for _, conv in quant_convs(model))
    return finished or (report.exists() and not last.with_name(FILE).exists())


def _arguments(trainer: BaseTrainer) -> dict:
    return {n: getattr(trainer.args, n) for n in ARGUMENTS} | {"images": len(trainer.train_loader.dataset)}


def _drop_rows(csv: Path, epochs: int) -> None:
    """Keep the rows of the first `epochs` epochs of results.csv; the others are about to be written again."""
    lines = csv.read_text(encoding="utf-8").splitlines(keepends=True) if csv.exists() else []
    rows = [line for line in lines[1:] if line.partition(",")[0].isdigit() and int(line.partition(",")[0]) <= epochs]
    if rows:
        with replacing(csv) as temporary:
            temporary.write_text("".join([lines[0], *rows]), encoding="utf-8")
    else:
        csv.unlink(missing_ok=True)
