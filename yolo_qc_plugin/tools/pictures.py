# yolo_qc_plugin, AGPL-3.0
"""How pictures look, and how they are written: in two formats, and never over a file of the user's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import QCError
from ..files import replacing

MARK = "yolo-qc plot"  # by which our pictures are known
FORMATS = ("png", "pdf")
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "lines.linewidth": 0.7,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # text stays text
}
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # told apart by the colour-blind too


def empty_figure(width: float, height: float):
    """An empty figure of a size in inches, made without pyplot, which has a global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figures: dict, out: Path, beside: Sequence[str] = ()) -> list[Path]:
    """Write all figures in all formats, or none where a file of the user's has the name of one of ours.

    Args:
        figures: Name -> figure.
        out: Folder.
        beside: Names of further files that are to be written there.

    Returns:
        The files.

    Raises:
        QCError: Naming the file of the user's.
    """
    files = {out / f"{name}.{kind}": figure for name, figure in figures.items() for kind in FORMATS}
    for file in [*files, *(out / name for name in beside)]:
        if file.is_file() and MARK.encode() not in file.read_bytes():
            raise QCError(f"QC: {file} was not drawn by {MARK} and would be overwritten; give another out=.")
    out.mkdir(parents=True, exist_ok=True)
    for figure in figures.values():
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # the layout is made once, and not for each format
    for file, figure in files.items():
        kind = file.suffix.removeprefix(".")
        with replacing(file) as temporary:
            figure.savefig(temporary, format=kind, dpi=300, metadata={"Software" if kind == "png" else "Creator": MARK})
    return list(files)
