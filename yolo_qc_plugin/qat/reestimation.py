# yolo_qc_plugin, AGPL-3.0
"""Batch norm re-estimation after QAT (Nagel et al., ICML 2022).

Oscillating weights shift the outputs of a convolution from step to step, so that the running statistics of training are
not those of the finished weights. They are measured again: the average over batches of each batch's mean and variance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..quant.modules import evaluating
from .correction import freeze_statistics

BATCHES = 50  # as in the authors' code


@torch.no_grad()
def reestimate(
    model: nn.Module, batches: Iterable[object], forward: Callable[[object], object], spared: Sequence[str] = ()
) -> None:
    """Measure the statistics of batch norms again, in place; while it does, each normalizes with its batch's own.

    Args:
        model: Finished model; every module's mode comes back. Heads run as in training, so that all are measured.
        batches: What `forward` takes, one at a time.
        forward: Runs the model on one batch.
        spared: Parts of names; batch norms whose name has one are left as they are.
    """
    norms = [m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and not any(part in n for part in spared)]
    momenta = [m.momentum for m in norms]
    with evaluating(model):
        freeze_statistics(model)
        try:
            for m in norms:
                m.momentum = None  # the plain average of all batches
                m.get_buffer("num_batches_tracked").zero_()
                m.train()
            for batch in batches:
                forward(batch)
        finally:
            for m, momentum in zip(norms, momenta):
                m.momentum = momentum
