# yolo_qc_plugin, AGPL-3.0
"""The record of a run: qc/report.json."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterable, Mapping
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import ultralytics
from torch import Tensor, nn

from .. import __version__
from ..config import QCConfig
from ..deploy.fold import deployed_convs
from ..files import replacing
from ..host.architecture import blank_image, deploy_model
from ..host.record import own_record
from ..quant.activations import quant_activations
from ..quant.layers import QuantConv2d, multiplications, quant_convs
from .runs import RECORD

FIGURES = {  # Ultralytics' key -> ours, and its heading; those that a task has are reported
    "metrics/mAP50-95(B)": ("map50_95", "mAP50-95"),
    "metrics/mAP50(B)": ("map50", "mAP50"),
    "metrics/mAP50-95(M)": ("mask_map50_95", "mask 50-95"),
    "metrics/mAP50(M)": ("mask_map50", "mask 50"),
    "metrics/mAP50-95(P)": ("pose_map50_95", "pose 50-95"),
    "metrics/mAP50(P)": ("pose_map50", "pose 50"),
    "metrics/accuracy_top1": ("top1", "top1"),
    "metrics/accuracy_top5": ("top5", "top5"),
}
CLIP_BATCHES = 4  # validation batches over which the share of clipped activations is counted


def build_report(
    model: nn.Module,
    config: QCConfig,
    metrics: dict[str, dict | None],
    kept: str,
    images: Iterable[Tensor],
    oscillating: Mapping[str, float],
    imgsz: int,
) -> dict:
    """Collect the record.

    Args:
        model: The model that best.pt holds, in eval mode.
        config: Options of the run.
        metrics: Figures (see `figures_of`) of "float_outputs" (after QAT, outputs not quantized), "qat" (with quantized
            outputs as well) and "qc" (corrected, or None where that is off).
        kept: "qat" or "qc".
        images: Batches in [0, 1] on the model's device, for the share of clipped activations.
        oscillating: Layer -> share of its weights that oscillate at the end; may be empty.
        imgsz: Side in pixels of the square image for which operations are counted.

    Returns:
        A dict of plain values.
    """
    clipped = clipped_shares(model, images)
    layers = [
        {**layer, "act_clipped": clipped[layer["name"]], "oscillating": oscillating.get(layer["name"])}
        for layer in described(model, blank_image(model, imgsz))
    ]
    return {
        "config": config.to_dict(),
        "versions": {
            "yolo_qc_plugin": __version__,
            "commit": checkout_commit(),
            "ultralytics": ultralytics.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "metrics": {"float": own_record(model).float_metrics, **metrics},
        "kept": kept,
        "size_mb": model_size(model),
        "operations": operations(layers),
        "layers": layers,
        "outputs": [
            {"name": name, "bits": act.quant.bits, "scale": act.quant.scale.item(), "zero_point": act.quant.zero_point}
            for name, act in quant_activations(model)
        ],
    }


def checkout_commit() -> str | None:
    """The commit of the checkout that the package is imported from, with a + where files differ from it.

    None for an installed copy, and where there is no git.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=12"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def described(model: nn.Module, image: Tensor) -> list[dict]:
    """Every layer's record (see `describe`), with "macs", its multiplications for an image, shape (1, c, h, w)."""
    macs = multiplications(model, image)
    return [{**describe(name, conv), "macs": macs[name]} for name, conv in quant_convs(model)]


def describe(name: str, conv: QuantConv2d) -> dict:
    """One layer's record: widths, scales, offset, codes in use and share of clipped weights."""
    weight, act = conv.weight_quant, conv.act_quant
    codes = conv.weight_codes()
    offset = act.grid_offset()
    return {
        "name": name,
        "weights": codes.numel(),
        "weight_bits": weight.bits,
        "act_bits": act.bits,
        "weight_scale": weight.scale.tolist(),
        "act_scale": act.scale.item(),
        "act_offset": None if offset is None else offset.item(),
        "act_range": [act.quant_min, act.quant_max],
        "weight_codes": codes.unique().numel(),
        "weight_clipped": weight.clipped(conv.weight).item(),
    }


def figures_of(results: dict[str, float]) -> dict[str, float]:
    """A task's main figures out of Ultralytics' results, by our names, and fitness, which decides what is kept."""
    figures = {name: float(results[key]) for key, (name, _) in FIGURES.items() if key in results}
    return {**figures, "fitness": float(results["fitness"])}


@torch.no_grad()
def clipped_shares(model: nn.Module, images: Iterable[Tensor]) -> dict[str, float]:
    """Share of each layer's input values that its quantizer clips, over the first `CLIP_BATCHES` batches."""
    shares: dict[str, list[Tensor]] = {name: [] for name, _ in quant_convs(model)}
    hooks = [
        conv.register_forward_pre_hook(lambda m, args, seen=shares[name]: seen.append(m.act_quant.clipped(args[0])))
        for name, conv in quant_convs(model)
    ]
    try:
        for batch in islice(images, CLIP_BATCHES):
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: float(torch.stack(seen).mean()) if seen else 0.0 for name, seen in shares.items()}


def model_size(model: nn.Module) -> dict[str, float]:
    """Size of the deployed parameters in MB (1e6 bytes): all in FP32, and with quantized weights at their bits.

    Both count weights, one scale and one bias per output channel of a quantized convolution (BN and QC folded in), and
    everything else in FP32. What training alone needs, a second head say, is not counted.
    """
    deployed = deepcopy(model)
    deploy_model(deployed)
    convs = deployed_convs(deployed).values()
    inside = {id(p) for conv in convs for p in conv.parameters()}
    rest = 4 * sum(p.numel() for p in deployed.parameters() if id(p) not in inside)
    channels = sum(conv.out_channels for conv in convs)
    return {
        "float32": (rest + 4 * sum(c.weight_codes.numel() for c in convs) + 4 * channels) / 1e6,
        "quantized": (rest + sum(c.weight_codes.numel() * c.bits for c in convs) / 8 + 8 * channels) / 1e6,
    }


def operations(layers: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """What the quantized convolutions compute for an image.

    Args:
        layers: Records as `described` makes them.

    Returns:
        "macs", multiplications; "bops", the same times the bits of weight and input (BOPs); "percent_of_8_bits", those
        in percent of what they are with 8 bits for all.
    """
    counted = [(x["macs"], x["macs"] * x["weight_bits"] * x["act_bits"]) for x in layers]
    macs, bops = (sum(column) for column in zip(*counted))
    return {"macs": macs, "bops": bops, "percent_of_8_bits": 100 * bops / (64 * macs)}


def write_report(report: dict, folder: Path) -> Path:
    """Write report.json into `folder`, atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RECORD
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return path
