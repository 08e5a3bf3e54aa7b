# yolo_qc_plugin, AGPL-3.0
"""The patches of Ultralytics, all of them, and the loop that applies them.

Each patch wraps one function, calls the original and does nothing for models without quantizers. What a process needs
to open a finished checkpoint (to predict, validate, export) is apart from what it needs to train: an Ultralytics that
is not supported opens checkpoints, with a warning, and is refused for training.
"""

from __future__ import annotations

import inspect
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ultralytics.engine import trainer as engine_trainer
from ultralytics.engine.exporter import Exporter
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.nn.modules import Detect
from ultralytics.nn.tasks import BaseModel, torch_safe_load
from ultralytics.utils.export import engine, litert, openvino
from ultralytics.utils.torch_utils import unwrap_model

from ..deploy.fold import deployed_convs
from ..deploy.graph import finish_graph, write_graph
from ..deploy.kinds import check_kind
from ..deploy.litert.graph import write_litert
from ..deploy.litert.translation import OPSET as LITERT_OPSET
from ..deploy.pack import pack_openvino
from ..files import AtomicPath
from ..qat.scale_steps import separate_scales
from ..quant.inject import remove
from ..quant.layers import is_deployed, is_quantized, scale_parameters
from . import compat, log
from .architecture import deploy_model, student
from .exporting import in_one_line, kind_of, prepare_export
from .record import QuantRecord, own_record, record_of, strip

ON_MODEL_SETUP = "on_model_setup"  # an event of ours, see `_announce_model`
ON_DATASET = "on_dataset"  # and one before the data set is read, see `_announce_dataset`
OPENVINO_OPSET = 18  # of the ONNX graph on the way to OpenVINO

Resume = Callable[[BaseTrainer, QuantRecord], None]


@dataclass(frozen=True)
class Patch:
    """A function of Ultralytics and what takes its place.

    Attributes:
        owner: Class or module in which the function is looked up.
        name: Its name there.
        parameters: Names of its parameters, without which the wrapper would be wrong.
        wrap: Takes the original and returns the wrapper.
    """

    owner: Any
    name: str
    parameters: str
    wrap: Callable[[Callable], Callable]

    @property
    def difference(self) -> str:
        """In words how the function differs from what is expected; empty where it does not."""
        function = getattr(self.owner, self.name, None)
        found = list(inspect.signature(function).parameters) if function else None
        if found == self.parameters.split():
            return ""
        return f"{self.owner.__name__}.{self.name} takes {found}, expected {self.parameters.split()}"

    def apply(self) -> None:
        """Put the wrapper in the function's place, once per process."""
        original = getattr(self.owner, self.name)
        if not hasattr(original, "qc_patch"):
            wrapper: Any = wraps(original)(self.wrap(original))
            wrapper.qc_patch = self
            setattr(self.owner, self.name, wrapper)


def attach_for_training(resume: Resume) -> None:
    """Apply all patches.

    Args:
        resume: See `attach_for_opening`.

    Raises:
        QCError: If Ultralytics is not supported or differs; the message names its version and the supported ones.
    """
    patches = [_FUSE, *_opening(resume), *_TRAINING]
    if not all(map(_is_applied, patches)):
        compat.check_version()
        compat.refuse([*(p.difference for p in patches), *compat.differences()])
        for patch in patches:
            patch.apply()


def attach_for_opening(resume: Resume) -> None:
    """Apply what it takes to predict with, validate, export and resume a checkpoint of ours.

    An Ultralytics that is not supported costs a warning; an export or a resumed run may then be refused or fail.

    Args:
        resume: Called with a trainer that resumes a quantized run without our callbacks, and with the run's record.

    Raises:
        QCError: If models cannot be fused as ours must be: accuracy would be lost without a word.
    """
    if _is_applied(_FUSE):
        return
    compat.refuse([_FUSE.difference])
    patches = [_FUSE, *_opening(resume)]
    doubts = [compat.version_difference(), *(p.difference for p in patches)]
    if doubts := [doubt for doubt in doubts if doubt]:
        log.warning(f"{'; '.join(doubts)}. The checkpoint opens; training and exports may be refused.")
    for patch in patches:
        if not patch.difference:
            patch.apply()


def _is_applied(patch: Patch) -> bool:
    return hasattr(getattr(patch.owner, patch.name, None), "qc_patch")


def _announce_model(original: Callable, resume: Resume) -> Callable:
    def setup_model(self):
        checkpoint = original(self)
        model = student(self.model)
        if is_quantized(model) and not record_of(model):
            remove(model)  # load() took a class branch of another width out of a checkpoint of ours, quantizers and all
        record = record_of(checkpoint.get("ema")) if self.resume and checkpoint else None
        if record and not self.callbacks.get(ON_MODEL_SETUP):  # a resumed run need not name the plugin again
            resume(self, record)
        for callback in self.callbacks.get(ON_MODEL_SETUP, ()):
            checkpoint = callback(self, checkpoint)
        return checkpoint

    return setup_model


def _announce_dataset(original: Callable) -> Callable:
    def get_dataset(self):
        for callback in self.callbacks.get(ON_DATASET, ()):
            callback(self)
        return original(self)

    return get_dataset


def _group_scales(original: Callable) -> Callable:
    def build_optimizer(self, model, *args, **kwargs):
        optimizer = original(self, model, *args, **kwargs)
        scales = scale_parameters(model)
        if scales:
            group = separate_scales(optimizer, scales, own_record(unwrap_model(model)).options.scale_lr)
            log.info(f"{len(group['params'])} scales and offsets in a group of their own, lr={group['lr']:g}")
        return optimizer

    return build_optimizer


