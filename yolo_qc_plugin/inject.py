# yolo_qc_plugin, AGPL-3.0
"""Put quantizers into a model and take them out again; start them from data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from .config import MAX_BITS, QCConfig, QCError
from .deploy import deployed_convs
from .layers import (
    QuantActivation,
    QuantConv2d,
    is_quantized,
    narrow,
    quant_activations,
    quant_convs,
    widen,
)
from .observers import Observer, SampleObserver
from .quantizer import ActQuantizer, Quantizer


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

    What is not quantized stays FP32 when the model is cast (see layers.WIDE).

    Exact type nn.Conv2d: subclasses may compute something else. All checks come before the first change.

    Args:
        model: Any module.
        config: Widths, granularity and patterns.
        edges: Names of convolutions that get `config.edge_bits`.
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

    plan: dict[str, tuple[int, int]] = {}
    for name in convs:
        if name in keep_float or any(fnmatchcase(name, p) for p in config.skip):
            continue
        plan[name] = (config.edge_bits, config.edge_bits) if name in edges else config.body_bits
        for pattern, bits in config.layer_bits.items():
            if fnmatchcase(name, pattern):
                plan[name] = (bits, bits)
    if not plan:
        raise QCError(f"QC: skip={list(config.skip)} leaves no convolution to quantize.")

    twins = {
        convs[name]: QuantConv2d.from_float(
            convs[name], w, a, config.per_channel, config.act_offset, config.act_equalize and a < MAX_BITS
        )
        for name, (w, a) in plan.items()
    }
    replace_modules(model, twins)
    widen(model)
    return Injection(plan, tuple(name for name in convs if name not in plan))


@torch.no_grad()
def share_quantizers(model: nn.Module, image: torch.Tensor) -> int:
    """Give convolutions that read one tensor one quantizer of it, in place; to be done before calibration.

    The tensor is then quantized once, in training and in an exported graph, where its producer becomes an integer
    operation if one quantizer is all that reads it. Quantizers of different widths stay apart.

    Those that read the image are not learned but fixed to the range [0, 1]: 8-bit codes are then the bytes it was made
    of, and backward ends there (at the image, the gradient that a scale would need takes a sixteenth of the step).

    Args:
        model: Injected model.
        image: What the model takes, of any size; it runs on it once, in eval mode.

    Returns:
        Number of quantizers that went.
    """
    readers: dict[tuple, list[QuantConv2d]] = {}
    kept = []  # alive, lest two tensors have one id in turn

    def note(conv: QuantConv2d, args: tuple) -> None:
        kept.append(args[0])
        readers.setdefault((id(args[0]), conv.act_quant.bits), []).append(conv)

    hooks = [m.register_forward_pre_hook(note) for _, m in quant_convs(model)]
    try:
        with evaluating(model):
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    gone = 0
    for (tensor, _), (first, *others) in readers.items():
        if tensor == id(image):
            first.act_quant.set_signed(False)
            first.act_quant.fix(1 / first.act_quant.quant_max)
        first.act_quant.readers = 1 + len(others)
        for conv in others:
            gone += conv.act_quant is not first.act_quant
            conv.act_quant = first.act_quant
    return gone


def remove(model: nn.Module) -> int:
    """Take the quantizers (and a correction) out, in place; the float parameters are the same objects.

    Returns:
        Number of convolutions restored.

    Raises:
        QCError: If the model is fused: its batch norms are gone.
    """
    if deployed_convs(model):
        raise QCError("QC: the model is fused; load the checkpoint again and remove() before fuse().")
    twins = {m: m.to_float() for _, m in quant_convs(model)}
    replace_modules(model, twins)
    replace_modules(model, {m: m.act for _, m in quant_activations(model)})
    narrow(model)
    return len(twins)


def replace_modules(model: nn.Module, twins: dict[nn.Module, nn.Module]) -> None:
    """Swap modules wherever they are registered, twice-registered ones included."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child in twins:
                parent._modules[key] = twins[child]


