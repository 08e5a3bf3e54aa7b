# yolo_qc_plugin, AGPL-3.0
"""How smooth the scales of finished runs are, without and with EMA, as their telemetry shows it."""

from __future__ import annotations

import numpy as np

from .runs import Run

SMOOTH = 101  # steps of the moving mean, the span of an oscillation in the paper


def smoothness(trace: np.ndarray) -> dict[str, float]:
    """How smooth a scale's trace is, shape (n,); variances are divided by the square of its mean.

    Returns:
        "mean"; "variance" of the whole trace, its trend included; "fluctuation", the variance around the centred moving
        mean over 101 steps (over half of them where there are fewer than 202), of the steps that have one; "steps",
        the variance of the change from step to step.
    """
    trace = trace.astype(np.float64)
    width = min(SMOOTH, len(trace) // 4 * 2 + 1)
    moving = np.convolve(trace, np.full(width, 1 / width), mode="valid")
    middle = trace[width // 2 : width // 2 + len(moving)]
    mean = trace.mean()
    return {
        "mean": mean,
        "variance": trace.var() / mean**2,
        "fluctuation": ((middle - moving) ** 2).mean() / mean**2,
        "steps": np.diff(trace).var() / mean**2 if len(trace) > 1 else 0.0,
    }


def compare(before: Run, after: Run) -> dict:
    """`smoothness` of all scales, without and with EMA, and which figures show."""
    rows = []
    for column in ("weight_scale", "act_scale"):
        shown = shown_layers(before, column)
        for layer in before.layers:
            without = before.traces(column)[:, before.layers.index(layer)]
            if layer in after.layers and not np.isnan(without).any():
                averaged = after.traces(f"{column}_ema")[:, after.layers.index(layer)]
                found = {"without": smoothness(without), "with": smoothness(averaged)}
                rows.append({"scale": column, "layer": layer, "shown": layer in shown, **found})
    sides = {
        "without": {"run": before.name, "trace": "in training", "steps": len(before.steps)},
        "with": {"run": after.name, "trace": "averaged", "steps": len(after.steps)},
    }
    return {**sides, "scales": rows}


def format_smoothness(record: dict) -> str:
    """The record as a table of standard deviations in percent of the scale: fluctuation, and change of a step."""
    head = ("without", "EMA", "var. ratio") * 2
    lines = [
        f"{'':<46}{'around the moving mean':^33}{'from step to step':^33}",
        f"{'scale, % of its mean':<46}" + "".join(f"{title:>11}" for title in head),
    ]
    for row in [r for r in record["scales"] if r["shown"]]:
        line = f"{row['scale']:<14}{row['layer']:<32}"
        for key in ("fluctuation", "steps"):
            without, averaged = row["without"][key], row["with"][key]
            line += f"{without**0.5:>11.4%}{averaged**0.5:>11.4%}{_ratio(without, averaged):>11.1f}"
        lines.append(line)
    for column in ("weight_scale", "act_scale"):
        line = f"{column:<14}{'all layers, median':<32}"
        for key in ("fluctuation", "steps"):
            pairs = [(r["without"][key], r["with"][key]) for r in record["scales"] if r["scale"] == column]
            without, averaged = np.median(np.sqrt(pairs), axis=0)
            line += f"{without:>11.4%}{averaged:>11.4%}{np.median([_ratio(*pair) for pair in pairs]):>11.1f}"
        lines.append(line)
    return "\n".join(lines)


def _ratio(without: float, averaged: float) -> float:
    return without / averaged if averaged else float("inf")


def shown_layers(run: Run, column: str) -> list[str]:
    """The layers of a figure: the first four after the 1st, of activations of those with a quantizer of their own."""
    own = ~np.isnan(run.traces(column)).any(0)
    return [layer for layer, has in list(zip(run.layers, own))[1:] if has][:4]
