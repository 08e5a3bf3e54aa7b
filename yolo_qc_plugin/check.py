# yolo_qc_plugin, AGPL-3.0
"""Parity of a checkpoint and its exported ONNX file, on real images.

Three comparisons for each runtime:

1. The integer weights: equal or not.
2. Layer by layer, PyTorch's layers being fed the very codes that the runtime computed: the codes that both then give,
   as the share that differs and the largest difference in quantization steps. End to end no two float implementations
   agree bit for bit: a value that lies at a rounding threshold moves by a step, and what follows moves with it. So the
   share of codes that differ end to end is reported, and not judged.
3. Accuracy on the same square images: of the checkpoint as it was trained (fake-quantized), of its deployed form in
   PyTorch, and of the runtime. For detection that is mAP by pycocotools, for other tasks the host's own figures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from ultralytics import YOLO
from ultralytics.utils import LOGGER

from . import host
from .config import QCError
from .deploy import DeployedConv2d, deployed_convs
from .evaluate import evaluate, load_model
from .qdq import links
from .report import figures_of

MAX_STEPS = 1  # largest difference of a code that passes, given the same input
MAX_POINTS = 0.1  # largest difference of a task's main figures that passes, in points
MAIN_FIGURES = ("AP", "map50_95", "mask_map50_95", "pose_map50_95", "top1")
RUNTIMES = ("onnxruntime", "onnxruntime, not optimised", "openvino")

Run = Callable[[np.ndarray], list[np.ndarray]]  # images (b, 3, h, w) -> the graph's outputs


def check(
    model: str | Path,
    onnx: str | Path,
    data: str | Path,
    *,
    images: int = 8,
    split: str = "val",
    conf: float = 0.001,
    iou: float = 0.7,
) -> dict[str, Any]:
    """Compare a checkpoint with its ONNX file in ONNX Runtime, with optimisations on and off, and in OpenVINO.

    Args:
        model: Checkpoint of a quantized model.
        onnx: What `yolo export format=onnx` made of it (without nms=True).
        data: Data YAML, as Ultralytics accepts it.
        images: Images for the comparison of codes; figures are of the whole split.
        split: "train", "val" or "test".
        conf: Lowest confidence kept, 0..1.
        iou: Overlap from which non-maximum suppression drops the weaker box, 0..1.

    Returns:
        "model", "onnx", "data", "imgsz", "images"; "weights", the names of layers whose integer weights differ;
        "checkpoint" and "pytorch" (deployed) with figures in 0..1 (AP and AP50 of detection, those of
        `report.figures_of` of other tasks); "runtimes", a list of dicts: name, the figures, points (largest difference
        of the main ones to "pytorch" in points), steps (largest, layer by layer), changed (share, layer by layer),
        changed_end_to_end (share), output (largest difference end to end, in the outputs' own units), or name and
        skipped (a reason); "passed".

    Raises:
        QCError: If a file is missing or cannot be read, or the ONNX file was not exported from a model like this one.
    """
    from importlib.util import find_spec

    graph = _Exported(Path(onnx))
    yolo, fake_quantized = _load_quantized(model, graph)
    graph.match(deployed_convs(yolo.model))
    stash = _Stash(images)
    settings = dict(data=data, imgsz=graph.imgsz, batch=graph.batch, split=split, conf=conf, iou=iou, rect=False)

    with _forward(yolo.model, stash.wrap):
        expected = _figures(yolo, settings)
    with _forward(yolo.model, lambda _: fake_quantized):
        trained = _figures(yolo, settings)
    sample = torch.cat(stash.batches)[:images]
    result = {
        "model": str(model),
        "onnx": str(onnx),
        "data": str(data),
        "imgsz": graph.imgsz,
        "images": len(sample),
        "weights": graph.differing_weights(deployed_convs(yolo.model)),
        "checkpoint": trained,
        "pytorch": expected,
        "runtimes": [],
    }
    for name in RUNTIMES:
        if name == "openvino" and (reason := graph.openvino_obstacle(bool(find_spec("openvino")))):
            result["runtimes"].append({"name": name, "skipped": reason})
            continue
        LOGGER.info(f"{host.PREFIX}{name}")
        row = {"name": name, **_compare_codes(yolo.model, graph, name, sample)}
        run = _batched(_session(graph.path.read_bytes(), name), graph.fixed_batch)
        with _forward(yolo.model, lambda _, run=run: partial(_run_on, run)):
            found = _figures(yolo, settings)
        row |= {**found, "points": _points(found, expected)}
        result["runtimes"].append(row)
    judged = [r for r in result["runtimes"] if "skipped" not in r]
    result["passed"] = (
        not result["weights"]
        and _points(result["checkpoint"], result["pytorch"]) <= MAX_POINTS
        and all(r["steps"] <= MAX_STEPS and r["points"] <= MAX_POINTS for r in judged)
    )
    return result


def _figures(yolo: YOLO, settings: dict[str, Any]) -> dict[str, float | None]:
    """Figures by name, in 0..1; None where there is no ground truth."""
    if yolo.task == "detect":
        coco = evaluate(yolo, **settings)["coco"]
        return {name: coco[name] for name in ("AP", "AP50")}
    with TemporaryDirectory() as folder:
        found = figures_of(yolo.val(**settings, plots=False, verbose=False, project=folder).results_dict)
    return {name: value for name, value in found.items() if name != "fitness"}


def _points(a: dict[str, float | None], b: dict[str, float | None]) -> float:
    """Largest difference of the main figures in points; no ground truth at all counts as 0."""
    return max(100 * abs((a[name] or 0.0) - (b[name] or 0.0)) for name in a if name in MAIN_FIGURES)


def format_check(result: dict[str, Any]) -> str:
    """The result of `check` as plain text, figures in points."""
    names = list(result["pytorch"])
    figures = lambda found: [f"{100 * (found[name] or 0):.2f}" for name in names]  # noqa: E731
    rows = [("", *names, "difference", "steps", "codes changed", "end to end")]
    for key, label in (("checkpoint", "checkpoint"), ("pytorch", "deployed, PyTorch")):
        rows.append((label, *figures(result[key]), "", "", "", ""))
    for r in result["runtimes"]:
        if "skipped" in r:
            rows.append((r["name"], r["skipped"]))
            continue
        shares = [f"{r[k]:.2e}" for k in ("changed", "changed_end_to_end")]
        rows.append((r["name"], *figures(r), f"{r['points']:.2f}", str(r["steps"]), *shares))
    lines = [f"{result['model']} and {result['onnx']} on {result['data']}, imgsz {result['imgsz']}"]
    lines += ["".join([f"{head:<28}", *(f"{cell:>14}" for cell in cells)]).rstrip() for head, *cells in rows]
    lines.append(f"integer weights: {'differ in ' + ', '.join(result['weights']) if result['weights'] else 'equal'}")
    lines.append(
        f"{'passed' if result['passed'] else 'FAILED'} (accepted: {MAX_STEPS} step layer by layer over "
        f"{result['images']} images, {MAX_POINTS} points of the main figures)"
    )
    return "\n".join(lines)


class _Exported:
    """An ONNX file of ours: its shape, its quantizers, its weights.

    Attributes:
        codes: Layer name -> (tensor of its input's codes, zero point).
        outputs: Layer name -> (tensor of its output's codes, scale, zero point), where the output is quantized.
    """

    def __init__(self, path: Path):
        import onnx
        from onnx import numpy_helper

        self.path = path
        if not path.is_file():
            raise QCError(f"QC: onnx={path} does not exist.")
        try:
            self.model = onnx.load(path)
            onnx.checker.check_model(self.model)
            image = next(i for i in self.model.graph.input if i.name == "images")
        except Exception as e:  # protobuf, checker and OS each have errors of their own
            lines = str(e).strip().splitlines()
            raise QCError(f"QC: onnx={path} is no ONNX model of Ultralytics: {lines[0] if lines else type(e).__name__}")
        self.metadata = {p.key: p.value for p in self.model.metadata_props}
        sides = [d.dim_value for d in image.type.tensor_type.shape.dim]
        self.fixed_batch = sides[0]  # 0: any
        try:
            self.imgsz = sides[2] or max(json.loads(self.metadata["imgsz"]))
            self.batch = self.fixed_batch or 16
        except (KeyError, ValueError):
            raise QCError(
                f"QC: onnx={path} has no metadata of Ultralytics; accepted: files of `yolo export`."
            ) from None

        nodes = self.model.graph.node
        self.values = {i.name: numpy_helper.to_array(i) for i in self.model.graph.initializer}
        sources, readers = links(self.model.graph)
        self.codes, self.outputs, self.weights = {}, {}, {}
        for conv in (n for n in nodes if n.op_type == "Conv"):
            weight, dequantize = sources.get(conv.input[1]), sources.get(conv.input[0])
            if weight is None or dequantize is None or {weight.op_type, dequantize.op_type} != {"DequantizeLinear"}:
                continue
            layer = weight.input[0].removesuffix(".weight_codes")
            self.weights[layer] = weight.input[0]
            self.codes[layer] = dequantize.input[0], int(self.values[dequantize.input[2]])
            for n in readers.get(conv.output[0], []):
                if n.op_type == "QuantizeLinear":
                    scale, zero_point = (self.values[name] for name in n.input[1:3])
                    self.outputs[layer] = n.output[0], float(scale), int(zero_point)
        if not self.codes:
            raise QCError(f"QC: onnx={path} has no quantized convolution; accepted: exports of a quantized checkpoint.")
        self.int4 = any(self.values[z].dtype.name == "uint4" for n in nodes if n.op_type == "QuantizeLinear"
                        for z in n.input[2:3])  # fmt: skip

    def match(self, layers: dict[str, DeployedConv2d]) -> None:
        """Refuse a file of another model."""
        ours = {name: tuple(m.weight_codes.shape) for name, m in layers.items()}
        theirs = {name: self.values[codes].shape for name, codes in self.weights.items()}
        if ours != theirs:
            odd = sorted(n for n in {*ours, *theirs} if ours.get(n) != theirs.get(n))
            raise QCError(
                f"QC: onnx={self.path} was not exported from this model: they differ in {len(odd)} convolutions, "
                f"{', '.join(odd[:3])}{' ...' if len(odd) > 3 else ''}."
            )

    def differing_weights(self, layers: dict[str, DeployedConv2d]) -> list[str]:
        """Names of layers whose integer weights are not the checkpoint's (up to the sign that a scale may carry)."""
        differing = []
        for name, layer in layers.items():
            codes = self.values[self.weights[name]].astype(np.int16)
            if self.values[self.weights[name]].dtype == np.uint8:
                codes -= 128
            mine = [c.cpu().numpy() for c in (layer.weight_codes, layer.positive_scale(-128, 127)[0])]
            if not any(np.array_equal(codes, c) for c in mine):
                differing.append(name)
        return differing

    def openvino_obstacle(self, installed: bool) -> str | None:
        """Why OpenVINO is not tried, or None."""
        if not installed:
            return "not installed"
        return "not tried: OpenVINO 2026.4 crashes on 4-bit activations" if self.int4 else None

    def with_codes(self) -> tuple[bytes, list[str]]:
        """The model with all codes as further outputs, and their names."""
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        names = list(dict.fromkeys([t for t, _ in self.codes.values()] + [t for t, *_ in self.outputs.values()]))
        if self.int4:  # NumPy has no 4-bit type: read such codes as floats
            model.graph.initializer.append(onnx.helper.make_tensor("one", onnx.TensorProto.FLOAT, [], [1.0]))
        for name in names:
            shown = name
            if self.int4:
                shown = f"{name}_shown"
                model.graph.node.append(onnx.helper.make_node("DequantizeLinear", [name, "one"], [shown]))
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(shown))
        return onnx.shape_inference.infer_shapes(model).SerializeToString(), names


def _load_quantized(model: str | Path, graph: _Exported):
    """The checkpoint in the deployed form, with the head that the file has, and itself."""
    try:
        yolo = load_model(model)
    except FileNotFoundError as e:
        raise QCError(f"QC: {e}") from None
    except Exception as e:  # a truncated or foreign file: torch, zip and pickle errors alike
        raise QCError(f"QC: model={model} cannot be read as a checkpoint: {e}") from None
    if not isinstance(yolo.model, nn.Module) or not host.is_quantized(yolo.model):
        raise QCError(f"QC: model={model} is not quantized; accepted: checkpoints trained with callbacks=qc.")
    if "end2end" in graph.metadata and hasattr(yolo.model, "end2end"):
        yolo.model.end2end = graph.metadata["end2end"] == "True"
    fake_quantized = deepcopy(yolo.model.float().eval())
    yolo.model.fuse(verbose=False)
    return yolo, fake_quantized


class _Stash:
    """Keeps the first images that a model is given in a validation."""

    def __init__(self, images: int):
        self.images, self.batches = images, []

    def wrap(self, forward):
        """`forward`, with its input kept."""

        def call(x, *args, **kwargs):
            # the first call is the host's warm-up, on an empty image
            if x.any() and sum(map(len, self.batches)) < self.images:
                self.batches.append(x.detach().cpu().clone())
            return forward(x, *args, **kwargs)

        return call


@contextmanager
def _forward(model: nn.Module, wrap) -> Iterator[None]:
    """Let something else compute a model's outputs, and the host's own validation do all that surrounds it."""
    model.forward = wrap(type(model).forward.__get__(model))
    try:
        yield
    finally:
        del model.forward


def _run_on(run: Run, x: Tensor, *args, **kwargs) -> Tensor | tuple[Tensor, ...]:
    """A runtime's outputs as the host's own backends give them."""
    values = tuple(map(torch.from_numpy, run(x.cpu().numpy())))
    return values if len(values) > 1 else values[0]


def _session(model: bytes, name: str) -> Run:
    """A runtime's session."""
    if name == "openvino":
        import io

        import openvino as ov

        compiled = ov.compile_model(ov.Core().read_model(io.BytesIO(model)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return lambda images: [np.array(v) for v in compiled([images]).to_tuple()]
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    if name != "onnxruntime":
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})


def _batched(run: Run, size: int) -> Run:
    """`run` for any number of images with a graph for `size` of them (0: any)."""

    def call(images: np.ndarray) -> list[np.ndarray]:
        if not size:
            return run(images)
        parts = []
        for start in range(0, len(images), size):
            part = images[start : start + size]
            padded = np.concatenate([part, np.repeat(part[-1:], size - len(part), 0)])
            parts.append([v[: len(part)] for v in run(padded)])
        return [np.concatenate(v) for v in zip(*parts)]

    return call


@torch.no_grad()
def _compare_codes(model: nn.Module, graph: _Exported, name: str, images: Tensor) -> dict[str, Any]:
    """Codes of PyTorch and of a runtime: layer by layer on the runtime's own codes, and end to end."""
    instrumented, names = graph.with_codes()
    run = _batched(_session(instrumented, name), graph.fixed_batch)
    total = changed = changed_end_to_end = steps = 0
    output = 0.0
    for image in images.split(graph.fixed_batch or 1):
        count = len(graph.model.graph.output)
        values = run(image.numpy())
        theirs = dict(zip(names, values[count:]))
        forced = _Codes(model, graph, theirs, force=True)
        with forced:
            model(image)
        free = _Codes(model, graph, theirs, force=False)
        with free:
            mine = model(image)
        mine = mine[0] if isinstance(mine, (tuple, list)) else mine  # what follows are the training loss' inputs
        mine = mine if isinstance(mine, (tuple, list)) else (mine,)
        shapes = [tuple(v.shape) for v in mine], [v.shape for v in values[:count]]
        if shapes[0] != shapes[1]:
            raise QCError(
                f"QC: onnx={graph.path} gives outputs of shape {shapes[1]}, the model {shapes[0]}; "
                "accepted: files exported without nms=True."
            )
        output = max(output, *(float((a - torch.from_numpy(b)).abs().max()) for a, b in zip(mine, values)))
        total, changed = total + forced.total, changed + forced.changed
        changed_end_to_end, steps = changed_end_to_end + free.changed, max(steps, forced.steps)
    return {
        "steps": steps,
        "changed": changed / total,
        "changed_end_to_end": changed_end_to_end / total,
        "output": output,
    }


class _Codes:
    """Hooks that compare a model's codes with those of a runtime, and let it go on with the latter if `force`.

    Attributes:
        total: Codes compared.
        changed: Codes that differ.
        steps: Largest difference.
    """

    def __init__(self, model: nn.Module, graph: _Exported, theirs: dict[str, np.ndarray], force: bool):
        self.layers, self.graph, self.theirs, self.force = deployed_convs(model), graph, theirs, force
        self.total = self.changed = self.steps = 0

    def __enter__(self):
        self.hooks = []
        for name, layer in self.layers.items():
            self.hooks.append(layer.register_forward_pre_hook(self._input))
            if name in self.graph.outputs:
                self.hooks.append(layer.register_forward_hook(self._output))
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def _input(self, layer: DeployedConv2d, args):
        tensor, zero_point = self.graph.codes[layer.name]
        theirs = torch.from_numpy(self.theirs[tensor].astype(np.int16)) - zero_point
        self._count(layer.act_quant.steps(args[0]), theirs)
        return (layer.act_quant.before(theirs),) if self.force else None

    def _output(self, layer: DeployedConv2d, args, y):
        tensor, scale, zero_point = self.graph.outputs[layer.name]
        theirs = torch.from_numpy(self.theirs[tensor].astype(np.int16)) - zero_point
        self._count((y / scale).round().clamp(-zero_point, 255 - zero_point), theirs)
        return theirs * scale if self.force else None

    def _count(self, mine: Tensor, theirs: Tensor) -> None:
        difference = (mine - theirs).abs()
        self.total += difference.numel()
        self.changed += int((difference > 0).sum())
        self.steps = max(self.steps, int(difference.max()))
