# yolo_qc_plugin, AGPL-3.0
"""What each block of a float detector loses when it alone goes to few bits, without training.

    python examples/experiments/sensitivity.py --weights float.pt --data digits/digits.yaml --imgsz 160 --name digits

Every other block is at 8 bits, and so are the edges, as in training. A block that loses nothing at so few bits has
either bits to spare or no work to do: of a data set on which many have none, a result is one of the rest of the model.
Each set is a section of sensitivity.md.
"""

from __future__ import annotations

import argparse
import json
import re
from copy import deepcopy
from pathlib import Path

import cv2
import numpy as np
import torch
from record import made, read, versions
from ultralytics import YOLO
from ultralytics.data.utils import check_det_dataset

from yolo_qc_plugin.config import QCConfig
from yolo_qc_plugin.host import architecture
from yolo_qc_plugin.quant.calibrate import calibrate
from yolo_qc_plugin.quant.inject import inject
from yolo_qc_plugin.quant.layers import quant_convs
from yolo_qc_plugin.quant.modules import replace_modules
from yolo_qc_plugin.quant.share import share_quantizers
from yolo_qc_plugin.run.callbacks import attach

# a stage of the backbone or neck; of a head, each branch at each stride
BLOCK = re.compile(r"model\.\d+(\.(one2one_)?cv\d\.\d)?")


def training_images(data: str, imgsz: int, count: int) -> list[torch.Tensor]:
    """Batches (16, 3, imgsz, imgsz) in 0..1 of the first training images, stretched to a square."""
    folder = check_det_dataset(data)["train"]
    if not (isinstance(folder, str) and Path(folder).is_dir()):
        raise SystemExit(f"--data {data}: its train is {folder!r}; a folder of images is accepted")
    files = sorted(Path(folder).glob("*.*"))[:count]
    images = np.stack([cv2.resize(cv2.imread(str(f)), (imgsz, imgsz))[..., ::-1] for f in files])
    return list(torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255).split(16))


def quantized(model: torch.nn.Module, bits: int, images: list[torch.Tensor]) -> torch.nn.Module:
    """A copy of a float model at `bits`, its scales set from images."""
    copy = deepcopy(model)
    inject(copy, QCConfig(bits=bits, per_channel=True), architecture.edge_convs(copy), architecture.fixed_convs(copy))
    share_quantizers(copy, architecture.blank_image(copy))
    calibrate(copy, images, copy)
    return copy


def measure(model: torch.nn.Module, args: argparse.Namespace) -> float:
    """mAP50-95 in points of the deployed form."""
    yolo = YOLO(args.weights)
    yolo.model = deepcopy(model)
    found = yolo.val(data=args.data, imgsz=args.imgsz, device="cpu", workers=0, plots=False, verbose=False)
    return 100 * found.box.map


def page(record: dict) -> str:
    """The record as Markdown: a section for each set."""
    lines = ["# Sensitivity", "", "Written by `examples/experiments/sensitivity.py` from `sensitivity.json`."]
    return "\n".join([*lines, *(line for result in record.values() for line in section(result))]) + "\n"


def section(result: dict) -> list[str]:
    """One set as Markdown."""
    lines = [
        "",
        f"## {result['weights']} on {result['data']}",
        "",
        f"mAP50-95 in points at {result['imgsz']} px, without training: float "
        f"{result['float']:.1f}, all at 8 bits {result['eight']:.1f}, all at {result['bits']} bits "
        f"{result['all']:.1f}, the edges always at 8 bits. Each row: that block alone at {result['bits']} bits. "
        + ", ".join(f"{k} {v}" for k, v in result["versions"].items()) + ".",
        "",
        "| block | weights | share of weights | mAP50-95 | loss |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    whole = sum(b["weights"] for b in result["blocks"].values())
    for name, b in result["blocks"].items():
        loss = result["eight"] - b["map50_95"]
        lines.append(f"| {name} | {b['weights']} | {b['weights'] / whole:.1%} | {b['map50_95']:.1f} | {loss:.1f} |")
    return lines


def main() -> None:
    """Parse the command line and run."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--weights", help="float checkpoint")
    p.add_argument("--data", help="data set YAML")
    p.add_argument("--name", help="of the set; by default DATA")
    p.add_argument("--imgsz", type=int, default=320)
    p.add_argument("--bits", type=int, default=3)
    p.add_argument("--images", type=int, default=64, help="training images that the scales are set from")
    p.add_argument("--out", type=Path, default=Path("docs/results"))
    p.add_argument("--assemble", action="store_true", help="make the page from the JSON file, without measuring")
    args = p.parse_args()
    file = args.out / "sensitivity.json"
    record = read(file)
    if not args.assemble:
        if not (args.weights and args.data):
            p.error("--weights and --data are needed to measure")
        record[args.name or Path(args.data).stem] = sensitivity(args)
        file.write_text(json.dumps(record, indent=1) + "\n")
    file.with_suffix(".md").write_text(page(record))


def sensitivity(args: argparse.Namespace) -> dict:
    """Measure every block; plain values."""
    attach()
    model = YOLO(args.weights).model.float()
    images = training_images(args.data, args.imgsz, args.images)
    low, eight = (quantized(model, bits, images) for bits in (args.bits, 8))
    weights: dict[str, int] = {}  # of each block, without edges, which keep their width
    for (name, conv), (_, narrow) in zip(quant_convs(eight), quant_convs(low)):
        if conv.weight_quant.bits != narrow.weight_quant.bits:
            block = BLOCK.match(name)[0]
            weights[block] = weights.get(block, 0) + conv.weight.numel()
    result = {
        "weights": Path(args.weights).name, "data": Path(args.data).name, "imgsz": args.imgsz, "bits": args.bits,
        "versions": versions(), **made(),
        "float": measure(model, args), "eight": measure(eight, args), "all": measure(low, args), "blocks": {},
    }  # fmt: skip
    for block, count in weights.items():
        mixed, narrow = deepcopy(eight), dict(quant_convs(deepcopy(low)))
        there = {m: narrow[name] for name, m in quant_convs(mixed) if BLOCK.match(name)[0] == block}
        replace_modules(mixed, there)
        result["blocks"][block] = {"weights": count, "map50_95": measure(mixed, args)}
    return result


if __name__ == "__main__":
    main()
