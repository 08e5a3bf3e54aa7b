# yolo_qc_plugin, AGPL-3.0
"""Every task and family: train, correct, validate, save, reload, deploy, export, compare; or the refusal's text.

    python examples/experiments/families.py --out runs/families --jobs 2

One epoch for a CPU at small size on the digits set of the task, from a model of the smallest scale that stock training
has begun to teach the training images by heart; on these it is measured, so that few steps give figures above 0. What
counts is that they are the same everywhere, and how far the outputs themselves differ. Each model is a process of its
own (a second one, fresh, opens the checkpoint), and its row a file in OUT: a second call goes on where the first was
stopped.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

from record import made, versions

TRAINED = {
    "detect": "yolov5n yolov6n yolov7-tiny yolov8n yolov9t yolov10n yolo11n yolo12n yolo26n",
    "segment": "yolov8n-seg yolov9c-seg yolo11n-seg yolo12n-seg yolo26n-seg",
    "pose": "yolov8n-pose yolo11n-pose yolo12n-pose yolo26n-pose",
    "obb": "yolov8n-obb yolo11n-obb yolo12n-obb yolo26n-obb",
    "classify": "yolov8n-cls yolo11n-cls yolo12n-cls yolo26n-cls",
}
REFUSED = (
    "rtdetr-l yolov8-rtdetr yolov8s-world yolov8s-worldv2 yoloe-v8s yoloe-11s-seg yoloe-26s yolo26n-sem yolo26n-depth"
)
DATA = {"train": 48, "val": 16, "imgsz": 64, "seed": 0}
RUN = {"imgsz": 64, "batch": 8, "nbs": 8, "epochs": 1, "device": "cpu", "plots": False, "workers": 0, "verbose": False}
RUN |= {"optimizer": "AdamW", "lr0": 2e-4, "mosaic": 0, "warmup_epochs": 0}
OF_START = {"lr0": 2e-3, "epochs": 50, "warmup_epochs": 1, "val": False}
QC = {"bits": 4, "target": "cpu", "budget": None}  # costs of a budget take longer than these runs
IMAGES = 4  # over which outputs and codes are compared


def data_of(out: Path, task: str) -> Path:
    """The set of a task, which validates on its training images; a classifier's, which learns faster, does not."""
    from yolo_qc_plugin.data.digits import compose

    data = compose(out / "data" / task, **DATA, task=task)
    if data.is_dir():
        return data
    learned = out / "data" / f"{task}.yaml"
    if not learned.exists():  # which another process may be reading
        learned.write_text(data.read_text().replace("val: images/val", "val: images/train"))
    return learned


def images_of(data: Path, split: str):
    """A split's images as Ultralytics feeds them, (n, 3, h, w) in 0..1."""
    import cv2
    import torch

    folder = data if data.is_dir() else data.with_suffix("")
    files = sorted(folder.glob(f"{split}/*/*.jpg" if data.is_dir() else f"images/{split}/*.jpg"))
    images = [torch.from_numpy(cv2.imread(str(f))[..., ::-1].copy()) for f in files]
    return torch.stack(images).permute(0, 3, 1, 2) / 255


def start(name: str, data: Path, out: Path) -> Path:
    """The checkpoint of a float model trained from scratch by stock Ultralytics, in this call or an earlier one."""
    from ultralytics import YOLO

    from yolo_qc_plugin.cfg import MODELS, model_yaml

    run = out / "runs" / f"{name}-start"
    file = run / f"{name}-start.pt"  # Ultralytics takes a yolov5n.pt for its own
    if not file.exists():
        yolo = YOLO(model_yaml(name) if name in MODELS else f"{name}.yaml")
        yolo.train(data=str(data), project=str(run.parent), name=run.name, exist_ok=True, **(RUN | OF_START))
        Path(yolo.trainer.last).replace(file)
    return file


