# yolo_qc_plugin, AGPL-3.0
"""The picture of what each layer costs alone at each width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .pictures import along_layers, empty_figure, width_along
from .runs import Run

FILE = "sensitivity.json"  # in a run's qc/, where its widths were chosen by a budget


def draw_sensitivity(run: Run):
    """The picture of a run's own sensitivity.json."""
    found = run.json(FILE) if run.report.get("budget") else None  # else the file is of an earlier run there
    return draw_costs(list(found["about"]["layers"]), found["costs"]) if found else None


def draw_costs(layers: Sequence[str], costs: Mapping[str, Mapping]):
    """Layers along the network, a line for each width, weights above and activations below.

    Args:
        layers: Names, in model order.
        costs: As sensitivity.json has them: kind -> name -> width as text -> cost.
    """
    from matplotlib import colormaps

    places = {name: i for i, name in enumerate(layers)}
    titles = {"weights": "weights of a layer", "activations": "the tensor that it reads"}
    figure = empty_figure(width_along(layers), 5.4)
    axes = figure.subplots(2, sharex=True, sharey=True)
    for ax, (kind, title) in zip(axes, titles.items()):
        widths = sorted({int(bits) for of in costs[kind].values() for bits in of})
        for k, bits in enumerate(widths):
            found = sorted((places[name], of[str(bits)]) for name, of in costs[kind].items() if str(bits) in of)
            color = colormaps["viridis"](0.3 + 0.55 * k / max(len(widths) - 1, 1))
            ax.plot(*zip(*found), ".-", color=color, markersize=3, linewidth=0.5, label=f"{bits} bits")
        ax.set_yscale("log")
        ax.set_title(title, loc="left")
        ax.grid(axis="both", linewidth=0.3, alpha=0.5)
    along_layers(axes[1], layers)
    figure.supylabel("loss of the outputs, this one alone quantized", fontsize=8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=8)
    return figure
