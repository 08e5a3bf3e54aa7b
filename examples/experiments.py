# yolo_qc_plugin, AGPL-3.0
"""Measure defaults: one of them changed at a time, every cell one stock training run, written to one JSON file.

    python examples/experiments.py defaults --data bccd.yaml --weights float.pt --seeds 0 --epochs 8

Each run gives two rows, before and after QC. See cells.py for what is run again and what is not; the Markdown page is
made from the JSON files alone, by `--assemble` without training.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cells import Cell, conditions, mean_and_spread, parser, results, run

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


def page(folder: Path) -> str:
    """The Markdown table."""
    found = {name: list(results(folder, name).values()) for name in DEFAULTS}
    files = [f for runs in found.values() for f in runs]
    if not files:
        return ""
    lines = [
        f"# Defaults: {files[0]['weights']} on {files[0]['data']}",
        "",
        "Written by `examples/experiments.py defaults` from the JSON files in `defaults/`.",
        *conditions(files),
        "mAP in points on the validation set, mean ± standard deviation over seeds.",
        "",
        "| row | seeds | mAP50-95 | mAP50 |",
        "|---|---|---|---|",
    ]
    for name, runs in found.items():
        for row, label in (("qat", name), ("qc", f"{name} + QC")):
            metrics = [r["metrics"][row] for r in runs if r["metrics"][row]]
            if metrics:
                cols = (mean_and_spread([100 * m[key] for m in metrics]) for key in ("map50_95", "map50"))
                lines.append(f"| {label} | {len(metrics)} | {' | '.join(cols)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line and run."""
    args = parser(__doc__, ("defaults",)).parse_args()
    folder = args.out / args.kind
    cells = [Cell(name, {**BASE, **options}) for name, options in DEFAULTS.items()]
    done = args.assemble or run(cells, folder, args)
    text = page(folder)
    (args.out / f"{args.kind}.md").write_text(text, encoding="utf-8")
    print(text)
    sys.exit(not done)


if __name__ == "__main__":
    main()
