# yolo_qc_plugin, AGPL-3.0
"""Regenerate the tables and figures of the paper's supplement (arXiv 2311.05109) on data at hand.

    python examples/experiments/paper.py table1 --data bccd.yaml --weights float.pt --seeds 0 1 2 --epochs 8 --imgsz 320
    python examples/experiments/paper.py table2 ...
    python examples/experiments/paper.py table3 ...
    python examples/experiments/paper.py figures --data bccd.yaml --weights float.pt --epochs 8 --imgsz 320
    python examples/experiments/paper.py cost --model yolov5n.yaml --device 0 --imgsz 640 --train batch=64

The float checkpoint is trained on for as many epochs with the same recipe (the float row), so that QAT gets no credit
for longer training. Each quantized run gives two rows, before and after QC. Tables share the runs they have in common;
what is done or begun is not repeated (see cells.py). `--train` and `--qc` change the recipe and the plugin's options of
every cell. OUT/paper.json holds all cells of all data sets and models, OUT/paper.md is made from it alone:

    python examples/experiments/paper.py table1 --assemble
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path

import cost
import measured
from cells import RECIPE, Cell, conditions, mean_and_spread, measure, pairs, parser
from measured import State
from record import page, read, results, table_head, write

HEAD = [
    "# The paper's tables and figures",
    "",
    "Written by `examples/experiments/paper.py` from `paper.json`. mAP50-95 and mAP50 in points on the validation "
    "set, mean ± standard deviation over seeds, of the last epoch. With QC and without are two states of the same "
    "runs, both with the outputs of convolutions at their width (`output_bits`). The paper's column is mAP on COCO, "
    "from its supplement.",
]

# mAP on COCO, Tables 1 to 3 of the supplement of Gupta and Asthana (WACV 2024)
PAPER = {
    "yolov5n": {
        "float": 28.0,
        "LSQ-4bit": (20.6, 22.6), "dampening-4bit": (21.5, 23.1), "EMA-4bit": (22.1, 23.8),
        "LSQ-3bit": (15.2, 17.1), "dampening-3bit": (16.4, 17.9), "EMA-3bit": (16.4, 18.2),
    },
    "yolov5s": {
        "float": 37.4,
        "LSQ-4bit": (32.4, 33.3), "dampening-4bit": (32.9, 33.4), "EMA-4bit": (33.1, 34.0),
        "LSQ-3bit": (27.2, 29.4), "dampening-3bit": (27.5, 29.6), "EMA-3bit": (28.5, 30.2),
    },
    "yolov7-tiny": {
        "float": 37.5,
        "LSQ-4bit": (32.9, 34.1), "dampening-4bit": (33.5, 34.3), "EMA-4bit": (34.6, 35.2),
        "LSQ-3bit": (28.4, 30.2), "dampening-3bit": (29.2, 30.5), "EMA-3bit": (30.3, 31.0),
    },
    "yolov5n-seg": {  # masks, from its main text
        "float": 23.4,
        "LSQ-4bit": (16.5, ""), "EMA-4bit": (17.7, 19.5), "LSQ-3bit": (12.5, ""), "EMA-3bit": (13.9, 15.8),
    },
}  # fmt: skip
RIVALS = {"yolov8n-seg": "yolov5n-seg", "yolo11n-seg": "yolov5n-seg"}  # ours -> the paper's nearest
PAPER_CORRECTIONS = {  # per, scale, shift
    ("tensor", True, False): 22.2, ("tensor", False, True): 22.3, ("tensor", True, True): 22.6,
    ("channel", True, False): 23.5, ("channel", False, True): 23.6, ("channel", True, True): 23.8,
}  # fmt: skip
PAPER_DECAYS = {0.0: 20.6, 0.9: 21.5, 0.99: 22.1, 0.999: 22.1, 0.9999: 22.1}

WIDTHS = 4, 3  # of Table 1
NEAREST = {"rounding": "nearest"}  # the paper's methods are about what such rounding does
METHODS = {
    "LSQ": {**NEAREST, "ema_decay": 0.0},
    "dampening": {**NEAREST, "ema_decay": 0.0, "dampening_weight": 0.1},
    "EMA": {**NEAREST, "ema_decay": 0.99},
}


def method(name: str, bits: int) -> Cell:
    """A method's cell at a width."""
    return Cell(f"{name}-{bits}bit", {"bits": bits, **METHODS[name]})


