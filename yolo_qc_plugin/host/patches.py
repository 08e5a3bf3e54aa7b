# yolo_qc_plugin, AGPL-3.0
"""Everything that touches Ultralytics from outside: supported versions and seven patches.

The patches, each a wrapper that calls the original and does nothing for models without quantizers:
    BaseTrainer.setup_model      announces the event on_model_setup, which the host lacks: the model is there, and the
                                 optimizer, EMA, freeze list, compile and DDP wrapper are not yet
    BaseTrainer.build_optimizer  gives scales and offsets their own parameter group
    trainer.strip_optimizer      writes atomically, and last.pt later: until a run has ended it can be resumed
    BaseModel.fuse               brings quantized convolutions into the deployed form, codes untouched
    Exporter.__call__            refuses formats that would lose the quantizers
    torch2onnx                   turns what was traced of a deployed model into integer weights and Q/DQ nodes
    torch2openvino               converts that graph instead of a trace
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, wraps
from importlib import metadata
from tempfile import TemporaryDirectory

from ultralytics import __version__ as ULTRALYTICS_VERSION
from ultralytics.engine import trainer as engine_trainer
from ultralytics.engine.exporter import Exporter
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.nn.modules import Detect
from ultralytics.nn.tasks import BaseModel, torch_safe_load
from ultralytics.utils.checks import check_version
from ultralytics.utils.export import engine, openvino
from ultralytics.utils.torch_utils import unwrap_model

from ..config import QCError
from ..deploy.fold import deployed_convs
from ..deploy.qdq import ONNX_KINDS, check_kind, write_qdq
from ..files import AtomicPath
from ..qat.scale_steps import separate_scales
from ..quant.layers import is_quantized, scale_parameters
from . import compat, log
from .architecture import deploy_model
from .record import QuantRecord, record_of, strip

ON_MODEL_SETUP = "on_model_setup"
OPENVINO_OPSET = 18  # of the ONNX graph on the way to OpenVINO
EXPORT_FORMATS = ("onnx", "openvino", "torchscript")  # those that carry the quantizers, see docs/deployment.md

# what is patched, and the parameters it must have for the patch to be right
_PATCHED = {
    (BaseTrainer, "setup_model"): ["self"],
    (BaseTrainer, "build_optimizer"): ["self", "model", "name", "lr", "momentum", "decay", "iterations"],
    (engine_trainer, "strip_optimizer"): ["f", "s", "updates"],
    (BaseModel, "fuse"): ["self", "verbose", "imgsz"],
    (Exporter, "__call__"): ["self", "model"],
    (engine, "torch2onnx"): ["model", "im", "output_file", "opset", "input_names", "output_names", "dynamic"],
    (openvino, "torch2openvino"): [
        "model", "im", "output_dir", "dynamic", "quantize", "calibration_dataset", "int8_detect", "prefix",
    ],
}  # fmt: skip


def supported_versions() -> str:
    """Supported Ultralytics versions as this package's metadata state them, e.g. ">=8.4.150,<8.5"; "" if unknown."""
    try:
        requirements = metadata.requires("yolo-qc-plugin") or []
    except metadata.PackageNotFoundError:  # run from a checkout without installing: the look-alike check remains
        return ""
    ours = next(r for r in requirements if r.startswith("ultralytics"))
    return ours.removeprefix("ultralytics").split(";")[0].strip()


def check_host() -> None:
    """Refuse an Ultralytics that is not supported or does not look as expected.

    Raises:
        QCError: Naming the version, the supported ones and what differs.
    """
    supported = supported_versions()
    accepted = f"yolo-qc-plugin supports ultralytics{supported}"
    # compared bound by bound: pip writes the bounds in any order
    if supported and not all(check_version(ULTRALYTICS_VERSION, bound) for bound in supported.split(",")):
        raise QCError(f"QC: ultralytics {ULTRALYTICS_VERSION} is not supported; {accepted}.")
    for (owner, name), expected in _PATCHED.items():
        method = getattr(owner, name, None)
        found = list(inspect.signature(method).parameters) if method else None
        if found != expected:
            raise QCError(
                f"QC: {owner.__name__}.{name} of ultralytics {ULTRALYTICS_VERSION} takes {found}, expected {expected}; "
                f"{accepted}."
            )
    if differences := compat.differences():
        raise QCError(f"QC: ultralytics {ULTRALYTICS_VERSION} differs: {'; '.join(differences)}; {accepted}.")


