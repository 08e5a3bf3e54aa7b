# yolo_qc_plugin, AGPL-3.0
"""Make the checkpoints that tests start from, in this folder.

    python tests/checkpoints/make.py float        # tiny.yaml trained on digits for some minutes: float.pt
    python tests/checkpoints/make.py segment      # tiny-seg.yaml, from float.pt: segment.pt
    python tests/checkpoints/make.py pose         # tiny-pose.yaml, from segment.pt: pose.pt
    python tests/checkpoints/make.py quantized    # float.pt after an epoch of callbacks=qc, in seconds: quantized.pt

Every later version must open quantized.pt and find in it what quantized.json says. It is made again where the form of a
checkpoint changes on purpose, which is to be a change that CHANGELOG.md names.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp(prefix="yolo_config_"))

from ultralytics import YOLO, __version__

import yolo_qc_plugin
from yolo_qc_plugin import add_qc_callbacks, compose
from yolo_qc_plugin.quant.layers import quant_convs

HERE = Path(__file__).resolve().parent
YAML, FLOAT, QUANTIZED, FIGURES = (HERE / n for n in ("tiny.yaml", "float.pt", "quantized.pt", "quantized.json"))
SIZE = 300_000  # bytes that a file has at most
COMMON = {"imgsz": 64, "device": "cpu", "workers": 0, "plots": False, "verbose": False, "name": "run"}
FLOAT_RUN = {"epochs": 70, "batch": 32, "optimizer": "AdamW", "lr0": 5e-3, "cos_lr": True, "warmup_epochs": 1,
             "cls": 1.0, "mosaic": 0.0, "scale": 0.2, "fliplr": 0.0, "cache": True, "val": False}  # fmt: skip
TASK_RUN = {**FLOAT_RUN, "epochs": 10, "batch": 16, "lr0": 4e-3, "imgsz": 96}
QUANTIZED_RUN = {"epochs": 1, "batch": 8, "nbs": 8, "optimizer": "Adam", "lr0": 1e-3, "warmup_epochs": 0, "mosaic": 0.0,
                 "fliplr": 0.0}  # fmt: skip


def hash_of_codes(model: torch.nn.Module) -> str:
    """SHA-256 of the codes of all weights."""
    digest = hashlib.sha256()
    for name, conv in quant_convs(model):
        digest.update(name.encode() + conv.weight_codes().to(torch.int8).contiguous().numpy().tobytes())
    return digest.hexdigest()


def keep(trained: Path, target: Path, yaml: Path = YAML) -> None:
    """Copy a checkpoint without what it says of this machine."""
    checkpoint = torch.load(trained, weights_only=False)
    model = checkpoint["model"]
    model.yaml["yaml_file"], model.pt_path = yaml.name, None
    chosen = {k: v for k, v in checkpoint["train_args"].items() if k in {*COMMON, *FLOAT_RUN, *QUANTIZED_RUN, "task"}}
    model.args = {"task": chosen["task"], "imgsz": chosen["imgsz"]}
    named = "epoch", "best_fitness", "ema", "updates", "optimizer", "train_metrics", "date", "version", "license"
    torch.save({**{k: checkpoint[k] for k in named}, "train_args": chosen, "model": model}, target)
    content = target.read_bytes()
    if len(content) > SIZE or str(HERE.parents[1]).encode() in content or str(trained.parents[2]).encode() in content:
        raise SystemExit(f"{target} has {len(content)} bytes, at most {SIZE} are wanted, or it names a folder")
    print(f"{target}: {len(content)} bytes")


def make_float(folder: Path) -> None:
    data = compose(folder / "digits", train=3000, val=100, imgsz=64, seed=0)
    model = YOLO(YAML)
    model.train(data=str(data), project=str(folder), **COMMON, **FLOAT_RUN)
    keep(model.trainer.best, FLOAT)


def make_of_task(folder: Path, task: str) -> None:
    data = compose(folder / "digits", train=800, val=50, imgsz=TASK_RUN["imgsz"], seed=0, task=task)
    yaml = HERE / {"segment": "tiny-seg.yaml", "pose": "tiny-pose.yaml"}[task]
    model = YOLO(yaml).load(FLOAT if task == "segment" else HERE / "segment.pt")
    model.train(data=str(data), project=str(folder), **{**COMMON, **TASK_RUN})
    keep(model.trainer.best, HERE / f"{task}.pt", yaml)


def make_quantized(folder: Path) -> None:
    data = compose(folder / "digits", train=200, val=8, imgsz=64, seed=0)
    model = YOLO(FLOAT)
    add_qc_callbacks(model, bits=4, skip=["model.2.m.*"], telemetry=False)
    model.train(data=str(data), project=str(folder), **COMMON, **QUANTIZED_RUN)
    keep(model.trainer.best, QUANTIZED)
    found = YOLO(QUANTIZED).val(data=str(data), imgsz=64, device="cpu", plots=False, project=str(folder), name="val")
    record = {
        "plugin": yolo_qc_plugin.__version__,
        "ultralytics": __version__,
        "torch": torch.__version__,
        "map50_95": found.box.map,
        "map50": found.box.map50,
        "codes": hash_of_codes(YOLO(QUANTIZED).model),
    }
    FIGURES.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    of_tasks = {task: partial(make_of_task, task=task) for task in ("segment", "pose")}
    kinds = {"float": make_float, **of_tasks, "quantized": make_quantized}
    if len(sys.argv) != 2 or sys.argv[1] not in kinds:
        raise SystemExit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        kinds[sys.argv[1]](Path(folder))
