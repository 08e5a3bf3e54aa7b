# yolo_qc_plugin, AGPL-3.0
"""Whether a trained model keeps the rules of runtimes whose integers are INT8 around 0, as TensorRT's are."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from ..config import QCError
from ..quant.activations import HeadOutput, quant_activations
from ..quant.layers import quant_convs
from .fold import FixedQuantizer, deployed_convs

INT8_MIN, INT8_MAX = -128, 127


def obstacles(model: nn.Module) -> Iterator[str]:
    """What of a quantized or deployed model does not fit, in words, each with the layer's name."""
    for name, low, high, codes in _layers(model):
        if low < INT8_MIN or high > INT8_MAX:
            yield f"the input of {name} has codes from {low} to {high} around its zero point"
        if codes.min() < -INT8_MAX:
            yield f"the weight of {name} has the code {INT8_MIN}"
    outputs = {name: act.act for name, act in quant_activations(model)}
    for name, m in model.named_modules():
        if isinstance(m, nn.Sequential) and len(m) and isinstance(m[0], FixedQuantizer):
            outputs[name] = m[1]
    for name, function in outputs.items():
        if isinstance(function, HeadOutput):
            yield f"the output of {name.rpartition('.')[0]} is quantized"
        else:
            yield f"the input of the activation function {name} is quantized"


def check_symmetric(model: nn.Module) -> None:
    """Refuse a model that does not fit.

    Raises:
        QCError: Naming the first obstacle, the number of the others, and the option to train with.
    """
    if found := list(obstacles(model)):
        raise QCError(
            f"QC: TensorRT takes INT8 codes with zero points of 0, but {found[0]}"
            + f" (and {len(found) - 1} more obstacles)" * (len(found) > 1)
            + "; train with callbacks=qc qc_target=tensorrt."
        )


def _layers(model: nn.Module) -> Iterator[tuple[str, int, int, Tensor]]:
    """Of each convolution, in whatever form: name, least and largest code of its input less the zero point, weight."""
    for name, conv in quant_convs(model):
        quant = conv.act_quant
        yield name, quant.quant_min - quant.zero_point, quant.quant_max - quant.zero_point, conv.weight_codes()
    for name, layer in deployed_convs(model).items():
        yield name, *layer.act_quant.range, layer.weight_codes
