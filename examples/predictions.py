# yolo_qc_plugin, AGPL-3.0
"""Draw what a float model and the quantized one that it became find on photographs, side by side.

    python examples/predictions.py RUN                       # two photographs that Ultralytics installs
    python examples/predictions.py RUN --photographs a.jpg b.jpg --imgsz 320 --out predictions.jpg
    python examples/predictions.py RUN --benchmark RUN/qc/benchmark.json

RUN is the folder of a finished run that had a teacher. The figures under the columns are of its report, or
of its files in ONNX Runtime where `yolo-qc benchmark` has measured them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure
from ultralytics import YOLO
from ultralytics.utils import ASSETS

import yolo_qc_plugin  # noqa: F401  (opens our checkpoints)
from yolo_qc_plugin.report.console import in_short, weights_by_widths

MODELS = {  # -> its file, its size in a report, its row in a benchmark
    "float": ("teacher.pt", "float32", "FP32"),
    "quantized": ("best.pt", "quantized", "ours packed"),
}


def caption(report: dict, which: str, benchmark: dict | None) -> str:
    """What a model is, how large it is, how well it does and how long it takes."""
    state = "float" if which == "float" else report["kept"]
    _, size, row = MODELS[which]
    body = "FP32" if which == "float" else in_short(weights_by_widths(report["layers"]))
    if benchmark:
        found = next(x for x in benchmark["rows"] if (x["runtime"], x["file"]) == ("ONNX Runtime", row))
        return f"{body}: {found['mb']:.1f} MB, mAP50-95 {found['figure']:.3f}, {found['median']:.1f} ms"
    return f"{body}: {report['size_mb'][size]:.1f} MB of weights, mAP50-95 {report['metrics'][state]['map50_95']:.3f}"


def draw(run: Path, photographs: list[Path], imgsz: int, confidence: float, benchmark: dict | None = None) -> Figure:
    """Both models' boxes on each photograph, all in a row, with the captions below."""
    report = json.loads((run / "qc" / "report.json").read_text())
    captions = [caption(report, which, benchmark) for which in MODELS]
    models = [YOLO(run / "weights" / file) for file, *_ in MODELS.values()]
    panels = [
        (
            model.predict(photograph, imgsz=imgsz, conf=confidence, device="cpu", verbose=False)[0].plot()[..., ::-1],
            told,
        )
        for photograph in photographs
        for model, told in zip(models, captions)
    ]
    widths = [image.shape[1] / image.shape[0] for image, _ in panels]
    figure = Figure(figsize=(12, 12 / sum(widths) + 0.8), layout="constrained")
    axes = figure.subplots(1, len(panels), width_ratios=widths, squeeze=False)[0]
    for ax, (image, told) in zip(axes, panels):
        ax.imshow(image)
        ax.set_title(told.partition(":")[0], fontsize=10)
        ax.set_axis_off()
    figure.supxlabel("    ".join(captions), fontsize=10)
    return figure


def main() -> None:
    """Parse the command line, draw and save."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", type=Path)
    p.add_argument("--photographs", type=Path, nargs="+", default=[ASSETS / "bus.jpg", ASSETS / "zidane.jpg"])
    p.add_argument("--imgsz", type=int, default=320)
    p.add_argument("--confidence", type=float, default=0.25)
    p.add_argument("--benchmark", type=Path, help="benchmark.json of the run's best.pt")
    p.add_argument("--out", type=Path, default=Path("predictions.jpg"))
    args = p.parse_args()
    benchmark = json.loads(args.benchmark.read_text()) if args.benchmark else None
    draw(args.run, args.photographs, args.imgsz, args.confidence, benchmark).savefig(args.out, dpi=110)
    print(args.out)


if __name__ == "__main__":
    main()
