# yolo_qc_plugin, AGPL-3.0
"""The walk through a traced graph that replaces what tracing marked; what takes the place is up to a kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from .bounds import LowerBounds
from .fold import DeployedConv2d
from .nodes import Writer, attributes, links
from .trace import DOMAIN, QUANTIZE


class Rewriter(ABC):
    """A graph being rewritten.

    Args:
        graph: Of an ONNX model, as traced.
        layers: The convolutions by name.
        kind: One of kinds.ONNX_KINDS.

    Attributes:
        writer: Takes the new nodes and constants.
        bounds: Lower bounds of the traced tensors.
        quantizers: Number of quantizers written.
    """

    def __init__(self, graph, layers: Mapping[str, DeployedConv2d], kind: str):
        self.graph, self.layers, self.kind = graph, layers, kind
        self.writer = Writer(graph)
        self.sources, self.readers = links(graph)
        self.bounds = LowerBounds(self.sources)
        self.quantizers = 0
        self._renamed: dict[str, str] = {}
        self._quantized: dict[tuple, str] = {}  # (tensor, grid) -> fake-quantized tensor, shared by all who read it

    def rewrite(self) -> None:
        """Replace every marker, in order."""
        for node in list(self.graph.node):
            for i, name in enumerate(node.input):
                node.input[i] = self._renamed.get(name, name)
            if node.domain != DOMAIN:
                self.keep(node)
            elif node.op_type == QUANTIZE:
                self._renamed[node.output[0]] = self._once(node)
            else:
                self.convolve(node, self.layer(node))
        stale = {v.name: v for v in self.graph.value_info}
        del self.graph.node[:]
        self.graph.node.extend(self.writer.nodes)
        written = {out for n in self.writer.nodes for out in n.output}
        del self.graph.value_info[:]
        self.graph.value_info.extend(v for name, v in stale.items() if name in written)

    def keep(self, node) -> None:
        """Write a node that tracing did not mark."""
        self.writer.nodes.append(node)

    def _once(self, node) -> str:
        """The name of the quantized tensor; one that is on the grid already is not quantized again."""
        x, grid = node.input[0], attributes(node)
        same = self.grid(node, grid)
        if (x, same) not in self._quantized:
            self.quantizers += 1
            self.is_on_grid(self.quantize(node.output[0], node, grid), same, of=x)
        return self._quantized[x, same]

    def is_on_grid(self, name: str, same: tuple, of: str | None = None) -> None:
        """Note that a tensor has values of a grid (`grid`) alone: those of another tensor, or its own."""
        self._quantized[of or name, same] = self._quantized[name, same] = name

    def layer(self, node) -> DeployedConv2d:
        """The convolution that a marker stands for."""
        return self.layers[node.attribute[0].s.decode()]

    def grid(self, node, a: dict) -> tuple:
        """What tells quantizers of one tensor apart."""
        return a["scale"], a["quant_min"], a["quant_max"], a["zero_point"]

    @abstractmethod
    def quantize(self, name: str, node, a: dict) -> str:
        """Write what fake-quantizes node.input[0] by the marker's attributes, as `name`; returns the name."""

    @abstractmethod
    def convolve(self, node, layer: DeployedConv2d) -> None:
        """Write a convolution of node.input[0], as node.output[0]."""

    @abstractmethod
    def summary(self) -> str:
        """One line that says what was written."""

    @staticmethod
    def geometry(layer: DeployedConv2d) -> dict:
        """Attributes of a Conv node."""
        return dict(
            kernel_shape=list(layer.kernel_size),
            strides=list(layer.stride),
            pads=layer.pads,
            dilations=list(layer.dilation),
            group=layer.groups,
        )
