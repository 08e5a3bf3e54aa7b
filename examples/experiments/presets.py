# yolo_qc_plugin, AGPL-3.0
"""Measure the presets at 4, 3 and 2 bits against the float checkpoint trained on for as many epochs.

    python examples/experiments/presets.py --data bccd.yaml --weights float.pt --seeds 0 1 2 --epochs 20

The figure of a run is that of its best.pt: with QC where that is the better on the validation set, as the plugin keeps
it, else without. See cells.py for what is run again and what is not. OUT/presets.json holds all cells, OUT/presets.md
is made from it alone.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from cells import Cell, conditions, mean_and_spread, measure, parser
from record import page, results

from yolo_qc_plugin.config import PRESETS
from yolo_qc_plugin.targets import TARGETS

HEAD = [
    "# Presets",
    "",
    "Written by `examples/experiments/presets.py` from `presets.json`. mAP50-95 in points on the validation set, mean"
    " ± standard deviation over seeds, of the last epoch. `best.pt` is the better of the two columns before it in "
    "each run, as the plugin keeps it. The share is of the mean of the float row over the same seeds. Bits are those "
    "of weights / activations, 8 at the edges. The teacher of what is distilled is the best.pt of the float row's run"
    " of the same seed.",
]

SETTINGS = {**PRESETS, "best": TARGETS["cpu"].fills}  # by the names that the record has
BITS = 4, 3, 2
ASKED = {4: 99, 3: 96, 2: 85}  # percent of the float row that is to be reached
TAUGHT = {"dis": 0}  # Ultralytics' comparison of features adds nothing to that of outputs (presets.md)


def cells() -> list[Cell]:
    """The float row and every setting at every width, alone and distilled; a changed one makes other cells."""
    made = [Cell("float", None)]
    for name, preset in reversed(SETTINGS.items()):
        made += [Cell(f"{name}-{bits}bit", {**preset, "bits": bits}) for bits in BITS]
        if name != "paper":
            made += [
                Cell(f"{name}-distilled-{bits}bit", {**preset, "bits": bits}, teacher="float", recipe=TAUGHT)
                for bits in BITS
            ]
    return made


def table(name: str, content: dict) -> list[str]:
    """The Markdown table of one set."""
    names = {key.rpartition("-seed")[0] for key in content["cells"]} - {"float"}
    by_preset = sorted(sorted(names, reverse=True), key=lambda name: name.rpartition("-")[0])  # wide ones first
    found = {cell: results(content["cells"], cell) for cell in ("float", *by_preset)}
    files = [r for runs in found.values() for r in runs.values()]
    if not found["float"]:
        return []
    one, images = files[0], files[0]["images"]
    lines = [
        f"## {name}",
        "",
        f"{one['model']} from {one['weights']} on {one['data']}, {images['train']} training and {images['val']} "
        f"validation images, {one['steps']} optimizer steps a run. " + " ".join(conditions(files)),
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
            same = len(floats) == len(runs) and any(floats)
            share = f"{100 * statistics.mean(figures[2]) / statistics.mean(floats):.1f}%" if same else ""
            preset, _, bits = cell.removesuffix("bit").rpartition("-")
            asked = f"{ASKED[int(bits)]}%" if preset != "paper" else ""
            one = next(iter(runs.values()))["options"]
            widths = f"{one.get('weight_bits', one['bits'])} / {one.get('act_bits', one['bits'])}"
            options = ", ".join(f"{k}={v}" for k, v in one.items() if k not in {"bits", "act_bits"})
            columns = " | ".join(mean_and_spread(values) for values in figures)
            lines.append(f"| {preset} | {widths} | {len(runs)} | {columns} | {share} | {asked} | {options} |")
    return lines


def main() -> None:
    """Parse the command line and run."""
    p = parser(__doc__)
    p.set_defaults(runs=Path("runs/presets"))
    args = p.parse_args()
    file = args.out / "presets.json"
    record, done = measure(cells(), file, args)
    file.with_suffix(".md").write_text(page(HEAD, record, table), encoding="utf-8")
    sys.exit(not done)


if __name__ == "__main__":
    main()
