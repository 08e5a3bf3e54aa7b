# yolo_qc_plugin, AGPL-3.0
"""Swapping modules, and eval mode that comes back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


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