def attach(on_resume: Callable[[BaseTrainer, QuantRecord], None]) -> None:
    """Install the patches, once per process.

    Args:
        on_resume: Called with a trainer that resumes a quantized run without our callbacks, and the run's record.

    Raises:
        QCError: From `check_host`.
    """
    if hasattr(BaseTrainer.setup_model, "qc_patch"):
        return
    check_host()
    announce = partial(_announce_model, on_resume=on_resume)
    training = announce, _group_scales, _strip_later
    deployment = _fuse_quantized, _check_export, _write_integers, _convert_integers
    for (owner, name), patch in zip(_PATCHED, training + deployment):
        wrapped = wraps(getattr(owner, name))(patch(getattr(owner, name)))
        wrapped.qc_patch = True
        setattr(owner, name, wrapped)


def _announce_model(original, on_resume):
    def setup_model(self):
        checkpoint = original(self)
        record = record_of(checkpoint.get("ema")) if self.resume and checkpoint else None
        if record and not self.callbacks.get(ON_MODEL_SETUP):  # a resumed run need not name the plugin again
            on_resume(self, record)
        self.qc_checkpoint = checkpoint if record else None
        self.qc_state = None  # what a callback restores in the host's place
        self.run_callbacks(ON_MODEL_SETUP)
        return None if self.qc_state else checkpoint

    return setup_model


def _group_scales(original):
    def build_optimizer(self, model, *args, **kwargs):
        optimizer = original(self, model, *args, **kwargs)
        scales = scale_parameters(model)
        if scales:
            group = separate_scales(optimizer, scales, record_of(unwrap_model(model)).options.scale_lr)
            log.info(f"{len(group['params'])} scales and offsets in a group of their own, lr={group['lr']:g}")
        return optimizer

    return build_optimizer


def _strip_later(original):
    def strip_optimizer(f, s="", updates=None):
        if not isinstance(f, AtomicPath):  # not ours
            return original(f, s, updates)
        if f.name == "last.pt" and f.with_name("best.pt").exists():
            return torch_safe_load(f)[0]
        return strip(f, updates)

    return strip_optimizer


def _fuse_quantized(original):
    def fuse(self, verbose=True, imgsz=640):
        if is_quantized(self):
            deploy_model(self)
            for m in self.modules():
                if isinstance(m, Detect):
                    m.fuse()  # leaves the branch in use alone
            self.info(verbose=verbose, imgsz=imgsz)
        elif not deployed_convs(self):
            return original(self, verbose, imgsz)
        return self

    return fuse


def _check_export(original):
    def __call__(self, model):
        if is_quantized(model) or deployed_convs(model):
            if self.args.format.lower() not in EXPORT_FORMATS:
                raise QCError(
                    f"QC: format={self.args.format!r} cannot carry the quantizers of this model; accepted: "
                    f"{', '.join(EXPORT_FORMATS)}. (For a float model, export the checkpoint that this one began with.)"
                )
            if self.args.quantize not in {None, 32}:
                raise QCError(
                    f"QC: quantize={self.args.quantize!r} would quantize this model a second time; leave it out. Its "
                    f"own widths are exported; callbacks=qc qc_onnx={'|'.join(ONNX_KINDS)} chooses the ONNX container."
                )
        return original(self, model)

    return __call__


def _write_integers(original):
    def torch2onnx(model, im, output_file, opset=14, *args, **kwargs):
        layers = deployed_convs(model)
        if not layers:
            return original(model, im, output_file, opset, *args, **kwargs)
        kind = next((m.qc_onnx for m in model.modules() if hasattr(m, "qc_onnx")), ONNX_KINDS[0])
        check_kind(kind, opset)
        result = original(model, im, output_file, opset, *args, **kwargs)
        log.info(f"{write_qdq(result, layers, kind)}")
        return result

    return torch2onnx


def _convert_integers(original):
    def torch2openvino(model, im, output_dir=None, dynamic=False, *args, **kwargs):
        if not deployed_convs(model):
            return original(model, im, output_dir, dynamic, *args, **kwargs)
        import openvino as ov

        axes = {"images": {0: "batch", 2: "height", 3: "width"}}
        with TemporaryDirectory() as folder:
            file = engine.torch2onnx(
                model, im, f"{folder}/model.onnx", OPENVINO_OPSET, dynamic=axes if dynamic else None
            )
            return ov.convert_model(file)

    return torch2openvino
