# yolo_qc_plugin, AGPL-3.0
"""Measure the plugin and the paper's claims on photographs of COCO, by pycocotools, with intervals over images.

    python examples/experiments/coco.py recipe --data coco.yaml --weights yolo11n.pt --seeds 0 1 2 --train lr0=1e-4
    python examples/experiments/coco.py ablation ...
    python examples/experiments/coco.py labels ...
    python examples/experiments/coco.py budget ...
    python examples/experiments/coco.py length ...
    python examples/experiments/coco.py table1 ... --qc preset=paper
    python examples/experiments/coco.py table2 ... --qc preset=paper
    python examples/experiments/coco.py table3 ... --qc preset=paper
    python examples/experiments/coco.py granularity ... --qc preset=paper
    python examples/experiments/coco.py corrections ... --qc preset=paper
    python examples/experiments/coco.py corrections ... --of budget-W4A4-ops

`recipe` is what a model keeps with the plugin's defaults and the same widths in all layers; `ablation` changes one
default at a time; `labels` has the float model label photographs that have no labels, from several confidences on;
`budget` is the same widths against widths by a budget of as much; `length` trains for a CPU for fewer epochs; table1 to
table3 are the paper's, made by the same functions as paper.py's; `granularity` is a scale per tensor against one per
channel, narrow edges ("4-bit*") and soft rounding; `corrections` are a cell's finished run, corrected again at other
rates, for longer, and by labels alone. Runs are shared between the kinds, and what is done or begun is not repeated
(see cells.py); give the paper's five the same options. OUT/coco.json holds all cells and their paired differences,
OUT/coco.npz the resamples that these come from; OUT/coco.md is made from the first alone:

    python examples/experiments/coco.py recipe --assemble
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import paper
from cells import Cell, mean_and_spread, measure, parser
from measured import State, differences, keep_resampled, label
from paper import difference, difference_head, header, main_figure, method, points, table_of_differences
from record import page, results, table_head, write
from trials import CALLBACKS, STARTS

from yolo_qc_plugin.config import QCConfig
from yolo_qc_plugin.targets import TARGETS

HEAD = [
    "# On photographs of COCO",
    "",
    "Written by `examples/experiments/coco.py` from `coco.json`. AP by pycocotools, in points on the validation set, "
    "mean ± standard deviation over seeds, of the last epoch. Shares are of the float checkpoint that training starts "
    "from. With QC and without are two states of the same runs. Intervals are of the paired difference, averaged over "
    "seeds (of those in brackets, where not all were at hand): the middle 95% of 1,000 resamples of the images, the "
    "same for all models. A difference holds (or is reversed) where all seeds agree in sign and its interval leaves "
    "out 0. The paper's columns are mAP on all of COCO after 100 epochs.",
]

START = Cell("pretrained", None, "start")
TRAINED_ON = Cell("float", None)  # from the same start with the same recipe: what is lost by training, not by rounding
RECIPE = {f"W{w}A{a}": {"weight_bits": w, "act_bits": a} for w, a in ((8, 8), (4, 8), (4, 4), (3, 3))}
TRAINED = "W4A8", "W4A4", "W3A3"

ABLATION = {  # one default changed at a time, at W4A4; what is the default is left out
    "teacher=off": {"teacher": "off"},
    "distill_outputs=0": {"distill_outputs": 0.0},
    "distill_features=0": {"distill_features": 0.0},
    "distill_features=1": {"distill_features": 1.0},
    "distill_features=8": {"distill_features": 8.0},
    "label_weight=0": {"label_weight": 0.0},
    "label_weight=1": {"label_weight": 1.0},
    "bn_freeze=False": {"bn_freeze": False},
    "relative_steps=False": {"relative_steps": False},
    "per_channel=False": {"per_channel": False},
    "per_channel=True": {"per_channel": True},
    "act_offset=False": {"act_offset": False},
    "scale_init=lsq": {"scale_init": "lsq"},
    "scale_lr=1": {"scale_lr": 1.0},
    "scale_lr=10": {"scale_lr": 10.0},
    "scale_lr=30": {"scale_lr": 30.0},
    "ema_decay=0": {"ema_decay": 0.0},
    "ema_decay=0.9": {"ema_decay": 0.9},
    "ema_decay=0.999": {"ema_decay": 0.999},
    "rounding=nearest": {"rounding": "nearest"},
    "rounding=nearest,dampening_weight=0.1": {"rounding": "nearest", "dampening_weight": 0.1},
    "rounding=nearest,freeze_threshold=0.01": {"rounding": "nearest", "freeze_threshold": 0.01},
    "act_bits=8": {"act_bits": 8},
    "act_bits=6": {"act_bits": 6},
    "act_bits=5": {"act_bits": 5},
}
GONE = ["ablation-bn_freeze=False,bn_reestimate=True"]  # whose options went, for what was measured
TRAINING = {  # arguments of `yolo train` changed
    "lr0=1e-4": {"lr0": 1e-4},
    "lr0=9e-4": {"lr0": 9e-4},
    **{f"trial={name}": {"trial": name} for name in (*CALLBACKS, *STARTS)},
    "mosaic=0.5": {"mosaic": 0.5},
    "mosaic=0": {"mosaic": 0.0},
}

LABELS = {  # of photographs that have none, at W4A4
    "labels-none": {"labels": "teacher", "label_weight": 0.0},  # predicted too, and not learned from
    **{f"labels-{c}": {"labels": "teacher", "label_confidence": c} for c in (0.1, 0.25, 0.5, 0.7)},
}

SIZES = {**{width: RECIPE[width] for width in TRAINED}, "W3A8": {"weight_bits": 3, "act_bits": 8}}  # of budgets
UNIFORM = {**SIZES, "W7A8": {"weight_bits": 7, "act_bits": 8}}  # the last is what bits=8 means on a CPU
# cell -> the uniform width, options beside its own; the target has two widths to choose from
PLANS = {
    **{f"budget-{width}": (width, {"budget": "100%size"}) for width in SIZES},
    **{f"budget-{width}-ops": (width, {"budget": "100%ops"}) for width in ("W4A4", "W3A3")},
    **{f"budget-{width}-90%": (width, {"budget": "90%size"}) for width in ("W4A8", "W4A4")},
    **{f"budget-W4A8-{n}%": ("W4A8", {"budget": f"{n}%size", "target": "cpu"}) for n in (102, 110)},
    "budget-W4A8-tensorrt": ("W4A8", {"budget": "102%size", "target": "tensorrt"}),
    "budget-W4A8-openvino": ("W4A8", {"budget": "102%size", "target": "openvino"}),
    "budget-W4A8-110%-openvino": ("W4A8", {"budget": "110%size", "target": "openvino"}),
    "budget-W7A8-openvino": ("W7A8", {"target": "openvino"}),
}

LENGTHS = 1, 3, 10, 20  # epochs, beside those of the cell of `budget` that has the default of `target=cpu`

CORRECTIONS = {  # of a finished run, each with what it changes
    **{f"lr{rate:g}": {"correction_lr": rate} for rate in (1e-3, 3e-3, 1e-2)},  # the paper's is 1e-4
    **{f"epochs{n}": {"correction_epochs": n} for n in (3, 10)},
    "labels": {"teacher": "off"},
}
CORRECTED = method("EMA", 4).name, *UNIFORM, *PLANS  # cells whose finished runs can be corrected again
NARROW = {"4": {"bits": 4}, "3": {"bits": 3}, "4*": {"bits": 4, "edge_bits": 4}}
# mAP on COCO in the paper's main text: per tensor, per channel, per tensor with QC; all with EMA
PAPER = {
    "yolov5n": {"4": (22.1, 22.1, 23.8), "3": (16.3, 14.4, 18.2), "4*": (16.5, 19.4, 20.4)},
    "yolov5s": {"4": (33.1, 32.6, 34.0), "3": (28.5, 27.3, 30.2), "4*": (25.6, 31.2, 32.0)},
    "yolov7-tiny": {"4": (34.6, 32.3, 35.2), "3": (30.3, 27.3, 31.0), "4*": (32.8, 30.3, 34.3)},
}
PAPER_ROUNDED = {  # hard, soft
    "yolov5n": {4: (20.6, 21.2), 3: (15.2, 16.2)},
    "yolov5s": {4: (32.5, 32.6), 3: (27.2, 27.7)},
}


def averaged(bits: str, per_channel: bool = False) -> Cell:
    """An EMA cell of `NARROW`; those of Table 1 serve where they are the same."""
    if bits in "43" and not per_channel:
        return method("EMA", int(bits))
    name = f"EMA-{bits[0]}bit{'-edges' * bits.endswith('*')}{'-channel' * per_channel}"
    return Cell(name, {**NARROW[bits], **paper.METHODS["EMA"], **({"per_channel": True} if per_channel else {})})


def rounded(bits: int) -> Cell:
    """A finished LSQ run by hard and by soft rounding."""
    return Cell(f"rounded-LSQ-{bits}bit", None, "round", source=method("LSQ", bits).name)


def corrected(source: str, way: str) -> Cell:
    """A finished run, corrected again in one of `CORRECTIONS`."""
    of = "" if source == CORRECTED[0] else f"{source}-"
    return Cell(f"{of}QC-{way}", {"correction": "channel", **CORRECTIONS[way]}, "correct", source=source)


def calibrated(width: str) -> Cell:
    """What a row of the recipe starts from, without training."""
    return Cell(f"calibrated-{width}", RECIPE[width], "start")


def cells(kind: str, of: str = "") -> list[Cell]:
    """The cells of a table; `of` is the cell whose run `corrections` corrects."""
    if kind == "recipe":
        return [START, TRAINED_ON, *map(calibrated, RECIPE), *(Cell(width, RECIPE[width]) for width in TRAINED)]
    if kind == "ablation":
        return [START, *ablated()]
    if kind == "labels":
        return [START, *labelled()]
    if kind == "budget":
        return [START, *budgeted()]
    if kind == "length":
        return [START, *shortened()]
    if kind == "granularity":
        made = [averaged(bits, per_channel) for bits in NARROW for per_channel in (False, True)]
        return [START, *made, *(method("LSQ", bits) for bits in paper.WIDTHS), *map(rounded, paper.WIDTHS)]
    if kind == "corrections":
        source = next(cell for cell in (method("EMA", 4), *budgeted()) if cell.name == of)
        return [START, source, *(corrected(of, way) for way in CORRECTIONS)]
    return [START, *paper.cells(kind, paper.WIDTHS)]


def ablated() -> list[Cell]:
    """The defaults at W4A4, then each change of one of them."""
    base = {"bits": 4}
    others = {n: {**base, **o} for n, o in ABLATION.items() if QCConfig(**base, **o) != QCConfig(**base)}
    changed = [Cell(f"ablation-{name}", options) for name, options in others.items()]
    changed += [Cell(f"ablation-{name}", base, recipe=recipe) for name, recipe in TRAINING.items()]
    return [Cell("ablation-base", base), *changed]


def labelled() -> list[Cell]:
    """No labels at W4A4, then those of the float model from each confidence on."""
    return [Cell(name, {"bits": 4, **options}) for name, options in LABELS.items()]


def ablation(name: str, content: dict) -> list[str]:
    """What each default is worth."""
    return against_the_first("One default changed at a time", [*names(ablated()), *GONE], name, content)


def labels(name: str, content: dict) -> list[str]:
    """What the float model's labels are worth, by the confidence that they ask for."""
    title = "No labels, and the float model's from a confidence on"
    return against_the_first(title, names(labelled()), name, content)


