# yolo_qc_plugin, AGPL-3.0
"""Write docs/results.md, the page for a stranger, from the records of all tables.

python examples/experiments/summary.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import coco
import paper
from cells import mean_and_spread
from paper import difference, method, points
from record import read, results, table_head

DOCS = Path("docs")
TRIALS = "coco-yolov5n-auto", "coco-yolov5n-mix", "animals-yolov5n-auto"  # of another recipe, for a line in coco.md
HEAD = """# Results

Three tables, written by `examples/experiments/summary.py` from the records in [results](results/README.md), which has
the recipes, versions, seeds and commands of every figure. W4A8 means weights of 4 bits and activations of 8. No
accuracy was measured on a GPU.

## What a model keeps

mAP50-95 of `best.pt`, the better of the models without and with QC on the validation set, as a share of float's, then
in points, mean ± standard deviation over seeds, their number in brackets: AP by pycocotools on COCO's photographs and
on animals, else Ultralytics' own. Labels say what training used beside the float model's outputs. Float is the
checkpoint that training starts from; with true labels it is the same after as many epochs of the same recipe in float,
where that was run. One width is that of all layers; otherwise a budget gives each layer a width of its own, with as
much of what it names as that one width takes. Its gain is of the models without QC, in AP, in brackets the middle 95%
of 1,000 resamples of the images. [coco.md](results/coco.md) has further budgets."""

CLAIMS = """## What held of the paper

The paper trains on all of COCO for 100 epochs; here it is small data for few epochs. Rounding is the paper's
(`rounding=nearest`) except where the plugin's recipe is named, which trains as in the table above, with one width or
by a budget. Differences in points, mean over several seeds, in brackets the middle 95% of 1,000 resamples of the
images (coco, animals), else ± the standard error (bccd). A claim holds where all seeds agree and that interval leaves
out 0, or the mean is at least twice that error. coco-yolov5n-constant is coco-yolov5n-orderings with a rate that does
not fall: there the average and QC repair what a falling rate does not leave behind.
[coco.md](results/coco.md) and [paper.md](results/paper.md) have the recipes."""

# width of all layers -> budgets of as much, the default first
PLANS = {
    "W7A8": ("budget-W7A8-openvino",),
    "W4A8": ("budget-W4A8-110%", "budget-W4A8-102%", "budget-W4A8", "budget-W4A8-90%"),
    "W4A4": ("budget-W4A4-ops", "budget-W4A4"),
    "W3A8": ("budget-W3A8",),
    "W3A3": ("budget-W3A3-ops", "budget-W3A3"),
}

EVERYWHERE = """## One model, one number

The same checkpoint in PyTorch and as a file in each runtime, on {where}:
MB of the file, mAP50-95 by Ultralytics, and time on one thread as a share of FP32's in the same runtime. What each file
is for: [deployment.md](deployment.md)."""


def labels(run: dict) -> str:
    """What labels a run was trained with."""
    options = run["options"]
    if options.get("label_weight") == 0:
        return "none"
    return "the float model's" if options.get("labels") == "teacher" else "true"


def share(runs: dict[int, dict], whole: float, figure: str) -> str:
    """What best.pt keeps, and in points."""
    if not runs:
        return ""
    best = [100 * run["metrics"][run["kept"]][figure] for run in runs.values()]
    return f"{statistics.mean(best) / whole:.1%}: {mean_and_spread(best)} ({len(best)})"


def row(content: dict, width: str, plans: Sequence[str] = (), figure: str = "ap") -> list[str] | None:
    """A line of the first table, None where there is no run.

    Args:
        content: Of a set.
        width: The cell with one width for all layers.
        plans: Cells with a budget; the first that was run is shown.
        figure: Of which the shares are.
    """
    cells = content["cells"]
    plan = next((p for p in plans if results(cells, p)), "")
    one, each = results(cells, width), results(cells, plan)
    if not (one or each):
        return None
    run = next(iter((one or each).values()))
    start, on = (points(results(cells, cell), "trained", figure) for cell in (coco.START.name, "float"))
    longer = bool(on) and (labels(run) == "true" or not start)
    floats = on if longer else start
    whole = statistics.mean(floats.values())
    config = run["config"]
    gain = difference(content, (plan, "qat"), (width, "qat"), figure) if plan else []
    return [
        f"{run['model']}, {Path(run['data']).stem}",
        f"{run['images']['train']} photographs, labels: {labels(run)}, {run['steps']} steps{apart(run)}",
        "W{}A{}".format(*(config[f"{of}_bits"] or config["bits"] for of in ("weight", "act"))),
        mean_and_spread(floats.values()) + " trained on" * longer,
        share(one, whole, figure),
        f"{share(each, whole, figure)} {chosen_by(plan)}" if plan else "",
        f"{gain[1]} ({seeds_named(gain[3])})".replace(" (-)", "") if gain else "",
    ]


def apart(run: dict) -> str:
    """In words, what sets a run apart from others of its model and data: a GPU, and grids for the head's outputs.

    The latter came together with edges whose width the target chooses.
    """
    grids = run["config"].get("edge_bits", 8) is None and run["config"]["output_bits"] is not None
    gpu = "" if run["recipe"].get("device", "cpu") == "cpu" else f" on a GPU ({run['machine']})"
    return gpu + ", the head's outputs on grids" * grids


def seeds_named(interval: str) -> str:
    """An interval, with the seeds in words where it is not of all."""
    return interval.replace(" (", "; seeds ").rstrip(")")


def chosen_by(plan: str) -> str:
    """What a plan's widths are chosen by: its budget, or its target alone."""
    options = coco.PLANS[plan][1]
    return options.get("budget", f"target={options.get('target')}")


