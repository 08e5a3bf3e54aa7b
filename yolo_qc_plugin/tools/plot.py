# yolo_qc_plugin, AGPL-3.0
"""Pictures of finished runs (`yolo-qc plot`): the paper's Figures 1 and 2, oscillation, codes, accuracy.

    weight_scales   Figure 1: scales of the 2nd to 5th convolution's weights, without and with EMA
    act_scales      Figure 2: the same of the inputs of the first four after the 1st that have a quantizer of their own
    oscillation     share of oscillating weights at the end and share of codes that flip in a step, per layer
    codes           how often a layer uses each code, for each run
    report          accuracy of the float start, after QAT and after QC

Left, without EMA: the first run that was trained without (ema_decay=0), else the first run's scales in training. Right:
the averaged scales of the first run with EMA. Both over the last 4,000 steps; smoothness.json says how smooth they are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..config import QCError
from ..files import replacing
from ..quant.layers import quant_convs
from ..run.report import FIGURES
from ..run.telemetry import WINDOW
from .evaluate import load_model
from .pictures import COLORS, MARK, STYLE, empty_figure, save
from .smoothness import Run, compare, format_smoothness, shown_layers

RECORD = "smoothness.json"


def plot(runs: Sequence[str | Path], out: str | Path | None = None, steps: int = WINDOW) -> tuple[str, list[Path]]:
    """Draw all pictures of one or several runs.

    Args:
        runs: Folders of runs.
        out: Folder to write to; qc/plots in the first run's if None.
        steps: How many of the last steps to draw and to count, 1 to 4,000.

    Returns:
        How smooth the scales are, as a table, and the files written.

    Raises:
        QCError: If a run has no telemetry, `steps` is out of range, or a file of the user's has the name of a picture.
    """
    if not 1 <= steps <= WINDOW:
        raise QCError(f"QC: steps={steps} is not accepted; give 1 to {WINDOW}, the steps kept at full rate.")
    loaded = [Run.load(Path(folder), steps) for folder in runs]
    names = [run.name for run in loaded]
    for number, run in enumerate(loaded, 1):
        run.name += f" {number}" * (names.count(run.name) > 1)
    out = Path(out or loaded[0].folder / "qc" / "plots")
    before = next((r for r in loaded if not r.averaged), loaded[0])
    after = next((r for r in loaded if r.averaged), None)
    from matplotlib import rc_context

    with rc_context(STYLE):
        figures = {
            "weight_scales": _draw_scales(before, after, "weight_scale", "weight scale"),
            "act_scales": _draw_scales(before, after, "act_scale", "activation scale"),
            "oscillation": _draw_oscillation(loaded),
            **_draw_codes(loaded),
            **_draw_reports(loaded),
        }
        files = save(figures, out, beside=[RECORD])
    if after is None:
        return "no run with EMA: there is nothing to compare", files
    record = {"by": MARK, **compare(before, after)}
    with replacing(out / RECORD) as temporary:
        temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return format_smoothness(record), [*files, out / RECORD]


def format_plot(drawn: tuple[str, list[Path]]) -> str:
    """What `plot` returns, as plain text."""
    table, files = drawn
    return "\n".join([table, *(f"written to {file}" for file in files)])


def _draw_scales(before: Run, after: Run | None, column: str, label: str):
    layers = [layer for layer in shown_layers(before, column) if after is None or layer in after.layers]
    sides = [(before, column, "without EMA")]
    if after:
        sides.append((after, f"{column}_ema", "with EMA"))
    figure = empty_figure(3.4 * len(sides), 0.4 + 1.15 * len(layers))
    axes = figure.subplots(len(layers), len(sides), sharey="row", sharex="col", squeeze=False)
    for j, (run, name, title) in enumerate(sides):
        for i, layer in enumerate(layers):
            axes[i, j].plot(run.steps, run.traces(name)[:, run.layers.index(layer)], color=COLORS[1 - j])
            axes[i, j].set_title(layer, loc="left")
            axes[i, j].margins(x=0)
            axes[i, j].ticklabel_format(axis="y", style="plain", useOffset=False)
        axes[0, j].set_title(title, loc="right", fontweight="bold")
        axes[-1, j].set_xlabel("optimizer step")
    figure.supylabel(label, fontsize=8)
    return figure


def _draw_oscillation(runs: list[Run]):
    layers = list(dict.fromkeys(layer for run in runs for layer in run.layers))
    figure = empty_figure(max(7.0, 1 + 0.09 * len(layers)), 4.2)
    axes = figure.subplots(2, sharex=True)
    for k, run in enumerate(runs):
        places = np.array([layers.index(layer) for layer in run.layers]) + (k - (len(runs) - 1) / 2) * 0.8 / len(runs)
        shares = run.traces("oscillating")[-1], run.traces("flips").mean(0)
        for ax, share in zip(axes, shares):
            ax.bar(places, 100 * share, 0.8 / len(runs), color=COLORS[k % len(COLORS)], label=run.name)
    axes[0].set_ylabel("oscillating weights (%)")
    axes[1].set_ylabel("codes flipped per step (%)")
    axes[1].set_xticks(range(len(layers)), layers, rotation=90, fontsize=5)
    axes[1].set_xlim(-1, len(layers))
    if len(runs) > 1:
        axes[0].legend()
    return figure


def _draw_codes(runs: list[Run]) -> dict:
    """A picture for each run that has a checkpoint, by name."""
    from matplotlib.colors import PowerNorm

    figures = {}
    for number, run in enumerate(runs, 1):
        files = [run.folder / "weights" / f"{name}.pt" for name in ("qat", "best", "last")]
        file = next((f for f in files if f.is_file()), None)
        if file is None:
            continue
        widths: dict[int, list] = {}
        for name, conv in quant_convs(load_model(file).model):
            codes = conv.weight_codes().flatten().int() - conv.weight_quant.quant_min
            share = np.bincount(codes.numpy(), minlength=2**conv.weight_quant.bits) / codes.numel()
            widths.setdefault(conv.weight_quant.bits, []).append((name, 100 * share))
        widths = dict(sorted(widths.items()))
        heights = [0.085 * (len(rows) + 1) for rows in widths.values()]
        figure = empty_figure(4.8, sum(heights) + 0.6 * len(heights))
        axes = figure.subplots(len(heights), height_ratios=heights, squeeze=False)[:, 0]
        for ax, (bits, rows) in zip(axes, widths.items()):
            half = 2 ** (bits - 1)
            image = ax.imshow(
                [share for _, share in rows],
                norm=PowerNorm(0.4, vmin=0, vmax=100),
                cmap="Blues",
                aspect="auto",
                interpolation="nearest",
                extent=(-half - 0.5, half - 0.5, len(rows) - 0.5, -0.5),
            )
            ax.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=5)
            ax.set_title(f"{bits}-bit weights", loc="left")
        axes[-1].set_xlabel("code")
        label = "share of the layer's weights (%)"
        figure.colorbar(image, ax=axes, label=label, ticks=[0, 1, 5, 10, 20, 50, 100], shrink=0.6, aspect=40)
        figures["codes" if len(runs) == 1 else f"codes_{number}"] = figure
    return figures


def _draw_reports(runs: list[Run]) -> dict:
    """Accuracy of the runs that have ended, on one picture, if there are any."""
    files = {run.name: run.folder / "qc" / "report.json" for run in runs}
    reports = {name: json.loads(f.read_text(encoding="utf-8")) for name, f in files.items() if f.is_file()}
    if not reports:
        return {}
    common = set.intersection(*(set(r["metrics"]["qat"]) for r in reports.values()))
    key, title = next(((name, title) for name, title in FIGURES.values() if name in common), (None, ""))
    if key is None:  # of different tasks
        return {}
    figure = empty_figure(1.6 + 1.1 * len(reports), 2.6)
    ax = figure.subplots()
    for k, (stage, label) in enumerate((("float", "float start"), ("qat", "QAT"), ("qc", "QAT + QC"))):
        found = [(i, 100 * m["metrics"][stage][key]) for i, m in enumerate(reports.values()) if m["metrics"].get(stage)]
        bars = ax.bar([i + (k - 1) * 0.27 for i, _ in found], [v for _, v in found], 0.25, label=label, color=COLORS[k])
        ax.bar_label(bars, fmt="%.1f", fontsize=6)
    ax.set_xticks(range(len(reports)), list(reports))
    ax.set_ylabel(f"{title} (points)")
    figure.legend(loc="outside upper center", ncols=3)
    return {"report": figure}