def names(made: list[Cell]) -> list[str]:
    """Of cells."""
    return [cell.name for cell in made]


def against_the_first(title: str, made: list[str], name: str, content: dict) -> list[str]:
    """A line for each cell of these names, and how it differs from the first."""
    runs = {cell: results(content["cells"], cell) for cell in made}
    first, files = made[0], [run for found in runs.values() for run in found.values()]
    if not runs[first]:
        return []
    gain = [f"AP: {column}" if column == "by seed" else column for column in difference_head(content)]
    head = ["changed", "seeds", "without QC", "with QC", "loss of outputs", "its difference", "95% over images", *gain]
    lines = header(title, name, files)
    lines += [
        "Differences are to the first row, without QC. The loss of outputs is that against the float start, on the "
        "validation images; lower is nearer.",
        "",
        *table_head(head),
    ]
    for cell, found in runs.items():
        if found:
            of = [points(found, state, "ap").values() for state in ("qat", "qc")]
            columns = [mean_and_spread(values) if values else "" for values in of]  # a cell may go without QC
            loss = statistics.mean(run["metrics"]["qat"]["agreement"] for run in found.values())
            pair = (cell, "qat"), (first, "qat")
            apart = content.get("differences", {}).get(label(*pair), {})
            nearer = ["", ""]
            if "agreement" in apart:
                nearer = [f"{apart['agreement']:+.3f}", "{:+.3f} to {:+.3f}".format(*apart["agreement_interval"])]
            by = difference(content, *pair, "ap") or [""] * len(gain)
            shown = [cell.partition("-")[2], str(len(found)), *columns, f"{loss:.3f}", *nearer, *by]
            lines.append(f"| {' | '.join(shown)} |")
    return lines