def _strip_later(original: Callable) -> Callable:
    def strip_optimizer(f, s="", updates=None):
        if not isinstance(f, AtomicPath):  # not ours
            return original(f, s, updates)
        if f.name == "last.pt" and f.with_name("best.pt").exists():
            return torch_safe_load(f)[0]
        return strip(f, updates)

    return strip_optimizer


def _fuse_quantized(original: Callable) -> Callable:
    def fuse(self, verbose=True, imgsz=640):
        if is_deployed(self):
            return self
        if is_quantized(self):
            deploy_model(self)
            for m in self.modules():
                if isinstance(m, Detect):
                    m.fuse()  # deletes the branch that inference does not use
            self.info(verbose=verbose, imgsz=imgsz)
            return self
        return original(self, verbose, imgsz)

    return fuse


def _check_export(original: Callable) -> Callable:
    def __call__(self, model):
        with in_one_line():
            if not is_quantized(model):
                return original(self, model)
            kind = prepare_export(self, model)
            file = original(self, model)
            if kind and str(file).endswith(".onnx") and (done := finish_graph(file, kind)):
                log.info(done)
            return file

    return __call__


def _write_integers(original: Callable) -> Callable:
    def torch2onnx(model, im, output_file, opset=14, *args, **kwargs):
        layers = deployed_convs(model)
        if not layers:
            return original(model, im, output_file, opset, *args, **kwargs)
        kind = kind_of(model)
        check_kind(kind, opset)
        result = original(model, im, output_file, opset, *args, **kwargs)
        log.info(write_graph(result, layers, kind))
        return result

    return torch2onnx


def _convert_integers(original: Callable) -> Callable:
    def torch2openvino(model, im, output_dir=None, dynamic=False, *args, **kwargs):
        if not deployed_convs(model):
            return original(model, im, output_dir, dynamic, *args, **kwargs)
        import openvino as ov

        axes = {"images": {0: "batch", 2: "height", 3: "width"}}
        with TemporaryDirectory() as folder:
            file = engine.torch2onnx(
                model, im, f"{folder}/model.onnx", OPENVINO_OPSET, dynamic=axes if dynamic else None
            )
            converted = ov.convert_model(file)
            if kind_of(model) != "int8":
                pack_openvino(converted)
            return converted

    return torch2openvino


def _translate_integers(original: Callable) -> Callable:
    def torch2litert(model, im, file, quantize=None, calibration_dataset=None, metadata=None, prefix=""):
        layers = deployed_convs(model)
        if not layers:
            return original(model, im, file, quantize, calibration_dataset, metadata, prefix)
        kind = kind_of(model, "qc_litert")
        about, target = metadata or {}, Path(file).with_suffix(".tflite")
        if about.get("task") != "classify" and not about.get("end2end"):  # as LiteRT's backend expects it
            shape = about.get("kpt_shape")
            model = engine._NormalizeCoords(model, *im.shape[2:], about.get("task"), len(about.get("names", {})), shape)
        with TemporaryDirectory() as folder:
            traced = inspect.unwrap(engine.torch2onnx)(model, im, f"{folder}/model.onnx", LITERT_OPSET)
            log.info(write_litert(traced, target, layers, kind))
        with zipfile.ZipFile(target, "a", zipfile.ZIP_DEFLATED) as archive:  # where that backend reads it
            archive.writestr("metadata.json", json.dumps(about))
        return str(target)

    return torch2litert


# Each says why no callback can do it.

# Every way into inference calls it, and it would fold batch norm into weights, which moves their codes.
_FUSE = Patch(BaseModel, "fuse", "self verbose imgsz", _fuse_quantized)


def _opening(resume: Resume) -> tuple[Patch, ...]:
    """What opening a checkpoint takes beside `fuse`."""
    onnx = "model im output_file opset input_names output_names dynamic"
    ov = "model im output_dir dynamic quantize calibration_dataset int8_detect prefix"
    tflite = "model im file quantize calibration_dataset metadata prefix"
    return (
        # No event lies between the making of the model and that of the optimizer, the EMA and the DDP wrapper; and a
        # resumed run need not name the plugin.
        Patch(BaseTrainer, "setup_model", "self", partial(_announce_model, resume=resume)),
        # on_export_start is for those who ask for it; a format that loses the quantizers is refused always.
        Patch(Exporter, "__call__", "self model", _check_export),
        # The exporter knows no 4-bit types and makes floats of integer weights; no event follows the tracing.
        Patch(engine, "torch2onnx", onnx, _write_integers),
        # OpenVINO is to convert that ONNX graph, not a trace of the model.
        Patch(openvino, "torch2openvino", ov, _convert_integers),
        # Its converter would calibrate the model a second time.
        Patch(litert, "torch2litert", tflite, _translate_integers),
    )


_TRAINING = (
    # Where a process is started for each of several devices, on_pretrain_routine_start comes after the data are read.
    Patch(BaseTrainer, "get_dataset", "self", _announce_dataset),
    # Scales must leave weight decay and matrix optimizers before a scheduler sees the groups.
    Patch(BaseTrainer, "build_optimizer", "self model name lr momentum decay iterations", _group_scales),
    # final_eval strips last.pt before on_train_end; until a run has ended it can be resumed.
    Patch(engine_trainer, "strip_optimizer", "f s updates", _strip_later),
)
