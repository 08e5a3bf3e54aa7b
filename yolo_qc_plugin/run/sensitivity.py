# yolo_qc_plugin, AGPL-3.0
"""What each layer's weights, and each tensor that layers read, cost alone at each width, without training.

One quantizer at a time is switched on in the float model. Its cost is the loss that draws a model's outputs to those of
the float one (class scores and box sides, host/distillation.py) on a few images without labels: 0 where the outputs
stay the same. Errors of several layers cost about the sum of what each costs, while they are small.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.tasks import BaseModel
from ultralytics.utils import TQDM

from ..config import QCConfig, QCError
from ..files import json_object, replacing
from ..host import architecture
from ..host.distillation import Gains, detector, head_loss
from ..host.images import read_images
from ..quant.calibrate import act_quantizers, observe
from ..quant.inject import inject
from ..quant.layers import QuantConv2d, multiplications, quant_convs
from ..quant.observers import SampleObserver
from ..quant.quantizer import ActQuantizer, Quantizer
from ..quant.share import share_quantizers

IMAGES, BATCH = 32, 16
SMALL = 320  # px, see `size_for`
GAINS = Gains(outputs=1.0, features=0.0, labels=0.0, cls=0.5, dfl=1.5)  # Ultralytics' own
KINDS = "weights", "activations"
MEASURED = 2, 3, 4, 6  # widths at which a plan's costs are measured, as far as it may have them; see `completed`
FALL = 0.25  # what a further bit leaves of a cost, as of a squared error
Wanted = Mapping[tuple[str, str], Iterable[int]]  # (kind, name) -> widths
Costs = dict[str, dict[str, dict[str, float]]]  # kind -> name -> width as text -> cost


class Probe:
    """A float model whose quantizers can be switched on one at a time.

    Args:
        model: Float model; it is copied.
        config: Granularity, offsets and `skip`; the widths do not matter, except that tensors whose readers are to have
            different widths have several quantizers.
        images: Batches as the model takes them, on its device.

    Attributes:
        model: The copy, with all quantizers off.
        convs: Name -> quantized convolution.
        inputs: Name of the last layer that reads it -> quantizer of a tensor, without that of the image.
        readers: The same names -> names of the layers that read it.
        macs: Name of a convolution -> multiplications for an image.
        images: The batches.
        sha256: Of the float model's state.
    """

    def __init__(self, model: BaseModel, config: QCConfig, images: list[Tensor]):
        self.sha256 = _digest(model)
        self.model = deepcopy(model).float().eval().requires_grad_(False)
        inject(self.model, config, architecture.edge_convs(self.model), architecture.fixed_convs(self.model))
        share_quantizers(self.model, architecture.blank_image(self.model).to(images[0].device))
        for m in self.model.modules():
            if isinstance(m, Quantizer):
                m.enabled = False
        self.convs: dict[str, QuantConv2d] = dict(quant_convs(self.model))
        tensors = act_quantizers(self.model)
        self.inputs: dict[str, ActQuantizer] = {name: quant for name, quant in tensors.items() if quant.learned}
        self.readers = {t: [n for n, c in self.convs.items() if c.act_quant is q] for t, q in self.inputs.items()}
        self.macs = multiplications(self.model, images[0][:1])
        self._method, self.images = config.scale_init, images
        self._seen: dict[str, SampleObserver] = {}
        self._outputs: list[Any] = []
        self._start()
        self._before = [[batch] for batch in images]  # of each batch, what the float blocks before some block gave

    def _start(self) -> None:
        """Run the float model: for the outputs to compare with, and the values that scales start from."""

        def run(batch: object) -> None:
            self._outputs.append(self.model(batch))

        self._seen = observe(self.model, self.inputs, self.images, run)

    @torch.no_grad()
    def cost(self, kind: str, name: str, bits: int) -> float:
        """The loss of outputs with one quantizer on, mean over batches.

        Args:
            kind: One of KINDS.
            name: Of a convolution, or of a tensor as in `inputs`.
            bits: Width, 2 to 8.
        """
        self._run_before(min(_block(n) for n in ([name] if kind == "weights" else self.readers[name])))
        quant = self.set_bits(kind, name, bits)
        quant.enabled = True
        losses = [
            head_loss(detector(self.model), architecture.run_blocks(self.model, before)[-1], output, GAINS).item()
            for before, output in zip(self._before, self._outputs)
        ]
        quant.enabled = False
        return sum(losses) / len(losses)

    def _run_before(self, block: int) -> None:
        """Run the float blocks before a block: those that have run are not run again, unless it is an earlier one."""
        if block < len(self._before[0]) - 1:
            self._before = [[batch] for batch in self.images]
        self._before = [architecture.run_blocks(self.model, before, block) for before in self._before]

    def set_bits(self, kind: str, name: str, bits: int) -> Quantizer:
        """Set the width of a quantizer and start its scale; it stays off."""
        if kind == "weights":
            conv = self.convs[name]
            conv.weight_quant.set_bits(bits)
            conv.weight_quant.calibrate(conv.weight, self._method)
            return conv.weight_quant
        quant, seen = self.inputs[name], self._seen[name]
        quant.set_bits(bits)
        quant.calibrate(seen.values, seen.low, self._method)
        return quant


def size_for(imgsz: int | Sequence[int]) -> int:
    """Side of the images that costs are measured on: half of the size that is trained at, down to SMALL.

    A quarter of the time; docs/results/sensitivity.md has what plans lose by it, and by MEASURED.

    Args:
        imgsz: As the user gave it; training takes the larger of two sides.
    """
    side = imgsz if isinstance(imgsz, int) else max(imgsz)
    return min(side, max(SMALL, side // 2))


def prepare(
    model: BaseModel, config: QCConfig, files: Sequence[Path], imgsz: int, device: str | torch.device
) -> tuple[Probe, dict[str, Any]]:
    """A probe on images of some files, and what its costs depend on (see `describe`).

    Args:
        model: Float model; it goes to the device.
        config: As of `Probe`.
        files: The images.
        imgsz: Their size in pixels, which is rounded up to what the model takes.
        device: Where to compute.
    """
    stride = max(int(model.stride.max()), 32)
    size = ceil(imgsz / stride) * stride
    images = read_images(files, size, model.yaml.get("channels", 3)).to(device)
    probe = Probe(model.to(device), config, list(images.split(BATCH)))
    return probe, describe(probe, config, files, size)


def measure(probe: Probe, wanted: Wanted, about: dict, file: Path) -> Costs:
    """Measure costs, with a progress bar; what the file has of the same model and images is not measured again.

    Args:
        probe: The model.
        wanted: (kind, name) -> widths.
        about: Plain values that the costs depend on, see `describe`.
        file: JSON to go on with and to write, after each quantizer.

    Returns:
        What the file holds as "costs".
    """
    found = read_costs(file)
    if found.get("about") != about:
        found = {"about": about, "costs": {kind: {} for kind in KINDS}}
    for (kind, name), widths in TQDM(wanted.items(), desc="QC: sensitivity"):
        costs = found["costs"][kind].setdefault(name, {})
        missing = [bits for bits in widths if str(bits) not in costs]
        costs.update({str(bits): probe.cost(kind, name, bits) for bits in missing})
        if missing:
            with replacing(file) as temporary:
                temporary.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found["costs"]


def read_costs(file: Path) -> dict[str, Any]:
    """What `measure` has written to a file; empty where there is none.

    Raises:
        QCError: If it holds something else.
    """
    found = json_object(file)
    if file.exists() and found.keys() != {"about", "costs"}:
        raise QCError(f"QC: {file} is no record of costs; move it, or give another folder.")
    return found


def to_measure(wanted: Wanted) -> Wanted:
    """Of wanted widths, those from which `completed` tells the others."""
    return {key: sorted({min(widths), *(set(MEASURED) & set(widths))}) for key, widths in wanted.items()}


def completed(costs: Costs, wanted: Wanted) -> Costs:
    """Costs at all wanted widths, from those at `to_measure`.

    In between a cost falls by the same share with each bit, beyond the last by FALL.
    """
    found: Costs = {kind: {} for kind in KINDS}
    for (kind, name), widths in wanted.items():
        # rounding may leave less than 0
        known = {int(bits): max(cost, 0.0) for bits, cost in costs[kind][name].items()}
        found[kind][name] = {str(bits): _cost_at(bits, known) for bits in widths}
    return found


def _cost_at(bits: int, known: Mapping[int, float]) -> float:
    below, above = max(b for b in known if b <= bits), min((b for b in known if b >= bits), default=None)
    if above is None:
        return known[below] * FALL ** (bits - below)
    share = (bits - below) / max(above - below, 1)
    return known[below] ** (1 - share) * known[above] ** share


def describe(probe: Probe, config: QCConfig, files: Sequence[Path], imgsz: int) -> dict[str, Any]:
    """What costs depend on, and the layers that they are of.

    Args:
        probe: The model.
        config: As the probe has it.
        files: The images.
        imgsz: Their size in pixels.
    """
    return {
        "sha256": probe.sha256,
        "options": {name: config.to_dict()[name] for name in ("per_channel", "act_offset", "scale_init")},
        "images": [f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}" for file in files],
        "imgsz": imgsz,
        "layers": {n: {"weights": c.weight.numel(), "macs": probe.macs[n]} for n, c in probe.convs.items()},
        "tensors": probe.readers,
    }


def _block(name: str) -> int:
    """Number of the block that a layer is in, of a name as model.4.cv1.conv."""
    return int(name.split(".")[1])


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