def budgeted() -> list[Cell]:
    """Uniform widths, and widths by a budget of about the same file size."""
    uniform = [Cell(width, options) for width, options in UNIFORM.items()]
    return [*uniform, *(Cell(name, {**UNIFORM[width], **more}) for name, (width, more) in PLANS.items())]


def shortened(budget: str = TARGETS["cpu"].budget) -> list[Cell]:
    """What is trained for a CPU, for each number of epochs; then that of `budget`, for as many as it is given."""
    longest = f"budget-W4A8-{budget.removesuffix('size')}"
    uniform, more = PLANS[longest]
    options = {**UNIFORM[uniform], **more}
    return [*(Cell(f"length-{n}", options, recipe={"epochs": n}) for n in LENGTHS), Cell(longest, options)]


def searched() -> list[tuple[State, State]]:
    """Widths by a budget, and the uniform ones of about the same size; as best.pt keeps QC, both with it."""
    return [((name, state), (width, state)) for name, (width, _) in PLANS.items() for state in ("qat", "qc")]


def compared() -> list[tuple[State, State]]:
    """All pairs of which the page shows the difference."""
    pairs = [*gains_of_qc(), *paper.ordered(), *paper.corrections(), *paper.decays()]
    for first, *others in ([*names(ablated()), *GONE], names(labelled())):
        pairs += [((name, "qat"), (first, "qat")) for name in (first, *others)]
    pairs += searched()
    pairs += [((corrected(source, way).name, "qc"), (source, "qat")) for source in CORRECTED for way in CORRECTIONS]
    return [*pairs, *(pair for bits in NARROW for pair in granular(bits)), *map(softer, paper.WIDTHS)]


