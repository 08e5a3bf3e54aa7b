# yolo_qc_plugin, AGPL-3.0
"""Put quantizers into a model and take them out again; start them from data."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..config import QCConfig, QCError
from .activations import QuantActivation, quant_activations
from .layers import QuantConv2d, is_deployed, is_quantized, quant_convs
from .modules import replace_modules
from .precision import keep_wide, undo_keep_wide
from .taps import untap


@dataclass(frozen=True)
class Injection:
    """What `inject` touched.

    Attributes:
        quantized: Name -> (weight bits, activation bits).
        skipped: Names of convolutions left in float by option or because they are fixed (DFL).
    """

    quantized: dict[str, tuple[int, int]]
    skipped: tuple[str, ...]

    def __str__(self) -> str:
        widths: dict[str, int] = {}
        for w, a in self.quantized.values():
            widths[f"W{w}A{a}"] = widths.get(f"W{w}A{a}", 0) + 1
        shares = ", ".join(f"{n} at {k}" for k, n in widths.items())
        return f"{len(self.quantized)} convolutions quantized ({shares}), {len(self.skipped)} left in float"


def inject(
    model: nn.Module, config: QCConfig, edges: Collection[str] = (), keep_float: Collection[str] = ()
) -> Injection:
    """Replace every nn.Conv2d of `model` by a QuantConv2d, in place; scales are not calibrated yet.

    What is not quantized stays FP32 when the model is cast (see precision.WIDE).

    Exact type nn.Conv2d: subclasses may compute something else. All checks come before the first change.

    Args:
        model: Any module.
        config: Widths, granularity and patterns.
        edges: Names of convolutions that get `config.edge_widths`.
        keep_float: Names of convolutions that stay float whatever the options say.

    Returns:
        What was touched.

    Raises:
        QCError: If the model is quantized already, has no convolution to quantize, or a pattern matches nothing.
    """
    if is_quantized(model):
        raise QCError("QC: the model is already quantized (it has QuantConv2d layers); start from a float checkpoint.")
    convs = {name: m for name, m in model.named_modules() if type(m) is nn.Conv2d}
    if not convs:
        raise QCError(f"QC: {type(model).__name__} has no nn.Conv2d to quantize.")
    for option, patterns in (("skip", config.skip), ("layer_bits", config.layer_bits)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in convs):
                raise QCError(
                    f"QC: {option}={pattern!r} matches no convolution; names look like {', '.join(list(convs)[:3])}."
                )

    skipped = {name for name in convs if name in keep_float or any(fnmatchcase(name, p) for p in config.skip)}
    plan = {name: config.bits_of(name, name in edges) for name in convs if name not in skipped}
    if not plan:
        raise QCError(f"QC: skip={list(config.skip)} leaves no convolution to quantize.")

    how = config.per_channel, config.act_offset, config.narrow, config.symmetric
    twins = {convs[name]: QuantConv2d.from_float(convs[name], w, a, *how) for name, (w, a) in plan.items()}
    replace_modules(model, twins)
    keep_wide(model)
    return Injection(plan, tuple(name for name in convs if name in skipped))


def remove(model: nn.Module) -> int:
    """Take the quantizers (and a correction) out, in place; the float parameters are the same objects.

    Returns:
        Number of convolutions restored.

    Raises:
        QCError: If the model is fused: its batch norms are gone.
    """
    if is_deployed(model):
        raise QCError("QC: the model is fused; load the checkpoint again and remove() before fuse().")
    twins = {m: m.to_float() for _, m in quant_convs(model)}
    replace_modules(model, twins)
    replace_modules(model, {m: m.act for _, m in quant_activations(model)})
    undo_keep_wide(model)
    untap(model)
    return len(twins)


def quantize_outputs(
    functions: Mapping[Any, nn.Module], bits: int, rounded_silu: bool = False
) -> list[QuantActivation]:
    """Quantize what blocks give to their activation function, in place; to be calibrated.

    Args:
        functions: Block -> its activation function, which it calls by its attribute `act`.
        bits: Width.
        rounded_silu: Whether SiLU is rounded as a whole, not its sigmoid.

    Returns:
        The new activations, one for each block.
    """
    acts = []
    for block, function in functions.items():
        device = next(block.parameters()).device
        block.act = QuantActivation(function, bits, rounded_silu).to(device).train(block.training).requires_grad_(False)
        acts.append(block.act)
    return acts
