# yolo_qc_plugin, AGPL-3.0
"""Parity of a checkpoint and its exported file, on real images.

Three comparisons for each runtime, the last two also of the checkpoint as it was trained with its deployed form:

1. The integer weights: equal or not.
2. The codes of each layer, where PyTorch's layers are given the codes that the runtime computed before them: the share
   that differs and the largest difference in quantization steps. Without that no two float implementations agree bit
   for bit: a value at a rounding threshold moves by a step, and later values move with it. So the share of codes that
   differ end to end is reported, and not judged. OpenVINO's folders and TorchScript show no codes.
3. Accuracy on the same images, padded to the file's size: of the checkpoint as it was trained (fake-quantized), of its
   deployed form in PyTorch, and of the runtime. Of boxes, masks and keypoints that is mAP by pycocotools, for other
   tasks Ultralytics' own figures. Where codes may flip, few images show it in mAP: by pycocotools a larger difference
   passes where it is chance, i.e. where 0 lies within the middle 95% of resamples of the images (see `accuracy`).
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics import YOLO

from ..config import QCError
from ..deploy.codes import compare_codes, compare_trained
from ..deploy.exported import Exported, ExportedONNX, batched
from ..deploy.exported_qonnx import open_onnx
from ..deploy.fold import deployed_convs
from ..deploy.kinds import check_runtime
from ..deploy.litert.exported import LITERT_RUNTIMES, ExportedLiteRT
from ..host import log
from ..host.checkpoints import load_checkpoint
from .accuracy import Accuracy, held_against, is_as_accurate, is_chance, measure
from .exported_whole import ExportedOpenVINO, ExportedTorchScript
from .running import computed_by, on_runtime

MAX_STEPS = 1  # largest difference of a code that passes, given the same input
MAX_POINTS = 0.1  # largest difference of a task's main figures that passes, in points
MAX_POINTS_LITERT = 0.3  # its built-in kernels round a product twice
FORMATS = {".onnx": open_onnx, ".tflite": ExportedLiteRT, ".torchscript": ExportedTorchScript}
FOLDER = "_openvino_model"  # the end of the name of OpenVINO's


def check(
    model: str | Path,
    file: str | Path,
    data: str | Path,
    *,
    images: int = 8,
    split: str = "val",
    conf: float = 0.001,
    iou: float = 0.7,
) -> dict[str, Any]:
    """Compare a checkpoint with a file exported from it, in the runtimes that run it.

    An ONNX file is run in ONNX Runtime, with optimisations on and off, and in OpenVINO; one of the qonnx kind in ONNX
    Runtime and in the qonnx package. A LiteRT file is run with XNNPACK and by LiteRT's built-in kernels, an OpenVINO
    folder in OpenVINO, a TorchScript file in PyTorch.

    Args:
        model: Checkpoint of a quantized model.
        file: What `yolo export` made of it (without nms=True).
        data: Data YAML, as Ultralytics accepts it.
        images: Images for the comparison of codes; figures are of the whole split.
        split: "train", "val" or "test".
        conf: Lowest confidence kept, 0..1.
        iou: Overlap from which non-maximum suppression drops the weaker box, 0..1.

    Returns:
        "model", "file", "data", "imgsz", "images"; "weights", the names of layers whose integer weights differ;
        "pytorch" (deployed) with figures (see `Accuracy`); "checkpoint" (as trained) with what `held_against` and
        `compare_trained` give; "runtimes", a list of dicts: name, what `held_against` gives, steps (largest, layer by
        layer), changed (share, layer by layer), changed_end_to_end (share), output (largest difference end to end, in
        the outputs' own units); of a format that shows no codes without the three before, of a runtime that is too
        slow for a data set without accuracy, of one that is not tried name and skipped (a reason); "cost", what the
        qonnx package counts in a file of that kind (see `deploy.exported_qonnx`), else empty; "passed".

    Raises:
        QCError: If a file is missing or cannot be read, or the file was not exported from a model like this one.
    """
    if images < 1:
        raise QCError(f"QC: images={images} is not accepted; give a whole number of at least 1.")
    graph = _open(Path(file))
    yolo, fake_quantized = _load_quantized(model, graph)
    graph.match(deployed_convs(yolo.model))
    if isinstance(graph, ExportedONNX):
        check_runtime(graph.kind)
    stash = _Stash(images)
    settings = dict(data=data, imgsz=graph.imgsz, batch=graph.batch, split=split, conf=conf, iou=iou, rect=False)
    settings["device"] = "cpu"  # where the runtimes compute, and the model

    with computed_by(yolo.model, stash.wrap):
        expected = measure(yolo, settings)
    with computed_by(yolo.model, lambda _: fake_quantized):
        trained = held_against(expected, measure(yolo, settings), MAX_POINTS)
    sample = torch.cat(stash.batches)[:images]
    trained |= compare_trained(fake_quantized, yolo.model, sample)
    weights = graph.differing_weights(deployed_convs(yolo.model))
    runtimes = [_compare(name, graph, yolo, sample, settings, expected) for name in graph.runtimes]
    judged = [r for r in runtimes if "skipped" not in r]
    return {
        "model": str(model),
        "file": str(file),
        "data": str(data),
        "imgsz": graph.imgsz,
        "images": len(sample),
        "weights": weights,
        "checkpoint": trained,
        "pytorch": expected.figures,
        "runtimes": runtimes,
        "cost": graph.cost(),
        "passed": not weights
        and is_as_accurate(trained, MAX_POINTS)
        and all(is_as_accurate(r, _limit(r["name"])) for r in judged)
        and all(r.get("steps", 0) <= MAX_STEPS for r in [trained, *judged]),
    }


def _open(path: Path) -> Exported:
    if not path.name.endswith(FOLDER) and path.suffix not in FORMATS:
        accepted = f"{', '.join(FORMATS)} or {FOLDER}"
        raise QCError(f"QC: file={path} is not accepted; give what `yolo export` writes, ending in {accepted}.")
    graph = ExportedOpenVINO(path) if path.name.endswith(FOLDER) else FORMATS[path.suffix](path)
    if "'nms': True" in graph.metadata.get("args", ""):
        raise QCError(f"QC: file={path} has nms=True in it, which leaves other outputs; accepted: files without.")
    return graph


def _limit(runtime: str) -> float:
    return MAX_POINTS_LITERT if runtime in LITERT_RUNTIMES else MAX_POINTS


def _compare(
    name: str, graph: Exported, yolo: YOLO, sample: Tensor, settings: dict[str, Any], expected: Accuracy
) -> dict[str, Any]:
    """One entry of "runtimes"."""
    if reason := graph.obstacle(name):
        return {"name": name, "skipped": reason}
    log.info(name)
    codes = compare_codes(yolo.model, graph, name, sample)
    if name in graph.slow:
        return {"name": name, **codes}
    run = batched(graph.open(name), graph.fixed_batch)
    with computed_by(yolo.model, on_runtime(run)):
        found = measure(yolo, settings)
    return {"name": name, **codes, **held_against(expected, found, _limit(name))}


def format_check(result: dict[str, Any]) -> str:
    """The result of `check` as plain text, figures in points."""
    names = list(result["pytorch"])
    figures = lambda found: ["-" if found[name] is None else f"{100 * found[name]:.2f}" for name in names]  # noqa: E731
    rows = [("", *names, "difference", "steps", "codes changed", "end to end")]
    trained = result["checkpoint"]
    rows.append(("checkpoint", *figures(trained), f"{trained['points']:.2f}", *_codes(trained)))
    rows.append(("deployed, PyTorch", *figures(result["pytorch"])))
    for r in result["runtimes"]:
        if "skipped" in r:
            rows.append((r["name"], r["skipped"]))
            continue
        compared = [*figures(r), f"{r['points']:.2f}"] if "points" in r else ["" for _ in (*names, "difference")]
        rows.append((r["name"], *compared, *_codes(r)))
    lines = [f"{result['model']} and {result['file']} on {result['data']}, imgsz {result['imgsz']}"]
    lines += ["".join([f"{head:<28}", *(f"{cell:>14}" for cell in cells)]).rstrip() for head, *cells in rows]
    lines.append(f"integer weights: {'differ in ' + ', '.join(result['weights']) if result['weights'] else 'equal'}")
    if result["cost"]:
        lines.append(", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in result["cost"].items()))
    for name, entry in {"checkpoint": trained, **{r["name"]: r for r in result["runtimes"]}}.items():
        if found := entry.get("intervals"):
            of = "chance" if is_chance(entry) else "more than chance"
            within = ", ".join(f"{figure} in [{low:+.2f}, {high:+.2f}]" for figure, (low, high) in found.items())
            lines.append(f"{name}: {entry['points']:.2f} points are {of}: 95% of resamples have {within}")
    if all(value is None for value in result["pytorch"].values()):
        lines.append(f"no object in the labels of {result['data']}: accuracy was not compared")
    verdict = "passed" if result["passed"] else "FAILED"
    lines.append(f"{verdict} (accepted: {_accepted(result)})")
    return "\n".join(lines)


def _codes(entry: dict[str, Any]) -> list[str]:
    """Cells of an entry's codes, none where there are none."""
    if "steps" not in entry:
        return []
    return [str(entry["steps"]), *(f"{entry[key]:.2e}" for key in ("changed", "changed_end_to_end"))]


def _accepted(result: dict[str, Any]) -> str:
    """What passes, in words."""
    runtimes = result["runtimes"]
    steps = f"{MAX_STEPS} step layer by layer over {result['images']} images, "
    litert = f" ({MAX_POINTS_LITERT} in LiteRT)" if any(r["name"] in LITERT_RUNTIMES for r in runtimes) else ""
    chance = "" if "top1" in result["pytorch"] else ", or chance"
    return f"{steps}{MAX_POINTS} points{litert} of the main figures{chance}"


def _load_quantized(model: str | Path, graph: Exported) -> tuple[YOLO, nn.Module]:
    """The checkpoint in the deployed form, with the head that the file has, and itself."""
    yolo = load_checkpoint("model", model, quantized=True)
    module: Any = yolo.model
    if "end2end" in graph.metadata and hasattr(module, "end2end"):
        module.end2end = graph.metadata["end2end"] == "True"
    fake_quantized = deepcopy(module)
    module.fuse(verbose=False)
    return yolo, fake_quantized


class _Stash:
    """Copies the first images that a model is given in a validation."""

    def __init__(self, images: int):
        self.images = images
        self.batches: list[Tensor] = []

    def wrap(self, forward):
        """A forward that copies its input and calls `forward`."""

        def call(x, *args, **kwargs):
            # Ultralytics' first call is to warm up, on an empty image
            if x.any() and sum(map(len, self.batches)) < self.images:
                self.batches.append(x.detach().cpu().clone())
            return forward(x, *args, **kwargs)

        return call