def gains_of_qc() -> list[tuple[State, State]]:
    """With QC, and without, of uniform widths and of plans."""
    return [((name, "qc"), (name, "qat")) for name in (*UNIFORM, *PLANS)]


def granular(bits: str) -> list[tuple[State, State]]:
    """Per channel, then per tensor with QC, each against per tensor; and the one against the other."""
    tensor, channel = averaged(bits).name, averaged(bits, True).name
    return [
        ((channel, "qat"), (tensor, "qat")),
        ((tensor, "qc"), (tensor, "qat")),
        ((tensor, "qc"), (channel, "qat")),
    ]


def softer(bits: int) -> tuple[State, State]:
    """Soft rounding, and hard."""
    name = rounded(bits).name
    return (name, "soft"), (name, "hard")


def recipe(name: str, content: dict) -> list[str]:
    """What a model keeps with the same widths in all layers."""
    floats = {
        title: points(results(content["cells"], cell.name), "trained", "ap")
        for title, cell in {"float": START, "float trained on": TRAINED_ON}.items()
    }
    trained = {width: results(content["cells"], width) for width in TRAINED}
    files = [run for runs in trained.values() for run in runs.values()]
    if not (files and floats["float"]):
        return []
    wholes = {title: statistics.mean(found.values()) for title, found in floats.items() if found}

    def shares(ap: float) -> str:
        return " | ".join(f"{100 * ap / whole:.1f}%" for whole in wholes.values())

    gain = [f"QC: {column}" if column == "by seed" else column for column in difference_head(content)]
    columns_of_shares = [f"of {title}" for title in wholes]
    head = [
        "bits",
        "seeds",
        "calibrated alone",
        "without QC",
        "with QC",
        "best.pt",
        *columns_of_shares,
        *gain,
        "minutes",
    ]
    lines = header("The same widths in all layers", name, files)
    given = {k: v for run in files for k, v in run["options"].items() if k not in {"weight_bits", "act_bits"}}
    lines += [f"Not by default: {', '.join(f'{k}={v}' for k, v in {'budget': 'none', **given}.items())}.", ""]
    lines += [
        "Bits are those of weights and activations, 8 at the edges. `best.pt` is the better of the two columns before "
        "it in each run, as the plugin keeps it. Minutes are of a run, with QC and all that the plugin measures.",
        "",
        *table_head(head),
    ]
    for title, whole in wholes.items():
        shown = mean_and_spread(floats[title].values())
        lines.append(f"| {title} | {len(floats[title])} | | | | {shown} | {shares(whole)} {'| ' * (len(gain) + 1)}|")
    for width in RECIPE:
        runs, start = trained.get(width, {}), results(content["cells"], calibrated(width).name)
        kept = {seed: 100 * run["metrics"][run["kept"]]["ap"] for seed, run in runs.items()}
        columns = [points(start, "qat", "ap"), points(runs, "qat", "ap"), points(runs, "qc", "ap"), kept]
        if any(columns):
            shown = [mean_and_spread(column.values()) if column else "" for column in columns]
            of_float = shares(statistics.mean((kept or columns[0]).values()))
            minutes = f"{statistics.mean(run['seconds'] for run in runs.values()) / 60:.0f}" if runs else ""
            by = difference(content, (width, "qc"), (width, "qat"), "ap") or [""] * len(gain)
            lines.append(f"| {' | '.join([width, str(len(runs or start)), *shown, of_float, *by, minutes])} |")
    return lines


