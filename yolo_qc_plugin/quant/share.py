# yolo_qc_plugin, AGPL-3.0
"""One quantizer for all that read one tensor, and, where the target wants that, for what is concatenated."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor, nn

from .watch import Watched


def share_quantizers(model: nn.Module, image: Tensor, joined: bool = False) -> int:
    """Give convolutions that read one tensor one quantizer of it, in place; to be done before calibration.

    In an exported graph the tensor is then quantized once, as in training, and its producer becomes an integer
    operation if one quantizer is all that reads it. Quantizers of different widths stay apart.

    Those that read the image are not learned but fixed to the range [0, 1]: 8-bit codes are then the bytes it was made
    of, and backward ends there (at the image, the gradient that a scale would need takes a sixteenth of the step).

    Args:
        model: Injected model.
        image: What the model takes, of any size; it runs on it once, in eval mode.
        joined: Have tensors that hold values of one another (what is concatenated, split, pooled or enlarged) count as
            one tensor.

    Returns:
        Number of quantizers that went.
    """
    watched = Watched(model, image)
    owners: list[Any] = [m for m in model.modules() if hasattr(m, "act_quant")]
    groups = {owner.act_quant.bits: _Groups() for owner in owners}
    for tensor, quant in watched.reads:
        groups[quant.bits].join(tensor, quant)
    for tensors in watched.same if joined else ():
        for group in groups.values():
            group.join(*tensors)
    first: dict[tuple, Any] = {}
    gone = 0
    for owner in owners:
        quant, group = owner.act_quant, groups[owner.act_quant.bits]
        key = quant.bits, group.root(quant)
        if key not in first and group.root(quant) == group.root(image):
            quant.set_signed(quant.int8 and quant.bits == 8)
            quant.fix(1 / quant.quant_max)
        owner.act_quant = first.setdefault(key, quant)
        gone += owner.act_quant is not quant
    for quant, readers in Counter(owner.act_quant for owner in owners).items():
        quant.readers = readers
    return gone


class _Groups:
    """Objects that belong together; they have to stay alive."""

    def __init__(self) -> None:
        self._up: dict[int, int] = {}

    def root(self, a: object) -> int:
        """A number that all of one group have in common."""
        key = id(a)
        while (up := self._up.get(key, key)) != key:
            key = up
        return key

    def join(self, first: object, *others: object) -> None:
        """Have objects, and the groups that they are in, belong together."""
        for other in others:
            self._up[self.root(other)] = self.root(first)
