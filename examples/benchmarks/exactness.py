# yolo_qc_plugin, AGPL-3.0
"""What must not depend on the device: the quantizer's values and gradients, and the codes of a deployed model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn

from yolo_qc_plugin import QCConfig
from yolo_qc_plugin.deploy.fold import FixedQuantizer, deployed_convs, head_grids
from yolo_qc_plugin.deploy.snap import snap
from yolo_qc_plugin.host import architecture
from yolo_qc_plugin.quant import kernels
from yolo_qc_plugin.quant.calibrate import calibrate, calibrate_outputs
from yolo_qc_plugin.quant.functional import fake_quantize
from yolo_qc_plugin.quant.inject import inject, quantize_outputs
from yolo_qc_plugin.quant.modules import hooked

# shape, scales, whether with offset, memory format; sizes that are no multiple of anything
CASES = {
    "activation": ((3, 7, 41, 53), 1, True, torch.contiguous_format),
    "channels last": ((3, 7, 41, 53), 1, True, torch.channels_last),
    "weight": ((67, 31, 3, 3), 1, False, torch.contiguous_format),
    "weight per channel": ((67, 31, 3, 3), 67, False, torch.contiguous_format),
}
SILU = "of SiLU"  # the last case, whose gradient by SiLU's input is made by the quantizer's pass
CASES[SILU] = CASES["channels last"]
DTYPES = torch.float32, torch.float16, torch.bfloat16


def kernel_faults(device: str, dtypes: tuple[torch.dtype, ...] = DTYPES) -> list[str]:
    """In which cases the compiled passes differ from separate operations, on the device and on a CPU, in words.

    Values and gradients by x are to be equal, and sums by scale and offset the same to rounding. Where x is what SiLU
    makes, on the device alone, gradients are to be the same to rounding as well.
    """
    faults = []
    for dtype in dtypes:
        for name, (shape, scales, with_offset, memory) in CASES.items():
            torch.manual_seed(0)
            x, grad = (torch.randn(shape).to(dtype).contiguous(memory_format=memory) for _ in range(2))
            scale, offset = torch.rand(scales) * 0.2 + 0.1, torch.tensor([-0.3]) if with_offset else None
            bounds = (0, 15) if with_offset else (-8, 7)
            found = {
                "compiled": _values(x, grad, scale, offset, bounds, device, True, name == SILU),
                "separate": _values(x, grad, scale, offset, bounds, device, False, name == SILU),
                "on a CPU": _values(x, grad, scale, offset, bounds, "cpu", False, name == SILU),
            }
            wanted = found.pop("separate")
            allowed = torch.zeros_like(wanted[1])
            if name == SILU:
                del found["on a CPU"]  # its exponential function is another
                allowed = 8 * torch.finfo(dtype).eps * (grad.float().abs() * 1.1)  # SiLU's slope is below 1.1
            terms = 16 * grad.double().abs().sum() / scales
            for way, (xhat, by_x, *sums) in found.items():
                where = f"{name}, {str(dtype).removeprefix('torch.')}, {way}"
                if n := (xhat != wanted[0]).sum().item():
                    faults.append(f"{where}: {n} of {xhat.numel()} values differ")
                if n := ((by_x.float() - wanted[1].float()).abs() > allowed).sum().item():
                    faults.append(f"{where}: {n} gradients by x differ")
                if any(((a - b).abs() > 1e-6 * terms).any() for a, b in zip(sums, wanted[2:])):
                    faults.append(f"{where}: sums by scale or offset differ")
    return faults


def _values(x, grad, scale, offset, bounds, device, compiled, silu) -> list[Tensor]:
    """Values and gradients, on a CPU."""
    was, kernels.enabled = kernels.enabled, compiled
    x, scale = (t.to(device).requires_grad_() for t in (x.detach().clone(), scale.clone()))
    offset = None if offset is None else offset.clone().to(device).requires_grad_()
    try:
        y = fake_quantize(nn.functional.silu(x) if silu else x, scale, offset, *bounds, 1.0)
        y.backward(grad.to(device))
        if kernels.usable(x, scale, offset) is not compiled:
            raise RuntimeError("no compiled passes; if a compiler has given up, the warning above says why")
    finally:
        kernels.enabled = was
    return [t.detach().cpu() for t in (y, x.grad, scale.grad, None if offset is None else offset.grad) if t is not None]


def deployed(yaml: str, imgsz: int, target: str | None = None) -> nn.Module:
    """A model of 4 bits with 8-bit outputs in its deployed form, with the numbers of a trained one by their look."""
    torch.manual_seed(0)
    model = architecture.MODELS["detect"](yaml, nc=10, verbose=False)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight, 1.0, 0.3)
            nn.init.normal_(m.bias, 0.0, 0.3)
            nn.init.normal_(m.running_mean, 0.0, 0.2)
            nn.init.uniform_(m.running_var, 0.1, 1.0)
    model.eval().requires_grad_(False)
    config = QCConfig(target=target, bits=4, scale_init="lsq")
    images = [torch.rand(2, 3, imgsz, imgsz)]
    inject(model, config, architecture.edge_convs(model), architecture.fixed_convs(model))
    calibrate(model, images, model, config.scale_init)
    quantize_outputs(architecture.output_blocks(model), 8, config.runs_on.rounded_silu)
    calibrate_outputs(model, images, model)
    snap(model, images[0])
    architecture.deploy_model(model)
    return model.eval()


@torch.no_grad()
def code_faults(model: nn.Module, images: Tensor, device: str) -> list[str]:
    """Which layers of a deployed model get or, in its head, give other codes on the device than on a CPU, in words.

    Twice: with what the layer is given on the CPU, so that a fault shows at the layer behind it; and end to end.

    Args:
        model: In the deployed form, on a CPU.
        images: Shape (n, 3, h, w), in 0..1.
        device: Where to run a copy.
    """
    given: dict[str, Tensor] = {}
    with _watched(model, lambda where, grid, x: given.setdefault(where, x)):
        model(images)
    theirs, faults = deepcopy(model).to(device), []
    for way in ("layer by layer", "end to end"):
        forced = way == "layer by layer"

        def compare(where: str, grid: FixedQuantizer, x: Tensor, way=way, forced=forced) -> Tensor | None:
            wanted = given[where]
            changed = (grid.steps(x).cpu() != grid.steps(wanted)).sum().item()
            if changed:
                name, what = where.split()
                faults.append(f"{name}, {way}: {changed} of {x.numel()} codes of its {what} differ")
            return wanted.to(device) if forced else None

        with _watched(theirs, compare):
            theirs(images.to(device))
    return faults


@contextmanager
def _watched(model: nn.Module, see) -> Iterator[None]:
    """Within the context, what is quantized is what `see` makes of it, if that is not None.

    That is each deployed convolution's input and, where it has a grid, the head's output.
    """
    points: list[tuple[str, nn.Module, FixedQuantizer]]
    points = [(f"{name} input", layer, layer.act_quant) for name, layer in deployed_convs(model).items()]
    points += [(f"{name} output", grid, grid) for name, grid in head_grids(model).items()]

    def hook(where: str, grid: FixedQuantizer, module: nn.Module, args: tuple) -> tuple | None:
        changed = see(where, grid, args[0])
        return None if changed is None else (changed,)

    with hooked(m.register_forward_pre_hook(partial(hook, where, grid)) for where, m, grid in points):
        yield