def budgets(name: str, content: dict) -> list[str]:
    """Uniform widths against widths by a budget of the same size."""
    floats = points(results(content["cells"], START.name), "trained", "ap")
    cells_of = {cell.name: results(content["cells"], cell.name) for cell in budgeted()}
    files = [run for cell, runs in cells_of.items() if cell.startswith("budget") for run in runs.values()]
    if not (files and floats):
        return []
    whole = statistics.mean(floats.values())
    head = ["widths", "QC", "seeds", "MB", "BOPs", "AP", "of float", "won back", "predicted", *difference_head(content)]
    lines = header("Widths by a budget", name, files)
    lines += [
        f"Float: {whole:.1f}. A budget is the file size of the uniform width of its name, or a share of it; -ops are "
        "its operations on bits, which count activations. Above 100% weights have two widths, as in files for a CPU; "
        "-tensorrt and -openvino are 102%, where no share is named, with what those targets respect. "
        "BOPs, multiplications times the bits of weight and input, are in percent of 8 bits everywhere. "
        "Differences are to that uniform width, and won back is the part of its distance to float that the plan makes "
        "good. Predicted is the share of float that the run foretold.",
        "",
        *table_head(head),
    ]
    for (cell, state), (uniform, _) in [(((u, s), (u, s))) for u in UNIFORM for s in ("qat", "qc")] + searched():
        runs, base = cells_of[cell], points(cells_of[uniform], state, "ap")
        found = points(runs, state, "ap")
        if found:
            ap, back, by = statistics.mean(found.values()), "", []
            size, operations = taken(content, cell, runs)
            if base and cell != uniform:
                lost = whole - statistics.mean(base.values())
                back = f"{(lost - whole + ap) / lost:.0%}" if lost > 0 else "none lost"
                by = difference(content, (cell, state), (uniform, state), "ap")
            told = [100 - run["budget"]["takes"]["%drop"] for run in runs.values() if run.get("budget")]
            shown = [
                cell, "✓" if state == "qc" else "✗", str(len(found)), size, operations, mean_and_spread(found.values()),
                f"{ap / whole:.1%}", back, f"{told[0]:.1f}%" if told else "",
                *(by or [""] * len(difference_head(content))),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(shown)} |")
    return lines


