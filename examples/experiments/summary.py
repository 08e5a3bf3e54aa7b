# yolo_qc_plugin, AGPL-3.0
"""Write docs/results.md, the page for a stranger, from the records of all tables.

python examples/experiments/summary.py
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

import coco
import paper
from cells import mean_and_spread
from measured import State
from paper import difference, method, points
from record import read, results, table_head

DOCS = Path("docs")
DATA = "coco", "animals", "bccd", "digits"  # in the order of the page
TRIALS = "coco-yolov5n-auto", "coco-yolov5n-mix", "animals-yolov5n-auto"  # of another recipe, for a line in coco.md
HEAD = """# Results

Three tables, written by `examples/experiments/summary.py` from the records in [results](results/README.md), which has
the recipes, versions, seeds and commands of every figure. W4A8 means weights of 4 bits and activations of 8.

## What a model keeps

mAP50-95 of `best.pt`, the better of the models without and with QC on the validation set, as a share of float's, then
in points, mean ± standard deviation over seeds, their number in brackets: AP by pycocotools; on digits, and on bccd
after 380 steps, Ultralytics' own, by the preset `best` of version 0.1.0. Labels say what training used beside the float
model's outputs. Float is the checkpoint that training starts from; with true labels it is the same after as many epochs
of the same recipe in float, where that was run. One width is that of all layers; otherwise a budget gives each layer a
width of its own, with as much of what it names as that one width takes, or as the target's default has it. Its gain is
of the models without QC in AP, and what QC adds is of the last model in the line; in brackets the middle 95% of 1,000
resamples of the images, or ± the standard error over seeds. A line has the run of most seeds, of those the longest;
[coco.md](results/coco.md) has the others, further budgets and what a GPU trained."""

CLAIMS = """## What held of the paper

The paper trains on all of COCO for 100 epochs; here it is small data for few epochs in its setting, on COCO with what
the float start gives in place of labels. Differences of AP in points (of a segmentation model: of masks), mean over
several seeds, in brackets the middle 95% of 1,000 resamples of the images, or ± the standard error over seeds. A claim
holds where all seeds agree and that interval leaves out 0, or the mean is at least twice that error.
coco-yolov5n-constant is coco-yolov5n-orderings with a rate that does not fall: the average and QC repair what such a
rate leaves behind, and after a falling one there is nothing of it. [coco.md](results/coco.md) and
[paper.md](results/paper.md) have the recipes."""

# width of all layers -> budgets of as much, the default first
PLANS = {
    "W7A8": ("budget-W7A8-openvino",),
    "W4A8": ("budget-W4A8-110%", "budget-W4A8-102%", "budget-W4A8", "budget-W4A8-90%"),
    "W4A4": ("budget-W4A4-ops", "budget-W4A4"),
    "W3A8": ("budget-W3A8",),
    "W3A3": ("budget-W3A3-ops", "budget-W3A3"),
}

WHERE = """## What runs where

Each target's own file, on {where}: MB, mAP50-95 by Ultralytics in points, and, where the runtime is the
one that it is for, ms of an image on one thread and the share of FP32's time in it. FP32 and INT8 are Ultralytics' own
files of the float start for that runtime. `target=tensorrt` and `fpga` are here for their accuracy: ONNX Runtime
computes what the file means. The checkpoint's own mAP is beside; models of `cpu` were trained longest, see
[results](results/README.md). [targets.md](results/targets.md) has every file, [deployment.md](deployment.md) what each
is for."""

FP32, STOCK = "FP32", "Ultralytics INT8"
# target -> runtime, kind of file, whether its time is one of the target's own
FILES = {
    "cpu": (
        ("ONNX Runtime", "packed", True),
        ("ONNX Runtime", "int8", True),
        ("OpenVINO, f32", "packed", True),
    ),
    "openvino": (("OpenVINO, f32", "openvino", True),),
    "litert": (("LiteRT", "int8", True), ("LiteRT", "int4", True)),
    "tensorrt": (("ONNX Runtime", "tensorrt", False),),
    "fpga": (("ONNX Runtime", "qonnx", False),),
}


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


@dataclass
class Found:
    """The runs of a set with one width, or with a plan of as much.

    Args:
        content: Of the set.
        cell: With that width or plan; one of PLANS is a plan.
        figure: That the set is compared by.
        runs: Of the cell, by seed.
    """

    content: dict
    cell: str
    figure: str
    runs: dict[int, dict]

    @property
    def one(self) -> dict:
        """The first run."""
        return next(iter(self.runs.values()))

    @property
    def size(self) -> tuple[int, int]:
        """How many seeds it has, and how many steps."""
        return len(self.runs), self.one["steps"]

    def floats(self) -> tuple[list[float], str]:
        """What the share is of, in points, by seed; and how it is told."""
        cells = self.content["cells"]
        start, on = (points(results(cells, c), "trained", self.figure) for c in (coco.START.name, "float"))
        longer = bool(on) and (labels(self.one) == "true" or not start)
        values = list((on if longer else start).values())
        return values, mean_and_spread(values) + " trained on" * longer

    def head(self) -> tuple[str, str, str, str]:
        """What lines are told apart by."""
        run, config = self.one, self.one["config"]
        return (
            f"{run['model']}, {Path(run['data']).stem}",
            f"{run['images']['train']} photographs, labels: {labels(run)}",
            "W{}A{}".format(*(config[f"{of}_bits"] or config["bits"] for of in ("weight", "act"))),
            self.floats()[1],
        )

    def kept(self) -> str:
        """Its share of float, after how many steps, and by what a plan's widths were chosen."""
        by = f", {chosen_by(self.cell)}" if self.cell in coco.PLANS else ""
        return f"{share(self.runs, statistics.mean(self.floats()[0]), self.figure)} {self.one['steps']} steps{by}"

    def gain(self, first: State, second: State) -> str:
        """The difference of two states of the set's models."""
        columns = difference(self.content, first, second, self.figure)
        return sure(columns) if columns else ""


