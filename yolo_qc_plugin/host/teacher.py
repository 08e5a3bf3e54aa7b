# yolo_qc_plugin, AGPL-3.0
"""The float model that a run starts from, as its teacher: frozen, and with the spread of its features."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor, nn
from ultralytics import __version__ as ULTRALYTICS_VERSION
from ultralytics.nn.tasks import BaseModel, load_checkpoint

from ..config import QCConfig, QCError
from ..quant.modules import hooked
from .architecture import task_of
from .distributed import from_rank_0
from .record import write_checkpoint

FILE = "teacher.pt"  # in a run's weights/
FLOOR = 0.01  # least variance of a channel, as a share of the mean over its layer


class Teacher:
    """A float model in inference mode, and what its layers give.

    Args:
        model: Float model; it is copied, in half precision as its file holds it, so that a resumed run has the same.

    Attributes:
        model: The copy.
        spreads: Variance of each output channel of `feature_layers`, over images and places, FP32 of shape
            (channels,); set by `measure`, kept in the file.
    """

    def __init__(self, model: BaseModel):
        self.model = deepcopy(model).half().float().eval().requires_grad_(False)
        self.spreads: list[Tensor] = []

    @torch.no_grad()
    def measure(self, images: Iterable[Tensor]) -> None:
        """Measure the spreads over batches of images, as the model takes them; they must not be empty."""
        seen: dict[int, list[tuple[int, Tensor, Tensor]]] = {}

        def note(layer: int, output: Tensor) -> None:
            count = output.numel() // output.shape[1]
            seen.setdefault(layer, []).append((count, *torch.var_mean(output.float(), (0, 2, 3), correction=0)))

        layers = feature_layers(self.model)
        with hooked(m.register_forward_hook(lambda m, args, out, i=i: note(i, out)) for i, m in enumerate(layers)):
            for batch in images:
                self.model(batch)
        self.spreads = [_spread(seen[i]) for i in range(len(layers))]

    def broadcast(self) -> None:
        """Give every process the spreads that rank 0 has measured; to be called by all."""
        device = next(self.model.parameters()).device
        self.spreads = [s.to(device) for s in from_rank_0([s.cpu() for s in self.spreads])]

    def write(self, folder: Path) -> None:
        """Write the file: a float checkpoint as Ultralytics' own, with the spreads."""
        model = deepcopy(self.model).cpu().half()
        args = getattr(model, "args", {})  # a classifier in training has none, and would be taken for a detector
        args = {"task": task_of(model), **(args if isinstance(args, dict) else vars(args))}
        checkpoint = {"model": model, "spreads": [s.cpu() for s in self.spreads], "train_args": args}
        about = {"date": datetime.now().isoformat(), "version": ULTRALYTICS_VERSION, "epoch": -1}
        write_checkpoint({**checkpoint, **about, "ema": None, "optimizer": None, "train_metrics": {}}, folder / FILE)

    @classmethod
    def read(cls, folder: Path, device: torch.device | str = "cpu") -> Teacher:
        """Read what `write` wrote.

        Raises:
            QCError: If the file is missing.
        """
        file = Path(folder) / FILE
        if not file.exists():
            raise QCError(f"QC: {file} is missing: the run it belongs to draws its model to this float one.")
        model, checkpoint = load_checkpoint(file, device=device)
        self = cls(model)
        self.spreads = [s.to(device) for s in checkpoint["spreads"]]
        return self


def teacher_of(weights: Path, config: QCConfig, device: torch.device | str) -> Teacher | None:
    """The teacher that a run has left in its folder of checkpoints; None where nobody taught."""
    taught = config.teacher == "start" and (weights / FILE).exists()
    return Teacher.read(weights, device) if taught else None


def feature_layers(model: BaseModel) -> list[nn.Module]:
    """The top-level layers before the head that have parameters of their own, in the order they run."""
    return [layer for layer in model.model[:-1] if any(True for _ in layer.parameters())]


def _spread(parts: list[tuple[int, Tensor, Tensor]]) -> Tensor:
    """Variance of each channel, at least `FLOOR`, from (count, variance, mean) of each batch."""
    variances, means = (torch.stack(of_all) for of_all in zip(*(pair for _, *pair in parts)))
    counts = torch.tensor([count for count, *_ in parts], device=means.device)[:, None]
    mean = (counts * means).sum(0) / counts.sum()
    variance = (counts * (variances + (means - mean).square())).sum(0) / counts.sum()
    return (variance + FLOOR * variance.mean()).clamp_min(torch.finfo(torch.float32).tiny)
