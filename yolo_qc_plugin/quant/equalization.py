# yolo_qc_plugin, AGPL-3.0
"""Equalization of activations: channels of one tensor share a scale, so let them fill the same range first.

    conv(x, w) = conv(x * e, w / e)        for any e > 0 per channel of x

With e chosen before training such that every channel of x * e has the same root mean square, small channels keep more
than one or two of a low-bit grid's steps. As SmoothQuant has it (Xiao et al., ICML 2023, equations 3 and 4) and
cross-layer equalization (Nagel et al., ICCV 2019), but all the way to the weights, whose scales are learned, and in
powers of two: x * e has the digits of x, so that nothing is rounded twice and codes agree in every runtime.

It costs one multiplication per value of an equalized tensor in training. At inference it costs more where the runtime
would compute activation functions in integers: ONNX Runtime does not where a product follows (docs/deployment.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .calibrate import act_quantizers, observe, quantizers_off
from .layers import quant_convs
from .observers import TINY, ChannelObserver

SMALLEST = 2.0**-6  # of the mean size: a channel of next to nothing is not blown up to one


@torch.no_grad()
def equalize(model: nn.Module, batches: Iterable[object], forward: Callable[[object], object]) -> None:
    """Set every equalizer and divide the weights that read it by it, in place; to be done before calibration.

    Args:
        model: Injected model whose equalizers are 1. One without any stays as it is.
        batches: What `forward` takes, one at a time; run in float, batch norms as in `inject.calibrate`.
        forward: Runs the model on one batch.
    """
    convs = dict(quant_convs(model))
    inputs = {name: q for name, q in act_quantizers(model).items() if q.equalizer is not None}
    if not inputs:
        return
    with quantizers_off(q for m in convs.values() for q in (m.weight_quant, m.act_quant)):
        seen = observe(model, inputs, batches, forward, ChannelObserver)
    for name, quant in inputs.items():
        if seen[name].count:  # one that did not run is named by the calibration
            quant.equalizer.copy_(equalizing_factors(seen[name].root_mean_square))
    for conv in convs.values():
        if conv.act_quant.equalizer is not None:
            conv.multiply_inputs(1 / conv.act_quant.equalizer)


def equalizing_factors(root_mean_square: Tensor) -> Tensor:
    """Powers of two, of geometric mean near 1, that bring channels to one root mean square up to a factor of sqrt(2).

    Worked numbers: channels of 0.1, 0.4 and 1.6 get the factors 4, 1 and 1/4.

    Args:
        root_mean_square: Of each channel, shape (channels,).
    """
    size = torch.log2(root_mean_square.clamp(min=float(root_mean_square.mean()) * SMALLEST + TINY))
    return torch.exp2((size.mean() - size).round())
