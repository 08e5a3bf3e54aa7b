# yolo_qc_plugin, AGPL-3.0
"""A record as text: the summary that ends a run's output, and the table of all layers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from ..files import replacing
from .record import FIGURES

TABLE = "layers.txt"  # in a run's qc/
SHOWN = 5  # layers in the summary
# what a run's figures are of, in the order in which they are measured
STAGES = {
    "float": "float start",
    "float_outputs": "QAT, outputs in float",
    "qat": "QAT",
    "qc": "QAT + QC",
}


def summary(report: dict[str, Any], worst: bool) -> str:
    """The figures of float, QAT and QC side by side, and totals of all layers.

    Args:
        report: What qc/report.json holds.
        worst: Also show the worst layers, see `trouble`.
    """
    layers, size = report["layers"], report["size_mb"]
    widths = ", ".join(f"{count} {name}" for name, count in Counter(map(widths_of, layers)).most_common())
    share = report["operations"]["percent_of_8_bits"]
    lines = [
        f"{len(layers)} layers: {widths}",
        f"weights {size['quantized']:.2f} MB, FP32 {size['float32']:.2f} MB",
        f"operations on bits {share:.1f}% of those at 8 bits everywhere",
    ]
    if worst:
        lines += ["", *layer_rows(sorted(layers, key=trouble, reverse=True)[:SHOWN])]
    return "\n".join([*lines, "", *figure_rows(report)])


def figure_rows(report: dict[str, Any]) -> list[str]:
    """A row for the float start, QAT and QC each, with a heading."""
    metrics, size = report["metrics"], report["size_mb"]
    columns = [(name, title) for name, title in FIGURES.values() if name in metrics["qat"]]
    rows = [f"{'':<14}" + "".join(f"{title:>12}" for _, title in [*columns, ("", "MB")])]
    for key in ("float", "qat", "qc"):
        if metrics.get(key):
            mark = "  <- best.pt" if key == report["kept"] else ""
            figures = "".join(f"{metrics[key][name]:>12.4f}" for name, _ in columns)
            rows.append(f"{STAGES[key]:<14}{figures}{size['float32' if key == 'float' else 'quantized']:>12.2f}{mark}")
    if target := report["config"]["target"]:
        rows.append(f"{'target':<14}{target:>12}")
    return rows


def layer_rows(layers: list[dict[str, Any]]) -> list[str]:
    """A row for each of some layers of a record, with a heading; "osc" is the share of oscillating weights."""
    rows = [("layer", "bits", "w scale", "a scale", "offset", "w clip", "a clip", "osc", "codes")]
    for x in layers:
        scales = x["weight_scale"]
        scale, act_scale = f"{sum(scales) / len(scales):.4g}", f"{x['act_scale']:.4g}"
        offset = "-" if x["act_offset"] is None else f"{x['act_offset']:.4f}"
        shares = (x["weight_clipped"], x["act_clipped"], x["oscillating"])
        told = ("-" if share is None else f"{share:.2%}" for share in shares)
        rows.append((x["name"], widths_of(x), scale, act_scale, offset, *told, str(x["weight_codes"])))
    return [f"{name:<32}" + "".join(f"{cell:>9}" for cell in cells) for name, *cells in rows]


def write_table(report: dict[str, Any], folder: Path) -> Path:
    """Write the table of all layers into `folder`, atomically."""
    path = folder / TABLE
    with replacing(path) as temporary:
        temporary.write_text("\n".join(layer_rows(report["layers"])) + "\n", encoding="utf-8")
    return path


def widths_of(layer: dict[str, Any]) -> str:
    """A layer's widths, as W4A8."""
    return f"W{layer['weight_bits']}A{layer['act_bits']}"


def trouble(layer: dict[str, Any]) -> tuple[float, float]:
    """How bad a layer is: oscillation, in shares of its range as a code is one, then what is clipped of its input."""
    return (layer["oscillating"] or 0.0) / 2 ** layer["weight_bits"], layer["act_clipped"]


def weights_by_widths(layers: list[dict[str, Any]]) -> Counter[str]:
    """Widths, as W4A8 -> how many weights have them (how many layers, of records of 0.2.0, which lack that)."""
    counted: Counter[str] = Counter()
    for layer in layers:
        counted[widths_of(layer)] += layer.get("weights", 1)
    return counted


def in_short(counted: Counter[str]) -> str:
    """The widths of a model in one word: those of most of its weights, as W4A8, or "mixed precision"."""
    ((name, count),) = counted.most_common(1)
    return name if 2 * count > counted.total() else "mixed precision"
