# yolo_qc_plugin, AGPL-3.0
"""All offsets brought to their grids together: what one by one gives, and never a stale one."""

import copy
import pickle

import torch
from torch import nn

from yolo_qc_plugin.qat.offsets import OffsetsTogether
from yolo_qc_plugin.quant.quantizer import ActQuantizer


def quantizers() -> nn.ModuleList:
    """Offsets on, between and beyond the grid's points; the last but one is frozen, the last has no offset."""
    quants = nn.ModuleList([ActQuantizer(4, True) for _ in range(6)] + [ActQuantizer(4, False)])
    for quant, steps in zip(quants, (0.0, -2.4, -2.5, 1.3, -40.0, -3.3)):
        quant.scale.data.fill_(0.3)
        quant.offset.data.fill_(0.3 * steps)
    return quants.requires_grad_(True)


def test_values_and_gradients_are_those_of_each_alone():
    alone = quantizers()
    together = copy.deepcopy(alone)
    alone[5].requires_grad_(False)
    together[5].requires_grad_(False)
    offsets = OffsetsTogether(together)
    assert offsets.quants == list(together[:5])
    offsets.prepare()
    for quants in (alone, together):
        sum((i + 1) * q.grid_offset() for i, q in enumerate(quants[:4])).backward()
    assert torch.equal(*(torch.cat([q.grid_offset() for q in quants[:6]]) for quants in (alone, together)))
    assert [round((q.grid_offset() / q.scale).item(), 4) for q in together[:6]] == [0, -2, -2, 0, -15, -3]
    assert [q.offset.grad.item() for q in together[:4]] == [q.offset.grad.item() for q in alone[:4]] == [1, 2, 3, 4]
    assert together[4].offset.grad is None and not together[5].grid_offset().requires_grad


def test_a_kept_offset_is_used_until_something_changes():
    """It is not computed again within a step; not used without gradients, after a step, or by a copy."""
    quants = quantizers()
    quant = quants[1]
    OffsetsTogether(quants).prepare()
    kept = quant.grid_offset()
    assert quant.grid_offset() is kept
    with torch.no_grad():
        assert quant.grid_offset() is not kept
        for other in (copy.deepcopy(quant), pickle.loads(pickle.dumps(quant))):
            assert other._grid_offset is None
        quant.offset.sub_(0.3)
    assert round((quant.grid_offset() / quant.scale).item(), 4) == -3
    OffsetsTogether(quants).prepare()
    with torch.no_grad():
        quant.scale.mul_(2)
    assert round((quant.grid_offset() / quant.scale).item(), 4) == -2  # -1.7 steps of 0.6


def test_a_model_without_offsets_has_nothing_to_prepare():
    OffsetsTogether(nn.ModuleList([ActQuantizer(4, False)])).prepare()
