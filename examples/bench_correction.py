# yolo_qc_plugin, AGPL-3.0
"""Time of QC's epoch against an epoch of QAT, in one run of the stock loop.

    python examples/bench_correction.py --model yolov5n.yaml --imgsz 320 --batch 16

Both go over the same digits images, without validation. The first QAT epoch, which compiles the quantizers, is left
out. Writes a JSON file and a Markdown page.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path


def measure(args: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Seconds of each QAT epoch and of each QC epoch."""
    import torch
    from ultralytics import YOLO

    from yolo_qc_plugin import add_qc_callbacks
    from yolo_qc_plugin.data.digits import compose
    from yolo_qc_plugin.run import finish

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


def main() -> None:
    """Parse the command line and run."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="yolov5n.yaml")
    p.add_argument("--imgsz", type=int, default=320)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--batches", type=int, default=6, help="of an epoch")
    p.add_argument("--epochs", type=int, default=3, help="counted, of each kind")
    p.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", 1)), help="as the host: 1")
    p.add_argument("--device", default="cpu")
    p.add_argument("--out", type=Path, default=Path("docs/results"))
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(args, Path(folder))

    import torch
    import ultralytics
    from bench_deploy import cpu_name

    from yolo_qc_plugin import __version__

    versions = {"yolo_qc_plugin": __version__, "ultralytics": ultralytics.__version__, "torch": torch.__version__}
    about = {k: getattr(args, k) for k in ("model", "imgsz", "batch", "batches", "epochs", "threads", "device")}
    about |= {"cpu": cpu_name(), "machine": platform.platform(), "versions": versions}
    qat, qc = (statistics.median(seconds[kind]) for kind in ("qat", "qc"))
    (args.out / "correction.json").write_text(json.dumps({**about, "seconds": seconds}, indent=1))
    page = [
        "# Time of QC's epoch",
        "",
        f"Written by `examples/bench_correction.py`. {Path(args.model).stem}, {args.imgsz} px, {args.batches} batches "
        f"of {args.batch}, {about['cpu']}, {args.threads} threads, device {args.device}. "
        + ", ".join(f"{k} {v}" for k, v in versions.items()) + ".",
        "",
        "| epoch | median of | seconds | of a QAT epoch |",
        "|---|---|---|---|",
        f"| QAT | {len(seconds['qat'])} | {qat:.1f} | 1.00x |",
        f"| QC | {len(seconds['qc'])} | {qc:.1f} | {qc / qat:.2f}x |",
    ]  # fmt: skip
    (args.out / "correction.md").write_text("\n".join([*page, ""]))
    print("\n".join(page))


if __name__ == "__main__":
    main()
