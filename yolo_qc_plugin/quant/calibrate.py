# yolo_qc_plugin, AGPL-3.0
"""Start scales and offsets from data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..config import QCError
from .activations import quant_activations
from .layers import quant_convs
from .modules import evaluating, hooked
from .observers import SampleObserver
from .quantizer import ActQuantizer, Quantizer
from .taps import taps


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
    convs, inputs = dict(quant_convs(model)), act_quantizers(model)
    with quantizers_off([*(m.weight_quant for m in convs.values()), *inputs.values()]):
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
    """Quantizers of the convolutions' inputs and of taps; a shared one once, by its last reader's name."""
    last: dict[ActQuantizer, str] = {tap.act_quant: name for name, tap in taps(model)}
    last |= {conv.act_quant: name for name, conv in quant_convs(model)}
    return {name: quant for quant, name in last.items()}


@torch.no_grad()
def observe(
    model: nn.Module,
    watched: dict[str, ActQuantizer],
    batches: Iterable[object],
    forward: Callable[[object], object],
) -> dict[str, SampleObserver]:
    """What reaches the watched quantizers; see `calibrate` for the modes the model runs in.

    Args:
        model: Injected model.
        watched: Name -> quantizer.
        batches: What `forward` takes, one at a time.
        forward: Runs the model on one batch.
    """
    observers = {name: SampleObserver() for name in watched}
    batch_norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    norms = {m: (m.training, m.track_running_stats) for m in batch_norms}

    def look(name: str, x: Tensor) -> None:
        try:
            observers[name].update(x)
        except ValueError as error:
            raise QCError(f"QC: at {name} {error}; give a model and images that are sound.") from None

    hooks = (m.register_forward_pre_hook(lambda m, args, name=name: look(name, args[0])) for name, m in watched.items())
    try:
        with hooked(hooks), evaluating(model):
            for m, (training, tracking) in norms.items():
                m.training, m.track_running_stats = training, tracking and not training
            for batch in batches:
                forward(batch)
    finally:
        for m, (_, tracking) in norms.items():
            m.track_running_stats = tracking
    return observers
