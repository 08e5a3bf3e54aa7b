# yolo_qc_plugin, AGPL-3.0
"""What a page says of a run in words and tables, out of its record: HTML, or "" where there is nothing to say."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .console import STAGES, in_short, weights_by_widths, widths_of
from .predictions import CHANGED, FILE, SIDES
from .record import FIGURES
from .runs import Run


def table(head: Sequence[str], rows: Iterable[tuple[Sequence[str], str]]) -> str:
    """A table that scrolls where it is too wide.

    Args:
        head: Headings.
        rows: (cells as HTML, class of the row).
    """
    cells = "".join(f"<th>{escape(title)}</th>" for title in head)
    lines = [f'<tr class="{kind}">' + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row, kind in rows]
    return f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def main_figure(report: dict[str, Any]) -> tuple[str, str]:
    """Name and heading of a task's main figure."""
    return next((name, title) for name, title in FIGURES.values() if name in report["metrics"]["qat"])


def about(run: Run) -> str:
    """What was trained on what, in a line."""
    made = run.report.get("training")
    if not made:
        return ""
    files = (Path(made[name]).name for name in ("start", "data"))
    told = [*files, made["task"], f"{made['imgsz']} px", f"{made['epochs']} epochs"]
    return f'<p class="soft">{escape(" · ".join(told))}</p>'


def tiles(run: Run) -> str:
    """A run's main figures in large type."""
    report = run.report
    if not report:
        return ""
    (name, title), size, metrics = main_figure(report), report["size_mb"], report["metrics"]
    value, start = metrics[report["kept"]][name], (metrics.get("float") or {}).get(name)
    share = f", {value / start:.1%} of the float start's {100 * start:.1f}" if start else ""
    shown = [
        (f"{100 * value:.1f}", f"{title} of best.pt in points{share}"),
        (f"{size['quantized']:.2f} MB", f"of weights, {size['float32'] / size['quantized']:.1f} times less than FP32"),
        tile_of_widths(report["layers"]),
        (STAGES[report["kept"]], "is what best.pt holds"),
    ]
    if found := report.get("operations"):  # records of earlier versions lack it
        shown.insert(3, (f"{found['percent_of_8_bits']:.0f}%", "of the operations on bits at 8 bits everywhere"))
    tiles = "".join(f'<div class="tile"><b>{escape(big)}</b><span>{escape(text)}</span></div>' for big, text in shown)
    return f'<div class="tiles">{tiles}</div>'


def tile_of_widths(layers: list[dict[str, Any]]) -> tuple[str, str]:
    """What most weights have or, where no widths have most of them, the mean of a weight."""
    counted = weights_by_widths(layers)
    ((common, count),) = counted.most_common(1)
    share = f"{count / counted.total():.0%} of the weights"
    if in_short(counted) == common:
        return common, f"bits of weights and of activations of {share}"
    mean = sum(x.get("weights", 1) * x["weight_bits"] for x in layers) / counted.total()
    return f"{mean:.1f} bits", f"of a weight on average; {common} for {share}"


def accuracy(run: Run) -> str:
    """The figures of every stage, what was kept, and why."""
    report = run.report
    if not report:
        return "<p>This run has no record: it has not ended.</p>"
    metrics, size, kept = report["metrics"], report["size_mb"], report["kept"]
    columns = [(name, title) for name, title in FIGURES.values() if name in metrics["qat"]]
    start = (metrics.get("float") or {}).get(columns[0][0])
    rows = []
    for stage, found in metrics.items():
        if found:
            figures = [f"{100 * found[name]:.2f}" for name, _ in columns]
            share = f"{found[columns[0][0]] / start:.1%}" if start else "-"
            mb = size["float32" if stage == "float" else "quantized"]
            label = STAGES.get(stage, stage.replace("_", " ")) + (" (best.pt)" if stage == kept else "")
            cells = [escape(label), *figures, share, f"{found['fitness']:.4f}", f"{mb:.2f}"]
            rows.append((cells, "kept" if stage == kept else ""))
    head = ["", *(title for _, title in columns), "of float", "fitness", "MB"]
    return table(head, rows) + f"<p>{escape(reason(report))}</p>"


def reason(report: dict[str, Any]) -> str:
    """What best.pt holds, and why."""
    qat, qc = (report["metrics"].get(stage) for stage in ("qat", "qc"))
    if not qc:
        return "best.pt holds the QAT model: there was no correction (correction=off)."
    better, worse = ("QAT + QC", "QAT") if report["kept"] == "qc" else ("QAT", "QAT + QC")
    figures = sorted((qat["fitness"], qc["fitness"]), reverse=True)
    return (
        f"best.pt holds the {better} model: its fitness on the validation set, {figures[0]:.4f}, is "
        f"{'above' if figures[0] > figures[1] else 'not below'} the {figures[1]:.4f} of {worse}."
    )


