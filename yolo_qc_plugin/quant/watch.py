# yolo_qc_plugin, AGPL-3.0
"""What a forward pass does with its tensors: which hold values of one another, which are added up, who made them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .modules import evaluating, hooked

# functions whose outputs hold values of their inputs and no others: of several inputs, and of one
JOINED = {"cat", "concat", "stack"}
TAKEN = set(
    """chunk split getitem unbind max_pool2d interpolate view reshape flatten permute transpose contiguous unsqueeze
    squeeze expand""".split()
)
SUMS = {"add", "iadd", "radd"}


class Watched(TorchFunctionMode):
    """A forward pass that has been watched.

    Args:
        model: With quantized convolutions; it runs once, in eval mode.
        image: What it takes.

    Attributes:
        same: Groups of tensors that hold values of one another.
        sums: Pairs of tensors that were added up, of four dimensions and one shape.
        reads: (tensor, quantizer that quantized it).
    """

    def __init__(self, model: nn.Module, image: Tensor):
        super().__init__()
        self.same: list[list[Tensor]] = []  # keeps them alive, lest two tensors have one id in turn
        self.sums: list[tuple[Tensor, Tensor]] = []
        self.reads: list[tuple[Tensor, Any]] = []
        self._made: dict[int, tuple[nn.Module, Tensor]] = {}
        self._quantized: dict[int, Any] = {}  # id of what a quantizer gave -> it
        self._parts: dict[int, tuple[list[Tensor], Tensor]] = {}  # id of a tensor -> those whose values it holds; it
        owners: list[Any] = [m for m in model.modules() if hasattr(m, "act_quant")]
        blocks = [m for m in model.modules() if any(True for _ in m.children()) and m not in owners]
        hooks = [m.register_forward_hook(self._note) for m in blocks]
        hooks += [m.act_quant.register_forward_hook(self._read) for m in owners]
        with hooked(hooks), evaluating(model), torch.no_grad(), self:
            model(image)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Take note of a function of tensors."""
        out = func(*args, **(kwargs or {}))
        name, inputs = getattr(func, "__name__", "").strip("_"), list(_tensors(args))
        summed = name in SUMS and len(inputs) == 2
        if name in JOINED | TAKEN:
            self.same.append([*inputs, *_tensors([out])])
        if name in JOINED | TAKEN or summed:  # contiguous may give the tensor itself
            self._parts |= {id(x): (inputs, x) for x in _tensors([out]) if all(x is not given for given in inputs)}
        if summed and inputs[0].dim() == 4 and inputs[0].shape == inputs[1].shape:
            self.sums.append((inputs[0], inputs[1]))
        return out

    def maker(self, tensor: Tensor) -> nn.Module | None:
        """The innermost block (a module with children) that gave a tensor, or what it was taken from, or None."""
        while id(tensor) not in self._made and len(parts := self._held(tensor)) == 1:
            tensor = parts[0]
        return self._made.get(id(tensor), (None,))[0]

    def sources(self, tensor: Tensor) -> set[Any]:
        """Whose values a tensor holds, or sums of them: quantizers, else innermost blocks; None of anything else."""
        found: set[Any] = set()
        tensors, known = [tensor], set()
        while tensors:
            tensor = tensors.pop()
            if id(tensor) in self._quantized:
                found.add(self._quantized[id(tensor)])
            elif parts := self._held(tensor):
                tensors += [part for part in parts if id(part) not in known]
                known |= set(map(id, parts))
            else:
                found.add(self.maker(tensor))
        return found

    def _held(self, tensor: Tensor) -> list[Tensor]:
        return self._parts.get(id(tensor), ([],))[0]

    def _note(self, module: nn.Module, args: tuple, out: object) -> None:
        if isinstance(out, Tensor):
            self._made.setdefault(id(out), (module, out))

    def _read(self, quant: nn.Module, args: tuple, out: Tensor) -> None:
        self.reads.append((args[0], quant))
        self._quantized[id(out)] = quant
        self.same.append([args[0], out])


def _tensors(values: Iterable) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
