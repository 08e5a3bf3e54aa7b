# yolo_qc_plugin, AGPL-3.0
"""Measure defaults: one of them changed at a time, every cell one stock training run.

    python examples/experiments/defaults.py --data bccd.yaml --weights float.pt --seeds 0 --epochs 8

Each run gives two rows, before and after QC. See cells.py for what is run again and what is not. OUT/defaults.json
holds all cells, OUT/defaults.md is made from it alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cells import Cell, conditions, mean_and_spread, measure, parser
from record import page, results

HEAD = [
    "# Defaults",
    "",
    "Written by `examples/experiments/defaults.py` from `defaults.json`. mAP in points on the validation set, mean ± "
    "standard deviation over seeds.",
]

# one default changed at a time, at 3 bits, where choices matter more than noise; the base is what the defaults were
# before the page was made, and outputs stay float, so that the page shows training alone
BASE = {"bits": 3, "scale_init": "mse", "output_bits": None}
DEFAULTS = {
    "base": {},
    "act_offset=False": {"act_offset": False},
    "per_channel=True": {"per_channel": True},
    "scale_init=lsq": {"scale_init": "lsq"},
    "scale_lr=0.1": {"scale_lr": 0.1},
    "scale_lr=10": {"scale_lr": 10.0},
    "ema_decay=0": {"ema_decay": 0.0},
    "ema_decay=0.9": {"ema_decay": 0.9},
    "correction_lr=0.003": {"correction_lr": 0.003},
    "correction_lr=0.01": {"correction_lr": 0.01},
    "4bit scale_init=lsq": {"bits": 4, "scale_init": "lsq", "output_bits": 8},  # beside EMA-4bit of the other table
}


def table(name: str, content: dict) -> list[str]:
    """The Markdown table of one set."""
    found = {cell: list(results(content["cells"], cell).values()) for cell in DEFAULTS}
    files = [f for runs in found.values() for f in runs]
    if not files:
        return []
    lines = [
        f"## {name}",
        "",
        f"{files[0]['weights']} on {files[0]['data']}. " + " ".join(conditions(files)),
        "",
        "| row | seeds | mAP50-95 | mAP50 |",
        "|---|---|---|---|",
    ]
    for cell, runs in found.items():
        for row, label in (("qat", cell), ("qc", f"{cell} + QC")):
            metrics = [r["metrics"][row] for r in runs if r["metrics"][row]]
            if metrics:
                cols = (mean_and_spread([100 * m[key] for m in metrics]) for key in ("map50_95", "map50"))
                lines.append(f"| {label} | {len(metrics)} | {' | '.join(cols)} |")
    return lines


def main() -> None:
    """Parse the command line and run."""
    p = parser(__doc__)
    p.set_defaults(runs=Path("runs/defaults"))
    args = p.parse_args()
    file = args.out / "defaults.json"
    record, done = measure([Cell(name, {**BASE, **options}) for name, options in DEFAULTS.items()], file, args)
    file.with_suffix(".md").write_text(page(HEAD, record, table), encoding="utf-8")
    sys.exit(not done)


if __name__ == "__main__":
    main()
