# yolo_qc_plugin, AGPL-3.0
"""Pictures of finished runs on a page (`yolo-qc plot`), of one run or of several side by side.

    weight_scales   the paper's Figure 1: scales of the 2nd to 5th convolution's weights, without and with EMA
    act_scales      Figure 2: the same of the inputs of the first four after the 1st that have a quantizer of their own
    oscillation     share of oscillating weights at the end and share of codes that flip in a step, per layer
    report          accuracy of the float start, after QAT and after QC
    latent          Figure 2a: where latent weights lie between grid points; of each run, as all that follow
    codes           how often a layer uses each code
    sizes, clipped  weights of each layer in the file, and shares of values outside of the grid
    sensitivity     what each layer costs alone, where widths were chosen by a budget

Left, without EMA: the first run that was trained without (ema_decay=0), else the first run's scales in training. Right:
the averaged scales of the first run with EMA. Both over the last 4,000 steps; smoothness.json says how smooth they are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..config import QCError
from ..files import replacing
from ..report.page import PAGE, write_page
from ..report.pictures import FORMATS, MARK, refuse_to_overwrite
from ..report.plots import sides
from ..report.runs import load_runs
from ..report.smoothness import compare, format_smoothness
from ..report.traces import WINDOW

RECORD = "smoothness.json"
COMPARISON = "compare.html"


def plot(runs: Sequence[str | Path], out: str | Path | None = None, steps: int = WINDOW) -> tuple[str, list[Path]]:
    """Draw all pictures of one or several runs, and a page of them: report.html, or compare.html of several.

    Args:
        runs: Folders of runs.
        out: Folder to write to; by default qc/ in the first run's, with pictures in qc/plots.
        steps: How many of the last steps to draw and to count, 1 to 4,000.

    Returns:
        How smooth the scales are, as a table, and the files written.

    Raises:
        QCError: If a run has left nothing, `steps` is out of range, or a file that is not ours would be overwritten.
    """
    if not 1 <= steps <= WINDOW:
        raise QCError(f"QC: steps={steps} is not accepted; give 1 to {WINDOW}, the steps kept at full rate.")
    loaded = load_runs(runs, steps)
    folder = loaded[0].folder / "qc"
    pictures = Path(out or folder / "plots")
    page = Path(out or folder) / (PAGE if len(loaded) == 1 else COMPARISON)
    refuse_to_overwrite([pictures / RECORD])
    files = write_page(loaded, pictures, page, FORMATS, dpi=300)
    before, after = sides(loaded)
    if before is None or after is None:
        return "no run with EMA: there is nothing to compare", files
    record = {"by": MARK, **compare(before, after)}
    with replacing(pictures / RECORD) as temporary:
        temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return format_smoothness(record), [*files, pictures / RECORD]


def format_plot(drawn: tuple[str, list[Path]]) -> str:
    """What `plot` returns, as plain text."""
    table, files = drawn
    return "\n".join([table, *(f"written to {file}" for file in files)])