def train(name: str, out: Path) -> dict:
    """QAT and QC; the run's own figures of what best.pt holds."""
    from torch import nn
    from ultralytics import YOLO

    from yolo_qc_plugin import add_qc_callbacks

    task = next(task for task, names in TRAINED.items() if name in names.split())
    data = data_of(out, task)
    yolo = YOLO(start(name, data, out))
    convs = sum(isinstance(m, nn.Conv2d) for m in yolo.model.modules())
    add_qc_callbacks(yolo, **QC)
    metrics = yolo.train(data=str(data), project=str(out / "runs"), name=name, exist_ok=True, **RUN)
    report = json.loads((yolo.trainer.save_dir / "qc" / "report.json").read_text())
    returned = {k: float(v) for k, v in metrics.results_dict.items()}
    *_, epoch, _ = csv.DictReader((yolo.trainer.save_dir / "results.csv").open())  # then what best.pt holds in the end
    return {
        "file": str(yolo.trainer.best),
        "data": str(data),
        "convolutions": convs,
        "quantized": len(report["layers"]),
        "kept": report["kept"],
        "epoch": {k.strip(): float(v) for k, v in epoch.items() if k.strip() in MAIN.values()},
        "float_outputs": report["metrics"]["float_outputs"],
        "training": report["metrics"][report["kept"]],
        "returned": returned,
    }


def measure(run: dict) -> dict:
    """What a fresh process finds: `val` of the checkpoint, the deployed form, and the exported file."""
    from ultralytics import YOLO

    yolo = YOLO(run["file"])
    settings = {k: RUN[k] for k in ("imgsz", "batch", "device", "plots", "workers", "verbose")}
    found = yolo.val(data=run["data"], project=str(Path(run["file"]).parents[1]), **settings)
    result = {"val": {k: float(v) for k, v in found.results_dict.items()}}
    result |= compare_deployed(run)
    file = YOLO(run["file"]).export(format="onnx", imgsz=RUN["imgsz"], device="cpu")

    from yolo_qc_plugin.tools.check import check

    checked = check(run["file"], file, run["data"], images=IMAGES)
    return result | {k: checked[k] for k in ("weights", "checkpoint", "pytorch", "runtimes", "passed")}


def compare_deployed(run: dict) -> dict:
    """Largest difference between what the checkpoint and its deployed form compute, and the latter's float layers.

    The difference is over the largest deviation of that output from its channel's mean.
    """
    from copy import deepcopy

    import torch
    from torch import nn
    from ultralytics.nn.tasks import load_checkpoint

    x = images_of(Path(run["data"]), "val")[:IMAGES]
    model, _ = load_checkpoint(run["file"])
    deployed = deepcopy(model).fuse(verbose=False)
    with torch.no_grad():
        plain, fused = (m(x)[1] for m in (model, deployed))
    if not isinstance(plain, dict):  # a classifier's logits
        plain, fused = {"logits": plain[..., None]}, {"logits": fused[..., None]}
    branch = "one2one" if getattr(model, "end2end", False) else "one2many"
    plain, fused = (p.get(branch, p) for p in (plain, fused))
    pairs = [(plain[k].flatten(2), fused[k].flatten(2)) for k, v in plain.items() if isinstance(v, torch.Tensor)]
    kinds = {"transposed convolution": nn.ConvTranspose2d, "linear layer": nn.Linear}
    others = {kind: sum(isinstance(m, t) for m in deployed.modules()) for kind, t in kinds.items()}
    return {
        "deployed_output": max(float((a - b).abs().max() / (a - a.mean((0, 2), True)).abs().max()) for a, b in pairs),
        "others": {kind: n for kind, n in others.items() if n},
    }


def refusal(name: str) -> str:
    """What the plugin says to a model that it does not take."""
    from ultralytics import RTDETR, YOLO

    from yolo_qc_plugin import add_qc_callbacks
    from yolo_qc_plugin.config import QCError

    try:
        add_qc_callbacks((RTDETR if "rtdetr" in name else YOLO)(f"{name}.yaml"))
    except QCError as e:
        return str(e)
    raise RuntimeError(f"{name} was not refused")


