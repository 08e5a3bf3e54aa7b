# yolo_qc_plugin, AGPL-3.0
"""Soft rounding leaves what lies between grid points as it is."""

from __future__ import annotations

import pytest
import torch

from yolo_qc_plugin.quant.quantizer import ActQuantizer
from yolo_qc_plugin.quant.soft_rounding import HARD, SOFT, soft_values


@pytest.mark.parametrize("bits,offset", [(4, True), (3, False)])
def test_soft_rounding(bits, offset):
    """Within half a step of a grid point it is the rounding of training; within less, values between keep theirs."""
    quant = ActQuantizer(bits, offset)
    with torch.no_grad():
        quant.scale.fill_(0.25)
    x = torch.linspace(-3, 8, 4001)
    assert torch.equal(soft_values(quant, HARD, x), quant(x))
    soft, hard = soft_values(quant, SOFT, x), quant(x)
    kept = soft != hard
    inside = (x > quant.quant_min * 0.25) & (x < quant.quant_max * 0.25)
    assert (kept & ~inside).sum() == 0 and 0.05 < kept[inside].float().mean() < 0.15
    assert torch.allclose(soft[kept], x[kept])
