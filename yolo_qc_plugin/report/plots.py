# yolo_qc_plugin, AGPL-3.0
"""Pictures of one or several runs on the same axes: the paper's Figures 1 and 2, oscillation, accuracy."""

from __future__ import annotations

import numpy as np

from .pictures import COLORS, along_layers, empty_figure, width_along
from .record import FIGURES
from .runs import Run
from .smoothness import shown_layers

POINTS = 600  # of a trace, beyond which the least and the largest of neighbours are drawn in place of all


def sides(runs: list[Run]) -> tuple[Run | None, Run | None]:
    """The run whose scales are shown without EMA, and the one whose averaged scales are shown.

    The first is the first run that was trained without EMA, else the first that was traced; the second is the first
    that was trained with EMA.
    """
    traced = [run for run in runs if run.layers]
    plain = next((run for run in traced if not run.averaged), next(iter(traced), None))
    return plain, next((run for run in traced if run.averaged), None)


def draw_weight_scales(runs: list[Run]):
    """Figure 1: scales of the 2nd to 5th convolution's weights, without and with EMA."""
    return _draw_scales(*sides(runs), "weight_scale", "weight scale")


def draw_act_scales(runs: list[Run]):
    """Figure 2: the same of the inputs of the first four after the 1st that have a quantizer of their own."""
    return _draw_scales(*sides(runs), "act_scale", "activation scale")


def _draw_scales(before: Run | None, after: Run | None, column: str, label: str):
    if before is None:
        return None
    layers = [layer for layer in shown_layers(before, column) if after is None or layer in after.layers]
    if not layers:
        return None
    shown = [(before, column, "without EMA")]
    if after:
        shown.append((after, f"{column}_ema", "with EMA"))
    figure = empty_figure(3.4 * len(shown), 0.4 + 1.15 * len(layers))
    axes = figure.subplots(len(layers), len(shown), sharey="row", sharex="col", squeeze=False)
    for j, (run, name, title) in enumerate(shown):
        for i, layer in enumerate(layers):
            trace = run.traces(name)[:, run.layers.index(layer)]
            axes[i, j].plot(*thinned(run.steps, trace), color=COLORS[1 - j])
            axes[i, j].set_title(layer, loc="left")
            axes[i, j].margins(x=0)
            axes[i, j].ticklabel_format(axis="y", style="plain", useOffset=False)
        axes[0, j].set_title(title, loc="right", fontweight="bold")
        axes[-1, j].set_xlabel("optimizer step")
    figure.supylabel(label, fontsize=8)
    return figure


def thinned(steps: np.ndarray, trace: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A trace of shape (n,) and its steps as they can be seen: of many neighbours the least and the largest."""
    if len(steps) <= POINTS:
        return steps, trace
    parts = np.array_split(np.arange(len(steps)), POINTS // 2)
    ends = np.array([sorted((part[trace[part].argmin()], part[trace[part].argmax()])) for part in parts]).ravel()
    return steps[ends], trace[ends]


def _plain(name: str) -> str:
    """A run's name as Matplotlib shows it: no formula between dollars, and not left out for a leading underscore."""
    return " " * name.startswith("_") + name.replace("$", r"\$")


def draw_oscillation(runs: list[Run]):
    """Share of oscillating weights at the end and share of codes that flip in a step, per layer."""
    runs = [run for run in runs if run.layers]
    if not runs:
        return None
    layers = list(dict.fromkeys(layer for run in runs for layer in run.layers))
    figure = empty_figure(width_along(layers), 4.2)
    axes = figure.subplots(2, sharex=True)
    for k, run in enumerate(runs):
        places = np.array([layers.index(layer) for layer in run.layers]) + (k - (len(runs) - 1) / 2) * 0.8 / len(runs)
        shares = run.traces("oscillating")[-1], run.traces("flips").mean(0)
        for ax, share in zip(axes, shares):
            ax.bar(places, 100 * share, 0.8 / len(runs), color=COLORS[k % len(COLORS)], label=_plain(run.name))
    axes[0].set_ylabel("oscillating weights (%)")
    axes[1].set_ylabel("codes flipped per step (%)")
    along_layers(axes[1], layers)
    if len(runs) > 1:
        axes[0].legend()
    return figure


def draw_accuracy(runs: list[Run]):
    """Accuracy of the float start, after QAT and after QC, of the runs that have ended, where they have one task."""
    reports = {_plain(run.name): run.report for run in runs if run.report}
    if not reports:
        return None
    common = set.intersection(*(set(r["metrics"]["qat"]) for r in reports.values()))
    key, title = next(((name, title) for name, title in FIGURES.values() if name in common), (None, ""))
    if key is None:
        return None
    figure = empty_figure(1.6 + 1.1 * len(reports), 2.6)
    ax = figure.subplots()
    for k, (stage, label) in enumerate((("float", "float start"), ("qat", "QAT"), ("qc", "QAT + QC"))):
        found = [(i, 100 * m["metrics"][stage][key]) for i, m in enumerate(reports.values()) if m["metrics"].get(stage)]
        bars = ax.bar([i + (k - 1) * 0.27 for i, _ in found], [v for _, v in found], 0.25, label=label, color=COLORS[k])
        ax.bar_label(bars, fmt="%.1f", fontsize=6)
    ax.set_xticks(range(len(reports)), list(reports))
    ax.set_ylabel(f"{title} (points)")
    figure.legend(loc="outside upper center", ncols=3)
    return figure
