# yolo_qc_plugin, AGPL-3.0
"""Make the page of the ablation that decided against `act_equalize`, an option of 0.1.0, from its JSON file.

    python examples/experiments/equalization.py --assemble

The cells were made with commit 88f742d, the last that has the option; none can be added.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from cells import conditions
from record import page, read, results

HEAD = [
    "# act_equalize: tried and deleted",
    "",
    "Written by `examples/experiments/equalization.py` from `equalization.json`. The option multiplied the channels of "
    "activations below 8 bits by powers of two that brought them to one size, before training; the weights behind took "
    "that up. This page says what it gained alone: mAP50-95 in points, against the same run without it.",
]
STAGES = {"qat": "before QC", "qc": "after it"}


def table(name: str, content: dict) -> list[str]:
    """The Markdown table of one data set, with the mean gains."""
    files = list(content["cells"].values())
    one, start = files[0], 100 * files[0]["metrics"]["float"]["map50_95"]
    lines = [
        f"## {name}",
        "",
        f"{one['model']} from {one['weights']} on {one['data']}, {one['images']['train']} training and "
        f"{one['images']['val']} validation images, {one['steps']} optimizer steps a run; the float start has "
        f"{start:.1f}. {' '.join(conditions(files))} Quantized rows have `scale_lr={one['options']['scale_lr']}`.",
        "",
        "| bits | weight scales per | seed | plain | equalized | gain | plain, QC | equalized, QC | gain |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    gains: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for bits, scales in ((b, s) for b in (4, 3) for s in ("tensor", "channel")):
        plain, equalized = (results(content["cells"], f"{bits}bit-{scales}-{kind}") for kind in ("plain", "equalized"))
        for seed in plain:
            row = []
            for stage, found in gains.items():
                a, b = (100 * runs[seed]["metrics"][stage]["map50_95"] for runs in (plain, equalized))
                found.append(b - a)
                row += [f"{a:.1f}", f"{b:.1f}", f"{b - a:+.1f}"]
            lines.append(f"| {bits} | {scales} | {seed} | {' | '.join(row)} |")
    means = (
        f"{statistics.mean(v):+.2f} ± {statistics.stdev(v) / len(v) ** 0.5:.2f} {STAGES[stage]}"
        for stage, v in gains.items()
    )
    every = [g for v in gains.values() for g in v]
    said = f"Mean gain over {len(gains['qat'])} pairs and its standard error: {' and '.join(means)}. "
    return [*lines, "", f"{said}All lie between {max(every):.1f} and {min(every):.1f}."]


def main() -> None:
    """Parse the command line and write the page."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("docs/results"))
    p.add_argument("--assemble", action="store_true", required=True, help="make the page from the JSON file")
    file = p.parse_args().out / "equalization.json"
    file.with_suffix(".md").write_text(page(HEAD, read(file), table), encoding="utf-8")


if __name__ == "__main__":
    main()
