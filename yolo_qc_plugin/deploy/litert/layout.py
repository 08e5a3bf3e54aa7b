# yolo_qc_plugin, AGPL-3.0
"""How tensors lie in a LiteRT file, which convolves with channels last, as ONNX does with channels second.

Each tensor knows the order in which its axes lie; shapes and axes are ONNX's everywhere else. An ONNX Transpose renames
axes and moves nothing. TRANSPOSE is written where an operator needs another order than there is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .flatbuffer import Grid

NHWC = (0, 2, 3, 1)
POINTS = (NHWC, (0, 3, 2, 1))  # orders in which a 1x1 convolution finds its channels


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file.

    Attributes:
        index: In the file.
        shape: As ONNX has it.
        order: ONNX's axes in the order in which they lie in the file.
        grid: Of INT8 codes; None for FLOAT32.
    """

    index: int
    shape: tuple[int, ...]
    order: tuple[int, ...]
    grid: Grid | None = None

    @property
    def placed(self) -> list[int]:
        """The shape in the file."""
        return [self.shape[a] for a in self.order]

    def at(self, axis: int) -> int:
        """Where an axis of ONNX lies in the file."""
        return self.order.index(axis % len(self.shape))


@dataclass(frozen=True)
class Geometry:
    """How a window moves over height and width.

    Attributes:
        kernel: Height, width.
        stride: Height, width.
        dilation: Height, width.
        pads: Top, left, bottom, right.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    pads: tuple[int, int, int, int]

    @classmethod
    def of(cls, a: dict[str, Any]) -> Geometry:
        """Of an ONNX node's attributes."""
        pairs = (a["kernel_shape"], a.get("strides", [1, 1]), a.get("dilations", [1, 1]), a.get("pads", [0] * 4))
        return cls(*map(tuple, pairs))

    @property
    def is_point(self) -> bool:
        """Whether height and width do not matter."""
        return self.kernel == self.stride == (1, 1) and not any(self.pads)

    def sides(self, height: int, width: int) -> tuple[int, ...]:
        """Height and width of what comes out."""
        return tuple(
            (n + self.pads[i] + self.pads[i + 2] - self.dilation[i] * (self.kernel[i] - 1) - 1) // self.stride[i] + 1
            for i, n in enumerate((height, width))
        )

    def is_same(self, height: int, width: int) -> bool:
        """Whether the pads are those that LiteRT's SAME adds."""
        for i, n in enumerate((height, width)):
            total = (-(-n // self.stride[i]) - 1) * self.stride[i] + self.dilation[i] * (self.kernel[i] - 1) + 1 - n
            if (self.pads[i], self.pads[i + 2]) != (max(total, 0) // 2, max(total, 0) - max(total, 0) // 2):
                return False
        return True


def regrouped(x: Tensor, shape: Sequence[int]) -> tuple[int, ...] | None:
    """The order of the axes after a reshape that moves nothing, or None where the order at hand makes it move.

    A reshape merges and splits neighbouring axes. It moves nothing where those that it merges lie side by side.
    """
    groups, i, j = [], 0, 0
    while i < len(x.shape) or j < len(shape):
        before, after = [i], [j]
        sizes = lambda: (math.prod(x.shape[a] for a in before), math.prod(shape[a] for a in after))  # noqa: B023, E731
        while (size := sizes())[0] != size[1]:
            side = before if size[0] < size[1] else after
            side.append(side[-1] + 1)
        i, j = before[-1] + 1, after[-1] + 1
        if math.prod(x.shape[i:]) == 1:  # ones at the end belong to the last group
            before, after = [*before, *range(i, len(x.shape))], [*after, *range(j, len(shape))]
            i, j = len(x.shape), len(shape)
        places = [x.order.index(a) for a in before if x.shape[a] > 1] or [x.order.index(before[0])]
        between = [a for a in x.order[places[0] : places[-1] + 1] if x.shape[a] > 1]
        if len(places) > 1 and between != [a for a in before if x.shape[a] > 1]:
            return None
        groups.append((places[0], after))
    return tuple(a for _, after in sorted(groups) for a in after)


def is_depthwise(groups: int, channels: int) -> bool:
    """Whether LiteRT has a convolution of its own for these groups."""
    return groups == channels > 1


def as_filter(weight: np.ndarray, groups: int, channels: int) -> np.ndarray:
    """A weight (out, in, height, width) as LiteRT wants it: outputs first and inputs last, or outputs last."""
    if is_depthwise(groups, channels):
        return weight.transpose(1, 2, 3, 0)  # (1, height, width, out)
    return weight.transpose(0, 2, 3, 1)
