# yolo_qc_plugin, AGPL-3.0
"""Everything that touches Ultralytics from outside: supported versions, seven patches, where a model's edges are.

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
import shutil
from collections.abc import Callable
from functools import partial, wraps
from importlib import metadata
from tempfile import TemporaryDirectory

import torch
from torch import nn
from ultralytics import __version__ as ULTRALYTICS_VERSION
from ultralytics.engine import trainer as engine_trainer
from ultralytics.engine.exporter import Exporter
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.nn.modules import DFL, Classify, Conv, Conv2, ConvTranspose, Detect, Proto, RepConv
from ultralytics.nn.modules.block import RepVGGDW
from ultralytics.nn.tasks import (
    BaseModel,
    ClassificationModel,
    DetectionModel,
    OBBModel,
    PoseModel,
    SegmentationModel,
    torch_safe_load,
)
from ultralytics.utils import LOGGER, colorstr
from ultralytics.utils.checks import check_version
from ultralytics.utils.export import engine, openvino
from ultralytics.utils.torch_utils import fuse_conv_and_bn, fuse_deconv_and_bn, strip_optimizer, unwrap_model

from . import compat
from .checkpoint import AtomicPath, QuantRecord, record_of, replacing
from .config import QCError
from .deploy import deploy_activation, deploy_conv, deployed_convs
from .inject import evaluating, replace_modules
from .layers import QuantConv2d, is_quantized, quant_activations, quant_convs, scale_parameters
from .optimizer import separate_scales
from .qdq import ONNX_KINDS, check_kind, write_qdq

ON_MODEL_SETUP = "on_model_setup"
PREFIX = colorstr("QC: ")
OPENVINO_OPSET = 18  # of the ONNX graph on the way to OpenVINO
MODELS = {  # task -> the model that is accepted; subclasses (RT-DETR, World, YOLOE) are not
    "detect": DetectionModel,
    "segment": SegmentationModel,
    "pose": PoseModel,
    "obb": OBBModel,
    "classify": ClassificationModel,
}
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
            LOGGER.info(
                f"{PREFIX}{len(group['params'])} scales and offsets in a group of their own, lr={group['lr']:g}"
            )
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
        LOGGER.info(f"{PREFIX}{write_qdq(result, layers, kind)}")
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


def strip(file: AtomicPath, updates: dict | None = None) -> dict:
    """Strip a checkpoint of what resuming takes, atomically; returns it, or {} and leaves the file if it is none."""
    with replacing(file) as temporary:
        stripped = strip_optimizer(file, temporary, updates)
        if not stripped:
            shutil.copyfile(file, temporary)
    return stripped


def deploy_model(model: nn.Module) -> None:
    """Bring a quantized model into its deployed form, in place.

    Batch norm that follows a convolution goes into the scale of a quantized one and into the weight of a float one.
    Blocks that would merge several convolutions (RepConv, RepVGGDW, Conv2) keep their branches: merged weights have
    other codes than the trained ones.
    """
    names = {m: name for name, m in quant_convs(model)}
    for m in list(model.modules()):
        if isinstance(m, Conv) and hasattr(m, "bn") and not isinstance(m, Conv2):
            quantized = m.conv in names
            m.conv = deploy_conv(m.conv, m.bn, names[m.conv]) if quantized else fuse_conv_and_bn(m.conv, m.bn)
            delattr(m, "bn")
            m.forward = m.forward_fuse
        elif isinstance(m, ConvTranspose) and hasattr(m, "bn"):
            m.conv_transpose = fuse_deconv_and_bn(m.conv_transpose, m.bn)
            delattr(m, "bn")
            m.forward = m.forward_fuse
    replace_modules(model, {m: deploy_conv(m, None, name) for name, m in quant_convs(model)})
    replace_modules(model, {m: deploy_activation(m) for _, m in quant_activations(model)})


def output_blocks(model: nn.Module) -> list[Conv]:
    """Blocks whose convolution's output, after batch norm, can be quantized: those of a quantized convolution alone.

    Blocks that add branches up before their activation (Conv2, RepConv, RepVGGDW) have no such place.
    """
    sums = {id(b) for m in model.modules() if isinstance(m, (RepConv, RepVGGDW)) for b in m.modules()}
    return [
        m
        for m in model.modules()
        if isinstance(m, Conv) and not isinstance(m, Conv2) and isinstance(m.conv, QuantConv2d) and id(m) not in sums
    ]


def student(model: nn.Module) -> nn.Module:
    """The model that a trainer trains: inside distributed wrappers and, with distill_model, beside a teacher."""
    model = unwrap_model(model)
    return getattr(model, "student_model", model)


def blank_image(model: nn.Module) -> torch.Tensor:
    """A small image that a model takes, black."""
    side = 2 * max(int(model.stride.max()), 32)  # a classifier states a stride of 1
    return torch.zeros(1, model.yaml.get("channels", 3), side, side, device=next(model.parameters()).device)


def loss_is_summed(task: str) -> bool:
    """Whether the host's training loss of a task is summed over a batch's images; a classifier's is their mean."""
    return task != "classify"


