# yolo_qc_plugin, AGPL-3.0
"""The host's multi-GPU training on a CPU: its launcher, its generated script and its loop, over gloo.

Adapted is what names a GPU: the number of processes, the process group, the device of the model and of its validation.
A module of its own because the worker processes import it, too.
"""

from __future__ import annotations

import hashlib
from datetime import timedelta
from types import SimpleNamespace

import torch
import ultralytics.engine.validator as validator_module
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import LOCAL_RANK, RANK
from ultralytics.utils.torch_utils import unwrap_model

from yolo_qc_plugin.quant.layers import scale_parameters

CPU = torch.device("cpu")


class OnCPU(DistributedDataParallel):
    """Without the list of GPUs."""

    def __init__(self, module, device_ids, **kwargs):
        super().__init__(module, **kwargs)


class GlooTrainer(DetectionTrainer):
    """Two processes on a CPU; keeps the batches of the training, for another run to train on the same."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.world_size, self.ddp = 2, LOCAL_RANK == -1
        self.batches = []

    def _setup_ddp(self):
        nn.parallel.DistributedDataParallel = OnCPU
        backend = validator_module.AutoBackend
        validator_module.get_torch_device_backend = lambda _: SimpleNamespace(current_device=lambda: 0)
        validator_module.AutoBackend = lambda **kwargs: backend(**{**kwargs, "device": CPU})
        # what waits for another process in vain fails soon
        dist.init_process_group("gloo", rank=RANK, world_size=self.world_size, timeout=timedelta(seconds=60))

    def preprocess_batch(self, batch):
        self.batches.append({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in batch.items()})
        return super().preprocess_batch(batch)


def states(trainer) -> dict:
    """Of model and EMA."""
    pair = {"model": unwrap_model(trainer.model).state_dict(), "ema": trainer.ema.ema.state_dict()}
    return {k: {name: v.clone() for name, v in state.items()} for k, state in pair.items()}


def digest(tensors) -> str:
    """A digest of all bits."""
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()


class Record:
    """Writes what each rank sees to a file: states at the start and the end of training, scales after each batch."""

    def __init__(self):
        self.found = {"scales": [], "instances": [], "images": []}

    def write(self, trainer) -> None:
        torch.save(self.found, trainer.save_dir / f"rank{RANK}.pt")

    def on_train_start(self, trainer) -> None:
        self.found["start"] = states(trainer)
        self.found["quantizers"] = digest(t for name, t in self.found["start"]["model"].items() if "_quant." in name)
        trainer.batches.clear()

    def on_train_batch_end(self, trainer) -> None:
        model = unwrap_model(trainer.model)
        self.found["scales"].append(digest(scale_parameters(model)))

    def on_train_epoch_end(self, trainer) -> None:
        self.found.update(end=states(trainer), batches=list(trainer.batches))
        self.write(trainer)

    def on_val_end(self, validator) -> None:
        self.found["instances"].append(int(validator.metrics.nt_per_class.sum()))

    def on_train_end(self, trainer) -> None:
        """Of the correction: it comes after `batches`."""
        later = trainer.batches[len(self.found["batches"]) :]
        self.found["corrected"] = [file for batch in later for file in batch["im_file"]]
        self.write(trainer)

    def events(self) -> dict:
        """Event name -> callback."""
        return {name: getattr(self, name) for name in dir(self) if name.startswith("on_")}
