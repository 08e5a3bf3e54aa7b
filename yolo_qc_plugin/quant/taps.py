# yolo_qc_plugin, AGPL-3.0
"""Quantizers at places where no convolution reads: what is added up, and what is pooled."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn

from ..config import QCConfig
from .precision import KeepWide
from .quantizer import ActQuantizer
from .watch import Watched

NAME = "tap"  # of the child that a block gets


class Tap(KeepWide, nn.Module):
    """Quantizes what a block gives, or is given: a hook of the block, and its child.

    Attributes:
        act_quant: ActQuantizer, which convolutions may share; in the deployed form one of plain numbers.
    """

    __module__ = "yolo_qc_plugin"  # by which checkpoints name it

    act_quant: Any

    def __init__(self, act_quant: ActQuantizer):
        super().__init__()
        self.act_quant = act_quant

    def forward(self, block: nn.Module, args: tuple, *given: Tensor) -> Tensor | tuple:
        """As a hook behind the block its output, as one before it its inputs, the first quantized."""
        return self.act_quant(given[0]) if given else (self.act_quant(args[0]), *args[1:])


def tap_sums(model: nn.Module, image: Tensor, config: QCConfig, sums_of_branches: Collection[int] = ()) -> int:
    """Quantize both inputs of every residual sum and, on symmetric grids, the input of every max pooling, in place.

    Sums of which a block gave one input alone, as those within attention, stay as they are.

    Args:
        model: Injected model.
        image: What the model takes, of any size.
        config: The options.
        sums_of_branches: Ids of modules whose outputs are added up before an activation function: no residuals.

    Returns:
        Number of sums.
    """
    watched = Watched(model, image)
    makers: list[nn.Module] = []
    sums = 0
    for pair in watched.sums:
        found = [m for m in map(watched.maker, pair) if m is not None and id(m) not in sums_of_branches]
        if len(found) == 2:
            makers, sums = [*makers, *found], sums + 1
    pools = [m for m in model.modules() if config.symmetric and type(m) is nn.MaxPool2d]
    for block in [*dict.fromkeys(makers), *pools]:
        tap = Tap(ActQuantizer(config.sum_bits, config.act_offset, config.symmetric).to(image.device))
        block.add_module(NAME, tap)
        block.register_forward_pre_hook(tap) if block in pools else block.register_forward_hook(tap)
    return sums


def taps(model: nn.Module) -> Iterator[tuple[str, Tap]]:
    """Name and module of every tap, in model order."""
    return ((n, m) for n, m in model.named_modules() if isinstance(m, Tap))


def untap(model: nn.Module) -> None:
    """Take all taps out, in place."""
    for block in model.modules():
        if isinstance(getattr(block, NAME, None), Tap):
            for hooks in (block._forward_hooks, block._forward_pre_hooks):
                for key in [key for key, hook in hooks.items() if isinstance(hook, Tap)]:
                    del hooks[key]
            delattr(block, NAME)