def rounding(run: Run) -> str:
    """What oscillation costs, by soft rounding."""
    found = run.report.get("rounding")
    if not found:
        return ""
    name, title = main_figure(run.report)
    hard, soft = (100 * found[kind][name] for kind in ("hard", "soft"))
    return (
        f"<p>Soft rounding: {title} of the QAT model on {found['images']} validation images is {hard:.2f} points as it "
        f"rounds, and {soft:.2f} ({soft - hard:+.2f}) where values farther than {found['k']} steps from every grid "
        "point keep their latent value. A gain is what having to choose between two codes costs there, without any "
        "training; on so few images tenths of a point mean nothing.</p>"
    )


def predictions(run: Run) -> str:
    """Float and quantized predictions side by side."""
    found = run.json(f"plots/{FILE}")
    if not found:
        return ""
    keys = "".join(
        f'<span class="key" style="background:{CHANGED[side]}"></span>in the {side} model alone' for side in SIDES
    )
    pairs = []
    for image in found["images"]:
        file = run.folder / "qc" / "plots" / Path(image["picture"]).name
        counts = f"{image['both']} in both"
        for side in SIDES:
            alone = image[f"{side}_alone"]
            counts += f"; {side} alone: {', '.join(alone) if alone else 'none'}"
        source = f"data:image/jpeg;base64,{b64encode(file.read_bytes()).decode()}"
        caption = escape(f"{image['photograph']}: {counts}")
        pairs.append(f'<figure><img alt="{caption}" src="{source}"><figcaption>{caption}</figcaption></figure>')
    return (
        f"<p>Left the float model, right best.pt, from a confidence of {found['confidence']} on. Thin boxes are in "
        f"both, of one class and with an overlap of at least one half.{keys}</p>"
        f'<div class="pairs">{"".join(pairs)}</div>'
    )


def plan(run: Run) -> str:
    """What a budget promised, and what became of it."""
    found = run.report.get("budget")
    if not found:
        return ""
    takes = ", ".join(f"{amount:.2f} {unit}" for unit, amount in found["takes"].items() if unit != "%drop")
    verdict = {True: " The promise was kept.", False: " The promise was not kept.", None: ""}[found["kept"]]
    after = f"{found['steps']} steps" if "steps" in found else "training"  # in records of before it was counted
    return (
        f"<p>Budget {escape(found['budget'])}: the plan takes {escape(takes)}. Its drop of {found['figure']}, "
        f"predicted for hundreds of steps, was {found['takes']['%drop']:.1f}%, that after {after} is "
        f"{found['measured_drop']:.1f}%.{verdict}</p>"
    )


def layers(run: Run) -> str:
    """Every layer's row, folded."""
    found = run.report.get("layers")
    if not found:
        return ""
    head = ["layer", "widths", "weights", "scale", "input scale", "codes", "clipped", "input clipped", "oscillating"]
    rows = []
    for x in found:
        numbers = [f"{sum(x['weight_scale']) / len(x['weight_scale']):.4g}", f"{x['act_scale']:.4g}"]
        shares = [x["weight_clipped"], x["act_clipped"], x.get("oscillating")]
        told = ["-" if share is None else f"{share:.2%}" for share in shares]
        count = f"{x['weights']:,}" if "weights" in x else "-"
        rows.append(([escape(x["name"]), widths_of(x), count, *numbers, str(x["weight_codes"]), *told], ""))
    return f"<details><summary>All {len(found)} layers</summary>{table(head, rows)}</details>"


def origin(run: Run) -> str:
    """The command and the versions."""
    report = run.report
    if not report:
        return ""
    command = report.get("training", {}).get("command")
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    return (f"<pre>{escape(command)}</pre>" if command else "") + f'<p class="soft">{escape(versions)}</p>'


def differences(runs: Sequence[Run]) -> str:
    """The options in which several runs differ."""
    configs = [run.report.get("config", {}) for run in runs]
    names = [name for name in {key: None for config in configs for key in config} if name != "layer_bits"]
    rows = []
    for name in names:
        values = [config.get(name) for config in configs]
        if any(value != values[0] for value in values):
            rows.append(([escape(name), *(escape(str(value)) for value in values)], ""))
    return table(["option", *(run.name for run in runs)], rows) if rows else "<p>The options are the same.</p>"
