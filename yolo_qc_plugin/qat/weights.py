# yolo_qc_plugin, AGPL-3.0
"""Quantize all weights of a model together, before each forward pass of training."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..quant.foreach import fake_quantize_all
from ..quant.layers import QuantConv2d, quant_convs


class WeightsTogether:
    """Computes all quantized weights that are trained and leaves each with its quantizer, which hands it out once.

    What changes a weight or a scale before that, and passes without gradients, compute it anew, as without this. The
    values serve all micro-batches of an optimizer step, until `forget` or a change of any weight or scale.

    Args:
        model: Injected model, whose frozen layers are frozen already.
        free: See `fake_quantize_all`; in the order of `trained_convs`.
    """

    def __init__(self, model: nn.Module, free: Sequence[Tensor] | None = None):
        # not those of frozen layers: with the others' they would come with a graph, and backward would go through them
        self.convs = list(trained_convs(model).values())
        self.quants = [conv.weight_quant for conv in self.convs]
        self.ranges = [(q.quant_min, q.quant_max) for q in self.quants]
        self.grad_scales = [q.grad_scale(conv.weight) for q, conv in zip(self.quants, self.convs)]
        self.free = free
        self._values: tuple[list[int], list[Tensor]] | None = None  # versions of what they were computed of, and they

    def prepare(self) -> tuple[Tensor, ...]:
        """Compute them, with gradients; to be called before a forward pass."""
        weights, scales = [conv.weight for conv in self.convs], [q.scale for q in self.quants]
        versions = [t._version for t in (*weights, *scales)]
        values = self._values[1] if self._values and self._values[0] == versions else None
        results = fake_quantize_all(weights, scales, self.ranges, self.grad_scales, self.free, values)
        self._values = versions, [result.detach() for result in results]
        for quant, weight, result in zip(self.quants, weights, results):
            quant.keep(weight, result)
        return results

    def forget(self) -> None:
        """Let go of the values, which an optimizer step has made old."""
        self._values = None


def trained_convs(model: nn.Module) -> dict[str, QuantConv2d]:
    """Name -> quantized convolution whose weight or weight scale is trained, in model order."""
    return {n: c for n, c in quant_convs(model) if c.weight.requires_grad or c.weight_quant.scale.requires_grad}
