# yolo_qc_plugin, AGPL-3.0
"""Everything that touches Ultralytics from outside: supported versions, three patches, where a model's edges are.

The patches, each a wrapper that calls the original and does nothing for models without quantizers:
    BaseTrainer.setup_model      announces the event on_model_setup, which the host lacks: the model is there, and the
                                 optimizer, EMA, freeze list, compile and DDP wrapper are not yet
    BaseTrainer.build_optimizer  gives scales and offsets their own parameter group
    BaseModel.fuse               folds batch norm behind a quantized convolution without touching its weight
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, wraps
from importlib import metadata

from torch import nn
from ultralytics import __version__ as ULTRALYTICS_VERSION
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.nn.modules import DFL, Conv, Conv2, ConvTranspose, Detect
from ultralytics.nn.tasks import BaseModel, DetectionModel
from ultralytics.utils import LOGGER, colorstr
from ultralytics.utils.checks import check_version
from ultralytics.utils.torch_utils import fuse_conv_and_bn, fuse_deconv_and_bn, unwrap_model

from .checkpoint import QuantRecord, record_of
from .config import QCError
from .fold import fold_bn
from .layers import QuantConv2d, is_quantized, scale_parameters
from .optimizer import separate_scales

ON_MODEL_SETUP = "on_model_setup"
PREFIX = colorstr("QC: ")

# what is patched, and the parameters it must have for the patch to be right
_PATCHED = {
    (BaseTrainer, "setup_model"): ["self"],
    (BaseTrainer, "build_optimizer"): ["self", "model", "name", "lr", "momentum", "decay", "iterations"],
    (BaseModel, "fuse"): ["self", "verbose", "imgsz"],
}


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
    patches = partial(_announce_model, on_resume=on_resume), _group_scales, _fold_quantized
    for (owner, name), patch in zip(_PATCHED, patches):
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
        self.run_callbacks(ON_MODEL_SETUP)
        return checkpoint

    return setup_model


def _group_scales(original):
    def build_optimizer(self, model, *args, **kwargs):
        optimizer = original(self, model, *args, **kwargs)
        scales = scale_parameters(model)
        if scales:
            group = separate_scales(optimizer, scales, record_of(unwrap_model(model)).options.scale_lr)
            LOGGER.info(
                f"{PREFIX}{len(group['params'])} scales and offsets in a group of their own, lr={group['lr']:g}"
            )
        return optimizer

    return build_optimizer


def _fold_quantized(original):
    def fuse(self, verbose=True, imgsz=640):
        if not is_quantized(self):
            return original(self, verbose, imgsz)
        if not self.is_fused():
            fold_model(self)
            self.info(verbose=verbose, imgsz=imgsz)
        return self

    return fuse


def fold_model(model: nn.Module) -> None:
    """Fold every batch norm that follows a convolution, in place: into the scale of a quantized one, into the weight of
    a float one. Blocks that would merge several convolutions (RepConv, RepVGGDW, Conv2) keep their branches: merged
    weights have other codes than the trained ones."""
    for m in model.modules():
        if isinstance(m, Conv) and hasattr(m, "bn") and not isinstance(m, Conv2):
            m.conv = (fold_bn if isinstance(m.conv, QuantConv2d) else fuse_conv_and_bn)(m.conv, m.bn)
            delattr(m, "bn")
            m.forward = m.forward_fuse
        elif isinstance(m, ConvTranspose) and hasattr(m, "bn"):
            m.conv_transpose = fuse_deconv_and_bn(m.conv_transpose, m.bn)
            delattr(m, "bn")
            m.forward = m.forward_fuse
        elif isinstance(m, Detect):
            m.fuse()


def check_model(model: nn.Module) -> None:
    """Refuse what is not a plain detection model.

    Raises:
        QCError: Naming the model and what is accepted.
    """
    head = getattr(model, "model", [None])[-1]
    if type(model) is not DetectionModel or not isinstance(head, Detect):
        raise QCError(
            f"QC: {type(model).__name__} with head {type(head).__name__} is not supported yet; give a YOLO "
            "detection model (YOLOv5, v8, 11, 26, ... with a Detect head)."
        )


def edge_convs(model: nn.Module) -> set[str]:
    """Names of the first convolution and of the head's bare output convolutions (those without batch norm)."""
    convs = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    head_prefix = f"model.{len(model.model) - 1}."
    bare = {
        f"{name}.{key}"
        for name, m in model.named_modules()
        if f"{name}.".startswith(head_prefix) and isinstance(m, nn.Sequential)
        for key, child in m.named_children()
        if isinstance(child, nn.Conv2d)
    }
    return {*convs[:1], *bare}


def fixed_convs(model: nn.Module) -> set[str]:
    """Names of convolutions that are constants, not learned: DFL's."""
    return {f"{name}.conv" for name, m in model.named_modules() if isinstance(m, DFL)}
