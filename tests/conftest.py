# yolo_qc_plugin, AGPL-3.0
"""What test files share: a tiny data set, real training runs on it, and the shared float checkpoint if present."""

from __future__ import annotations

import csv
import os
import tempfile
from math import isnan
from pathlib import Path

os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp(prefix="yolo_config_"))  # leave the user's settings alone

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"
# a small model, and that model trained on digits: mAP50-95 about 0.3 (checkpoints/make.py)
CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"
TINY_YAML, FLOAT = CHECKPOINTS / "tiny.yaml", CHECKPOINTS / "float.pt"

# the smallest real run: 24 images of 64 px, three batches an epoch
TINY = {
    "imgsz": 64,
    "batch": 8,
    "epochs": 1,
    "device": "cpu",
    "plots": False,
    "workers": 0,
    "verbose": False,
    "warmup_epochs": 0,
}


def pytest_collection_modifyitems(items):
    """Begin with the file whose one test takes longest: at the end, one process would run it and the others wait."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


def last_epoch(run: Path) -> dict[str, float]:
    """What the host wrote of a run's last epoch into results.csv; the row after it is what best.pt holds in the end."""
    rows = [{k.strip(): float(v) for k, v in row.items()} for row in csv.DictReader((run / "results.csv").open())]
    return next(row for row in reversed(rows) if not isnan(row["lr/pg0"]))


def steps_of(trainer):
    """The run's Steps."""
    from yolo_qc_plugin.run.callbacks import QCCallbacks

    owners = (getattr(c, "__self__", None) for c in trainer.callbacks["on_train_end"])
    return next(owner for owner in owners if isinstance(owner, QCCallbacks)).state.steps


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """YAML of a digits data set: 24 training and 8 validation images of 64 px."""
    from yolo_qc_plugin.data.digits import compose

    return compose(tmp_path_factory.mktemp("data") / "digits", train=24, val=8, imgsz=64, seed=0)


@pytest.fixture
def small_files(monkeypatch):
    """Let Ultralytics write files of less than 0.1 MB, which it takes for broken ones, and which those of FLOAT are."""
    from ultralytics.engine import exporter
    from ultralytics.utils.files import file_size

    monkeypatch.setattr(exporter, "file_size", lambda path: max(0.2, file_size(path)))


@pytest.fixture
def train(digits, tmp_path):
    """Train the tiny model on the digits, in this process: train(options, callbacks, model, **host arguments)."""
    from ultralytics import YOLO

    from yolo_qc_plugin import add_qc_callbacks

    def run(options: dict | None = None, callbacks: dict | None = None, model=TINY_YAML, **arguments):
        yolo = YOLO(model)
        if options is not None:
            add_qc_callbacks(yolo, **options)
        for event, callback in (callbacks or {}).items():
            yolo.add_callback(event, callback)
        arguments = {**TINY, "data": str(digits), "project": str(tmp_path), "name": "run", **arguments}
        yolo.returned = yolo.train(**arguments)
        return yolo

    return run
