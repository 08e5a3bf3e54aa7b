# yolo_qc_plugin, AGPL-3.0
"""The main job on a fresh machine: compose a data set, train a small float YOLO, take it to 4 bits, export, check.

    make demo        or        python examples/demo.py [--out demo]

YOLOv5n finds handwritten digits on photographs, of whatever kind (`single_cls`), which it learns from scratch in
minutes. The float model is trained on for as many epochs as the quantized one, so that training longer is not taken for
a merit of fewer bits. OUT/demo.json has the figures, OUT/predictions.png what the models find on eight images.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

DATA = {"train": 400, "val": 200, "imgsz": 128, "seed": 0}
COMMON = {"imgsz": 128, "batch": 16, "nbs": 16, "device": "cpu", "workers": 0, "single_cls": True}
COMMON |= {"optimizer": "AdamW", "mosaic": 0, "fliplr": 0, "warmup_bias_lr": 0, "plots": False, "verbose": False}
FLOAT = {"epochs": 36, "lr0": 2e-3, "lrf": 0.05, "warmup_epochs": 1}
LONGER = {"epochs": 6, "lr0": 3e-4, "lrf": 0.02, "cos_lr": True, "warmup_epochs": 1}  # of the float model and of 4 bits
SHOWN = 8  # images in the picture


def run(program: str, *words: str, **arguments) -> None:
    """Run a console script that is installed beside this interpreter."""
    command = [str(Path(sys.executable).with_name(program)), *words, *(f"{k}={v}" for k, v in arguments.items())]
    print("\n$", program, *command[1:], flush=True)
    subprocess.run(command, check=True)


def draw(images: list[Path], labels: Path, models: dict[str, Path], file: Path) -> None:
    """Ground truth and each model's boxes on each image, a row each."""
    from matplotlib.figure import Figure
    from PIL import Image
    from ultralytics import YOLO

    figure = Figure(figsize=(1.6 * len(images), 1.7 * (1 + len(models))), layout="constrained")
    axes = figure.subplots(1 + len(models), len(images), squeeze=False)
    boxes = {"ground truth": [truth(labels / f"{image.stem}.txt", COMMON["imgsz"]) for image in images]}
    for name, checkpoint in models.items():
        found = YOLO(checkpoint).predict(images, imgsz=COMMON["imgsz"], conf=0.4, device="cpu", verbose=False)
        boxes[name] = [result.boxes.xyxy.tolist() for result in found]
    for row, (name, per_image) in zip(axes, boxes.items()):
        for ax, image, found in zip(row, images, per_image):
            ax.imshow(Image.open(image))
            ax.set(xticks=[], yticks=[])
            ax.autoscale(False)
            for left, top, right, bottom in found:
                ax.plot([left, right, right, left, left], [top, top, bottom, bottom, top], color="#ff9500", linewidth=1)
        row[0].set_ylabel(name)
    figure.savefig(file, dpi=110)


def truth(file: Path, side: int) -> list[list[float]]:
    """Corners in pixels of a label file's boxes."""
    rows = [list(map(float, line.split()[1:])) for line in file.read_text().splitlines()]
    return [[side * (x - w / 2), side * (y - h / 2), side * (x + w / 2), side * (y + h / 2)] for x, y, w, h in rows]


def metrics(run_folder: Path) -> float:
    """The last mAP50-95 that a float run printed."""
    head, *rows = (run_folder / "results.csv").read_text().splitlines()
    return dict(zip(map(str.strip, head.split(",")), map(float, rows[-1].split(","))))["metrics/mAP50-95(B)"]


def main() -> None:
    """Compose, train, quantize, export, check, report."""
    from yolo_qc_plugin import compose

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the data set and the runs")
    out = parser.parse_args().out.resolve()
    began = time.time()
    data = compose(out / "digits", **DATA)
    for folder in ("float", "longer", "qc"):  # of an earlier demo
        shutil.rmtree(out / folder, ignore_errors=True)

    common = {"data": data, "project": out, **COMMON}
    run("yolo", "train", model="yolov5n.yaml", name="float", **common, **FLOAT)
    start = out / "float" / "weights" / "last.pt"
    run("yolo", "train", model=start, name="longer", **common, **LONGER)
    run("yolo", "train", "callbacks=qc", "qc_target=cpu", model=start, name="qc", **common, **LONGER)
    best, report = out / "qc" / "weights" / "best.pt", json.loads((out / "qc" / "qc" / "report.json").read_text())
    files = {"float checkpoint": start, "4-bit checkpoint*": best}
    if find_spec("onnx") and find_spec("onnxruntime"):
        run("yolo", "export", model=best, format="onnx", imgsz=COMMON["imgsz"])
        files["4-bit file"] = best.with_suffix(".onnx")
        run("yolo-qc", "check", model=best, file=files["4-bit file"], data=data)
    images = sorted((out / "digits" / "images" / "val").glob("*.jpg"))[:SHOWN]
    draw(images, out / "digits" / "labels" / "val", {"float": start, "4 bits": best}, out / "predictions.png")

    figures = {"float": metrics(out / "float"), "float, trained on": metrics(out / "longer")}
    figures |= {name: report["metrics"][key]["map50_95"] for name, key in (("QAT", "qat"), ("QAT + QC", "qc"))}
    result = {
        "map50_95": figures,
        "kept": report["kept"],
        "of_float_trained_on": figures[{"qat": "QAT", "qc": "QAT + QC"}[report["kept"]]] / figures["float, trained on"],
        "mb": {name: file.stat().st_size / 1e6 for name, file in files.items()},
        "minutes": (time.time() - began) / 60,
    }
    (out / "demo.json").write_text(json.dumps(result, indent=1))
    print("\n" + table(result, out))


def table(result: dict, out: Path) -> str:
    """What the demo ends with."""
    best = {"qat": "QAT", "qc": "QAT + QC"}[result["kept"]]
    rows = [f"{'mAP50-95 (W4A8)':<24}"]
    for name, figure in result["map50_95"].items():
        rows.append(f"  {name:<22}{100 * figure:6.1f}{'   <- best.pt' * (name == best)}")
    rows.append(f"  best.pt of float, trained on: {result['of_float_trained_on']:.1%}")
    rows += ["MB", *(f"  {name:<22}{size:6.2f}" for name, size in result["mb"].items())]
    rows.append("  * trains on: its latent weights are in FP32")
    shown = out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out
    best_file = shown / "qc" / "weights" / "best.pt"
    rows += [
        f"{result['minutes']:.1f} minutes; {shown / 'predictions.png'} shows what the models find. Next:",
        f"  yolo val model={best_file} data={shown / 'digits' / 'digits.yaml'} imgsz={COMMON['imgsz']} single_cls=True",
        f"  yolo-qc plot runs={shown / 'qc'}",
        "  yolo train model=yolo11n.pt data=coco8.yaml epochs=10 callbacks=qc qc_target=cpu   # a model of yours",
    ]
    return "\n".join(rows)


if __name__ == "__main__":
    main()
