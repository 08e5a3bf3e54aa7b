# yolo_qc_plugin, AGPL-3.0
"""How Ultralytics' optimizer treats scales and offsets: a parameter group of their own, and steps in proportion."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import nn
from torch.optim import Optimizer

from ..config import QCError
from ..quant.observers import TINY
from ..quant.quantizer import Quantizer

MAX_STEP = 0.1  # of a scale, by which one step changes it at most


def separate_scales(optimizer: Optimizer, scales: list[nn.Parameter], lr_factor: float) -> dict | None:
    """Move `scales` out of the groups they were sorted into and into a last group of their own.

    The new group takes the settings of a group of 1-D parameters (never a matrix optimizer's), no weight decay, and the
    smallest learning rate of all groups times `lr_factor`.

    Args:
        optimizer: Just built; holds no state yet.
        scales: Parameters to move.
        lr_factor: Above 0.

    Returns:
        The new group, or None where there is nothing to move.

    Raises:
        QCError: If no group is called "bn", as Ultralytics' is.
    """
    if not scales:
        return None
    moved = {id(p) for p in scales}
    model_group = next((g for g in optimizer.param_groups if g.get("param_group") == "bn"), None)
    if model_group is None:
        found = [g.get("param_group") for g in optimizer.param_groups]
        raise QCError(f"QC: the optimizer has parameter groups {found}; one called 'bn' is expected.")
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in moved]
    settings = {k: v for k, v in model_group.items() if k not in {"params", "initial_lr"}}
    if settings.get("foreach", True) is None and not settings.get("fused"):
        settings["foreach"] = True  # as on CUDA by default: some two hundred tensors of one number each
    lr = min(g["lr"] for g in optimizer.param_groups) * lr_factor
    optimizer.add_param_group({**settings, "params": scales, "lr": lr, "weight_decay": 0.0, "param_group": "scale"})
    return optimizer.param_groups[-1]


class ScaleSteps:
    """Keeps every optimizer step on scales and offsets in proportion to the scale, and every scale positive.

    An adaptive optimizer (the Adam family, RMSprop) moves each parameter by about lr, whatever its size: at lr 1e-3
    the scale of an 8-bit weight, about 2e-3, would change sign within two steps. Its step is therefore taken in units
    of the scale: lr 1e-3 moves a scale by 0.1%, and an offset by a thousandth of a quantization step. The SGD family
    follows LSQ's gradient, which the published gradient scale already brings into proportion, and is left as it is.
    In either case one step changes a scale by MAX_STEP of it at most, and none falls below TINY: with SGD at lr 0.01 a
    few steps in a thousand would change one by more, up to its double, most of them of 8-bit weights, whose scales are
    small. Our reading; the papers train with SGD.

    Args:
        optimizer: Holds the parameters below; gets a pre- and a post-step hook.
        model: Model with quantizers.
    """

    ADAPTIVE = ("Adam", "Adamax", "AdamW", "NAdam", "RAdam", "RMSprop")

    def __init__(self, optimizer: Optimizer, model: nn.Module):
        quantizers = [m for m in model.modules() if isinstance(m, Quantizer) and m.learned]
        offsets = {i: o.detach() for i, q in enumerate(quantizers) if (o := getattr(q, "offset", None)) is not None}
        scales = [q.scale.detach() for q in quantizers]
        self.parameters = [*scales, *offsets.values()]
        self._sizes = [p.numel() for p in self.parameters]
        self._scales = sum(s.numel() for s in scales)  # numbers among the parameters' that are scales
        first = [0, *accumulate(self._sizes)]  # number of each parameter; a scale beside an offset is one number
        # for each number of the parameters: which of them is the scale that it is measured in
        unit = [*range(self._scales), *(first[i] for i in offsets)]
        self._unit = torch.tensor(unit, dtype=torch.long, device=next(model.parameters()).device)
        self.relative = type(optimizer).__name__ in self.ADAPTIVE
        self.optimizer = optimizer
        self._taken = 0
        self._overflows: list[torch.Tensor] = []  # of steps of a fused optimizer, not yet read
        if self.parameters:
            optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    @property
    def taken(self) -> int:
        """Number of steps that moved something.

        A fused optimizer is called for a step that GradScaler leaves out as well, with the overflow as a tensor on the
        device. It is read here, where Ultralytics' progress bar has waited for the device already.
        """
        while self._overflows:
            self._taken += not self._overflows.pop().item()
        return self._taken

    @taken.setter
    def taken(self, number: int) -> None:
        """Go on counting from what a resumed run had."""
        self._taken = number

    def _before(self, optimizer, args, kwargs) -> None:
        self._old = torch.cat(self.parameters)

    def _after(self, optimizer, args, kwargs) -> None:
        if self.parameters:
            self._bound()
        overflow = getattr(optimizer, "found_inf", None)  # set by GradScaler during the call of a fused optimizer
        if overflow is None:
            self._taken += 1
        else:
            self._overflows.append(overflow)

    def _bound(self) -> None:
        """All in one line: there are some two hundred parameters of one number each."""
        old, new = self._old, torch.cat(self.parameters)
        if self.relative:
            new = old + (new - old) * old[self._unit]
        before, after = old[: self._scales], new[: self._scales]
        within = after.maximum(before * (1 - MAX_STEP)).clamp_min_(TINY)
        torch.minimum(within, before * (1 + MAX_STEP), out=after)
        torch._foreach_copy_(self.parameters, new.split(self._sizes))
