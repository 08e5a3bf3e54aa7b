# yolo_qc_plugin, AGPL-3.0
"""What the paper's experiment would cost on COCO, from steps of the stock loop measured on this machine."""

from __future__ import annotations

import json
import platform
import statistics
import time
from itertools import pairwise
from pathlib import Path

from record import made, read, versions

COCO = {"train": 118287, "val": 5000}  # images
VARIANTS = {"float": None, "quantized": {"preset": "paper"}}  # options of the plugin
# runs: Table 1's, the three of Table 3 that Table 1 lacks, per channel at three widths, narrow edges
TRAINED = {"float": 1, "quantized": 6 + 3 + 3 + 1}
CORRECTED = TRAINED["quantized"] + 6  # epochs of QC: one a quantized run, and Table 2
EPOCHS = 100  # of the paper's runs


def step_seconds(model: str, options: dict | None, arguments: dict, seconds: float) -> float:
    """Median seconds from the end of one training step to the end of the next, in a stock run of about `seconds`."""
    from ultralytics import YOLO

    from yolo_qc_plugin import add_qc_callbacks

    ends, steps = [], []
    yolo = YOLO(model)
    if options is not None:
        add_qc_callbacks(yolo, **options)

    def on_train_batch_end(trainer) -> None:
        ends.append(time.perf_counter())

    def on_train_epoch_end(trainer) -> None:
        steps.extend(b - a for a, b in pairwise(ends))  # loading of the next epoch is not a step
        ends.clear()

    yolo.add_callback("on_train_batch_end", on_train_batch_end)
    yolo.add_callback("on_train_epoch_end", on_train_epoch_end)
    yolo.train(**arguments, time=seconds / 3600)
    return statistics.median(steps[len(steps) // 5 :])  # without the first ones, which compile and warm up


def measure(model: str, recipe: dict, seconds: float, runs: Path) -> dict:
    """Measure float and quantized steps on a composed data set.

    Args:
        model: YAML or checkpoint.
        recipe: Arguments of `model.train()`, with batch, imgsz and device.
        seconds: Of each measurement.
        runs: Folder for the runs and the data.

    Returns:
        Plain values: what was measured.
    """
    import torch

    from yolo_qc_plugin import compose

    batch, imgsz, device = (recipe[k] for k in ("batch", "imgsz", "device"))
    folder = runs / f"digits-{imgsz}"
    data = folder / "digits.yaml"
    if not data.exists():
        compose(folder, train=16 * batch, val=batch, imgsz=imgsz, seed=0)
    place = {"data": str(data), "project": str(runs.resolve()), "name": "cost", "exist_ok": True, "verbose": False}
    found = {name: step_seconds(model, o, {**recipe, **place}, seconds) for name, o in VARIANTS.items()}
    cuda = torch.device("cpu" if device == "cpu" else "cuda").type == "cuda"
    return {
        "model": Path(model).stem,
        "device": torch.cuda.get_device_name() if cuda else f"CPU, threads: {torch.get_num_threads()}",
        "recipe": recipe,
        "seconds_per_step": found,
        "versions": {**versions(), "python": platform.python_version()},
        **made("cuda" if cuda else "cpu"),
    }


def hours(found: dict) -> dict[str, float]:
    """Hours on one such device for one seed: of the float run, the quantized runs and QC."""
    steps, seconds = COCO["train"] / found["recipe"]["batch"], found["seconds_per_step"]
    trained = {name: runs * EPOCHS * steps * seconds[name] / 3600 for name, runs in TRAINED.items()}
    return {**trained, "QC": CORRECTED * steps * seconds["quantized"] / 3600}  # as training's steps, which cost more


def write(found: dict | None, folder: Path) -> str:
    """Put what `measure` found in the record, if anything, make the page, and return it."""
    file = folder / "cost.json"
    record = read(file)
    if found:
        record[f"{found['model']} on {found['device']}"] = found
        file.write_text(json.dumps(record, indent=1) + "\n")
    file.with_suffix(".md").write_text(page(record))
    return page(record)


def page(record: dict) -> str:
    """The record as Markdown."""
    lines = [
        "# What the paper's tables would cost on COCO",
        "",
        "Written by `examples/experiments/paper.py cost`: steps of the stock loop, measured on images composed for it, "
        f"scaled up to Tables 1 to 3, per channel and narrow edges ({sum(TRAINED.values())} runs of {EPOCHS} epochs, "
        f"{CORRECTED} epochs of QC a seed), without validation.",
        "",
        "| model and device | px | batch | float step, s | quantized step, s | hours a seed | "
        "of these float / quantized / QC |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in record.items():
        steps, of, recipe = found["seconds_per_step"], hours(found), found["recipe"]
        cells = [name, recipe["imgsz"], recipe["batch"], f"{steps['float']:.3f}", f"{steps['quantized']:.3f}"]
        cells += [f"{sum(of.values()):.0f}", " / ".join(f"{value:.0f}" for value in of.values())]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, ""])