def write_row(name: str, out: Path) -> None:
    """Measure one model, in this process and a fresh one, and write its row."""
    began = time.time()
    if name in REFUSED.split():
        row = {"model": name, "refused": refusal(name)}
    else:
        run = train(name, out)
        fresh = subprocess.run(
            [sys.executable, __file__, "--measure", json.dumps(run)], stdout=subprocess.PIPE, text=True, check=True
        )
        row = {"model": name, **run, **json.loads(fresh.stdout.splitlines()[-1])}
        row = {k: v for k, v in row.items() if k not in {"file", "data"}}
    row |= {"seconds": round(time.time() - began), **made()}
    temporary = out / f".{name}.tmp"
    temporary.write_text(json.dumps(row, indent=1))
    temporary.replace(out / f"{name}.json")


def start_row(name: str, out: Path) -> str:
    """Run a row's process, unless the row is there; a line that says how it went."""
    if (out / f"{name}.json").exists():
        return f"{name}: done before"
    log = out / f"{name}.log"
    with log.open("w") as f:
        done = subprocess.run([sys.executable, __file__, "--row", name, "--out", str(out)], stdout=f, stderr=f)
    return f"{name}: {'done' if done.returncode == 0 else f'FAILED, see {log}'}"


def page(record: dict) -> str:
    """The record as Markdown."""
    rows = record["rows"]
    lines = [
        "# Tasks and families",
        "",
        f"Written by `examples/experiments/families.py`: {DATA['train']} digits images of {DATA['imgsz']} px, one "
        f"epoch of `{' '.join(f'{k}={v}' for k, v in QC.items())}` from a float model that "
        f"{OF_START['epochs']} epochs taught them from scratch, QC, export. All but classifiers are measured on these "
        "images. The figures are low for that reason; what counts is whether they are the same. In points:",
        "",
        "- epoch: the last epoch's row of results.csv, which has three decimals of a point; file: the checkpoint that "
        "Ultralytics wrote then (outputs not quantized yet), measured after training. The rest is of the model in "
        "best.pt:",
        "- training: what the run reports; val: `yolo val` of the file in a fresh process (it deploys the model), "
        "images padded as Ultralytics does for checkpoints",
        "- checkpoint, deployed, ONNX Runtime (optimised and not), OpenVINO: `yolo-qc check`, square images, as "
        "Ultralytics feeds exported files; boxes, masks and keypoints by pycocotools",
        f"- outputs: largest difference over {IMAGES} images, deployed to checkpoint (of the outputs' spread) and ONNX "
        "Runtime to deployed (in the outputs' own units, pixels for boxes; end-to-end heads sort theirs, and equals "
        "may change places); codes: share that differs from the deployed form, end to end",
        "",
    ]
    head = "model, convolutions quantized, also in float, epoch, file, training, val, checkpoint, deployed, "
    head += "ONNX Runtime, OpenVINO, outputs: deployed, outputs: ONNX, codes: ONNX, codes: OpenVINO, check"
    head = head.split(", ")
    for task, names in TRAINED.items():
        found = [r for name in names.split() for r in rows if r["model"] == name]
        if not found:
            continue
        keys = [k for k in found[0]["training"] if k in MAIN]
        lines += [f"## {task} ({', '.join(keys)})", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        lines += [f"| {' | '.join(cells(row, keys))} |" for row in found] + [""]
    lines += ["## Refused", "", "| model | message |", "|---|---|"]
    lines += [f"| {r['model']} | {r['refused']} |" for r in rows if "refused" in r]
    lines += [
        f"| {name} | not trained by Ultralytics itself: {reason} |" for name, reason in record["untrainable"].items()
    ]
    return "\n".join([*lines, ""])


MAIN = {  # our name -> Ultralytics'
    "map50_95": "metrics/mAP50-95(B)",
    "mask_map50_95": "metrics/mAP50-95(M)",
    "pose_map50_95": "metrics/mAP50-95(P)",
    "top1": "metrics/accuracy_top1",
}


def cells(row: dict, keys: list[str]) -> list[str]:
    """A row of the table."""
    points = lambda values: " / ".join(f"{100 * (v or 0):.4f}" for v in values)  # noqa: E731
    square = [k.replace("map50_95", "AP") for k in keys] if "AP" in row["pytorch"] else keys
    runtimes = {r["name"]: r for r in row["runtimes"]}
    ort = [r for name, r in runtimes.items() if name.startswith("onnxruntime")]
    shown = dict.fromkeys(points(r[k] for k in square) for r in ort)
    openvino = runtimes["openvino"]
    return [
        row["model"],
        f"{row['quantized']} of {row['convolutions']}",
        ", ".join(f"{n} {kind}{'s' * (n > 1)}" for kind, n in row["others"].items()) or "-",
        points(row["epoch"][MAIN[k]] for k in keys),
        points(row["float_outputs"][k] for k in keys),
        points(row["training"][k] for k in keys),
        points(row["val"][MAIN[k]] for k in keys),
        points(row["checkpoint"][k] for k in square),
        points(row["pytorch"][k] for k in square),
        " and ".join(shown),
        openvino.get("skipped") or points(openvino[k] for k in square),
        f"{row['deployed_output']:.0e}",
        f"{max(r['output'] for r in ort):.0e}",
        f"{max(r['changed_end_to_end'] for r in ort):.0e}",
        f"{openvino['changed_end_to_end']:.0e}" if "changed_end_to_end" in openvino else "-",
        "passed" if row["passed"] else "FAILED",
    ]


def untrainable() -> dict[str, str]:
    """Models of Ultralytics for which it has no trainer."""
    from ultralytics import NAS, SAM, FastSAM

    found = {}
    for model in (FastSAM, SAM, NAS):
        tasks = model.task_map.fget(SimpleNamespace(is_sam2=False, is_sam3=False))
        if not any("trainer" in parts for parts in tasks.values()):
            found[model.__name__] = f"{' and '.join(next(iter(tasks.values())))} only"
    return found


def main() -> None:
    """Parse the command line and run."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("runs/families"), help="rows, runs and logs")
    p.add_argument("--page", type=Path, default=Path("docs/results"), help="folder of families.json and families.md")
    p.add_argument("--jobs", type=int, default=1)
    p.add_argument("--only", nargs="+", help="models, by name")
    p.add_argument("--assemble", action="store_true", help="make the page from the JSON file, without measuring")
    p.add_argument("--row", help=argparse.SUPPRESS)
    p.add_argument("--measure", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.measure:
        print(json.dumps(measure(json.loads(args.measure))))
        return
    file = args.page / "families.json"
    if args.assemble:
        file.with_suffix(".md").write_text(page(json.loads(file.read_text())))
        return
    os.environ.setdefault("YOLO_QC_COMPILE", "0")  # compiling takes longer than these runs
    out = args.out.resolve()
    if args.row:
        write_row(args.row, out)
        return
    names = [*" ".join(TRAINED.values()).split(), *REFUSED.split()]
    for task in TRAINED:
        data_of(out, task)  # before two processes want to make it
    with ThreadPoolExecutor(args.jobs) as pool:
        for line in pool.map(lambda name: start_row(name, out), args.only or names):
            print(line, flush=True)
    rows = [json.loads(f.read_text()) for name in names if (f := out / f"{name}.json").exists()]
    record = {"versions": versions(), "rows": rows, "untrainable": untrainable()}
    file.write_text(json.dumps(record, indent=1) + "\n")
    file.with_suffix(".md").write_text(page(record))
    if missing := [name for name in names if not (out / f"{name}.json").exists()]:
        sys.exit(f"no row yet: {', '.join(missing)}")


if __name__ == "__main__":
    main()
