# yolo_qc_plugin, AGPL-3.0
"""What a GPU makes of FP32 arithmetic, done to operations on a CPU: values that it changes show themselves."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class DivisionByNumbers(TorchDispatchMode):
    """CUDA's separate operations: a division by a Python number is a multiplication by its rounded reciprocal."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operation."""
        if func in (aten.div.Tensor, aten.div_.Tensor) and not isinstance(args[1], Tensor):
            func = aten.mul.Tensor if func is aten.div.Tensor else aten.mul_.Tensor
            args = args[0], (1 / torch.tensor(args[1], dtype=args[0].dtype)).item()
        return func(*args, **(kwargs or {}))
