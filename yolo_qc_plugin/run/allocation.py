# yolo_qc_plugin, AGPL-3.0
"""Widths for every layer within a budget, as an integer program.

With x[l, w, a] = 1 where layer l has weights of w and an input of a bits, the cost

    sum x[l, w, a] * (DROP * cost of l's weights at w + DROP * cost of l's input at a)

is least, subject to the budget, to one pair of widths for each layer, and to equal widths a of all layers that read one
tensor; its cost counts once. exp(-cost) is the predicted share of the float model's mAP that is kept, and what it lacks
to 1 the predicted drop. A budget of the drop itself makes the file least instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import exp, inf, log1p

import numpy as np

from ..config import QCError

Widths = tuple[int, int]  # of weights and of the input
Plan = dict[str, Widths]  # by the name of the layer
# How much of mAP each unit of cost takes after training, which mends weights better: by least squares from the runs of
# YOLOv5n in docs/results/coco.md (40 epochs, four widths for all and seven plans). What it foretells of other models is
# beside what came in the tables of budgets there.
DROP = {"weights": 0.027, "activations": 0.20}
BITS_OF_INPUTS = "%bops", "%ops"  # units that count them
PERCENT_OF_USUAL = "%size", "%ops"
GAP = 1e-4  # a solution may be above the least by this share
TINY = 1e-12  # of costs that are all 0, as of an untrained classifier


@dataclass(frozen=True)
class Layer:
    """A quantized convolution and the widths that it may have.

    Args:
        weights: Their number.
        macs: Multiplications for an image.
        reads: Name of the tensor that it reads; that of the image is empty.
        weight_bits: Widths to choose from.
        act_bits: The same of its input.
    """

    weights: int
    macs: int
    reads: str
    weight_bits: tuple[int, ...]
    act_bits: tuple[int, ...]


@dataclass(frozen=True)
class Problem:
    """What is to be decided.

    Args:
        layers: By name.
        costs: "weights" and "activations" -> name of the layer or tensor -> width as text -> cost.
        other_bits: Of the file, beside the weights.
        usual: The plan that the options give without a budget.
    """

    layers: Mapping[str, Layer]
    costs: Mapping[str, Mapping[str, Mapping[str, float]]]
    other_bits: float
    usual: Plan

    def amount(self, unit: str, plan: Plan) -> float:
        """How much a plan takes of what a budget limits."""
        return self._finish(unit, sum(self._shares(unit)(name, *widths) for name, widths in plan.items()))

    def reach(self, unit: str) -> tuple[float, float]:
        """The least and the largest amount that the widths to choose from allow."""
        of_layers = [[self._shares(unit)(*choice) for choice in self._choices(name)] for name in self.layers]
        return self._finish(unit, sum(map(min, of_layers))), self._finish(unit, sum(map(max, of_layers)))

    def solve(self, unit: str, limit: float) -> Plan:
        """The plan of least cost within a budget; of a budget of cost, that of the smallest file.

        Args:
            unit: One of BUDGET_UNITS.
            limit: Within `reach(unit)`.

        Raises:
            QCError: If there is none.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        choices = [choice for name in self.layers for choice in self._choices(name)]
        limited = np.array([self._shares(unit)(*choice) for choice in choices])
        wanted = np.array([self._shares("MB" if unit == "%drop" else "%drop")(*choice) for choice in choices])
        largest = max(limited.max(), TINY)
        rows, equal_to = self._equations(choices)
        found = milp(
            wanted / max(wanted.max(), TINY),
            integrality=np.ones(len(choices)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(csr_array(rows), equal_to, equal_to),
                LinearConstraint(limited[None] / largest, ub=self._start(unit, limit) / largest),
            ],
            options={"mip_rel_gap": GAP},
        )
        if found.x is None:
            raise QCError(f"QC: no widths fit budget='{limit:g}{unit}': {found.message}")
        return {name: (w, a) for (name, w, a), chosen in zip(choices, found.x) if chosen > 0.5}

    def _choices(self, name: str) -> Iterator[tuple[str, int, int]]:
        layer = self.layers[name]
        return ((name, w, a) for w in layer.weight_bits for a in layer.act_bits)

    def _equations(self, choices: list[tuple[str, int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """Rows and right sides: a pair of widths for each layer, and the first reader's width for each other reader."""
        names, widths = (np.array([choice[i] for choice in choices]) for i in (0, 2))
        rows = [names == name for name in self.layers]
        ones = len(rows)
        for name, layer in self.layers.items():
            if (first := self._payer(layer)) != name:
                for bits in sorted({*layer.act_bits, *self.layers[first].act_bits}):
                    rows.append((widths == bits) * (1 * (names == name) - 1 * (names == first)))
        return np.array(rows, dtype=float), np.array([1] * ones + [0] * (len(rows) - ones))

    def _payer(self, layer: Layer) -> str:
        """The layer for which the cost of a tensor counts: the first that reads it."""
        return next(name for name, other in self.layers.items() if other.reads == layer.reads)

    def _shares(self, unit: str) -> Callable[[str, int, int], float]:
        """What a layer adds to an amount, at its widths."""
        layers = self.layers

        def cost(name: str, w: int, a: int) -> float:
            of_weights = self.costs["weights"][name][str(w)]
            reads = layers[name].reads  # the first layer's image costs nothing
            pays = reads and self._payer(layers[name]) == name
            of_tensor = self.costs["activations"][reads][str(a)] if pays else 0.0
            return DROP["weights"] * of_weights + DROP["activations"] * of_tensor

        if unit == "%drop":
            return cost
        if unit in BITS_OF_INPUTS:
            return lambda name, w, a: layers[name].macs * w * a
        return lambda name, w, a: layers[name].weights * w

    def _finish(self, unit: str, total: float) -> float:
        """The amount, from the sum of what layers add."""
        amount = (total + self._offset(unit)) / self._unit(unit)
        return 100 * (1 - exp(-amount)) if unit == "%drop" else amount

    def _start(self, unit: str, amount: float) -> float:
        """The inverse of `_finish`."""
        if unit == "%drop":
            amount = -log1p(-amount / 100) if amount < 100 else inf
        return amount * self._unit(unit) - self._offset(unit)

    def _offset(self, unit: str) -> float:
        return self.other_bits if unit in {"MB", "%size"} else 0.0

    def _unit(self, unit: str) -> float:
        if unit in PERCENT_OF_USUAL:
            usual = sum(self._shares(unit)(name, *widths) for name, widths in self.usual.items())
            return (usual + self._offset(unit)) / 100
        layers = self.layers.values()
        return {
            "MB": 8e6,
            "bits": sum(layer.weights for layer in layers),
            "%bops": sum(layer.macs for layer in layers) * 64 / 100,
            "%drop": 1,
        }[unit]
