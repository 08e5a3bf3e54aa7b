# yolo_qc_plugin, AGPL-3.0
"""Reconstruction: before training, each layer's quantized output is drawn to its float one, layer after layer.

The idea is that of block reconstruction (BRECQ, Li et al., ICLR 2021): a layer sees the outputs of the quantized layers
before it and learns to give what the float model gives there, so that it makes up for their errors too. Here all that
training will move is learned, weights, scales, offsets and the affine part of batch norm, with LSQ's gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from ..quant.layers import scale_parameters
from .scale_steps import ScaleSteps

LAST = 0.05  # of the learning rates, at the end


def reconstruct(
    layer: nn.Module, loss: Callable[[], Tensor], steps: int, lr: float, scale_lr: float, spared: Collection[int] = ()
) -> None:
    """Train a layer by Adam, its learning rates falling along a cosine.

    Args:
        layer: With quantizers, in the mode to train it in.
        loss: Loss of one mini-batch, drawn anew at each call; a 0-dim tensor.
        steps: Number of steps, at least 1.
        lr: Learning rate of weights and of what batch norm learns.
        scale_lr: Of scales and offsets, as a share of a scale.
        spared: Ids of parameters to leave alone: those of quantizers that earlier layers share. A layer without weights
            to train is left as it is.
    """
    of_scales = {id(p) for p in scale_parameters(layer)}
    trained = [p for p in layer.parameters() if p.requires_grad and id(p) not in spared]
    groups = [
        {"params": [p for p in trained if id(p) not in of_scales], "lr": lr},
        {"params": [p for p in trained if id(p) in of_scales], "lr": scale_lr},
    ]
    if not groups[0]["params"]:
        return
    optimizer = torch.optim.Adam(groups)
    ScaleSteps(optimizer, layer)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: LAST + (1 - LAST) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    for _ in range(steps):
        loss().backward()
        nn.utils.clip_grad_norm_(trained, 10.0)  # Ultralytics' own bound
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
