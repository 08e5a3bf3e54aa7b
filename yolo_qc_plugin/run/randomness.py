# yolo_qc_plugin, AGPL-3.0
"""Where the random course of a training run stands: number generators, order of images, images to make mosaics of.

The loader's part is for a loader without worker processes, as on a CPU. With workers the order of images goes on from
where it was drawn ahead to, and the workers' own generators and images start anew.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from ultralytics.engine.trainer import BaseTrainer


def random_state(trainer: BaseTrainer) -> dict:
    """The state at the start of an epoch, in plain tensors and values."""
    loader = trainer.train_loader
    numbers: dict = np.random.get_state(legacy=False)
    key = torch.from_numpy(numbers["state"]["key"].astype(np.int64))
    return {
        "python": random.getstate(),
        "numpy": {**numbers, "state": {**numbers["state"], "key": key}},
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(trainer.device) if trainer.device.type == "cuda" else None,
        "order": loader.generator.get_state(),
        "under way": trainer.epoch > trainer.start_epoch,  # else the loader begins
        "mosaic": list(getattr(loader.dataset, "buffer", ())),
    }


def set_random_state(trainer: BaseTrainer, state: dict) -> None:
    """Bring a trainer whose loader has given no batch yet to where another one was."""
    loader = trainer.train_loader
    for i in state["mosaic"]:
        loader.dataset.load_image(i)
    if state["under way"] and loader.num_workers == 0:
        # Ultralytics' iterator never ends: it stands behind the last batch of a pass, of which no image is needed
        loader.iterator = loader._get_iterator()
        for _ in range(len(loader)):
            next(loader.iterator._sampler_iter)
    loader.generator.set_state(state["order"])
    numbers = state["numpy"]
    key = numbers["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state({**numbers, "state": {**numbers["state"], "key": key}})
    random.setstate(state["python"])
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], trainer.device)
