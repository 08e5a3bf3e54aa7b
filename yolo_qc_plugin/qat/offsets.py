# yolo_qc_plugin, AGPL-3.0
"""Bring all offsets of a model to their grids together, before each forward pass of training."""

from __future__ import annotations

from torch import nn

from ..quant.foreach import snap_all
from ..quant.quantizer import ActQuantizer


class OffsetsTogether:
    """Computes all grid offsets that are trained and leaves each with its quantizer, until scale or offset changes.

    Args:
        model: Injected model, whose frozen layers are frozen already.
    """

    def __init__(self, model: nn.Module):
        quants = (m for m in model.modules() if isinstance(m, ActQuantizer) and m.offset is not None)
        self.quants = [q for q in quants if q.offset.requires_grad]
        self.most = [q.quant_max for q in self.quants]

    def prepare(self) -> None:
        """Compute them, with gradients; to be called before a forward pass."""
        if not self.quants:  # act_offset=False
            return
        results = snap_all([q.offset for q in self.quants], [q.scale for q in self.quants], self.most)
        for quant, result in zip(self.quants, results):
            quant.keep_grid_offset(result)