def table_kept(records: dict[str, dict]) -> list[str]:
    """The first table."""
    head = ["model, data", "trained with", "bits", "float", "one width", "a width for each layer", "its gain"]
    sets = [name for name in records["coco"] if name not in TRIALS]
    sets.sort(key=lambda name: name.partition("-")[0] != "coco")  # then as recorded
    rows = [row(records["coco"][name], width, plans) for name in sets for width, plans in PLANS.items()]
    rows += [
        row(content, f"{preset}-{bits}bit", figure="map50_95")
        for content in records["presets"].values()
        for preset in ("best", "per-channel")
        for bits in (4, 3)
    ]
    return [*table_head(head), *(f"| {' | '.join(row)} |" for row in rows if row)]


def claims() -> dict[str, tuple]:
    """Claim -> pair of states, and the pair of the paper's figures."""
    made = {}
    for bits in paper.WIDTHS:
        theirs = {name: paper.PAPER["yolov5n"][method(name, bits).name] for name in paper.METHODS}
        cell = {name: method(name, bits).name for name in paper.METHODS}
        for name in paper.METHODS:
            made[f"QC gains after {name}, {bits} bits"] = ((cell[name], "qc"), (cell[name], "qat")), theirs[name][::-1]
        for name in ("LSQ", "dampening"):
            pair = (cell["EMA"], "qat"), (cell[name], "qat")
            made[f"EMA above {name}, {bits} bits"] = pair, (theirs["EMA"][0], theirs[name][0])
    return made


def table_of_claims(records: dict[str, dict]) -> list[str]:
    """The second table."""
    sets = [("map50_95", *of) for of in records["paper"].items()] + [("ap", *of) for of in records["coco"].items()]
    both = [(claim, pair, f"{first - second:+.1f}") for claim, (pair, (first, second)) in claims().items()]
    ours = {width: width for width in coco.UNIFORM}
    for plan, (width, options) in coco.PLANS.items():
        ours[plan] = ", ".join([width, *(f"target={v}" if k == "target" else v for k, v in options.items())])
    both += [(f"QC gains in the plugin's recipe, {bits}", ((c, "qc"), (c, "qat")), "") for c, bits in ours.items()]
    rows = []
    for claim, pair, theirs in both:
        for figure, name, content in sets:
            columns = difference(content, *pair, figure)
            if columns and "," in columns[0]:  # several seeds
                _, mean, error, *interval, reading = columns
                sure = f"({seeds_named(interval[0])})" if interval else f"± {error}"
                rows.append(f"| {claim} | {theirs} | {name} | {mean} {sure} | {reading} |")
    return [*table_head(["claim", "paper, YOLOv5n", "here, data and model", "difference", "reading"]), *rows]


def table_everywhere(benchmarks: list[dict]) -> list[str]:
    """The third table: a row for each file in each runtime, and a column for each model."""
    shown: dict[tuple[str, str], dict[str, str]] = {}
    for found in benchmarks:
        for row in found["rows"]:
            if "figure" in row:
                ratio = [f"{row['ratio']:.2f}x"] if row.get("ratio") else []
                cell = ", ".join([f"{row['mb']:.2f} MB", f"{100 * row['figure']:.2f}", *ratio])
                shown.setdefault((row["runtime"], row["file"]), {})[found["model"]] = cell
    runtimes = [runtime for runtime, _ in shown]
    head = ["runtime", "file", *(found["model"] for found in benchmarks)]
    rows = [
        f"| {runtime} | {file} | {' | '.join(of.get(found['model'], '') for found in benchmarks)} |"
        for (runtime, file), of in sorted(shown.items(), key=lambda item: runtimes.index(item[0][0]))
    ]
    return [*table_head(head), *rows]


def summary(folder: Path) -> str:
    """The page, from a folder of records."""
    records = {name: read(folder / f"{name}.json") for name in ("coco", "presets", "paper")}
    benchmarks = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*/benchmark.json"))]
    benchmarks.sort(key=lambda found: found["model"].replace("yolov", "yolo0"))  # by generation
    where = "; ".join(dict.fromkeys(f"{b['data']} at {b['imgsz'][0]} px, {b['cpu']}" for b in benchmarks))
    parts = [
        [HEAD], table_kept(records), [CLAIMS], table_of_claims(records),
        [EVERYWHERE.format(where=where)], table_everywhere(benchmarks),
    ]  # fmt: skip
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def main() -> None:
    """Write the page."""
    page = DOCS / "results.md"
    page.write_text(summary(DOCS / "results"), encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
