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

    Values and gradients of what it hands out are those of each layer's own `weight_quant` (rounded to half precision
    where that is asked for), in the memory format of the weight: convolutions take theirs from it. Flat buffers have
    each weight in the order of its memory, so that nothing is copied to get there.

    Args:
        model: Injected and calibrated model, whose frozen layers are frozen already: with those of the others, their
            weights would come with a graph, and backward would go through them.

    Attributes:
        names: Names of the convolutions (see `trained_convs`).
        convs: The convolutions.
        quants: Their weight quantizers.
        weights: Their weights.
        scales: Their weights' scales.
        sizes: Number of weights of each.
        codes: Codes at the last `read`, int8, flat.
        fixed: (free, held), where some weights have fixed codes, else None: 1 or, at a fixed one, 0; and 0 or its code.
            Both int8, flat.
    """

    def __init__(self, model: nn.Module):
        found = trained_convs(model)
        self.names, self.convs = list(found), list(found.values())
        self.quants = [conv.weight_quant for conv in self.convs]
        self.weights, self.scales = [conv.weight for conv in self.convs], [q.scale for q in self.quants]
        self.sizes = [w.numel() for w in self.weights]
        self._scales = [s.numel() for s in self.scales]
        device = next(model.parameters()).device
        self.codes = torch.empty(sum(self.sizes), dtype=torch.int8, device=device)
        counts = [n // m for n, m in zip(self.sizes, self._scales) for _ in range(m)]
        self._counts = torch.tensor(counts, device=device)  # of weights that share a scale
        lsq = [q.grad_scale(w) for q, w, m in zip(self.quants, self.weights, self._scales) for _ in range(m)]
        dtype = self.scales[0].dtype if found else None
        self._grad_scales = torch.tensor(lsq, dtype=dtype, device=device)
        self._layers = torch.tensor(self.sizes, device=device)
        self._lows, self._highs = (
            torch.tensor([float(getattr(q, bound)) for q in self.quants], device=device)
            for bound in ("quant_min", "quant_max")
        )
        self.fixed: tuple[Tensor, Tensor] | None = None
        self._positions: tuple[list[int], Tensor] | None = None
        self.read()

    @torch.no_grad()
    def read(self) -> None:
        """Compute the codes; to be called whenever weights or scales have changed."""
        self._positions = None
        if kernels.by_c(self.weights, self.scales):
            for w, quant, part in zip(self.weights, self.quants, self.codes.split(self.sizes)):
                native.read_codes(w, quant.scale, quant.quant_min, quant.quant_max, part)
        else:
            self.codes.copy_(self.clip_(self.positions().round()))
        self._fix()

    @torch.no_grad()
    def positions(self) -> Tensor:
        """Grid positions of all weights, not clipped; flat, FP32 at least, and kept until weights or scales change."""
        versions = [t._version for t in (*self.weights, *self.scales)]
        if self._positions is None or self._positions[0] != versions:
            self._positions = versions, widen(self.join(self.weights)) / self.spread(self.scales)
        return self._positions[1]

    def spread(self, scales: Sequence[Tensor]) -> Tensor:
        """What there is of each scale, for each weight; flat."""
        return torch.cat([*scales]).repeat_interleave(self._counts, output_size=sum(self.sizes))

    def join(self, tensors: Iterable[Tensor]) -> Tensor:
        """A flat buffer of tensors in the shapes of the weights."""
        return torch.cat([_line(t, w) for t, w in zip(tensors, self.weights)])

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Of each weight, the ends of its layer's range; flat."""
        low, high = (b.repeat_interleave(self._layers, output_size=sum(self.sizes)) for b in (self._lows, self._highs))
        return low, high

    def clip_(self, position: Tensor) -> Tensor:
        """Clip flat grid positions to each layer's range, in place."""
        return torch.clamp(position, *self.bounds(), out=position)

    def hand_out(self, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """Give each convolution its quantized weight, with gradients; to be called before each forward pass.

        Args:
            dtype: Of what is handed out, where the pass computes in half precision: one cast for all layers, in place
                of one for each and another for its gradient. None is the weights' own.

        Returns:
            The weights; none where all layers are frozen.
        """
        if not self.convs:
            return ()
        self._fix()  # what was fixed since
        return self.give(_Values.apply(self, dtype, *self.weights, *self.scales))

    def give(self, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Have each convolution compute with its value; returns them."""
        for conv, value in zip(self.convs, values):
            vars(conv)["given_weight"] = value  # nn.Module looks at each attribute that is set
        return values

    def values(self, codes: Tensor, scales: Sequence[Tensor], dtype: torch.dtype | None) -> tuple[Tensor, ...]:
        """scale * code of each layer, from flat codes, which need not be whole and are overwritten."""
        flat = codes.mul_(self.spread(scales)).to(dtype or self.weights[0].dtype)
        return tuple(self.by_layer(flat))

    def gradients(self, grads: Sequence[Tensor | None]) -> Tensor:
        """Flat gradients by what was handed out, FP32 at least; 0 where nothing used it."""
        dtype = next((g.dtype for g in grads if g is not None), None)
        there = (torch.zeros_like(w, dtype=dtype) if g is None else g for g, w in zip(grads, self.weights))
        return widen(self.join(there))

    def by_parameter(self, grads: Sequence[Tensor | None], by_weight: Tensor, by_scale: Tensor) -> list[Tensor | None]:
        """Gradients by each weight, then by each scale, from flat ones; None where nothing used what was handed out.

        Args:
            grads: By what was handed out.
            by_weight: Flat.
            by_scale: Terms that are to be summed up over the weights that share a scale, and multiplied by LSQ's
                gradient scale; flat.
        """
        rows = (self.sums(by_scale) * self._grad_scales).split(self._scales)
        weights = self.by_layer(by_weight.to(self.weights[0].dtype))
        return [g if used is not None else None for g, used in zip([*weights, *rows], [*grads, *grads])]

    def take_back(self) -> None:
        """Let each convolution quantize its weight by itself."""
        for conv in self.convs:
            vars(conv).pop("given_weight", None)

    def sums(self, flat: Tensor) -> Tensor:
        """Sums of a flat buffer over the weights that share a scale, in the order of the scales; one operation."""
        return torch.segment_reduce(flat, "sum", lengths=self._counts, unsafe=True)  # that the lengths fit is known

    def by_layer(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat buffer, one per layer, in the shapes and memory formats of the weights."""
        return [part.as_strided(w.shape, w.stride()) for part, w in zip(flat.split(self.sizes), self.weights)]

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
def weights_quantized_once(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Within the context, quantized weights stay what they are at its start, and are not computed again.

    Args:
        model: Injected and calibrated.
        dtype: As of `TrainedWeights.hand_out`.
    """
    convs = [conv for _, conv in quant_convs(model)]
    try:
        for conv in convs:
            conv.given_weight = conv.weight_quant(conv.weight).detach().to(dtype or conv.weight.dtype)
        yield
    finally:
        for conv in convs:
            conv.given_weight = None


def _line(x: Tensor, like: Tensor) -> Tensor:
    """x, of the shape of a dense tensor, as one line in the order of that tensor's memory; a view if x has it too."""
    return kernels.in_order_of(like, x).as_strided((x.numel(),), (1,))


class _Values(torch.autograd.Function):
    """scale * code of each weight, one node for all; a weight whose code is fixed gets no gradient.

    Layer by layer in C, or all in one flat buffer, as `annealed_rounding`.
    """

    @staticmethod
    def forward(ctx, layers, dtype, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)  # a weight that nothing used gets no gradient
        n = len(layers.convs)
        weights, scales = tensors[:n], tensors[n:]
        ctx.layers, ctx.free = layers, None if layers.fixed is None else layers.fixed[0]
        ctx.by_c = dtype is None and kernels.by_c(weights, scales)
        if ctx.by_c:
            codes = layers.by_layer(layers.codes)
            return tuple(c.to(w.dtype).mul_(per_slice(s, w)) for c, w, s in zip(codes, weights, scales))
        ctx.positions = layers.positions()
        return layers.values(widen(layers.codes), scales, dtype)

    @staticmethod
    def backward(ctx, *grads):
        layers, n = ctx.layers, len(grads)
        weights, scales = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        if ctx.by_c:
            free = [None] * n if ctx.free is None else layers.by_layer(ctx.free)
            found: list[Tensor | None] = [None] * 2 * n
            for i, (g, w, s, quant) in enumerate(zip(grads, weights, scales, layers.quants)):
                if g is not None:
                    grid = quant.quant_min, quant.quant_max, quant.grad_scale(w)
                    pair = gradients(g, w, s, None, *grid, free[i], free[i] is None, needed=(True, False))
                    found[i], found[n + i] = pair[:2]
            return None, None, *found
        grad, position, (low, high) = layers.gradients(grads), ctx.positions, layers.bounds()
        by_weight = grad * ((position > low) & (position < high))
        if ctx.free is not None:
            by_weight.mul_(ctx.free)
        by_scale = position.round().clamp_(low, high).mul_(grad).sub_(position * by_weight)
        return None, None, *layers.by_parameter(grads, by_weight, by_scale)
