# yolo_qc_plugin, AGPL-3.0
"""What a model is to run on: what training must respect for it, and which ONNX graph is written of the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True)
class Target:
    """A place to run.

    Attributes:
        fills: Option -> its value where it is not given.
        bears: Option -> the values that can run there; others are refused. Options that are not named can have any.
        onnx: The kind of graph that `format=onnx` writes (see deploy.kinds).
        widths: Those that a budget chooses from: others take no less of the file than the next of these.
        narrow: Whether weights of 8 bits leave out the code -128.
        budget: What `budget="auto"` is there: some layers then have more bits than others, at little or no cost.
        symmetric: Whether activations are to be signed and symmetric.
        sums: Whether the inputs of residual sums are to be quantized.
        joined: Whether what is concatenated, split, pooled or enlarged is to be on one grid, so that codes can be.
        body_weights: The widest weights that `bits` gives to layers other than edges.
        edge_weights: The width of edges' weights where `edge_bits` is not given.
        widest_edge_weights: The widest that `edge_bits` gives to them.
        rounded_silu: Whether SiLU is rounded as a whole, not its sigmoid (see `quant.activations`).
    """

    fills: Mapping[str, Any]
    onnx: str
    bears: Mapping[str, tuple] = field(default_factory=dict)
    widths: tuple[int, ...] = (4, 8)
    budget: str = "110%size"  # docs/results/coco.md, "Widths by a budget"
    narrow: bool = False
    symmetric: bool = False
    sums: bool = False
    joined: bool = False
    body_weights: int = MAX_BITS
    edge_weights: int = MAX_BITS
    widest_edge_weights: int = MAX_BITS
    rounded_silu: bool = False


ALL = tuple(range(MIN_BITS, MAX_BITS + 1))
SAME_WORK = "100%ops"
ANYWHERE = Target({}, onnx="packed", widths=ALL, budget=SAME_WORK)  # where none is named
TARGETS: dict[str, Target] = {
    # No runtime there computes activations of fewer than 8 bits faster (docs/deployment.md has the sources). Weights of
    # 8 bits are UINT8 in a file, which OpenVINO computes in float (deploy/qdq.py), so wide layers and edges have 7.
    "cpu": Target({"per_channel": True, "act_bits": 8}, onnx="packed", widths=(4, 7), body_weights=7, edge_weights=7),
    # It computes a convolution, its output's grid, SiLU and the next grid in one node, of integers where weights have 7
    # bits at most; and where codes are split or pooled, in place of values, it quantizes once, in such a node.
    "openvino": Target(
        {"per_channel": True, "act_bits": 8},
        onnx="openvino",
        bears={"weight_bits": (None, *range(MIN_BITS, 8))},
        widths=(4, 7),
        body_weights=7,
        edge_weights=7,
        widest_edge_weights=7,
        joined=True,
        rounded_silu=True,
    ),
    "tensorrt": Target(
        {"per_channel": True, "act_bits": 8, "act_offset": False, "output_bits": None},
        onnx="tensorrt",
        bears={"act_offset": (False,), "output_bits": (None,)},
        narrow=True,
        symmetric=True,
        sums=True,
        joined=True,
    ),
    "litert": Target({"per_channel": True, "act_bits": 8}, onnx="packed", narrow=True, sums=True, joined=True),
    # every bit is logic there, of activations too; FINN takes no zero points, which outputs' grids have
    "fpga": Target(
        {"per_channel": True, "act_offset": False, "output_bits": None},
        onnx="qonnx",
        bears={"act_offset": (False,), "output_bits": (None,)},
        widths=ALL,
        budget=SAME_WORK,
    ),
}