def check_task(task: str) -> None:
    """Refuse a task whose models are not supported.

    Raises:
        QCError: Naming the accepted ones.
    """
    if task not in MODELS:
        raise QCError(f"QC: task={task!r} is not supported; accepted: {', '.join(MODELS)}.")


def check_model(model: nn.Module) -> None:
    """Refuse what is not a YOLO model of one of the tasks in `MODELS`.

    Raises:
        QCError: Naming the model and what is accepted.
    """
    head = getattr(model, "model", [None])[-1]
    if type(model) not in MODELS.values() or not isinstance(head, (Detect, Classify)):
        raise QCError(
            f"QC: {type(model).__name__} with head {type(head).__name__} is not supported; give a YOLO model "
            f"(YOLOv5, v8, 11, 26, ...) of the task {', '.join(MODELS)}."
        )


def check_weights(model: nn.Module) -> None:
    """Refuse a start that no training can mend.

    Raises:
        QCError: Naming the tensors that hold an infinity or a NaN.
    """
    bad = [name for name, v in model.state_dict().items() if v.is_floating_point() and not v.isfinite().all()]
    if bad:
        raise QCError(
            f"QC: the start model is not finite: inf or NaN in {len(bad)} tensors ({', '.join(bad[:3])}); give a sound "
            "checkpoint."
        )


def edge_convs(model: nn.Module) -> set[str]:
    """Names of the first convolution and of those that write the head's outputs.

    These are its bare convolutions (without batch norm) and the last one of mask prototypes. A classifier's output is
    written by a linear layer, which stays float.
    """
    convs = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    head_prefix = f"model.{len(model.model) - 1}."
    last = set()
    for name, m in model.named_modules():
        if f"{name}.".startswith(head_prefix) and isinstance(m, (nn.Sequential, nn.ModuleList)):
            last |= {f"{name}.{key}" for key, child in m.named_children() if isinstance(child, nn.Conv2d)}
        elif isinstance(m, Proto):
            last.add(f"{name}.cv3.conv")
    return {*convs[:1], *last}


@torch.no_grad()
def fixed_convs(model: nn.Module) -> set[str]:
    """Names of convolutions that are not to be quantized.

    That is DFL's, a constant, and those that compute nothing but a part of the training loss (YOLO26: the spread of
    keypoints, semantic masks).
    """
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    ran: set[nn.Module] = set()
    hooks = [m.register_forward_hook(lambda m, *_: ran.add(m)) for m in convs.values()]
    try:
        with evaluating(model):
            model(blank_image(model))
    finally:
        for hook in hooks:
            hook.remove()
    constant = {f"{name}.conv" for name, m in model.named_modules() if isinstance(m, DFL)}
    return constant | {name for name, m in convs.items() if m not in ran}
