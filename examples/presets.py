# yolo_qc_plugin, AGPL-3.0
"""Measure the presets at 4, 3 and 2 bits against the float checkpoint trained on for as many epochs.

    python examples/presets.py measure --data bccd.yaml --weights float.pt --name bccd --seeds 0 1 2 --epochs 20

The figure of a run is that of its best.pt: with QC where that is the better on the validation set, as the plugin keeps
it, else without. See cells.py for what is run again and what is not; `--assemble` makes the page without training.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from cells import Cell, conditions, mean_and_spread, parser, results, run

from yolo_qc_plugin.config import PRESETS

BITS = 4, 3, 2
ASKED = {4: 99, 3: 96, 2: 85}  # percent of the float row that is to be reached
TEACHER = " The teacher of what is distilled is the best.pt of the float row's run of the same seed."
TAUGHT = {"dis": 0}  # the host's own comparison of features adds nothing to that of outputs (trials: wide-both)


def cells() -> list[Cell]:
    """The float row and every preset at every width, alone and distilled; a changed preset makes other cells."""
    made = [Cell("float", None)]
    for name, preset in reversed(PRESETS.items()):
        made += [Cell(f"{name}-{bits}bit", {**preset, "bits": bits}) for bits in BITS]
        if name != "paper":
            made += [
                Cell(f"{name}-distilled-{bits}bit", {**preset, "bits": bits}, teacher="float", recipe=TAUGHT)
                for bits in BITS
            ]
    return made


def page(folder: Path) -> str:
    """The Markdown table."""
    names = {f.stem.partition("-seed")[0] for f in folder.glob("*-seed*.json")}
    order = [c.name for c in cells()]
    found = {name: results(folder, name) for name in [n for n in order if n in names] + sorted(names - set(order))}
    files = [r for runs in found.values() for r in runs.values()]
    if not found.get("float"):
        return ""
    one, images = files[0], files[0]["images"]
    lines = [
        f"# Presets: {one['model']} on {one['data']}",
        "",
        f"Written by `examples/presets.py` from the JSON files in `cells/`: {one['weights']}, {images['train']} "
        f"training and {images['val']} validation images, {one['steps']} optimizer steps a run. "
        + " ".join(conditions(files)),
        "",
        "mAP50-95 in points on the validation set, mean ± standard deviation over seeds, of the last epoch. `best.pt` "
        "is the better of the two columns before it in each run, as the plugin keeps it. The share is of the mean of "
        "the float row over the same seeds. Bits are those of weights / activations, 8 at the edges."
        + (TEACHER if any("distilled" in name for name in found) else ""),
        "",
        "| preset | bits | seeds | without QC | with QC | best.pt | of float | asked | options |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    trained = {seed: 100 * r["metrics"]["trained"]["map50_95"] for seed, r in found["float"].items()}
    lines += [f"| float trained on | 32 / 32 | {len(trained)} | | | {mean_and_spread(trained.values())} | 100% | | |"]
    for cell, runs in found.items():
        if cell != "float":
            figures = [
                [100 * r["metrics"][kind or r["kept"]]["map50_95"] for r in runs.values()] for kind in ("qat", "qc", "")
            ]
            floats = [trained[seed] for seed in runs if seed in trained]
            same = len(floats) == len(runs)
            share = f"{100 * statistics.mean(figures[2]) / statistics.mean(floats):.1f}%" if same else ""
            name, _, bits = cell.removesuffix("bit").rpartition("-")
            asked = f"{ASKED[int(bits)]}%" if name != "paper" else ""
            one = next(iter(runs.values()))["options"]
            widths = f"{one.get('weight_bits', one['bits'])} / {one.get('act_bits', one['bits'])}"
            options = ", ".join(f"{k}={v}" for k, v in one.items() if k not in {"bits", "act_bits"})
            shown = " | ".join(mean_and_spread(values) for values in figures)
            lines.append(f"| {name} | {widths} | {len(runs)} | {shown} | {share} | {asked} | {options} |")
    return "\n".join(lines) + "\n"


def trials(folder: Path) -> str:
    """The Markdown table of all trials; of the host's arguments those in which the trials of a width differ."""
    found = {f: json.loads(f.read_text()) for f in sorted(folder.glob("trial-*/cells/*-seed*.json"))}
    lines = [
        "# Trials",
        "",
        "Written by `examples/presets.py trials` from the JSON files in `trial-*/cells/`. mAP50-95 in points on the "
        "validation set, of the last epoch.",
        "",
        "| trial | data | bits | steps | start | without QC | with QC | options | host |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for file, r in found.items():
        alike = [o["recipe"] for o in found.values() if o["options"]["bits"] == r["options"]["bits"]]
        host = {k: v for k, v in r["recipe"].items() if any(o.get(k) != v for o in alike) and k != "device"}
        options = {k: v for k, v in r["options"].items() if k != "bits"}
        shown = [", ".join(f"{k}={v}" for k, v in values.items()) for values in (options, host)]
        figures = [f"{100 * r['metrics'][kind]['map50_95']:.1f}" for kind in ("float", "qat", "qc")]
        cells = [file.parts[-3].removeprefix("trial-"), r["data"], r["options"]["bits"], r["steps"], *figures, *shown]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line and run."""
    p = parser(__doc__, ("measure", "trials"))
    p.add_argument("--name", help="folder of the results in --out")
    args = p.parse_args()
    if args.kind == "trials":
        text = trials(args.out / "presets")
        (args.out / "presets" / "trials.md").write_text(text, encoding="utf-8")
        return print(text)
    if not args.name:
        p.error("--name is needed to measure")
    folder = args.out / "presets" / args.name
    args.runs /= args.name
    done = args.assemble or run(cells(), folder / "cells", args)
    if text := page(folder / "cells"):
        folder.with_suffix(".md").write_text(text, encoding="utf-8")
        print(text)
    sys.exit(not done)


if __name__ == "__main__":
    main()
