# yolo_qc_plugin, AGPL-3.0
"""A run of the stock trainer from its start to an exported file, killed and resumed on the way.

python examples/benchmarks/gpu_runs.py FOLDER '{"model": ..., "data": ..., ...}'     trains, for `faults` below
"""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from ultralytics import YOLO

from yolo_qc_plugin import add_qc_callbacks
from yolo_qc_plugin.report.record import figures_of

TOLERANCE = 1e-4  # of a figure that is measured again


def faults(folder: Path, model: str, data: Path, imgsz: int, batch: int, device: str, **arguments) -> list[str]:
    """What went wrong in a run of two epochs, killed by SIGKILL after the first, resumed, measured again and exported.

    Args:
        folder: Where the run goes; new.
        model: What `YOLO` takes.
        data: YAML of the data set.
        imgsz: Side of the images.
        batch: Images of a batch.
        device: As Ultralytics takes it.
        **arguments: Of `train`.
    """
    asked = dict(model=model, data=str(data), imgsz=imgsz, batch=batch, device=device, epochs=2, **arguments)
    log = folder.with_suffix(".log")
    killed = _train(folder, asked, log, die=True)
    if killed != -signal.SIGKILL:
        return [f"ended by itself ({killed}): {_last_line(log)}"]
    if (ended := _train(folder, {}, log)) != 0:
        return [f"could not be resumed ({ended}): {_last_line(log)}"]
    return [*_lost(folder), *_changed(folder, asked), *_not_exported(folder)]


def _train(folder: Path, arguments: dict, log: Path, die: bool = False) -> int:
    """Train in a process of its own; returns its exit code, -SIGKILL where it died."""
    command = [sys.executable, __file__, str(folder), json.dumps(arguments), *["die"] * die]
    with log.open("a") as output:
        return subprocess.run(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL).returncode


def child(folder: Path, arguments: dict, die: bool) -> None:
    """Train, or resume where there are no arguments; die as the second epoch begins."""
    if not arguments:
        YOLO(folder / "weights" / "last.pt").train(resume=True)
        return
    yolo = YOLO(arguments.pop("model"))
    add_qc_callbacks(yolo, bits=4)

    def kill(trainer) -> None:
        if die and trainer.epoch == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    yolo.add_callback("on_train_batch_end", kill)
    yolo.train(**arguments, project=str(folder.parent), name=folder.name, exist_ok=True, plots=False, verbose=False)


def _lost(folder: Path) -> list[str]:
    """Epochs that are missing, and losses that are not finite."""
    rows = list(csv.DictReader((folder / "results.csv").open()))
    found = [] if len(rows) == 3 else [f"results.csv has {len(rows)} rows in place of 2 epochs and what is kept"]
    losses = [(k.strip(), float(v)) for row in rows[:2] for k, v in row.items() if "loss" in k]
    return found + [f"{name} is {value}" for name, value in losses if not math.isfinite(value)]


def _changed(folder: Path, asked: dict) -> list[str]:
    """Figures of the report that best.pt does not have when it is measured again."""
    report = json.loads((folder / "qc" / "report.json").read_text())
    told = report["metrics"][report["kept"]]
    measured = {k: asked[k] for k in ("data", "imgsz", "batch", "device")}
    found = figures_of(YOLO(folder / "weights" / "best.pt").val(**measured, plots=False, verbose=False).results_dict)
    if not any(found.values()):
        return ["all figures are 0: there is nothing to compare"]
    return [
        f"{name}: {value} in the report, {found[name]} again"
        for name, value in told.items()
        if not abs(value - found[name]) <= TOLERANCE
    ]


def _not_exported(folder: Path) -> list[str]:
    """An export that failed; nothing without the package for it."""
    if find_spec("onnx") is None:
        return []
    file = YOLO(folder / "weights" / "best.pt").export(format="onnx", device="cpu", simplify=False)
    return [] if file and Path(file).is_file() else ["no ONNX file was written"]


def _last_line(log: Path) -> str:
    return (log.read_text(errors="replace").strip().splitlines() or ["nothing said"])[-1][:300]


if __name__ == "__main__":
    child(Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:] == ["die"])
