# yolo_qc_plugin, AGPL-3.0
"""One self-contained page of one run, or of several side by side: nothing in it is loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from ..files import replacing
from . import sections
from .costs import draw_sensitivity
from .layers import draw_clipped, draw_codes, draw_latent, draw_sizes
from .pictures import MARK, STYLE, refuse_to_overwrite, save, to_svg
from .plots import draw_accuracy, draw_act_scales, draw_oscillation, draw_weight_scales
from .runs import Run
from .style import CSS

PAGE = "report.html"
Guard = Callable[[str], AbstractContextManager]  # given a name, decides what its failure does


@dataclass(frozen=True)
class Picture:
    """A picture of a page.

    Attributes:
        draw: Draws it, of one run or of all; gives None where there is nothing to draw.
        text: What it shows.
        look: How wide it is: "layers", "plain" or "small".
        together: Whether one picture shows all runs.
        told: Whether a table of the page has it already where there is one run.
    """

    draw: Callable
    text: str
    look: str = "layers"
    together: bool = False
    told: bool = False


PICTURES = {
    "report": Picture(draw_accuracy, "Accuracy of the float start, after QAT and after QC.", "small", True, True),
    "sizes": Picture(draw_sizes, "Weights of each layer in the file, by their width."),
    "weight_scales": Picture(
        draw_weight_scales,
        "Scales of the weights of the 2nd to 5th convolution: left as they are in training or in a run without EMA, "
        "right averaged (the paper's Figure 1).",
        "plain",
        True,
    ),
    "act_scales": Picture(
        draw_act_scales,
        "The same of the first four inputs that have a quantizer of their own (the paper's Figure 2).",
        "plain",
        True,
    ),
    "oscillation": Picture(
        draw_oscillation,
        "Above, the share of each layer's weights whose codes oscillate at the end of training; below, the share whose "
        "codes change in a step.",
        together=True,
    ),
    "latent": Picture(
        draw_latent,
        "Where the averaged latent weights lie, of the layers that oscillate most (the paper's Figure 2a): left on the "
        "grid, right between the rounding thresholds around a grid point.",
        "plain",
    ),
    "codes": Picture(draw_codes, "How often each layer uses each code.", "small"),
    "clipped": Picture(draw_clipped, "Share of values that lie outside of the grid."),
    "sensitivity": Picture(draw_sensitivity, "What each layer costs alone at each width, by the loss of the outputs."),
}
# title -> what is said of each run, and the pictures below it
SECTIONS: dict[str, tuple[Sequence[Callable[[Run], str]], Sequence[str]]] = {
    "Accuracy": ((sections.accuracy,), ("report",)),
    "Predictions": ((sections.predictions,), ()),
    "Size": ((), ("sizes",)),
    "Scales": ((), ("weight_scales", "act_scales")),
    "Oscillation": ((sections.rounding,), ("oscillation",)),
    "Latent weights": ((), ("latent",)),
    "Codes": ((), ("codes",)),
    "Clipping": ((), ("clipped",)),
    "Sensitivity and plan": ((sections.plan,), ("sensitivity",)),
    "Layers": ((sections.layers,), ()),
    "How it was made": ((sections.origin,), ()),
}


def write_page(
    runs: Sequence[Run],
    out: Path,
    page: Path,
    formats: Sequence[str] = ("png",),
    dpi: int = 130,
    guard: Guard = lambda name: nullcontext(),
) -> list[Path]:
    """Draw all pictures of one or several runs, and the page that shows them.

    Args:
        runs: The runs.
        out: Folder of the pictures; it is made.
        page: File of the page.
        formats: Of the pictures' files.
        dpi: Of those that are pixels.
        guard: Called with the name of each picture and section; what it makes of a failure holds for that one alone.

    Returns:
        The files.

    Raises:
        QCError: If a file of the user's has the name of one of these.
    """
    from matplotlib import rc_context

    wanted = _by_name(runs)
    refuse_to_overwrite([page, *(out / f"{key}.{kind}" for key in wanted for kind in formats)])
    out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {}
    files = []
    with rc_context(STYLE):
        for key, (picture, shown) in wanted.items():
            with guard(key):
                if figure := picture.draw(shown):
                    files += save({key: figure}, out, formats, dpi)
                    figures[key] = figure
        text = to_html(runs, figures, guard)
    with replacing(page) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return [*files, page]


def _by_name(runs: Sequence[Run]) -> dict[str, tuple[Picture, Any]]:
    """Every picture, and the run or the runs that it is of; with several, a picture of one has its number."""
    found: dict[str, tuple[Picture, Any]] = {}
    for name, picture in PICTURES.items():
        if picture.together or len(runs) == 1:
            found[name] = picture, list(runs) if picture.together else runs[0]
        else:
            found |= {f"{name}_{number}": (picture, run) for number, run in enumerate(runs, 1)}
    return found


def to_html(runs: Sequence[Run], figures: dict[str, Any], guard: Guard) -> str:
    """The page.

    Args:
        runs: The runs.
        figures: Saved figures by name; with several runs, those of one run have its number at the end.
        guard: As of `write_page`.
    """
    title = " and ".join(run.name for run in runs)
    blocks = {name: _section(name, runs, figures, guard) for name in SECTIONS}
    if len(runs) > 1:
        with guard("options"):
            blocks = {"Options": sections.differences(runs), **blocks}
    links = "".join(f'<a href="#{_anchor(name)}">{name}</a>' for name, block in blocks.items() if block)
    body = "".join(
        f'<section id="{_anchor(name)}"><h2>{name}</h2>{block}</section>' for name, block in blocks.items() if block
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="generator" content="{MARK}"><title>{escape(title)}</title><style>{CSS}</style></head><body>'
        f"<header><h1>{escape(title)}</h1>{_head(runs, guard)}<nav>{links}</nav></header><main>{body}</main>"
        "<footer>Drawn by yolo-qc-plugin. EMA and QC: Gupta and Asthana, WACV 2024, arXiv 2311.05109.</footer>"
        "</body></html>\n"
    )


def _head(runs: Sequence[Run], guard: Guard) -> str:
    """What a run was, and its main figures."""
    if len(runs) > 1:
        return f'<p class="soft">{len(runs)} runs</p>'
    text = ""
    with guard("head"):
        text = sections.about(runs[0]) + sections.tiles(runs[0])
    return text


def _section(name: str, runs: Sequence[Run], figures: dict[str, Any], guard: Guard) -> str:
    """Words and pictures, by run where there are several."""
    words, names = SECTIONS[name]
    pictures = [key for key in names if len(runs) > 1 or not PICTURES[key].told]
    together = [key for key in pictures if PICTURES[key].together]
    text = ""
    for number, run in enumerate(runs, 1):
        of_run = ""
        with guard(name):
            of_run = "".join(say(run) for say in words)
        own = {key if len(runs) == 1 else f"{key}_{number}": PICTURES[key] for key in pictures if key not in together}
        of_run += "".join(_figure(key, picture, figures, guard) for key, picture in own.items())
        text += f"<h3>{escape(run.name)}</h3>{of_run}" if of_run and len(runs) > 1 else of_run
    return text + "".join(_figure(key, PICTURES[key], figures, guard) for key in together)


def _figure(key: str, picture: Picture, figures: dict[str, Any], guard: Guard) -> str:
    text = ""
    with guard(key):
        if key in figures:
            drawn = to_svg(figures[key], escape(picture.text))
            text = (
                f'<figure><div class="wide {picture.look}">{drawn}</div>'
                f"<figcaption>{escape(picture.text)}</figcaption></figure>"
            )
    return text


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")
