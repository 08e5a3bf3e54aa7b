# yolo_qc_plugin, AGPL-3.0
"""QC, the correction after QAT (the paper's second means).

Each quantized convolution gets a scale gamma (1 at first) and a shift beta (0 at first); everything else is frozen and
gamma and beta are trained with the detector's own loss for an epoch. Folding (`fold`) makes them free at inference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..quant.layers import ChannelAffine, quant_convs


def insert_correction(
    model: nn.Module, per_channel: bool, scale: bool = True, shift: bool = True
) -> list[nn.Parameter]:
    """Add gamma and beta to every quantized convolution and freeze all else.

    Args:
        model: Quantized model; changed in place.
        per_channel: One factor per output channel, or one per layer.
        scale: Train gamma.
        shift: Train beta.

    Returns:
        The parameters to train.
    """
    model.requires_grad_(False)
    trained = []
    for _, conv in quant_convs(model):
        conv.correction = ChannelAffine(conv.out_channels if per_channel else 1).to(conv.weight.device)
        conv.correction.gamma.requires_grad_(scale)
        conv.correction.beta.requires_grad_(shift)
        trained += [p for p in (conv.correction.gamma, conv.correction.beta) if p.requires_grad]
    return trained


def freeze_norms(model: nn.Module) -> None:
    """Have batch norms use their statistics and keep them, whatever mode the rest of the model is in."""
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.eval()


def freeze_statistics(model: nn.Module) -> None:
    """Training mode for what needs it to compute a loss (the head), eval for all that would draw or keep statistics."""
    model.train()
    freeze_norms(model)
    for m in model.modules():
        if isinstance(m, nn.modules.dropout._DropoutNd):
            m.eval()


class CorrectedNorm(nn.Module):
    """Correction and batch norm in eval mode as one batch norm, whose weight and bias hold gamma and beta.

    weight * (gamma * y + beta - mean) / sigma + bias, in one pass over y and, backward, in one for all three gradients.

    Args:
        correction: What the convolution before it has.
        bn: What follows it.
    """

    def __init__(self, correction: ChannelAffine, bn: nn.BatchNorm2d):
        super().__init__()
        self.correction = correction
        self.bn = bn

    def forward(self, y: Tensor) -> Tensor:
        """Correct and normalize y of shape (batch, channels, height, width)."""
        bn, gamma, beta = self.bn, self.correction.gamma, self.correction.beta
        mean, var = bn.get_buffer("running_mean"), bn.get_buffer("running_var")
        over_sigma = bn.weight * torch.rsqrt(var + bn.eps)
        bias = bn.bias + over_sigma * (beta + (gamma - 1) * mean)
        return nn.functional.batch_norm(y, mean, var, bn.weight * gamma, bias, eps=bn.eps)


@contextmanager
def corrected_in_norms(blocks: Iterable[Any]) -> Iterator[None]:
    """Within the context, a CorrectedNorm takes the place of each block's `conv.correction` and `bn`.

    Args:
        blocks: Modules in which the batch norm `bn`, in eval mode, follows the quantized convolution `conv`.
    """
    blocks = list(blocks)
    for block in blocks:
        block.bn = CorrectedNorm(block.conv.correction, block.bn)
        block.conv.correction = None
    try:
        yield
    finally:
        for block in blocks:
            block.conv.correction, block.bn = block.bn.correction, block.bn.bn


def train_correction(
    parameters: list[nn.Parameter],
    epochs: Iterable[Iterable[object]],
    loss: Callable[[Any], Tensor],
    lr: float,
    steps: int,
    scaler: torch.amp.GradScaler | None = None,
    accumulate: int = 1,
) -> int:
    """Train gamma and beta by Adam with a cosine learning rate that ends at 0.

    Args:
        parameters: From `insert_correction`.
        epochs: Each an iterable of batches.
        loss: Loss of one batch, a 0-dim tensor.
        lr: Learning rate at the start.
        steps: Total number of optimizer steps, for the schedule.
        scaler: Gradient scaler under FP16 mixed precision.
        accumulate: Batches whose gradients are summed for one step; the last step of an epoch may have fewer.

    Returns:
        Number of optimizer steps taken.

    Raises:
        FloatingPointError: If the loss is not finite; the parameters are then of no use.
    """
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    optimizer = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.5 + 0.5 * math.cos(math.pi * n / max(steps, 1)))
    done = 0

    def step() -> None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, 10.0)  # Ultralytics' own bound
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        schedule.step()

    for batches in epochs:
        waiting = 0
        for batch in batches:
            value = loss(batch)
            if not math.isfinite(value.detach()):
                raise FloatingPointError(f"QC: the loss became {value.item()} at step {done} of the correction")
            scaler.scale(value).backward()
            waiting += 1
            if waiting == accumulate:
                step()
                done, waiting = done + 1, 0
        if waiting:
            step()
            done += 1
    return done
