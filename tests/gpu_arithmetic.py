# yolo_qc_plugin, AGPL-3.0
"""What a GPU may make of FP32 arithmetic, done to operations on a CPU: values that it could change show themselves."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class FusedKernel(TorchDispatchMode):
    """One compiled kernel: quotients two units in the last place off, a product and a sum of it rounded once.

    Args:
        up: Whether quotients are too large.
    """

    def __init__(self, up: bool):
        super().__init__()
        self.towards = torch.tensor(float("inf") if up else -float("inf"))
        self._products: dict[int, tuple[Tensor, Tensor]] = {}  # id -> (FP32 product, the same unrounded)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operation."""
        out = func(*args, **(kwargs or {}))
        if not isinstance(out, Tensor) or out.dtype != torch.float32:
            return out
        if func in (aten.div.Tensor, aten.reciprocal.default):
            return torch.nextafter(torch.nextafter(out, self.towards), self.towards)
        if func is aten.mul.Tensor:
            self._products[id(out)] = out, args[0].double() * args[1]
        elif func in (aten.add.Tensor, aten.sub.Tensor):
            unrounded = [self._products.get(id(a), (None, a))[1] for a in args[:2]]
            return func(*unrounded).float()
        return out


class DivisionByNumbers(TorchDispatchMode):
    """CUDA's separate operations: a division by a Python number is a multiplication by its rounded reciprocal."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operation."""
        if func in (aten.div.Tensor, aten.div_.Tensor) and not isinstance(args[1], Tensor):
            func = aten.mul.Tensor if func is aten.div.Tensor else aten.mul_.Tensor
            args = args[0], (1 / torch.tensor(args[1], dtype=args[0].dtype)).item()
        return func(*args, **(kwargs or {}))
