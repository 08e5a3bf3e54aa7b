# yolo_qc_plugin, AGPL-3.0
"""Several processes, one a device: what they take from rank 0, and what rank 0 does alone.

Ultralytics' launcher starts them, and DistributedDataParallel gives every rank the float weights of rank 0 and, at
every step, the sum of all gradients, those of scales and offsets included. So ranks that begin with equal scales stay
equal. Every rank injects, measures the float model with the others and keeps its own EMA, as Ultralytics does.

    calibration   rank 0, from its share of the training images; its model is broadcast
    correction    rank 0, after training, over all images, in batches of one device; gradients are summed to the global
                  batch. The other ranks have left by then and wait for nothing, so that no time limit of a collective
                  operation can end a long correction.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed as dist
from torch import nn
from torch.utils.data import DataLoader


def broadcast_model(model: nn.Module) -> None:
    """Give every rank what rank 0 has set from data, scales and all; does nothing in a single process.

    To be called by all ranks.

    Args:
        model: Injected model, not wrapped.
    """
    if not dist.is_initialized():
        return
    state = model.state_dict()
    for tensor in state.values():
        dist.broadcast(tensor, src=0)
    model.load_state_dict(state)  # quantizers read their range, which they also keep as plain numbers


def from_rank_0(value: Any) -> Any:
    """What rank 0 has, for every rank; the value itself in a single process. To be called by all ranks.

    Args:
        value: Anything that can be pickled; tensors on the CPU.
    """
    found = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    return found[0]


def at_rank_0(items: list) -> list:
    """The items of all ranks, on rank 0; on other ranks their own. To be called by all ranks.

    Args:
        items: Anything that can be pickled; tensors on the CPU.
    """
    if not dist.is_initialized():
        return items
    parts: list[list] = [[]] * dist.get_world_size()
    dist.gather_object(items, parts if dist.get_rank() == 0 else None, dst=0)
    return [item for part in parts for item in part] or items


@contextmanager
def alone() -> Iterator[None]:
    """Within the context, collective operations wait for no other rank, and the world has one process.

    For rank 0 once the others have left: Ultralytics' validator gathers from all ranks.
    """
    everyone = dist.group.WORLD if dist.is_initialized() else None
    if everyone is None:
        yield
        return
    only = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    dist.group.WORLD = only  # type: ignore[assignment]  # a group for members, of which this rank is one
    try:
        yield
    finally:
        dist.group.WORLD = everyone


def whole(loader: DataLoader, shuffle: bool) -> DataLoader:
    """A loader of all images, in the batches of `loader`, which gives this process its share of them."""
    return type(loader)(
        dataset=loader.dataset,
        batch_size=loader.batch_size,
        shuffle=shuffle,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        prefetch_factor=loader.prefetch_factor,
        generator=loader.generator,
    )