def quantize_outputs(blocks: Iterable[nn.Module], bits: int) -> list[QuantActivation]:
    """Quantize what blocks give to their activation function, in place; to be calibrated.

    Args:
        blocks: Modules with an attribute `act`.
        bits: Width.

    Returns:
        The new activations, one for each block.
    """
    acts = []
    for block in blocks:
        device = next(block.parameters()).device
        block.act = QuantActivation(block.act, bits).to(device).train(block.training).requires_grad_(False)
        acts.append(block.act)
    return acts


@contextmanager
def evaluating(model: nn.Module):
    """Eval mode within the context; every module's own mode comes back."""
    modes = {m: m.training for m in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for m, training in modes.items():
            m.training = training


@contextmanager
def quantizers_off(quantizers: Iterable[Quantizer]):
    """Let values pass unquantized within the context."""
    quantizers = list(quantizers)
    was = [q.enabled for q in quantizers]
    try:
        for q in quantizers:
            q.enabled = False
        yield
    finally:
        for q, enabled in zip(quantizers, was):
            q.enabled = enabled


def calibrate(
    model: nn.Module, batches: Iterable[object], forward: Callable[[object], object], method: str = "mse"
) -> None:
    """Start every scale and offset: weights from themselves, activations from batches run in float.

    Batch norms in training mode use the batch's statistics, as in the training that follows (an untrained model has no
    others), and keep their own undisturbed; everything else runs in eval mode. All modes are restored.

    Args:
        model: Injected model.
        batches: What `forward` takes, one at a time.
        forward: Runs the model on one batch.
        method: "mse" or "lsq".

    Raises:
        RuntimeError: If a quantized convolution did not run on the batches.
    """
    convs = dict(quant_convs(model))
    with quantizers_off(q for m in convs.values() for q in (m.weight_quant, m.act_quant)):
        inputs = act_quantizers(model)
        seen = observe(model, inputs, batches, forward)
    for name, quant in inputs.items():
        if not seen[name].samples:
            raise RuntimeError(f"QC: convolution {name} did not run on the calibration batches; add it to skip.")
        if not quant.learned:
            continue
        quant.calibrate(seen[name].values, seen[name].low, method)
    for m in convs.values():
        m.weight_quant.calibrate(m.weight, method)


def calibrate_outputs(model: nn.Module, batches: Iterable[object], forward: Callable[[object], object]) -> None:
    """Set the grids of all quantized outputs from batches run with everything else quantized.

    Args:
        model: Model with quantized outputs, in eval mode.
        batches: What `forward` takes, one at a time.
        forward: Runs the model on one batch.
    """
    acts = dict(quant_activations(model))
    with quantizers_off(m.quant for m in acts.values()):
        seen = observe(model, {name: m.quant for name, m in acts.items()}, batches, forward)
    for name, m in acts.items():
        if seen[name].samples:  # a head that training alone uses does not run here: any grid does
            m.calibrate(seen[name].values, seen[name].low, seen[name].high)


def act_quantizers(model: nn.Module) -> dict[str, ActQuantizer]:
    """Quantizers of the convolutions' inputs; a shared one once, by its last reader's name."""
    last = {m.act_quant: name for name, m in quant_convs(model)}
    return {name: quant for quant, name in last.items()}


@torch.no_grad()
def observe(
    model: nn.Module,
    watched: dict[str, ActQuantizer],
    batches: Iterable[object],
    forward: Callable[[object], object],
    kind: Callable[[], Observer] = SampleObserver,
) -> dict[str, Observer]:
    """What reaches the watched quantizers, equalized; see `calibrate` for the modes the model runs in.

    Args:
        model: Injected model.
        watched: Name -> quantizer.
        batches: What `forward` takes, one at a time.
        forward: Runs the model on one batch.
        kind: Makes an observer for each.
    """
    observers = {name: kind() for name in watched}
    batch_norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    norms = {m: (m.training, m.track_running_stats) for m in batch_norms}
    hooks = [
        m.register_forward_pre_hook(lambda m, args, seen=observers[name]: seen.update(m.equalized(args[0])))
        for name, m in watched.items()
    ]
    try:
        with evaluating(model):
            for m, (training, tracking) in norms.items():
                m.training, m.track_running_stats = training, tracking and not training
            for batch in batches:
                forward(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for m, (_, tracking) in norms.items():
            m.track_running_stats = tracking
    return observers
