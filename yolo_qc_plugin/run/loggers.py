# yolo_qc_plugin, AGPL-3.0
"""What loggers get: TensorBoard, W&B, MLflow, ClearML, Comet, DVC and Ray Tune, by the interface that they share.

All of them take what `trainer.metrics` holds at on_fit_epoch_end, which Ultralytics tells after each epoch, and once
more, one past the last epoch, when it has measured best.pt.

    after each epoch    shares of weights that flipped and oscillate, and scales, of all and by layer: `hand_over`
    two past the last   what best.pt holds in the end, what it was compared with, sizes: `tell_result`; and `add_row`
                        puts its figures into results.csv

Names begin with "qc", so that `take_back` finds them: where it validates no epoch, Ultralytics keeps `trainer.metrics`,
whose keys are the columns of results.csv.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import nan

from ultralytics.engine.trainer import BaseTrainer

from ..host import log

PREFIX = "qc"
PAST = 2  # from the last epoch


def hand_over(trainer: BaseTrainer, scalars: dict[str, float]) -> None:
    """Let loggers see numbers of an epoch; before they are called."""
    trainer.metrics = {**trainer.metrics, **scalars}


def take_back(trainer: BaseTrainer) -> None:
    """Leave in `trainer.metrics` what Ultralytics put there; on other ranks than 0 there is nothing."""
    if trainer.metrics:
        trainer.metrics = {name: value for name, value in trainer.metrics.items() if not name.startswith(PREFIX)}


def add_row(trainer: BaseTrainer) -> None:
    """Add what `trainer.validator` has measured last to results.csv, with "nan" for losses and learning rates."""
    if trainer.csv.exists():  # not where a finished run is corrected again
        header = trainer.csv.read_text(encoding="utf-8").partition("\n")[0]
        found = trainer.validator.metrics.results_dict
        with _later(trainer):
            trainer.save_metrics({name: found.get(name, nan) for name in header.split(",")[2:]})  # after epoch and time


def tell_result(trainer: BaseTrainer, report: dict) -> None:
    """Tell loggers how the run has ended; one that fails, which may know no such epoch, costs a warning.

    Args:
        trainer: Its metrics are those of what best.pt holds.
        report: As written to qc/report.json.
    """
    hand_over(trainer, result_scalars(report))
    with _later(trainer):
        try:
            trainer.run_callbacks("on_fit_epoch_end")
        except Exception as error:  # of any package; the run itself is over
            log.warning(f"a callback at on_fit_epoch_end failed on the run's final figures ({error!r}).")


def result_scalars(report: dict) -> dict[str, float]:
    """Figures of the float start, QAT and QC, and sizes in MB, by name."""
    found = {f"{PREFIX}/size_mb_{kind}": size for kind, size in report["size_mb"].items()}
    for stage in ("float", "qat", "qc"):
        for name, value in (report["metrics"].get(stage) or {}).items():
            if name == "coco":
                kinds = {kind: metrics["AP"] for kind, metrics in value.items() if kind != "ground_truth"}
                found |= {f"{PREFIX}/{stage}_coco_{kind}_AP": ap for kind, ap in kinds.items() if ap is not None}
            else:
                found[f"{PREFIX}/{stage}_{name}"] = value
    return found


@contextmanager
def _later(trainer: BaseTrainer) -> Iterator[None]:
    """Within the context, the epoch is one that no epoch of training and no evaluation by Ultralytics has."""
    trainer.epoch += PAST
    try:
        yield
    finally:
        trainer.epoch -= PAST
