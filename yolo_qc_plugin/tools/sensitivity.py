# yolo_qc_plugin, AGPL-3.0
"""`yolo-qc sensitivity`: what each layer of a float model costs alone at each width, as a file and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ultralytics.utils.torch_utils import select_device

from ..config import MAX_BITS, MIN_BITS, QCConfig, QCError
from ..host import architecture, log
from ..host.checkpoints import open_checkpoint
from ..host.images import spread_out
from ..host.photographs import read_photographs
from ..quant.layers import is_quantized
from ..report.costs import FILE, draw_costs
from ..report.pictures import STYLE, save
from ..run.sensitivity import IMAGES, measure, prepare, read_costs, size_for

LEAST_SIZE = 32  # px, the largest stride
SHOWN = 10  # layers in the text


def sensitivity(
    model: str | Path,
    data: str | Path,
    bits: Sequence[int] = (2, 3, 4, 6, 8),
    images: int = IMAGES,
    imgsz: int | None = None,
    out: str | Path | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Measure what the weights of each layer, and each tensor that layers read, cost alone at each width.

    The cost is the loss of outputs, class scores and box sides, against the float model's. Measuring that was
    interrupted goes on in the same folder.

    Args:
        model: A trained float checkpoint.
        data: A folder of photographs, or a data YAML, whose training images are used without their labels.
        bits: Widths, 2 to 8.
        images: Images to measure on.
        imgsz: Size of the images in pixels; by default as a run's budget takes it, half of the model's training size
            down to 320.
        out: Folder for sensitivity.json and the pictures; by default the name of `model` with -sensitivity.
        device: Where to compute: cpu, 0, ...

    Returns:
        What sensitivity.json holds, "about" and "costs"; with "files", the files written.

    Raises:
        QCError: If the model, the data set or a number is not accepted.
    """
    if not bits or any(not MIN_BITS <= b <= MAX_BITS for b in bits):
        raise QCError(f"QC: bits={list(bits)} is not accepted; give whole numbers from {MIN_BITS} to {MAX_BITS}.")
    if images < 1:
        raise QCError(f"QC: images={images} is not accepted; give a whole number of at least 1.")
    if imgsz is not None and imgsz < LEAST_SIZE:
        raise QCError(f"QC: imgsz={imgsz} is not accepted; give a whole number of at least {LEAST_SIZE}.")
    yolo = open_checkpoint("model", model)
    architecture.check_model(yolo.model)
    if is_quantized(yolo.model):
        raise QCError(f"QC: model={model} is quantized; give the float checkpoint.")
    folder = Path(out or f"{Path(model).stem}-sensitivity")
    files = spread_out(list(read_photographs(data, folder).splits["train"]), images)
    size = imgsz or size_for((yolo.ckpt or {}).get("train_args", {}).get("imgsz") or 640)
    probe, about = prepare(yolo.model, QCConfig(), files, size, select_device(device, verbose=False))
    widths = sorted(set(bits))
    wanted = {**{("weights", n): widths for n in probe.convs}, **{("activations", n): widths for n in probe.inputs}}
    read_costs(folder / FILE)  # another file of that name is not written over
    folder.mkdir(parents=True, exist_ok=True)
    log.info(f"{len(probe.convs)} layers and {len(probe.inputs)} tensors on {len(files)} images of {about['imgsz']} px")
    found = measure(probe, wanted, about, folder / FILE)  # all that the file holds, of earlier calls too
    names = [str(width) for width in widths]
    costs = {kind: {n: {b: c[b] for b in names} for n, c in of.items()} for kind, of in found.items()}
    from matplotlib import rc_context

    with rc_context(STYLE):
        files = save({"sensitivity": draw_costs(about["layers"], costs)}, folder)
    return {"about": about, "costs": costs, "files": [str(folder / FILE), *map(str, files)]}


def format_sensitivity(result: dict[str, Any]) -> str:
    """The result of `sensitivity` as text: the layers that cost most at the least width, and the files."""
    lines = []
    for kind, of in result["costs"].items():
        least = min(int(bits) for found in of.values() for bits in found)
        worst = sorted(of.items(), key=lambda item: -item[1][str(least)])[:SHOWN]
        lines.append(f"{kind} at {least} bits, the {len(worst)} of {len(of)} that cost most:")
        for name, found in worst:
            lines.append(
                f"  {name:<28}" + "".join(f"  {bits} bits {cost:9.2g}" for bits, cost in sorted(found.items()))
            )
    return "\n".join([*lines, *(f"written to {file}" for file in result["files"])])
