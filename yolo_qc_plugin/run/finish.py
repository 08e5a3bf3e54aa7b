# yolo_qc_plugin, AGPL-3.0
"""What follows the stock loop: correct the best checkpoint, measure both, choose the better, write the record."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import cast
from zipfile import is_zipfile

from torch import nn
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.nn.tasks import load_checkpoint, torch_safe_load
from ultralytics.utils import LOGGER

from ..config import QCConfig
from ..deploy.snap import snap
from ..files import replacing
from ..host import architecture, log
from ..host.record import own_record, write_checkpoint
from ..host.teacher import Teacher
from ..quant.calibrate import calibrate_outputs
from ..quant.inject import quantize_outputs
from ..report.card import CARD, write_card
from ..report.command import train_command
from ..report.console import TABLE, summary, write_table
from ..report.record import build_report, figures_of, write_report
from ..report.runs import shares_at_the_end
from .budget import format_outcome, outcome, planned_widths
from .drawing import draw_run
from .labels import labels_of_run
from .loggers import add_row, tell_result
from .qc import train_qc
from .resume import FILE, conclude
from .rounding import measure_rounding
from .validation import training_images, validate


def finish(trainer: BaseTrainer, config: QCConfig, teacher: Teacher | None) -> dict:
    """Quantize the outputs, correct, compare and report; runs at on_train_end.

    Ultralytics' final evaluation has just measured best.pt. With its outputs quantized it becomes qat.pt; the corrected
    model replaces best.pt where its fitness is higher than that of qat.pt, else qat.pt does, and
    `trainer.validator.metrics` (what `model.train()` returns) are those of what best.pt holds.

    Returns:
        The report, as written to qc/report.json.
    """
    best = trainer.best if trainer.best.exists() else trainer.last
    if not best.exists():  # stopped early
        log.warning("save=False left no checkpoint to correct.")
        trainer.last.with_name(FILE).unlink(missing_ok=True)
        return {}
    qat = trainer.wdir / "qat.pt"
    metrics = {"float_outputs": figures_of(trainer.validator.metrics.results_dict)}
    if config.output_bits is None:
        with replacing(qat) as temporary:
            shutil.copyfile(best, temporary)
        metrics["qat"] = validate(trainer, qat, coco=True) if config.coco_eval else metrics["float_outputs"]
    else:
        model, _ = load_checkpoint(best, device=trainer.device)
        set_outputs(trainer, model, config)
        log.info(f"measuring the model with {config.output_bits}-bit outputs")
        metrics["qat"] = validate(trainer, deepcopy(model), config.coco_eval)
        write_like(best, model, trainer.validator.metrics.results_dict, qat)
    start = own_record(architecture.student(trainer.ema.ema)).start
    planned = planned_widths(trainer.save_dir / "qc") if config.budget else {}
    command = train_command(vars(trainer.args), config, start, planned)
    report = correct_and_choose(trainer, config, metrics, qat, best, command, teacher)
    conclude(trainer.last)
    tell_result(trainer, report)
    if trainer.args.plots:
        draw_run(trainer, best, start)
    return report


def correct_and_choose(
    trainer: BaseTrainer,
    config: QCConfig,
    metrics: dict,
    qat: Path,
    best: Path,
    command: str,
    teacher: Teacher | None = None,
) -> dict:
    """Correct the checkpoint `qat`, whose figures have just been measured, write the better to `best`, and report.

    Args:
        trainer: Set up; its loaders, loss, precision and validator are used.
        config: The options.
        metrics: Figures so far, "qat" among them; those of "qc" are added.
        qat: Checkpoint with quantized outputs, not corrected.
        best: Checkpoint to write.
        command: That the run amounts to, for the report.
        teacher: The float model that the run starts from, where it teaches.

    Returns:
        The report, as written to qc/report.json.
    """
    before = deepcopy(trainer.validator.metrics)
    metrics["qc"], kept = None, "qat"
    if config.correction != "off":
        corrected = train_qc(trainer, config, qat, teacher)
        log.info("measuring the corrected model")
        metrics["qc"] = validate(trainer, deepcopy(corrected), config.coco_eval)
        if metrics["qc"]["fitness"] > metrics["qat"]["fitness"]:
            kept = "qc"
        else:
            trainer.validator.metrics = before
    trainer.metrics = {**trainer.metrics, **trainer.validator.metrics.results_dict}
    trainer.metrics.pop("fitness", None)
    rounding = None
    if trainer.args.plots:
        with log.naming_what_fails("soft rounding"):
            rounding = measure_rounding(trainer, qat)

    # after all else: while best.pt is what training wrote, all this can be done again
    with replacing(best) as temporary:
        if kept == "qc":
            write_like(qat, corrected, trainer.validator.metrics.results_dict, temporary)
            model = corrected.float().to(trainer.device)  # as one loads it
        else:
            shutil.copyfile(qat, temporary)
            model, _ = load_checkpoint(qat, device=trainer.device)
        report = record_run(trainer, config, model, metrics, kept)
        report |= {"training": origin(trainer, model, command), "rounding": rounding}
        path = write_report(report, trainer.save_dir / "qc")
        add_row(trainer)
    tell(trainer, report, path)
    return report


def record_run(trainer: BaseTrainer, config: QCConfig, model: nn.Module, metrics: dict, kept: str) -> dict:
    """The report of a run: what `build_report` makes of the model that it kept, and what became of a budget."""
    folder = trainer.save_dir / "qc"
    images = (trainer.validator.preprocess(batch)["img"].float() for batch in trainer.test_loader)
    oscillating: dict[str, float] = {}
    with log.naming_what_fails("oscillation"):
        oscillating = shares_at_the_end(folder)
    report = build_report(model, config, metrics, kept, images, oscillating, trainer.args.imgsz)
    if config.budget:
        report["budget"] = outcome(folder, report["metrics"], kept, trainer.ema.updates)
    return report


def tell(trainer: BaseTrainer, report: dict, path: Path) -> None:
    """Print the report, which is in the file `path`, in short, and write what is read in place of it."""
    folder = path.parent
    LOGGER.info(f"\n{summary(report, worst=trainer.args.verbose)}")
    log.info(f"best.pt holds the {report['kept'].upper()} model, record in {path}")
    with log.naming_what_fails(TABLE):
        log.info(f"every layer is in {write_table(report, folder)}")
    with log.naming_what_fails(CARD):
        log.info(f"what to tell where the model is published is in {write_card(report, trainer.wdir, folder)}")
    if report.get("budget"):
        log.info(format_outcome(report["budget"]))


def origin(trainer: BaseTrainer, model: nn.Module, command: str) -> dict:
    """What was trained on what, for the report."""
    args = trainer.args
    labelled = labels_of_run(trainer)
    return {
        "command": command,
        "task": args.task,
        "start": own_record(model).start,
        "data": str(args.data),
        "photographs": labelled.get("photographs"),  # where the start model has labelled some
        "val_by_model": labelled.get("val_by_model"),
        "names": list(trainer.data["names"].values()),
        "imgsz": args.imgsz,
        "epochs": trainer.epoch + 1,
        "batch": trainer.batch_size,
    }


@contextmanager
def saying_what_is_safe(folder: Path) -> Iterator[None]:
    """Where what follows training fails or is interrupted, say which checkpoints are whole; the error goes on."""
    try:
        yield
    except BaseException as error:
        kept = [name for name in ("best.pt", "qat.pt", "last.pt") if is_zipfile(folder / name)]
        reason = f": {error}".partition("\n")[0].removesuffix(": ")
        log.error(
            f"{type(error).__name__} after training had ended{reason}. "
            f"Its checkpoints are kept in {folder}: {', '.join(kept) or 'none'}."
            + (f" Resuming {folder / 'last.pt'} does again what failed." if (folder / FILE).exists() else "")
        )
        raise


def write_like(source: Path, model: nn.Module, results: dict, target: Path) -> None:
    """Write `model` (to the CPU and to half precision in place) with all else of a checkpoint, and its own figures."""
    checkpoint, _ = torch_safe_load(source)
    checkpoint["train_metrics"] = {**checkpoint["train_metrics"], **results}
    write_checkpoint({**checkpoint, "model": model.cpu().half()}, target)


def set_outputs(trainer: BaseTrainer, model: nn.Module, config: QCConfig) -> None:
    """Quantize the convolutions' outputs of a finished model, in place, with grids from training batches."""
    bits = cast(int, config.output_bits)
    quantize_outputs(architecture.output_blocks(model), bits, config.runs_on.rounded_silu)
    calibrate_outputs(model, training_images(trainer, config.calibration_batches), model)
    snap(model, architecture.blank_image(model))
