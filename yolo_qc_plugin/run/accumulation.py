# yolo_qc_plugin, AGPL-3.0
"""Which micro-batches wait for an optimizer step."""

from __future__ import annotations

from ultralytics.engine.trainer import BaseTrainer


class Accumulation:
    """Counts the micro-batches since the last optimizer step; in a resumed run it also decides when one is due.

    Ultralytics counts from the start of the process: a resumed run would step after other micro-batches than the
    uninterrupted one.

    Attributes:
        pending: Micro-batches whose gradients wait for a step.
    """

    def __init__(self):
        self.pending = 0
        self._step = None  # in a resumed run: the trainer's own method

    def take_over(self, trainer: BaseTrainer) -> None:
        """Step where the uninterrupted run would; the trainer's own calls do nothing from now on.

        There is no event between the backward pass and the step, hence the method of this one trainer is replaced.
        """
        self._step = trainer.optimizer_step
        trainer.optimizer_step = lambda: None

    def count(self, trainer: BaseTrainer) -> None:
        """Count one micro-batch, when it ends."""
        self.pending += 1
        if self._step and self.pending >= trainer.accumulate:
            self._step()
        self.settle(trainer)

    def settle(self, trainer: BaseTrainer) -> None:
        """Nothing is pending where gradients are gone: after a step, and where an epoch is started again."""
        groups = trainer.optimizer.param_groups  # the model's own list of them is made anew by walking through it
        if all(p.grad is None for group in groups for p in group["params"]):
            self.pending = 0
