# yolo_qc_plugin, AGPL-3.0
"""What a model is worth where it runs: size, accuracy and time of every file of it, beside Ultralytics' own.

    python examples/experiments/targets.py --checkpoints RUN/weights/best.pt ... --float yolo11n.pt --data coco.yaml

Runs `yolo-qc benchmark` on checkpoints with the same float start, one for each target; OUT/targets.json keeps a result
for each model, its widths and target, the last that was measured, and OUT/targets.md shows all of them. `summary.py`
shows of each what it was trained for.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from record import made, read

from yolo_qc_plugin.tools.benchmark import benchmark, format_benchmark

HEAD = """# What runs where

Written by `examples/experiments/targets.py` from `targets.json`: a table of `yolo-qc benchmark` for each model and
target. What each file is for: [deployment.md](../deployment.md)."""


def measure(checkpoint: Path, args: argparse.Namespace) -> dict:
    """The result of the benchmark, without the paths of a machine, and where and when it was made."""
    given = {key: getattr(args, key) for key in ("float", "format", "imgsz", "threads", "repeats")}
    found = benchmark(str(checkpoint), args.data, **given)
    print(format_benchmark(found), flush=True)
    del found["page"]
    return {**found, **{key: Path(found[key]).name for key in ("checkpoint", "float", "data")}, **made()}


def page(record: dict[str, dict]) -> str:
    """The record as Markdown."""
    return "\n".join([HEAD, "", *(f"#{format_benchmark(found)}" for found in record.values())])


def in_order(record: dict[str, dict]) -> dict[str, dict]:
    """By the model's generation, then by target."""
    return dict(sorted(record.items(), key=lambda item: item[0].replace("yolov", "yolo0")))


def main() -> None:
    """Parse the command line and run."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoints", type=Path, nargs="+", help="the runs' best.pt")
    p.add_argument("--float", help="the checkpoint that they were trained from")
    p.add_argument("--data", help="data set YAML")
    p.add_argument("--format", help="onnx, openvino or litert: files of this format alone")
    p.add_argument("--imgsz", type=int, default=320)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--repeats", type=int, default=60)
    p.add_argument("--out", type=Path, default=Path("docs/results"))
    p.add_argument("--assemble", action="store_true", help="make the page from the JSON file, without measuring")
    args = p.parse_args()
    file = args.out / "targets.json"
    record = read(file)
    if not (args.assemble or (args.checkpoints and args.float and args.data)):
        p.error("--checkpoints, --float and --data are needed to measure")
    args.out.mkdir(parents=True, exist_ok=True)
    for checkpoint in [] if args.assemble else args.checkpoints:
        found = measure(checkpoint, args)
        record = in_order({**record, found["model"]: found})
        file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(page(record), encoding="utf-8")


if __name__ == "__main__":
    main()
