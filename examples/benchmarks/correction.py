# yolo_qc_plugin, AGPL-3.0
"""Time of QC's epoch against an epoch of QAT, in one run of the stock loop.

    python examples/benchmarks/correction.py --model yolov5n.yaml --imgsz 320 --batch 16

Both go over the same digits images, without validation. The first QAT epoch, which compiles the quantizers, is left
out. Writes a JSON file and a Markdown page.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from about import about, versions
from ultralytics import YOLO

from yolo_qc_plugin import add_qc_callbacks, compose
from yolo_qc_plugin.run import finish


def measure(args: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Seconds of each QAT epoch and of each QC epoch."""
    torch.set_num_threads(args.threads)
    data = compose(folder / "digits", train=args.batches * args.batch, val=8, imgsz=args.imgsz, seed=0)
    began, qat, qc = [], [], []

    def clock() -> float:
        if args.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(epochs):
        for batches in epochs:
            start = clock()
            yield batches
            qc.append(clock() - start)

    train = finish.train_correction
    finish.train_correction = lambda parameters, epochs, *rest: train(parameters, timed(epochs), *rest)
    model = YOLO(args.model)
    add_qc_callbacks(model, bits=4, correction_epochs=args.epochs)
    model.add_callback("on_train_epoch_start", lambda trainer: began.append(clock()))
    model.add_callback("on_train_epoch_end", lambda trainer: qat.append(clock() - began[-1]))
    model.train(
        data=str(data), imgsz=args.imgsz, batch=args.batch, nbs=args.batch, epochs=args.epochs + 1, device=args.device,
        workers=0, optimizer="SGD", warmup_epochs=0, close_mosaic=0, val=False, plots=False, verbose=False,
        project=str(folder), name="run",
    )  # fmt: skip
    return {"qat": qat[1:], "qc": qc}


def page(record: dict) -> str:
    """The record as Markdown."""
    seconds = record["seconds"]
    qat, qc = (statistics.median(seconds[kind]) for kind in ("qat", "qc"))
    lines = [
        "# Time of QC's epoch",
        "",
        f"Written by `examples/benchmarks/correction.py`. {Path(record['model']).stem}, {record['imgsz']} px, "
        f"{record['batches']} batches of {record['batch']}, {record['cpu']}, {record['threads']} threads, device "
        f"{record['device']}. {versions(record)}.",
        "",
        "| epoch | median of | seconds | of a QAT epoch |",
        "|---|---|---|---|",
        f"| QAT | {len(seconds['qat'])} | {qat:.1f} | 1.00x |",
        f"| QC | {len(seconds['qc'])} | {qc:.1f} | {qc / qat:.2f}x |",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Parse the command line and run."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="yolov5n.yaml")
    p.add_argument("--imgsz", type=int, default=320)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--batches", type=int, default=6, help="of an epoch")
    p.add_argument("--epochs", type=int, default=3, help="counted, of each kind")
    p.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", 1)), help="as Ultralytics: 1")
    p.add_argument("--device", default="cpu")
    p.add_argument("--out", type=Path, default=Path("docs/results"))
    p.add_argument("--assemble", action="store_true", help="make the page from the JSON file, without measuring")
    args = p.parse_args()
    file = args.out / "correction.json"
    if not args.assemble:
        with tempfile.TemporaryDirectory() as folder:
            seconds = measure(args, Path(folder))
        asked = {k: getattr(args, k) for k in ("model", "imgsz", "batch", "batches", "epochs", "threads", "device")}
        file.write_text(json.dumps({**asked, **about(), "seconds": seconds}, indent=1))
    text = page(json.loads(file.read_text()))
    file.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