def chosen_by(plan: str) -> str:
    """What a plan's widths are chosen by: its budget, or its target alone."""
    options = coco.PLANS[plan][1]
    return options.get("budget", f"target={options.get('target')}")


def found_in(records: dict[str, dict]) -> list[Found]:
    """All cells that the first table may show."""
    cells = [cell for width, plans in PLANS.items() for cell in (width, *plans)]
    made = [(content, cell, "ap") for name, content in records["coco"].items() if name not in TRIALS for cell in cells]
    for content in records["presets"].values():
        made += [(content, f"{p}-{bits}bit", "map50_95") for p in ("best", "per-channel") for bits in (4, 3)]
    return [Found(*of, runs) for of in made if (runs := results(of[0]["cells"], of[1]))]


def table_kept(records: dict[str, dict]) -> list[str]:
    """The first table: a line for each model, data, labels and width."""
    head = "model, data; trained with; bits; float; one width; a width for each layer; its gain; QC adds".split("; ")
    lines: dict[tuple, list[Found]] = {}
    for found in found_in(records):
        lines.setdefault(found.head(), []).append(found)
    plans = [plan for plans in PLANS.values() for plan in plans]  # of a line, the default first
    rows = []
    for told, of_line in sorted(lines.items(), key=place):
        one = max((f for f in of_line if f.cell not in plans), key=lambda f: f.size, default=None)
        planned = [f for f in of_line if f.cell in plans]
        each = max(planned, key=lambda f: (-plans.index(f.cell), f.size), default=None)
        last = each or one
        gain = each.gain((each.cell, "qat"), (told[2], "qat")) if each else ""
        added = last.gain((last.cell, "qc"), (last.cell, "qat"))
        columns = [*told, *(found.kept() if found else "" for found in (one, each)), gain, added]
        rows.append(f"| {' | '.join(columns)} |")
    return [*table_head(head), *rows]


def place(line: tuple[tuple, list[Found]]) -> tuple:
    """Of a line among others: by data, labels, generation of the model and widths."""
    (model, trained, bits, _), _ = line
    name, _, data = model.partition(", ")
    return DATA.index(data), trained, name.replace("yolov", "yolo0"), list(PLANS).index(bits)


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
    """The second table: a line for each claim, a column for each set that has several seeds of some."""
    sets = [("map50_95", *of) for of in records["paper"].items()] + [("ap", *of) for of in records["coco"].items()]
    columns: dict[str, dict[str, str]] = {}
    for figure, name, content in sets:
        for claim, (pair, _) in claims().items():
            by_seed, *others = difference(content, *pair, figure) or [""]
            if "," in by_seed:  # several seeds
                columns.setdefault(name, {})[claim] = f"{sure([by_seed, *others])}: {others[-1]}"
    rows = [
        f"| {claim} | {first - second:+.1f} | {' | '.join(of.get(claim, '') for of in columns.values())} |"
        for claim, (_, (first, second)) in claims().items()
    ]
    return [*table_head(["claim", "paper, YOLOv5n", *columns]), *rows]


def sure(columns: list[str]) -> str:
    """The mean of what `difference` gives, and how sure it is; seeds in words where the interval is not of all."""
    _, mean, error, *interval, _ = columns
    if interval and interval[0] != "-":
        return f"{mean} ({interval[0].replace(' (', '; seeds ').rstrip(')')})"
    return mean if error == "-" else f"{mean} ± {error}"


def table_of_targets(measured: dict[str, dict]) -> list[str]:
    """The third table: a row for each target, model, and file of ours in a runtime for it."""
    rows = []
    for target, shown in FILES.items():
        for found in (of for name, of in measured.items() if name.endswith(f", target={target}")):
            files = {(row["runtime"], row["file"]): row for row in found["rows"]}
            for runtime, kind, is_timed in shown:
                told = [words(files.get((runtime, name), {}), is_timed) for name in (FP32, STOCK, f"ours {kind}")]
                checkpoint = f"{100 * files['PyTorch', 'checkpoint']['figure']:.2f}"
                model = found["model"].removesuffix(f", target={target}")
                where = f"{runtime}, {found['cpu']}" if is_timed else runtime
                rows.append(f"| {' | '.join([target, model, where, checkpoint, *told[:2], f'{kind}: {told[2]}'])} |")
    return [*table_head(["target", "model", "measured in", "checkpoint", FP32, STOCK, "ours"]), *rows]


def words(row: dict, is_timed: bool) -> str:
    """Size, accuracy and time of a file."""
    if "figure" not in row:
        return "-"
    time = [f"{row['median']:.1f} ms", f"{row['ratio']:.2f}x"] if is_timed and row.get("ratio") else []
    return ", ".join([f"{row['mb']:.2f} MB", f"{100 * row['figure']:.2f}", *time])


def summary(folder: Path) -> str:
    """The page, from a folder of records."""
    records = {name: read(folder / f"{name}.json") for name in ("coco", "presets", "paper")}
    measured = read(folder / "targets.json")
    where = "; ".join(dict.fromkeys(f"{of['data']} at {of['imgsz'][0]} px" for of in measured.values()))
    parts = [
        [HEAD], table_kept(records), [CLAIMS], table_of_claims(records),
        [WHERE.format(where=where)], table_of_targets(measured),
    ]  # fmt: skip
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def main() -> None:
    """Write the page."""
    page = DOCS / "results.md"
    page.write_text(summary(DOCS / "results"), encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
