# yolo_qc_plugin, AGPL-3.0
"""The main job on a fresh machine: compose a data set, train a small float YOLO, take it to 4 bits.

    make demo        or        python examples/demo.py [--out demo]

Prints float, QAT and QC accuracy, and writes them to OUT/demo.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from yolo_qc_plugin.data.digits import compose

# A small set of small images, so that two cores suffice; AdamW learns it from scratch in a few minutes.
DATA = {"train": 400, "val": 200, "imgsz": 160, "seed": 0}
COMMON = {"imgsz": 160, "batch": 16, "nbs": 16, "device": "cpu", "mosaic": 0, "fliplr": 0, "optimizer": "AdamW"}
COMMON |= {"warmup_bias_lr": 0, "warmup_epochs": 1, "plots": False, "verbose": False, "seed": 0}
FLOAT = {"epochs": 22, "lr0": 2e-3, "lrf": 0.05}
QAT = {"epochs": 8, "lr0": 1e-3, "lrf": 0.01}


def yolo(*words: str, **arguments) -> None:
    """Run the stock `yolo` program that is installed beside this interpreter."""
    command = [str(Path(sys.executable).with_name("yolo")), *words, *(f"{k}={v}" for k, v in arguments.items())]
    print("$", "yolo", *command[1:], flush=True)
    subprocess.run(command, check=True)


def main() -> None:
    """Compose, train, quantize, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the data set and the runs")
    out = parser.parse_args().out.resolve()
    began = time.time()
    data = compose(out / "digits", **DATA)
    for run in ("float", "qc"):  # of an earlier demo
        shutil.rmtree(out / run, ignore_errors=True)
    yolo("train", model="yolov5n.yaml", data=data, project=out, name="float", **COMMON, **FLOAT)
    best = out / "float" / "weights" / "best.pt"
    yolo("train", "callbacks=qc", "qc_bits=4", model=best, data=data, project=out, name="qc", **COMMON, **QAT)
    report = json.loads((out / "qc" / "qc" / "report.json").read_text())
    metrics = report["metrics"]
    result = {
        "map50_95": {k: round(v["map50_95"], 4) for k, v in metrics.items()},
        "qc_of_float": round(metrics["qc"]["map50_95"] / metrics["float"]["map50_95"], 4),
        "kept": report["kept"],
        "size_mb": report["size_mb"],
        "minutes": round((time.time() - began) / 60, 1),
    }
    (out / "demo.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
