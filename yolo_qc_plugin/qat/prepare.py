# yolo_qc_plugin, AGPL-3.0
"""Quantize the weights of a model ahead of its forward passes: codes once per optimizer step, then values of codes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..quant import kernels, native
from ..quant.functional import gradients, per_slice, widen
from ..quant.layers import QuantConv2d, quant_convs


def trained_convs(model: nn.Module) -> dict[str, QuantConv2d]:
    """Name -> quantized convolution whose weight or weight scale is trained, in model order."""
    return {n: c for n, c in quant_convs(model) if c.weight.requires_grad or c.weight_quant.scale.requires_grad}


class TrainedWeights:
    """All trained quantized weights of a model, and their codes, in flat buffers and in model order.

    Values and gradients of what it hands out are those of each layer's own `weight_quant`, in the memory format of the
    weight: convolutions take theirs from it. Flat buffers have each weight in the order of its memory, so that nothing
    is copied to get there.

    Args:
        model: Injected and calibrated model, whose frozen layers are frozen already: with those of the others, their
            weights would come with a graph, and backward would go through them.

    Attributes:
        names: Names of the convolutions (see `trained_convs`).
        convs: The convolutions.
        quants: Their weight quantizers.
        sizes: Number of weights of each.
        codes: Codes at the last `read`, int8, flat.
        fixed: (free, held), where some weights have fixed codes, else None: 1 or, at a fixed one, 0; and 0 or its code.
            Both int8, flat.
    """

    def __init__(self, model: nn.Module):
        found = trained_convs(model)
        self.names, self.convs = list(found), list(found.values())
        self.quants = [conv.weight_quant for conv in self.convs]
        self.sizes = [conv.weight.numel() for conv in self.convs]
        device = next(model.parameters()).device
        self.codes = torch.empty(sum(self.sizes), dtype=torch.int8, device=device)
        counts = [n // q.scale.numel() for n, q in zip(self.sizes, self.quants) for _ in range(q.scale.numel())]
        self._counts = torch.tensor(counts, device=device)  # of weights that share a scale
        self.fixed: tuple[Tensor, Tensor] | None = None
        self.read()

    @torch.no_grad()
    def read(self) -> None:
        """Compute the codes; to be called whenever weights or scales have changed."""
        weights, scales = [conv.weight for conv in self.convs], [q.scale for q in self.quants]
        if kernels.by_c(weights, scales):
            for w, quant, part in zip(weights, self.quants, self.codes.split(self.sizes)):
                native.read_codes(w, quant.scale, quant.quant_min, quant.quant_max, part)
        else:
            position, _ = self.positions(weights, scales)
            self.codes.copy_(self.clip_(position.round_()))
        self._fix()

    def positions(self, weights: Sequence[Tensor], scales: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Grid positions of all weights, and their scales; flat, FP32 at least.

        Args:
            weights: Of each layer.
            scales: Of each layer.
        """
        scale = torch.cat([*scales]).repeat_interleave(self._counts, output_size=sum(self.sizes))
        return self.join(map(widen, weights)).div_(scale), scale

    def join(self, tensors: Iterable[Tensor]) -> Tensor:
        """A flat buffer of tensors in the shapes of the weights."""
        return torch.cat([_line(t, conv.weight) for t, conv in zip(tensors, self.convs)])

    def clip_(self, position: Tensor) -> Tensor:
        """Clip flat grid positions to each layer's range, in place."""
        parts = position.split(self.sizes)
        torch._foreach_clamp_min_(parts, [float(q.quant_min) for q in self.quants])
        torch._foreach_clamp_max_(parts, [float(q.quant_max) for q in self.quants])
        return position

    def hand_out(self) -> tuple[Tensor, ...]:
        """Give each convolution its quantized weight, with gradients; to be called before each forward pass.

        Returns:
            The weights.
        """
        self._fix()  # what was fixed since
        free = [None] * len(self.convs) if self.fixed is None else self.by_layer(self.fixed[0])
        weights, scales = [conv.weight for conv in self.convs], [q.scale for q in self.quants]
        found = _Values.apply(self.by_layer(self.codes), self.quants, free, *weights, *scales)
        for conv, value in zip(self.convs, found):
            conv.given_weight = value
        return found

    def take_back(self) -> None:
        """Let each convolution quantize its weight by itself."""
        for conv in self.convs:
            conv.given_weight = None

    def sums(self, flat: Tensor) -> Tensor:
        """Sums of a flat buffer over the weights that share a scale, in the order of the scales; one operation."""
        return torch.segment_reduce(flat, "sum", lengths=self._counts, unsafe=True)  # that the lengths fit is known

    def by_layer(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat buffer, one per layer, in the shapes and memory formats of the weights."""
        weights = [conv.weight for conv in self.convs]
        return [part.as_strided(w.shape, w.stride()) for part, w in zip(flat.split(self.sizes), weights)]

    def saved(self, flat: Tensor) -> Tensor:
        """A flat buffer as a file has it, whatever the memory format: in the order of the weights' indices."""
        return torch.cat([part.reshape(-1) for part in self.by_layer(flat)])

    def load(self, flat: Tensor, saved: Tensor) -> None:
        """Fill a flat buffer with what `saved` gave of one."""
        for part, values in zip(self.by_layer(flat), saved.split(self.sizes)):
            part.copy_(values.view(part.shape))

    def _fix(self) -> None:
        if self.fixed is not None:
            free, held = self.fixed
            self.codes.mul_(free).add_(held)


@contextmanager
def weights_quantized_once(model: nn.Module) -> Iterator[None]:
    """Within the context, quantized weights stay what they are at its start, and are not computed again."""
    convs = [conv for _, conv in quant_convs(model)]
    try:
        for conv in convs:
            conv.given_weight = conv.weight_quant(conv.weight).detach()
        yield
    finally:
        for conv in convs:
            conv.given_weight = None


def _line(x: Tensor, like: Tensor) -> Tensor:
    """x, of the shape of a dense tensor, as one line in the order of that tensor's memory; a view if x has it too."""
    return kernels.in_order_of(like, x).as_strided((x.numel(),), (1,))


class _Values(torch.autograd.Function):
    """scale * code of each weight, one node for all; a weight whose code is fixed gets no gradient."""

    @staticmethod
    def forward(ctx, codes, quants, free, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)  # a weight that nothing used gets no gradient
        ctx.quants, ctx.free = quants, free
        weights, scales = tensors[: len(codes)], tensors[len(codes) :]
        return tuple(c.to(w.dtype).mul_(per_slice(s, w)) for c, w, s in zip(codes, weights, scales))

    @staticmethod
    def backward(ctx, *grads):
        n = len(grads)
        found = [None] * 2 * n
        for i, (grad, quant, free) in enumerate(zip(grads, ctx.quants, ctx.free)):
            if grad is not None:
                weight, scale = ctx.saved_tensors[i], ctx.saved_tensors[n + i]
                grid = quant.quant_min, quant.quant_max, quant.grad_scale(weight)
                compiled = free is None and kernels.usable(weight, scale, None)
                pair = gradients(grad, weight, scale, None, *grid, free, compiled, needed=(True, False))
                found[i], found[n + i] = pair[:2]
        return None, None, None, *found
