# yolo_qc_plugin, AGPL-3.0
"""Pictures of one run's layers: size, clipped shares, codes, and where latent weights lie between grid points."""

from __future__ import annotations

import numpy as np
import torch

from ..quant.functional import grid_position, per_slice
from ..quant.layers import QuantConv2d, quant_convs
from .pictures import COLORS, along_layers, empty_figure, width_along
from .runs import Run

SHOWN = 4  # layers whose latent weights are shown
BINS = 20  # of a histogram, in a step of the grid
CODES = (0.16, 0.55, 0.90)  # red, green, blue of a code that all weights have
WIDEST = 5  # bits up to which the whole range of a layer can be seen


def draw_sizes(run: Run):
    """Size of each layer's weights in the file, by their width."""
    layers = run.report.get("layers", [])
    if not layers or "weights" not in layers[0]:  # records of earlier versions do not have it
        return None
    names = [layer["name"] for layer in layers]
    figure = empty_figure(width_along(names), 2.8)
    ax = figure.subplots()
    for k, bits in enumerate(sorted({layer["weight_bits"] for layer in layers})):
        found = [(i, x["weights"] * bits / 8e3) for i, x in enumerate(layers) if x["weight_bits"] == bits]
        places, sizes = zip(*found)
        ax.bar(places, sizes, 0.8, color=COLORS[k % len(COLORS)], label=f"{bits} bits: {sum(sizes):,.0f} kB")
    ax.set_ylabel("weights (kB)")
    figure.legend(loc="outside upper center", ncols=7)
    along_layers(ax, names)
    return figure


def draw_clipped(run: Run):
    """Share of values outside of the grid, of each layer's weights and of what it reads."""
    layers = run.report.get("layers", [])
    if not layers:
        return None
    names = [layer["name"] for layer in layers]
    figure = empty_figure(width_along(names), 4.2)
    axes = figure.subplots(2, sharex=True)
    for ax, key, title, color in zip(axes, ("weight_clipped", "act_clipped"), ("weights", "inputs"), COLORS):
        ax.bar(range(len(names)), [100 * layer[key] for layer in layers], 0.8, color=color)
        ax.set_ylabel(f"clipped {title} (%)")
    along_layers(axes[1], names)
    return figure


def draw_codes(run: Run):
    """How often each layer uses each code."""
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    widths: dict[int, list] = {}
    for name, conv in quant_convs(run.model) if run.model else ():
        codes = conv.weight_codes().flatten().int() - conv.weight_quant.quant_min
        share = np.bincount(codes.numpy(), minlength=2**conv.weight_quant.bits) / codes.numel()
        widths.setdefault(conv.weight_quant.bits, []).append((name, 100 * share))
    if not widths:
        return None
    widths = dict(sorted(widths.items()))
    heights = [0.085 * (len(rows) + 1) for rows in widths.values()]
    figure = empty_figure(4.8, sum(heights) + 0.6 * len(heights))
    axes = figure.subplots(len(heights), height_ratios=heights, squeeze=False)[:, 0]
    for ax, (bits, rows) in zip(axes, widths.items()):
        half = 2 ** (bits - 1)
        image = ax.imshow(
            [share for _, share in rows],
            norm=PowerNorm(0.4, vmin=0, vmax=100),
            cmap=LinearSegmentedColormap.from_list("codes", [(*CODES, 0.0), (*CODES, 1.0)]),  # on any background
            aspect="auto",
            interpolation="nearest",
            extent=(-half - 0.5, half - 0.5, len(rows) - 0.5, -0.5),
        )
        ax.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=5)
        ax.set_title(f"{bits}-bit weights", loc="left")
    axes[-1].set_xlabel("code")
    label = "share of the layer's weights (%)"
    figure.colorbar(image, ax=axes, label=label, ticks=[0, 1, 5, 10, 20, 50, 100], shrink=0.6, aspect=40)
    return figure


def draw_latent(run: Run):
    """Where latent weights lie between grid points (the paper's Figure 2a), of the layers that oscillate most.

    Left over the layer's grid, whose points are the ticks; right all of its steps on one another, from one rounding
    threshold to the next with the grid point in the middle. Clipped weights are left out.
    """
    convs = dict(quant_convs(run.model)) if run.model else {}
    layers = [name for name in _by_oscillation(run) if name in convs] or list(convs)
    layers = [name for name in layers if convs[name].weight_quant.bits <= WIDEST][:SHOWN] or layers[:SHOWN]
    if not layers:
        return None
    figure = empty_figure(7.6, 0.5 + 1.15 * len(layers))
    axes = figure.subplots(len(layers), 2, width_ratios=(2, 1), squeeze=False)
    for (whole, step), name in zip(axes, layers):
        quant, place = convs[name].weight_quant, positions(convs[name])
        codes = range(quant.quant_min, quant.quant_max + 1)
        edges = np.linspace(codes[0] - 0.5, codes[-1] + 0.5, BINS * len(codes) + 1)
        whole.stairs(np.histogram(place, edges)[0], edges, fill=True, color=COLORS[0])
        whole.set_xticks(codes[:: max(len(codes) // 16, 1)])
        whole.set_xlim(edges[0], edges[-1])
        whole.set_title(f"{name}, {quant.bits} bits", loc="left")
        share, edges = np.histogram(place - place.round(), np.linspace(-0.5, 0.5, BINS + 1))
        step.stairs(100 * share / max(len(place), 1), edges, fill=True, color=COLORS[0])
        step.axhline(100 / BINS, color=COLORS[1], linestyle="--")
        step.set_xticks([-0.5, 0, 0.5], ["threshold", "grid point", "threshold"])
        step.set_xlim(-0.5, 0.5)
        step.set_ylabel("weights (%)")
    axes[-1, 0].set_xlabel("code")
    axes[0, 1].set_title("dashed: if spread evenly", loc="right")
    return figure


def positions(conv: QuantConv2d) -> np.ndarray:
    """Latent weights in steps of the grid, shape (n,); those that clip are left out."""
    quant = conv.weight_quant
    with torch.no_grad():
        place = grid_position(conv.weight, per_slice(quant.scale, conv.weight), None).flatten()
    return place[(place >= quant.quant_min - 0.5) & (place <= quant.quant_max + 0.5)].numpy()


def _by_oscillation(run: Run) -> list[str]:
    """The traced layers, those first whose weights oscillate most at the end."""
    shares = run.traces("oscillating")[-1] if run.layers else []
    return [name for _, name in sorted(zip(shares, run.layers), key=lambda pair: -pair[0])]