def decay(value: float) -> Cell:
    """A cell of Table 3; those of Table 1 serve where they are the same."""
    shared = {options["ema_decay"]: method(name, 4) for name, options in METHODS.items() if name != "dampening"}
    return shared.get(value) or Cell(f"EMA-4bit-decay{value}", {"bits": 4, **NEAREST, "ema_decay": value})


def correction(per: str, scale: bool, shift: bool) -> Cell:
    """A cell of Table 2: the finished 4-bit EMA run, corrected again."""
    options = {"correction": per, "correction_scale": scale, "correction_shift": shift}
    return Cell(f"QC-{per}{'-scale' * scale}{'-shift' * shift}", options, "correct", source=method("EMA", 4).name)


def cells(kind: str, widths: list[int]) -> list[Cell]:
    """The cells of a table."""
    if kind == "table2":
        return [method("EMA", 4), *(correction(*setup) for setup in PAPER_CORRECTIONS)]
    if kind == "table3":
        return [decay(value) for value in PAPER_DECAYS]
    if kind == "figures":
        return [method("LSQ", 4), method("EMA", 4)]
    return [Cell("float", None), *(method(name, bits) for bits in widths for name in METHODS)]


def points(found: dict[int, dict], row: str, figure: str = "map50_95") -> dict[int, float]:
    """Seed -> figure in points of one state of a cell: "trained", "qat" or "qc"."""
    return {seed: 100 * r["metrics"][row][figure] for seed, r in found.items() if r["metrics"].get(row)}


def main_figure(files: list[dict]) -> tuple[str, str]:
    """Key and title of the figure that cells are compared by: pycocotools' AP where all have it."""
    states = [state for f in files for name, state in f["metrics"].items() if state and name in measured.FILES]
    if not all("ap" in state for state in states):
        return "map50_95", "mAP50-95"
    return "ap", "AP of masks" if all("box_ap" in state for state in states) else "AP"


def header(title: str, name: str, files: list[dict]) -> list[str]:
    """The head of a table: what was run on what."""
    one, images = files[0], files[0]["images"]
    steps = " or ".join(dict.fromkeys(str(run["steps"]) for run in files if "steps" in run))
    of = " AP is that of masks." if main_figure(files)[1] == "AP of masks" else ""
    return [
        f"## {title}: {name}",
        "",
        f"{one['model']} from {one['weights']} on {one['data']}, {images['train']} training and {images['val']} "
        f"validation images, {steps} optimizer steps a run. " + " ".join(conditions(files)) + of,
        "",
    ]


