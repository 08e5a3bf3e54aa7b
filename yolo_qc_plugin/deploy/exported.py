# yolo_qc_plugin, AGPL-3.0
"""An exported file: what it holds, and what a runtime makes of it. Here of ONNX; LiteRT's is in `litert.exported`."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ..config import QCError
from .fold import DeployedConv2d
from .kinds import check_runtime, runtime_obstacle
from .nodes import links, moves

RUNTIMES = ("onnxruntime", "onnxruntime, not optimised", "openvino")
NOT_IN_OPENVINO = {  # kind -> why
    "int4": "not tried: OpenVINO 2026.4 crashes on 4-bit activations",
    "tensorrt": "not tried: made for TensorRT",
}

Run = Callable[[np.ndarray], list[np.ndarray]]  # images (b, 3, h, w) -> the graph's outputs


class Exported:
    """An exported file of ours, whatever its format: its shape, its quantizers, its weights.

    Attributes:
        path: Of the file.
        runtimes: Names of those that can run it, for `session`.
        slow: Those of them with which no data set is run.
        metadata: Ultralytics', as texts.
        imgsz: Side of its images in pixels, or [height, width] where these differ; of dynamic axes, as it was exported.
        batch: Images a batch to evaluate it with.
        fixed_batch: Images that it takes at once, 0 for any number.
        codes: Layer name -> (tensor of its input's codes, zero point).
        outputs: Layer name -> (tensor of its output's codes, scale, zero point), where the output is quantized.
        weights: Layer name -> tensor of its weight's codes.
        values: Constant name -> array; weights are (out, in, height, width).
    """

    slow: frozenset[str] = frozenset()
    path: Path
    runtimes: tuple[str, ...]
    metadata: dict[str, str]
    imgsz: int | list[int]
    batch: int
    fixed_batch: int
    codes: dict[str, tuple[str, int]]
    outputs: dict[str, tuple[str, float, int]]
    weights: dict[str, str]
    values: dict[str, np.ndarray]

    def obstacle(self, name: str) -> str | None:
        """Why a runtime is not tried, or None."""
        return None

    def open(self, runtime: str, content: bytes | None = None) -> Run:
        """The file, or what `with_codes` made of it, in a runtime; its outputs are as PyTorch gives them."""
        raise NotImplementedError

    def with_codes(self) -> tuple[bytes, list[str]]:
        """The model with all codes as further outputs, and their names."""
        raise NotImplementedError

    def cost(self) -> dict[str, float]:
        """What tools for the format count in the file, where there is such a tool."""
        return {}

    def match(self, layers: dict[str, DeployedConv2d]) -> None:
        """Refuse a file of another model."""
        ours = {name: tuple(m.weight_codes.shape) for name, m in layers.items()}
        theirs = {name: self.values[codes].shape for name, codes in self.weights.items()}
        if ours != theirs:
            odd = sorted(n for n in {*ours, *theirs} if ours.get(n) != theirs.get(n))
            raise QCError(
                f"QC: file={self.path} was not exported from this model: they differ in {len(odd)} convolutions, "
                f"{', '.join(odd[:3])}{' ...' if len(odd) > 3 else ''}."
            )

    def differing_weights(self, layers: dict[str, DeployedConv2d]) -> list[str]:
        """Names of layers whose integer weights are not the checkpoint's (up to the sign that a scale may carry)."""
        differing = []
        for name, layer in layers.items():
            codes = self.values[self.weights[name]].astype(np.int16)
            if self.values[self.weights[name]].dtype == np.uint8:
                codes -= 128
            raw = layer.weight_codes
            mine = [
                c.cpu().numpy() for c in (raw, raw * ~layer.off.view(-1, 1, 1, 1), layer.positive_scale(-128, 127)[0])
            ]
            if not any(np.array_equal(codes, c) for c in mine):
                differing.append(name)
        return differing


class ExportedONNX(Exported):
    """An ONNX file of ours.

    Args:
        path: Of the file.

    Raises:
        QCError: If the file cannot be read, or was not exported from a quantized checkpoint by this plugin.
    """

    runtimes: tuple[str, ...] = RUNTIMES

    def __init__(self, path: Path):
        if not find_spec("onnx"):
            raise QCError(f"QC: file={path} needs onnx, which is not installed: pip install 'yolo-qc-plugin[export]'.")
        import onnx
        from onnx import numpy_helper

        self.path = path
        if not path.is_file():
            raise QCError(f"QC: file={path} does not exist.")
        try:
            self.model = onnx.load(path)
            onnx.checker.check_model(self.model)
            image = next(i for i in self.model.graph.input if i.name == "images")
        except Exception as e:  # protobuf, checker and OS each have errors of their own
            reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
            raise QCError(f"QC: file={path} is no ONNX model of Ultralytics: {reason}") from None
        self.metadata = {p.key: p.value for p in self.model.metadata_props}
        sides = [d.dim_value for d in image.type.tensor_type.shape.dim]
        self.fixed_batch = sides[0]  # 0: any
        try:
            height, width = sides[2:] if all(sides[2:]) else json.loads(self.metadata["imgsz"])
            self.imgsz = height if height == width else [height, width]
            self.batch = self.fixed_batch or 16
        except (KeyError, ValueError):
            raise QCError(
                f"QC: file={path} has no metadata of Ultralytics; accepted: files of `yolo export`."
            ) from None

        self.values = {i.name: numpy_helper.to_array(i) for i in self.model.graph.initializer}
        self.codes, self.outputs, self.weights = {}, {}, {}
        self.moved: dict[str, list[str]] = {}  # of `codes` those of values on a grid -> its scale and zero point
        self.lowest: dict[str, str] = {}  # tensor of an output's codes as steps from 0, in floats -> that of the lowest
        try:
            self._read(*links(self.model.graph))
        except (KeyError, IndexError):  # another exporter's: scales that are computed, or no zero point
            raise QCError(f"QC: file={path} has Q/DQ nodes of another exporter; accepted: ours.") from None
        if not self.codes:
            raise QCError(f"QC: file={path} has no quantized convolution; accepted: exports of a quantized checkpoint.")

    def _read(self, sources: dict, readers: dict) -> None:
        """Find the convolutions' tensors."""
        for conv in (n for n in self.model.graph.node if n.op_type == "Conv"):
            weight, dequantize = sources.get(conv.input[1]), sources.get(conv.input[0])
            while dequantize is not None and moves(dequantize):
                dequantize = sources.get(dequantize.input[0])
            if weight is None or dequantize is None or {weight.op_type, dequantize.op_type} != {"DequantizeLinear"}:
                continue
            layer = weight.input[0].removesuffix(".weight_codes")
            cast = sources.get(weight.input[0])  # of the packed kind
            self.weights[layer] = weight.input[0] if cast is None else cast.input[0]
            codes, *grid = dequantize.input
            if dequantize.output[0] != conv.input[0]:
                codes = conv.input[0]
                self.moved[codes] = grid
            self.codes[layer] = codes, int(self.values[grid[1]])
            for n in readers.get(conv.output[0], []):
                if n.op_type == "QuantizeLinear":
                    scale, zero_point = (self.values[name] for name in n.input[1:3])
                    self.outputs[layer] = n.output[0], float(scale), int(zero_point)
                elif grid := _grid_in_floats(n, readers):
                    clip, product = grid
                    steps, (_, lowest, highest) = clip.output[0], clip.input
                    self.lowest[steps] = lowest
                    if self.values[highest] - self.values[lowest] == 255:  # else it shows in the inputs behind it
                        step = self.values[product.input[1]] if product else 1.0
                        self.outputs[layer] = steps, float(step), -int(self.values[lowest])

    @cached_property
    def kind(self) -> str:
        """One of kinds.ONNX_KINDS, from the nodes."""
        containers = {
            self.values[n.input[2]].dtype.name for n in self.model.graph.node if n.op_type == "QuantizeLinear"
        }
        if "int8" in containers:
            return "tensorrt"
        if self.lowest:
            return "openvino"
        if any(name.endswith(".weight_codes_packed") for name in self.weights.values()):
            return "packed"
        return "int4" if "uint4" in containers or "int4" in {v.dtype.name for v in self.values.values()} else "int8"

    def obstacle(self, name: str) -> str | None:
        """Why a runtime is not tried, or None."""
        if name != "openvino":
            return runtime_obstacle(self.kind)
        if not find_spec("openvino"):
            return "not installed"
        return NOT_IN_OPENVINO.get(self.kind) or runtime_obstacle(self.kind, name)

    def open(self, runtime: str, content: bytes | None = None) -> Run:
        """The file, or what `with_codes` made of it, in a runtime."""
        return session(content or self.path.read_bytes(), runtime)

    def with_codes(self) -> tuple[bytes, list[str]]:
        """The model with all codes as further outputs, and their names."""
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        names = list(dict.fromkeys([t for t, _ in self.codes.values()] + [t for t, *_ in self.outputs.values()]))
        if self.kind == "int4":  # NumPy has no 4-bit type: read such codes as floats
            model.graph.initializer.append(onnx.helper.make_tensor("one", onnx.TensorProto.FLOAT, [], [1.0]))
        how = {name: ("Sub", [lowest]) for name, lowest in self.lowest.items()}
        how |= {name: ("QuantizeLinear", grid) for name, grid in self.moved.items()}
        how |= {name: ("DequantizeLinear", ["one"]) for name in names} if self.kind == "int4" else {}
        for name in names:
            shown = name
            if name in how:
                (op, more), shown = how[name], f"{name}_shown"
                model.graph.node.append(onnx.helper.make_node(op, [name, *more], [shown]))
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(shown))
        return onnx.shape_inference.infer_shapes(model).SerializeToString(), names


def _grid_in_floats(node, readers: dict) -> tuple | None:
    """The grid that begins at a node, as `qdq` writes it: its Clip, and the product behind it; or None.

    A product by 1, of a step of 1, may have been taken out when the graph was simplified; its place is None then.
    """

    def following(node):
        found = readers.get(node.output[0], [])
        return found[0] if len(found) == 1 else None

    rounded = following(node) if node.op_type == "Mul" else node
    if rounded is None or rounded.op_type != "Round":
        return None
    clip = following(rounded)
    if clip is None or clip.op_type != "Clip":
        return None
    product = following(clip)
    return clip, product if product is not None and product.op_type == "Mul" else None


def session(model: bytes, name: str) -> Run:
    """A session of a runtime, one of RUNTIMES, with a serialized model.

    Raises:
        QCError: If ONNX Runtime is too old for the model.
    """
    if name == "openvino":
        import io

        import openvino as ov

        compiled = ov.compile_model(ov.Core().read_model(io.BytesIO(model)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return lambda images: [np.array(v) for v in compiled([images]).to_tuple()]
    check_runtime("packed" if b"_codes_packed" in model else "int8")
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    if name != "onnxruntime":
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})


def batched(run: Run, size: int) -> Run:
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
