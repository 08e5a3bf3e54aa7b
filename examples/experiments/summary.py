# yolo_qc_plugin, AGPL-3.0
"""Write docs/results.md, the page for a stranger, from the records of all tables.

python examples/experiments/summary.py
"""

from __future__ import annotations

import json
import statistics
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

mAP50-95 in points, mean ± standard deviation over seeds: AP by pycocotools on COCO's photographs and on animals, else
Ultralytics' own. `best.pt` is the better of the models without and with QC on the validation set, as the plugin keeps
it. Float is the checkpoint that training starts from; trained on is the same after as many epochs of the same recipe
in float, with true labels. Labels say what training used beside the float model's outputs. A budget gives each layer a
width of its own, within a share of the file size or of the operations on bits that the width before it takes. QC's
gain is with less without, in brackets the middle 95% of 1,000 resamples of the images or, of older runs (bccd, digits;
a float teacher or none), the standard error."""

CLAIMS = """## What held of the paper

The paper trains on all of COCO for 100 epochs; here it is small data for the few epochs that
[paper.md](results/paper.md) says, with the paper's way of rounding (`rounding=nearest`). Differences in points, mean
over seeds and standard error; a claim holds where all seeds agree and the mean is at least twice that error. QC's
gain with the plugin's own way of rounding is in the table above."""

EVERYWHERE = """## One model, one number

The same checkpoint in PyTorch and as a file in each runtime: {where}. MB of the file, mAP50-95 by Ultralytics, and
time on one thread as a share of FP32's in the same runtime. What each file is for: [deployment.md](deployment.md)."""


def labels(run: dict) -> str:
    """What labels a run was trained with."""
    options = run["options"]
    if options.get("label_weight") == 0:
        return "none"
    return "the float model's" if options.get("labels") == "teacher" else "true"


def gain_of_qc(content: dict, cell: str, figure: str) -> str:
    """With QC less without, and how sure that is."""
    columns = difference(content, (cell, "qc"), (cell, "qat"), figure)
    if not columns:
        return ""
    _, mean, error, *interval, _ = columns
    return f"{mean} ({interval[0] if interval else f'± {error}'})"


def kept(content: dict, cell: str, start: str, figure: str) -> list[str] | None:
    """Columns of a row, from model and data to QC's gain; None where there is no run."""
    runs = results(content["cells"], cell)
    if not runs:
        return None
    one = next(iter(runs.values()))
    floats = points(results(content["cells"], start), "trained", figure)
    on = points(results(content["cells"], "float"), "trained", figure)
    best = [100 * run["metrics"][run["kept"]][figure] for run in runs.values()]
    config = one["config"]
    bits = "W{}A{}".format(*(config[f"{of}_bits"] or config["bits"] for of in ("weight", "act")))
    if cell in coco.PLANS:
        bits += f", {coco.PLANS[cell][1]['budget']}"
    share = [
        f"{statistics.mean(best) / statistics.mean(whole.values()):.1%}" if whole else "" for whole in (floats, on)
    ]
    shown = [mean_and_spread(values.values()) if values else "" for values in (floats, on)]
    return [
        f"{one['model']}, {Path(one['data']).stem}", str(one["images"]["train"]), labels(one), str(one["steps"]), bits,
        str(len(runs)), *shown, mean_and_spread(best), *share, gain_of_qc(content, cell, figure),
    ]  # fmt: skip


def table_kept(records: dict[str, dict]) -> list[str]:
    """The first table."""
    head = ["model, data", "photographs", "labels", "steps", "bits", "seeds", "float", "trained on", "best.pt",
            "of float", "of trained on", "QC's gain"]  # fmt: skip
    rows = [
        kept(c, width, coco.START.name, "ap")
        for n, c in records["coco"].items()
        if n not in TRIALS
        for width in dict.fromkeys((*coco.RECIPE, *coco.UNIFORM, *coco.PLANS))
    ]
    rows += [
        kept(c, f"{preset}-{bits}bit", "", "map50_95")
        for c in records["presets"].values()
        for preset in ("best", "per-channel")
        for bits in (4, 3, 2)
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
    rows = []
    for claim, (pair, (first, second)) in claims().items():
        for name, content in records["paper"].items():
            columns = difference(content, *pair, "map50_95")
            if columns and "," in columns[0]:  # several seeds
                _, mean, error, reading = columns
                rows.append(f"| {claim} | {first - second:+.1f} | {name} | {mean} ± {error} | {reading} |")
    return [*table_head(["claim", "paper, YOLOv5n", "here, data and model", "difference", "reading"]), *rows]


def table_everywhere(benchmarks: list[dict]) -> list[str]:
    """The third table: a row for each file in each runtime, and for each model its columns."""
    shown: dict[tuple[str, str], dict[str, str]] = {}
    for found in benchmarks:
        for row in found["rows"]:
            if "figure" in row:
                ratio = f"{row['ratio']:.2f}" if row.get("ratio") else ""
                columns = f"{row['mb']:.2f} | {100 * row['figure']:.2f} | {ratio}"
                shown.setdefault((row["runtime"], row["file"]), {})[found["model"]] = columns
    models = [found["model"].partition(" ")[0] for found in benchmarks]
    head = ["runtime", "file", *(f"{model}: {name}" for model in models for name in ("MB", "mAP50-95", "time"))]
    rows = [
        f"| {runtime} | {file} | {' | '.join(of.get(found['model'], ' | | ') for found in benchmarks)} |"
        for (runtime, file), of in shown.items()
    ]
    return [*table_head(head), *rows]


def summary(folder: Path) -> str:
    """The page, from a folder of records."""
    records = {name: read(folder / f"{name}.json") for name in ("coco", "presets", "paper")}
    benchmarks = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*/benchmark.json"))]
    benchmarks.sort(key=lambda found: found["model"].replace("yolov", "yolo0"))  # by generation
    where = "; ".join(dict.fromkeys(f"{b['data']} at {b['imgsz'][0]} px, {b['cpu']}" for b in benchmarks))
    where = f"{' and '.join(b['model'] for b in benchmarks)} on {where}"
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