def lengths(name: str, content: dict) -> list[str]:
    """What fewer steps keep."""
    floats = points(results(content["cells"], START.name), "trained", "ap")
    budget = next((r["options"]["budget"] for cell, r in content["cells"].items() if cell.startswith("length-")), None)
    if not (budget and floats):
        return []
    runs = {cell.name: results(content["cells"], cell.name) for cell in shortened(budget)}
    whole = statistics.mean(floats.values())
    lines = header("Steps", name, [run for found in runs.values() for run in found.values()])
    lines += [
        f"Float: {whole:.1f}. The model for a CPU ({list(runs)[-1]} above) after fewer epochs, each with the whole "
        "schedule of rate and rounding. Minutes are of a run beside another on two cores, its costs measured before.",
        "",
        *table_head(["epochs", "steps", "seeds", "without QC", "with QC", "best.pt", "of float", "minutes"]),
    ]
    for found in runs.values():
        if found:
            run = next(iter(found.values()))
            kept = [100 * r["metrics"][r["kept"]]["ap"] for r in found.values()]
            minutes = statistics.mean(r["seconds"] for r in found.values()) / 60
            states = [mean_and_spread(points(found, state, "ap").values()) for state in ("qat", "qc")]
            shown = [
                str(run["recipe"]["epochs"]), str(run["steps"]), str(len(found)), *states, mean_and_spread(kept),
                f"{statistics.mean(kept) / whole:.1%}", f"{minutes:.0f}",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(shown)} |")
    return lines


def taken(content: dict, cell: str, runs: dict) -> tuple[str, str]:
    """Columns of what the widths of a cell take: MB, and BOPs in percent; empty where no run tells.

    Runs of earlier versions tell BOPs only of a plan. Uniform widths take as much before training, of which the cell of
    `calibrated` tells.
    """
    every = [*runs.values()] + ([*results(content["cells"], f"calibrated-{cell}").values()] if cell in UNIFORM else [])
    sizes = {run["size_mb"]["quantized"] for run in every if "size_mb" in run}
    shares = {run["budget"]["takes"]["%bops"] for run in every if run.get("budget")}
    shares = shares or {run["operations"]["percent_of_8_bits"] for run in every if "operations" in run}
    return tuple(f"{statistics.mean(of):.{digits}f}" if of else "" for of, digits in ((sizes, 2), (shares, 1)))


def granularity(name: str, content: dict) -> list[str]:
    """Per tensor, per channel, per tensor with QC."""
    runs = {
        (bits, per_channel): results(content["cells"], averaged(bits, per_channel).name)
        for bits in NARROW
        for per_channel in (False, True)
    }
    files = [run for (_, per_channel), found in runs.items() if per_channel for run in found.values()]
    if not files:  # Table 1 has the others
        return []
    (figure, title), paper_rows = main_figure(files), PAPER.get(files[0]["model"], {})
    head = ["bits", "weights' scales", "QC", "seeds", title, f"paper, {files[0]['model']}"]
    lines = [
        *header("Per tensor, per channel, per tensor with QC", name, files),
        'All with EMA. 4* has the edges at 4 bits too, the paper\'s "4-bit*".',
        "",
        *table_head(head),
    ]
    for bits in NARROW:
        rows = ("tensor", "✗", False, "qat"), ("channel", "✗", True, "qat"), ("tensor", "✓", False, "qc")
        for (scales, qc, per_channel, state), theirs in zip(rows, paper_rows.get(bits, [""] * 3)):
            if values := points(runs[bits, per_channel], state, figure):
                shown = f"{len(values)} | {mean_and_spread(values.values())} | {theirs}"
                lines.append(f"| {bits} | per {scales} | {qc} | {shown} |")
    pairs = [pair for bits in NARROW for pair in granular(bits)]
    return [*lines, "", *table_of_differences(content, pairs, figure)]


