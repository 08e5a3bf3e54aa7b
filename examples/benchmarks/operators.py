# yolo_qc_plugin, AGPL-3.0
"""What a training step asks of the device: operations, each a kernel or more, and reads that wait for it.

Counted on the profile of one step of the stock loop. On a CPU an operation is a call of an operator that computes
something, views and allocations left out; a call on a list of tensors (foreach) is one, and so is a call of the
quantizer's compiled passes, and weights are not rounded in C; a read is a call of an operator of WAITS. On CUDA an
operation is a kernel that ran, and a read is what torch.cuda.set_sync_debug_mode warns of.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from ultralytics import YOLO

from yolo_qc_plugin import add_qc_callbacks
from yolo_qc_plugin.quant import kernels

# reads of values, which on CUDA wait for the device; the last is torch.tensor(numbers), a copy to it that waits
WAITS = "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::lift_fresh"
# of these and of what begins so, nothing is computed
VIEWS = set(
    """view reshape detach as_strided expand permute transpose t select slice narrow split split_with_sizes unbind chunk
    unsqueeze squeeze alias lift_fresh resolve_conj resolve_neg resize_ set_ to item unflatten flatten view_as
    _reshape_alias expand_as numpy_T movedim result_type contiguous _unsafe_view as_strided_ unfold""".split()
)
STEP = 3  # the third: by then all is compiled and allocated
OURS = "quantizer's pass"


class Counted(Exception):
    """Ends a run whose step is counted."""


class OneStep:
    """Callbacks that profile one step of a run and end it.

    Attributes:
        operations: Of the step.
        waits: Operator, or on CUDA file and line -> number of reads.
        names: Operator, on CUDA kernel -> number of calls among `operations`.
        busy: On CUDA: ms that the kernels took together, which is what a step takes where nothing waits for Python.
    """

    def __init__(self) -> None:
        self.operations = 0
        self.waits: Counter[str] = Counter()
        self.names: Counter[str] = Counter()
        self.busy: float | None = None
        self._begun = 0
        self._profile: profile | None = None
        self._watch = ExitStack()

    def begin(self, trainer) -> None:
        """on_train_batch_start."""
        self._begun += 1
        if self._begun == STEP:
            cuda = trainer.device.type == "cuda"
            self._profile = profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda])
            if cuda:
                self._warned = self._watch.enter_context(warnings.catch_warnings(record=True))
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                self._watch.callback(torch.cuda.set_sync_debug_mode, "default")
            self._profile.__enter__()

    def end(self, trainer) -> None:
        """on_train_batch_end, after all others."""
        if self._profile is None:
            return
        self._watch.close()
        self._profile.__exit__(None, None, None)  # waits for what was launched
        events = self._profile.events()
        if trainer.device.type == "cuda":
            # annotations of a CPU's spans are shown on the device too
            ran = [
                e for e in events if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False)
            ]
            self.busy = sum(e.time_range.elapsed_us() for e in ran) / 1e3
            self.names = Counter(e.name for e in ran)
            self.operations = self.names.total()
            found = (w for w in self._warned if "synchronizing CUDA operation" in str(w.message))
            self.waits = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in found)
        else:
            self.operations = sum(map(self._count, (e for e in events if e.cpu_parent is None)))
            self.waits = Counter(e.name for e in events if e.name in WAITS)
        raise Counted

    def _count(self, event: Any) -> int:
        """Operations of an event and of what it calls."""
        kind, _, name = event.name.partition("::")
        if event.name == OURS or name.startswith("_foreach"):
            inside = 0
        else:
            inside = sum(map(self._count, event.cpu_children))
            if inside or kind != "aten" or name in VIEWS or name.startswith(("empty", "new_empty")):
                return inside
        self.names[event.name] += 1
        return 1


def one_step(
    model: str, data: Path, options: dict | None, imgsz: int, batch: int, device: str = "cpu", **arguments
) -> OneStep:
    """Train up to the step that is counted.

    Args:
        model: What `YOLO` takes.
        data: YAML of the data set, of three batches at least.
        options: Of the plugin; None trains in float.
        imgsz: Side of the images.
        batch: Images of a batch.
        device: As Ultralytics takes it.
        **arguments: Of `train`.
    """
    counted, yolo = OneStep(), YOLO(model)
    if options is not None:
        add_qc_callbacks(yolo, **options)
    yolo.add_callback("on_train_batch_start", counted.begin)
    yolo.add_callback("on_train_start", lambda t: t.callbacks["on_train_batch_end"].append(counted.end))
    yolo.add_callback("on_pretrain_routine_end", use_foreach)
    with counted_as_on_a_gpu(), suppress(Counted):
        yolo.train(
            data=str(data), imgsz=imgsz, batch=batch, nbs=batch, epochs=10, device=device, workers=0, val=False,
            save=False, plots=False, verbose=False, warmup_epochs=0, **arguments,
        )  # fmt: skip
    return counted


def use_foreach(trainer) -> None:
    """Have torch's optimizers work on lists of tensors, as they do on CUDA by themselves."""
    for group in trainer.optimizer.param_groups:
        if group.get("foreach", True) is None and not group.get("fused"):
            group["foreach"] = True


@contextmanager
def counted_as_on_a_gpu() -> Iterator[None]:
    """Within the context, a profile shows a call of the quantizer's compiled passes as OURS, and weights are rounded by
    operations on all layers, as they are on a GPU."""
    was = {name: getattr(kernels, name) for name in ("forward", "backward", "by_c")}

    def labelled(function: Callable) -> Callable:
        def call(*args, **options):
            with record_function(OURS):
                return function(*args, **options)

        return call

    try:
        kernels.forward, kernels.backward = labelled(kernels.forward), labelled(kernels.backward)
        kernels.by_c = lambda tensors, scales: False
        yield
    finally:
        for name, function in was.items():
            setattr(kernels, name, function)
