# yolo_qc_plugin, AGPL-3.0
"""How pictures look, and how they are written: as files, never over one of the user's, and into a page."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
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
    "svg.fonttype": "none",
}
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # told apart by the colour-blind too


def empty_figure(width: float, height: float):
    """An empty figure of a size in inches, made without pyplot, which has a global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def along_layers(ax, layers: Sequence[str]) -> None:
    """Name the layers below an axis whose places are their numbers."""
    ax.set_xticks(range(len(layers)), layers, rotation=90, fontsize=5)
    ax.set_xlim(-1, len(layers))


def width_along(layers: Sequence[str]) -> float:
    """Width of a figure with a place for each layer, in inches."""
    return max(7.0, 1 + 0.09 * len(layers))


def refuse_to_overwrite(files: Sequence[Path], mark: str = MARK, by: str = MARK) -> None:
    """Raise a QCError that names a file that is there without the mark that a command leaves in its own."""
    for file in files:
        if file.is_file() and mark.encode() not in file.read_bytes():
            raise QCError(f"QC: {file} was not made by {by} and would be overwritten; give another out=.")


def save(figures: Mapping[str, Any], out: Path, formats: Sequence[str] = FORMATS, dpi: int = 300) -> list[Path]:
    """Write figures, by their names, into a folder that is there, or none where a file of the user's has such a name.

    Returns:
        The files.

    Raises:
        QCError: Naming the file of the user's.
    """
    files = {out / f"{name}.{kind}": figure for name, figure in figures.items() for kind in formats}
    refuse_to_overwrite(list(files))
    for figure in figures.values():
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # the layout is made once, and not for each format
    for file, figure in files.items():
        kind = file.suffix.removeprefix(".")
        with replacing(file) as temporary:
            figure.savefig(temporary, format=kind, dpi=dpi, metadata={"Software" if kind == "png" else "Creator": MARK})
    return list(files)


def to_svg(figure, title: str) -> str:
    """A saved figure as an element of a page, in the page's text colour and with the page's variables --c0, --c1, ...

    Args:
        figure: Its layout is made.
        title: Read out in its place.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", dpi=150, transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"^.*?(?=<svg)|<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"| version="1.1"', "", text).replace("xlink:href", "href")
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # each figure has its axes_1; what is referred to has other ids
    text = re.sub(r'<svg width="[^"]*" height="[^"]*"', f'<svg role="img" aria-label="{title}"', text, count=1)
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"-?\d+\.\d{2,}", _shortened, path[0]), text)
    text = text.replace("stroke: #000000", "stroke: currentColor").replace("'DejaVu Sans'", "system-ui")
    for number, color in enumerate(COLORS):
        text = text.replace(color.lower(), f"var(--c{number})")
    return text.strip()


def _shortened(number: re.Match) -> str:
    """A coordinate to a tenth of a point."""
    return f"{float(number[0]):.1f}"