def table1(name: str, content: dict) -> list[str]:
    """Table 1: every method before and after QC."""
    found = {c.name: results(content["cells"], c.name) for c in cells("table1", WIDTHS)}
    files = [r for runs in found.values() for r in runs.values()]
    start = results(content["cells"], "pretrained")
    if not (start or found["float"]) or not any(runs for cell, runs in found.items() if cell != "float"):
        return []
    theirs_of = RIVALS.get(files[0]["model"], files[0]["model"])
    paper = PAPER.get(theirs_of, {})
    (figure, title), lines = main_figure(files), header("Table 1", name, files)
    second, second_title = ("box_ap", "AP of boxes") if title == "AP of masks" else ("map50", "mAP50")
    lines += [f"| method | QC | bits | seeds | {title} | of float | {second_title} | paper, {theirs_of} |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    float_mean = statistics.mean(points(start or found["float"], "trained", figure).values())
    for cell, runs in ({"pretrained": start} | found).items():
        for row, qc in (("trained", "-"), ("qat", "✗"), ("qc", "✓")):
            values = points(runs, row, figure)
            if not values:
                continue
            theirs = paper.get("float" if cell == "pretrained" else cell, "")
            theirs = theirs[row == "qc"] if isinstance(theirs, tuple) else theirs
            row_title, _, bits = cell.partition("-")
            share = f"{100 * statistics.mean(values.values()) / float_mean:.1f}%" if float_mean else ""
            cols = mean_and_spread(values.values()), share, mean_and_spread(points(runs, row, second).values())
            row_title = {"pretrained": "float", "float": "float trained on"}.get(cell, row_title)
            shown = f"{bits.removesuffix('bit') or 32} | {len(values)} | {' | '.join(cols)} | {theirs}"
            lines.append(f"| {row_title} | {qc} | {shown} |")
    return [*lines, "", *orderings(content, figure, title), "", *output_cost(files)]


def ordered() -> list[tuple[State, State]]:
    """The paper's orderings: the first is above the second."""
    pairs = []
    for bits in WIDTHS:
        pairs += [((f"{name}-{bits}bit", "qc"), (f"{name}-{bits}bit", "qat")) for name in METHODS]
        for state in ("qat", "qc"):
            pairs += [((f"EMA-{bits}bit", state), (f"{name}-{bits}bit", state)) for name in ("LSQ", "dampening")]
    return pairs


def orderings(content: dict, figure: str, title: str) -> list[str]:
    """The paper's orderings, seed by seed."""
    lines = [f"The paper's orderings (first above second), differences of {title} in points, seed by seed:", ""]
    return [*lines, *table_of_differences(content, ordered(), figure)]


def table_of_differences(content: dict, pairs: list[tuple[State, State]], figure: str) -> list[str]:
    """Paired differences, a line each."""
    lines = table_head(["first", "second", *difference_head(content)])
    for pair in pairs:
        if columns := difference(content, *pair, figure):
            names = [name + " + QC" * (state == "qc") for name, state in pair]
            lines.append(f"| {' | '.join([*names, *columns])} |")
    return lines


def difference_head(content: dict) -> list[str]:
    """Titles of the columns that `difference` makes."""
    return ["by seed", "mean", "standard error", *["95% over images"] * ("differences" in content), "reading"]


def difference(content: dict, first: State, second: State, figure: str = "map50_95") -> list[str]:
    """Columns of a paired difference: by seed, mean, standard error, interval where recorded, reading.

    It holds (or is reversed) where all seeds agree in sign and the mean is at least twice its standard error or, where
    there is one, the interval over images leaves out 0. Empty where no seed has both.
    """
    a, b = (points(results(content["cells"], cell), state, figure) for cell, state in (first, second))
    by_seed = [a[seed] - b[seed] for seed in a if seed in b]
    if not by_seed:
        return []
    mean, error = statistics.mean(by_seed), standard_error(by_seed)
    columns = [", ".join(f"{d:+.1f}" for d in by_seed), f"{mean:+.2f}", "-" if error is None else f"{error:.2f}"]
    beyond_noise, found = error is not None and abs(mean) >= 2 * error, None
    if "differences" in content:
        found = content["differences"].get(measured.label(first, second))
        if found:
            low, high = found["interval"]
            beyond_noise = not low <= 0 <= high
            some = f" ({', '.join(map(str, found['seeds']))})" if len(found["seeds"]) < len(by_seed) else ""
        columns.append(f"{low:+.2f} to {high:+.2f}{some}" if found else "-")
    agree = all(d > 0 for d in by_seed) or all(d < 0 for d in by_seed)
    known = error is not None or found
    reading = ("holds" if mean > 0 else "reversed") if agree and beyond_noise else "noise" if known else "one seed"
    return [*columns, reading]


def standard_error(values: list[float]) -> float | None:
    """Of the mean; None for a single value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def output_cost(files: list[dict]) -> list[str]:
    """What quantized outputs of the convolutions, which integer kernels need, cost before the correction."""
    metrics = [f["metrics"] for f in files if f.get("config", {}).get("output_bits")]
    costs = [100 * (m["qat"]["map50_95"] - m["float_outputs"]["map50_95"]) for m in metrics]
    if len(costs) < 2:
        return []
    return [
        f"Quantized outputs against float outputs after QAT, over {len(costs)} runs: mean "
        f"{statistics.mean(costs):+.2f} points, standard error {standard_error(costs):.2f}."
    ]


def corrections() -> list[tuple[State, State]]:
    """Each set-up of QC, and the run that it corrects."""
    return [((correction(*setup).name, "qc"), (method("EMA", 4).name, "qat")) for setup in PAPER_CORRECTIONS]


def table2(name: str, content: dict) -> list[str]:
    """Table 2: six set-ups of QC on the same QAT runs."""
    runs = results(content["cells"], method("EMA", 4).name)
    corrected = {setup: results(content["cells"], correction(*setup).name) for setup in PAPER_CORRECTIONS}
    if not (runs and any(corrected.values())):
        return []
    (figure, title), lines = main_figure(list(runs.values())), header("Table 2", name, list(runs.values()))
    before, theirs = points(runs, "qat", figure), PAPER["yolov5n"]["EMA-4bit"][0]
    head = ["QC", "scale", "shift", "seeds", title, "paper, yolov5n", *difference_head(content)]
    lines += [
        "Each run of the 4-bit EMA model is corrected six times, with the same batches (`yolo_qc_plugin.correct`). The "
        "last columns are the gain over the model without QC, seed by seed, its mean and standard error.",
        "",
        *table_head([f"gain {column}" if column == "by seed" else column for column in head]),
        f"| none | ✗ | ✗ | {len(before)} | {mean_and_spread(before.values())} | {theirs} {'| ' * (len(head) - 6)}|",
    ]
    for setup, pair in zip(PAPER_CORRECTIONS, corrections()):
        after, theirs = points(corrected[setup], "qc", figure), PAPER_CORRECTIONS[setup]
        if after:
            gains = " | ".join(difference(content, *pair, figure))
            marks = " | ".join("✓" if on else "✗" for on in setup[1:])
            shown = f"{len(after)} | {mean_and_spread(after.values())} | {theirs}"
            lines.append(f"| per {setup[0]} | {marks} | {shown} | {gains} |")
    return lines


def table3(name: str, content: dict) -> list[str]:
    """Table 3: decays of the EMA."""
    found = {value: results(content["cells"], decay(value).name) for value in PAPER_DECAYS}
    files = [r for runs in found.values() for r in runs.values()]
    if not any(runs for value, runs in found.items() if "decay" in decay(value).name):  # Table 1 has the others
        return []
    steps = files[0]["steps"]
    (figure, title), lines = main_figure(files), header("Table 3", name, files)
    shown_differences = "differences" in content
    more = [f"less decay 0: {column}" if column == "by seed" else column for column in difference_head(content)]
    head = ["decay", "seeds", title, "with QC", "paper, yolov5n", *more * shown_differences]
    lines += [
        f"The decay is warmed up: at step n it is min(decay, (1 + n) / (10 + n)). In {steps} steps the warm-up reaches "
        f"{(1 + steps) / (10 + steps):.4f}: decays above that are the same here.",
        "",
        *table_head(head),
    ]
    for (value, runs), pair in zip(found.items(), decays()):
        qat, qc = (points(runs, row, figure) for row in ("qat", "qc"))
        if qat:
            shown = mean_and_spread(qat.values()), mean_and_spread(qc.values()) if qc else ""
            columns = [str(value), str(len(qat)), *shown, str(PAPER_DECAYS[value])]
            if shown_differences:
                columns += (value and difference(content, *pair, figure)) or [""] * len(more)
            lines.append(f"| {' | '.join(columns)} |")
    return lines


def decays() -> list[tuple[State, State]]:
    """Each decay of Table 3, and LSQ without an average."""
    return [((decay(value).name, "qat"), (method("LSQ", 4).name, "qat")) for value in PAPER_DECAYS]


TABLES = {"table1": table1, "table2": table2, "table3": table3}
FIGURES = {"weight_scales.png": "Figure 1", "act_scales.png": "Figure 2"}


def drawn(name: str, content: dict) -> list[str]:
    """The figures of a set and how much smoother its scales are with EMA, from the telemetry of its runs."""
    if "smoothness" not in content:
        return []
    lines = header("Figures 1 and 2", name, list(content["cells"].values()))
    lines += [f"![{title} of the paper]({name}/{file})" for file, title in FIGURES.items()]
    lines += [
        "",
        "How many times smaller variances of the scales are with EMA than without, in the median of the layers: around "
        "the moving mean over 101 steps, and of the change from step to step.",
        "",
        "| scales | layers | around the moving mean | from step to step |",
        "|---|---|---|---|",
    ]
    for scale in ("weight_scale", "act_scale"):
        layers = [s for s in content["smoothness"] if s["scale"] == scale and all(s["with"].values())]
        ratios = [
            statistics.median(s["without"][key] / s["with"][key] for s in layers) for key in ("fluctuation", "steps")
        ]
        lines.append(f"| {scale} | {len(layers)} | {' | '.join(f'{r:.1f}' for r in ratios)} |")
    return lines


def figures(args: argparse.Namespace) -> None:
    """Draw Figures 1 and 2 from the telemetry of the first seed's runs, and record how smooth the scales are.

    EMA-4bit has both traces, of the model and of its average: `--only EMA-4bit` leaves out a comparison of runs alone.
    """
    from yolo_qc_plugin.tools.plot import plot

    names = [cell.name for cell in cells("figures", []) if not args.only or cell.name in args.only]
    folder = args.runs / "figures"
    plot([args.runs / f"{name}-seed{args.seeds[0]}" for name in names], folder)
    (args.out / args.name).mkdir(parents=True, exist_ok=True)
    for file in FIGURES:
        shutil.copy(folder / file, args.out / args.name / file)
    record = read(args.out / "paper.json")
    record[args.name]["smoothness"] = json.loads((folder / "smoothness.json").read_text())["scales"]
    write(args.out / "paper.json", record)


def main() -> None:
    """Parse the command line and run."""
    p = parser(__doc__, (*TABLES, "figures", "cost"))
    p.add_argument("--bits", type=int, nargs="+", default=WIDTHS, choices=WIDTHS, help="widths of Table 1 to run")
    p.add_argument("--model", default="yolov5n.yaml", help="cost: what to measure")
    p.add_argument("--seconds", type=float, default=60, help="cost: of each measurement")
    p.set_defaults(runs=Path("runs/paper"))
    args = p.parse_args()
    if args.kind == "cost":
        size = {"device": args.device, "epochs": args.epochs, "imgsz": args.imgsz}
        recipe = {**RECIPE, **size, **pairs(args.train)}
        found = None if args.assemble else cost.measure(args.model, recipe, args.seconds, args.runs)
        return print(cost.write(found, args.out))
    file = args.out / "paper.json"
    record, done = measure(cells(args.kind, args.bits), file, args)
    if args.kind == "figures" and done and not args.assemble:
        figures(args)
        record = read(file)
    file.with_suffix(".md").write_text(page(HEAD, record, *TABLES.values(), drawn), encoding="utf-8")
    sys.exit(not done)


if __name__ == "__main__":
    main()
