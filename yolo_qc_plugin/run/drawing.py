# yolo_qc_plugin, AGPL-3.0
"""What a run draws when all else is done: qc/report.html and qc/plots."""

from __future__ import annotations

from pathlib import Path

from ultralytics.engine.trainer import BaseTrainer
from ultralytics.nn.tasks import load_checkpoint

from ..host import log
from ..host.images import spread_out
from ..host.teacher import FILE as TEACHER
from ..quant.layers import is_quantized
from ..report.page import PAGE, write_page
from ..report.predictions import compare_predictions
from ..report.runs import Run
from ..report.traces import WINDOW

PHOTOGRAPHS = 8


def draw_run(trainer: BaseTrainer, best: Path, start: str) -> None:
    """Draw what a finished run has to show; what fails is named in a warning and stops nothing.

    Args:
        trainer: Of the run.
        best: The checkpoint that was kept.
        start: What training began with.
    """
    folder = Path(trainer.save_dir) / "qc"
    out = folder / "plots"
    out.mkdir(parents=True, exist_ok=True)
    with log.naming_what_fails("predictions"):
        if first := float_checkpoint(trainer, start):
            files = {"float": first, "quantized": Path(best)}
            compare_predictions(files, photographs(trainer), trainer.args.imgsz, trainer.device, out)
    with log.naming_what_fails(PAGE):
        run = Run.load(Path(trainer.save_dir), WINDOW)
        write_page([run], out, folder / PAGE, guard=log.naming_what_fails)
        log.info(f"pictures of the run are in {folder / PAGE}")


def photographs(trainer: BaseTrainer) -> list[Path]:
    """Some validation images, at equal distances in their order."""
    dataset = trainer.test_loader.dataset
    files = dataset.im_files if hasattr(dataset, "im_files") else [sample[0] for sample in dataset.samples]
    return spread_out([Path(file) for file in files], PHOTOGRAPHS)


def float_checkpoint(trainer: BaseTrainer, start: str) -> Path | None:
    """The file of the float model that training began with, if there is one and it knows the classes."""
    teacher = trainer.wdir / TEACHER
    if teacher.exists():
        return Path(teacher)
    if not start.endswith(".pt") or not Path(start).is_file():
        return None
    model, _ = load_checkpoint(start)
    same = list(model.names.values()) == list(trainer.data["names"].values())
    return Path(start) if same and not is_quantized(model) else None
