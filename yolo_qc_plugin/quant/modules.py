# yolo_qc_plugin, AGPL-3.0
"""Twins of modules, swapping modules, eval mode that comes back, and hooks that go again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn
from torch.utils.hooks import RemovableHandle

Module = TypeVar("Module", bound=nn.Module)


def twin(module: nn.Module, kind: type[Module]) -> Module:
    """A module of another class with the state of `module`: the very parameters, in containers of its own."""
    made = kind.__new__(kind)
    made.__dict__ = {k: v.copy() if isinstance(v, dict) else v for k, v in vars(module).items()}
    return made


def replace_modules(model: nn.Module, twins: Mapping[Any, nn.Module]) -> None:
    """Swap modules wherever they are registered, twice-registered ones included."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child in twins:
                parent._modules[key] = twins[child]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode within the context; every module's own mode comes back."""
    modes = {m: m.training for m in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for m, training in modes.items():
            m.training = training


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that are there within the context."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
