# yolo_qc_plugin, AGPL-3.0
"""What oscillation costs a finished model: its figures by hard and by soft rounding, on the same validation images."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.nn.tasks import load_checkpoint

from ..host import log
from ..quant.soft_rounding import HARD, SOFT, round_within
from .validation import validate

PIXELS = 64 * 320 * 320  # of all images together: both passes take seconds on a CPU


class FirstImages(Dataset):
    """A data set that ends after some images, and else is what it was.

    Args:
        dataset: The data set.
        count: So many images, at most its own number.
    """

    def __init__(self, dataset: Any, count: int):
        self._dataset, self._count = dataset, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        return self._dataset[index]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)


def measure_rounding(trainer: BaseTrainer, file: Path) -> dict[str, Any]:
    """Measure a checkpoint by hard and by soft rounding on the first validation images; the trainer stays as it is.

    Args:
        trainer: Set up; its validator is used, and the data set of its loader.
        file: Checkpoint without QC.

    Returns:
        "k" of soft rounding; "images", how many; "hard" and "soft", the task's figures as `figures_of` names them.
    """
    validator, loader = trainer.validator, trainer.test_loader
    count = min(max(PIXELS // trainer.args.imgsz**2, 1), len(loader.dataset))
    if count > loader.batch_size:  # whole batches: each has a shape of its own
        count -= count % loader.batch_size
    log.info(f"measuring soft rounding on {count} images")
    found: dict[str, Any] = {"k": SOFT, "images": count}
    before = deepcopy(validator.metrics)
    validator.dataloader = DataLoader(
        FirstImages(loader.dataset, count), batch_size=loader.batch_size, collate_fn=loader.collate_fn
    )
    try:
        for name, k in (("hard", HARD), ("soft", SOFT)):
            model, _ = load_checkpoint(file, device=trainer.device)
            model.fuse = lambda *_, model=model, **__: model  # its deployed form rounds everything
            round_within(model, k)
            with log.quiet():
                found[name] = validate(trainer, model)
    finally:
        validator.dataloader, validator.metrics = loader, before
    return found
