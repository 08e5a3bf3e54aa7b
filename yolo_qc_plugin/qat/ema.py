# yolo_qc_plugin, AGPL-3.0
"""EMA of latent weights, scales and offsets with a constant decay (the paper's first means).

ema <- decay * ema + (1 - decay) * value        after each optimizer step
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ConstantEMA:
    """Moves an averaged copy of a model towards the model.

    The decay is constant but for a warm-up that keeps the average from being dominated by its start: at update n it is
    min(decay, (1 + n) / (10 + n)), the TensorFlow `num_updates` rule. It reaches 0.9 after 80 updates, 0.99 after 890,
    0.999 after 8,990 and 0.9999 after 89,990. (The paper's decay is 0 at the start; it does not say how it rises.)

    Floating parameters and buffers (BN statistics) are averaged, others copied. Tensors are matched by name. Attributes
    and `update_attr` are those Ultralytics' trainer and validator look for.

    Args:
        averaged: The copy to move, in eval mode and without gradients.
        decay: In [0, 1); 0 keeps the copy equal to the model.
        updates: Updates made before (a resumed run).
    """

    def __init__(self, averaged: nn.Module, decay: float, updates: int = 0):
        self.ema = averaged
        self.max_decay = decay
        self.updates = updates
        self.enabled = True
        self._pairs: tuple[list, list, dict] | None = None

    def decay(self, updates: int) -> float:
        """Decay of update number `updates` (1 is the first)."""
        return min(self.max_decay, (1 + updates) / (10 + updates))

    @torch.no_grad()
    def step(self, model: nn.Module) -> None:
        """Move the average once; call it once per optimizer step."""
        self.updates += 1
        if self._pairs is None:  # tensors are moved in place, so they are matched once
            self._pairs = self._match(model)
        averages, values, copied = self._pairs
        torch._foreach_lerp_(averages, values, 1 - self.decay(self.updates))
        for copies, sources in copied.values():
            torch._foreach_copy_(copies, sources)

    def _match(self, model: nn.Module) -> tuple[list, list, dict]:
        """What is averaged and its values; and what is copied and from where, by dtype, of which a kernel takes one."""
        state = model.state_dict()
        averages: list[Tensor] = []
        values: list[Tensor] = []
        copied: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        # a tensor shared by two modules has two names and is to be moved once
        own = {tensor.data_ptr(): (name, tensor) for name, tensor in self.ema.state_dict().items() if tensor.numel()}
        for name, tensor in own.values():
            floating = tensor.is_floating_point()
            averaged, source = (averages, values) if floating else copied.setdefault(tensor.dtype, ([], []))
            averaged.append(tensor)
            source.append(state[name])
        return averages, values, copied

    def update(self, model: nn.Module) -> None:
        """The host's call inside its optimizer step; the average is moved by `step` at on_train_batch_end instead."""

    def update_attr(self, model: nn.Module, include=(), exclude=()) -> None:
        """Copy the named attributes that the model has."""
        for name in include:
            if hasattr(model, name) and name not in exclude:
                setattr(self.ema, name, getattr(model, name))
