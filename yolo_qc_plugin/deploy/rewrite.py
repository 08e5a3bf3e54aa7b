# yolo_qc_plugin, AGPL-3.0
"""The walk through a traced graph that replaces what tracing marked; what takes the place is up to a kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial

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
        self._quantized: dict[tuple, str] = {}  # (tensor, grid) -> the same on the grid, shared by all who read it

    def rewrite(self) -> None:
        """Replace every marker, in order."""
        for node in list(self.graph.node):
            for i, name in enumerate(node.input):
                node.input[i] = self._renamed.get(name, name)
            if node.domain != DOMAIN:
                self.keep(node)
            elif node.op_type == QUANTIZE:
                grid = attributes(node)
                write = partial(self.quantize, node.output[0], node, grid)
                self._renamed[node.output[0]] = self.once(node.input[0], self.grid(node, grid), write)
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

    def once(self, x: str, grid: tuple, write: Callable[[], str]) -> str:
        """The name of a tensor on a grid (`grid`); `write` quantizes it and returns that name, unless there is one."""
        if (x, grid) not in self._quantized:
            self.quantizers += 1
            name = write()
            self._quantized[x, grid] = self._quantized[name, grid] = name
        return self._quantized[x, grid]

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
