# yolo_qc_plugin, AGPL-3.0
"""What is known of Ultralytics' models: which are accepted, where their edges are, how their blocks are deployed."""

from __future__ import annotations

import torch
from torch import nn
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.nn.modules import DFL, Classify, Conv, Conv2, ConvTranspose, Detect, Proto, RepConv
from ultralytics.nn.modules.block import RepVGGDW
from ultralytics.nn.tasks import BaseModel, ClassificationModel, DetectionModel, OBBModel, PoseModel, SegmentationModel
from ultralytics.utils.torch_utils import fuse_conv_and_bn, fuse_deconv_and_bn, unwrap_model

from ..config import QCError
from ..deploy.fold import FixedQuantizer, deploy_activation, deploy_conv
from ..quant.activations import HeadOutput, quant_activations
from ..quant.layers import QuantConv2d, quant_convs
from ..quant.modules import evaluating, replace_modules
from ..quant.quantizer import ActQuantizer
from ..quant.taps import taps

# sigmoid(-8) is a third of the 0.001 from which detections count: logits of scores below it need not be told apart
LOWEST_SCORE = -8.0
MODELS = {  # task -> the model that is accepted; subclasses (RT-DETR, World, YOLOE) are not
    "detect": DetectionModel,
    "segment": SegmentationModel,
    "pose": PoseModel,
    "obb": OBBModel,
    "classify": ClassificationModel,
}


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
    for _, tap in taps(model):
        if isinstance(tap.act_quant, ActQuantizer):  # Ultralytics fuses again where a fused model is validated
            tap.act_quant = FixedQuantizer(tap.act_quant)


def output_blocks(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """What can have its output quantized -> the activation function behind it: `normed_blocks` and `head_outputs`."""
    return {**{m: m.act for m in normed_blocks(model)}, **head_outputs(model)}


def head_outputs(model: nn.Module) -> dict[QuantConv2d, HeadOutput]:
    """The head's bare convolutions, quantized ones alone, whose outputs can be -> what they give.

    These are class scores, and box sides as logits of a distribution (DFL): what a softmax makes of them moves little
    with them. Numbers that become coordinates or masks as they are would hand on the whole error of a grid, and stay
    float: box sides of heads with reg_max=1 (YOLO26), keypoints, angles, mask coefficients. What a grid would cost
    there was not measured.
    """
    head = getattr(model, "model", [None])[-1]
    lowest: dict[str, float | None] = {"cv3": LOWEST_SCORE, "one2one_cv3": LOWEST_SCORE}
    if getattr(head, "reg_max", 1) > 1:
        lowest |= {"cv2": None, "one2one_cv2": None}
    branches = [(of, low) for name, low in lowest.items() for of in getattr(head, name, None) or ()]
    return {of[-1]: HeadOutput(low) for of, low in branches if isinstance(of[-1], QuantConv2d)}


def scores_as(model: nn.Module, other: nn.Module) -> bool:
    """Whether the class scores of a model come from another's, maybe in another order.

    Each class's weights in the last layers of the one are then among those of the other: Ultralytics takes them over as
    they are, or begins them anew where the number of classes is another and the names tell of no kinship.
    """
    ours, theirs = _class_layers(model), _class_layers(other)
    if len(ours) != len(theirs) or any(a.weight[0].shape != b.weight[0].shape for a, b in zip(ours, theirs)):
        return False
    known = [{tuple(row.flatten().tolist()) for row in layer.weight.detach().float().cpu()} for layer in theirs]
    return all(
        tuple(row.flatten().tolist()) in of
        for layer, of in zip(ours, known)
        for row in layer.weight.detach().float().cpu()
    )


def _class_layers(model: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    """The layers that give class scores: of each size of feature map one, of a classifier one."""
    head = getattr(model, "model", [None])[-1]
    return [head.linear] if isinstance(head, Classify) else [branch[-1] for branch in head.cv3]


def normed_blocks(model: nn.Module) -> list[Conv]:
    """Blocks whose convolution's output, after batch norm, can be quantized: those of a quantized convolution alone.

    Blocks that add branches up before their activation (Conv2, RepConv, RepVGGDW) have no such place.
    """
    sums = sums_of_branches(model)
    return [
        m
        for m in model.modules()
        if isinstance(m, Conv) and not isinstance(m, Conv2) and isinstance(m.conv, QuantConv2d) and id(m) not in sums
    ]


def sums_of_branches(model: nn.Module) -> set[int]:
    """Ids of the modules within blocks that add branches up before their activation function."""
    blocks = [m for m in model.modules() if isinstance(m, (RepConv, RepVGGDW))]
    return {id(branch) for m in blocks for branch in m.modules() if branch is not m}


def student(model: nn.Module) -> BaseModel:
    """The model that a trainer trains: inside distributed wrappers and, with distill_model, beside a teacher."""
    model = unwrap_model(model)
    return getattr(model, "student_model", model)


def take_memory_format(model: nn.Module, other: nn.Module) -> None:
    """Lay a model's weights out as another's, in place; on a GPU that is channels last, the faster one there."""
    last = torch.channels_last
    if any(not p.is_contiguous() and p.is_contiguous(memory_format=last) for p in other.parameters()):
        model.to(memory_format=last)


def blank_image(model: BaseModel, side: int | None = None) -> torch.Tensor:
    """A square image that a model takes, black; a small one where no side is given."""
    side = side or 2 * max(int(model.stride.max()), 32)  # a classifier states a stride of 1
    return torch.zeros(1, model.yaml.get("channels", 3), side, side, device=next(model.parameters()).device)


def run_blocks(model: BaseModel, outputs: list, stop: int | None = None) -> list:
    """Go on with a forward pass of an accepted model, block by block, from where it stands.

    Args:
        model: The model.
        outputs: The images, and what each of the blocks that have run gave.
        stop: Number of the block to stop before; None for none.

    Returns:
        The same of the further blocks too, the last being that of the last one; None in place of what no block to come
        reads.
    """
    outputs = list(outputs)
    for block in model.model[len(outputs) - 1 : stop]:
        read = [outputs[i if i < 0 else i + 1] for i in ([block.f] if isinstance(block.f, int) else block.f)]
        if block.i - 1 not in model.save:
            outputs[-1] = None
        outputs.append(block(read[0] if isinstance(block.f, int) else read))
    return outputs


def loss_is_summed(task: str) -> bool:
    """Whether Ultralytics' training loss of a task is summed over a batch's images; a classifier's is their mean."""
    return task != "classify"


def amp_dtype(trainer: BaseTrainer) -> torch.dtype | None:
    """What convolutions compute in under mixed precision, None without it; known once the trainer is set up."""
    if not trainer.amp:
        return None
    if trainer.args.amp == "bf16":
        return torch.bfloat16
    return trainer.amp if isinstance(trainer.amp, torch.dtype) else torch.get_autocast_dtype(trainer.device.type)


def task_of(model: nn.Module) -> str:
    """The task of an accepted model."""
    return next(task for task, kind in MODELS.items() if type(model) is kind)


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


def edge_convs(model: BaseModel) -> set[str]:
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