def corrections(name: str, content: dict) -> list[str]:
    """QC's learning rate, its length, and what teaches it."""
    made = {source: {way: corrected(source, way).name for way in CORRECTIONS} for source in CORRECTED}
    made = {s: of for s, of in made.items() if any(results(content["cells"], cell) for cell in of.values())}
    runs = [run for source in made for run in results(content["cells"], source).values()]
    if not runs:
        return []
    figure, title = main_figure(runs)
    lines = [
        *header("QC in other ways", name, runs),
        "Finished runs, corrected again with one option changed, after the correction of the run itself, which tells "
        "its rate. `teacher=off` is by the labels of the data alone. The last columns are the gain over the model "
        "without QC.",
        "",
        *table_head(["run", "QC", "seeds", title, *difference_head(content)]),
    ]
    for source, of in made.items():
        (run, *_) = results(content["cells"], source).values()
        rows = {f"correction_lr={run['config']['correction_lr']:g}": source} if "qc" in run["metrics"] else {}
        for way, cell in of.items():
            rows.setdefault(", ".join(f"{k}={v}" for k, v in CORRECTIONS[way].items()), cell)
        for changed, cell in rows.items():
            if after := points(results(content["cells"], cell), "qc", figure):
                gains = difference(content, (cell, "qc"), (source, "qat"), figure)
                spread = mean_and_spread(after.values())
                lines.append(f"| {source} | {changed} | {len(after)} | {spread} | {' | '.join(gains)} |")
    return lines


def soft_rounding(name: str, content: dict) -> list[str]:
    """Finished LSQ runs by hard and by soft rounding."""
    from yolo_qc_plugin.quant.soft_rounding import SOFT

    found = {bits: results(content["cells"], rounded(bits).name) for bits in paper.WIDTHS}
    sources = [run for bits in paper.WIDTHS for run in results(content["cells"], method("LSQ", bits).name).values()]
    if not (any(found.values()) and sources):
        return []
    head = ["bits", "seeds", "hard", "soft", "paper, hard", "paper, soft", *difference_head(content)]
    lines = [
        *header("Soft rounding", name, sources),
        "Finished LSQ models without QC, measured without training: a weight or an activation is rounded only where it "
        f"lies within {SOFT} of a step of a grid point, and keeps its latent value otherwise. Both columns are of the "
        "trained form in FP32, not of the deployed one.",
        "",
        *table_head(head),
    ]
    for bits, runs in found.items():
        if runs:
            hard, soft = (mean_and_spread(points(runs, state, "ap").values()) for state in ("hard", "soft"))
            theirs = PAPER_ROUNDED.get(sources[0]["model"], {}).get(bits, ("", ""))
            columns = " | ".join(difference(content, *softer(bits), "ap"))
            lines.append(f"| {bits} | {len(runs)} | {hard} | {soft} | {theirs[0]} | {theirs[1]} | {columns} |")
    return lines


TABLES = (
    *(recipe, ablation, labels, budgets, lengths),
    *(paper.table1, paper.table2, corrections, paper.table3, granularity, soft_rounding),
)
KINDS = (
    *("recipe", "ablation", "labels", "budget", "length"),
    *("table1", "table2", "table3", "granularity", "corrections"),
)


def main() -> None:
    """Parse the command line and run."""
    p = parser(__doc__, KINDS)
    p.set_defaults(runs=Path("runs/coco"), coco=True)
    p.add_argument("--of", default=CORRECTED[0], choices=CORRECTED, help="cell whose run `corrections` corrects")
    args = p.parse_args()
    file = args.out / "coco.json"
    record, done = measure(cells(args.kind, args.of), file, args)
    if args.name and record[args.name]["cells"]:
        kept = keep_resampled(file.with_suffix(".npz"), args.name, args.runs)
        record[args.name]["differences"] = differences(record[args.name], args.name, kept, args.runs, compared())
        write(file, record)
    if any(content["cells"] for content in record.values()):
        file.with_suffix(".md").write_text(page(HEAD, record, *TABLES), encoding="utf-8")
    sys.exit(not done)


if __name__ == "__main__":
    main()
