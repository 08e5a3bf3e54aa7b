# yolo_qc_plugin, AGPL-3.0
"""An exported LiteRT file: what it holds, and what its runtime makes of it."""

from __future__ import annotations

import json
import zipfile
from ast import literal_eval
from pathlib import Path

import numpy as np

from ...config import QCError
from ..exported import Exported, Run
from ..kinds import missing, too_old
from ..nodes import unpack4
from .flatbuffer import pack

OLDEST = 2, 1, 4  # LiteRT
LITERT_RUNTIMES = ("LiteRT", "LiteRT, built-in kernels")  # with XNNPACK, and without


class ExportedLiteRT(Exported):
    """A LiteRT file of ours. Its tensors have their index for a name.

    Args:
        path: Of the file.

    Raises:
        QCError: If the file cannot be read, or was not exported from a quantized checkpoint; or without LiteRT.
    """

    runtimes = LITERT_RUNTIMES

    def __init__(self, path: Path):
        if reason := litert_obstacle():
            raise QCError(f"QC: file={path} cannot be run: {reason}.")
        from ai_edge_litert import schema_py_generated as schema

        self.path, self.schema = path, schema
        if not path.is_file():
            raise QCError(f"QC: file={path} does not exist.")
        try:
            content = path.read_bytes()
            if not schema.Model.ModelBufferHasIdentifier(content, 0):
                raise ValueError("it does not begin as one")
            self.model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
            self.graph = self.model.subgraphs[0]
            self.metadata = litert_metadata(path)
            height, width = json.loads(self.metadata["imgsz"])
        except Exception as e:  # the reader of a truncated file raises whatever its bytes led it to
            raise QCError(f"QC: file={path} is no LiteRT model of Ultralytics: {e}") from None
        self.imgsz = height if height == width else [height, width]
        self.fixed_batch = self.batch = int(self.graph.tensors[self.graph.inputs[0]].shape[0])
        self.codes, self.outputs, self.weights, self.values = {}, {}, {}, {}
        self._read()
        if not self.codes:
            raise QCError(f"QC: file={path} has no quantized convolution; accepted: exports of a quantized checkpoint.")

    def open(self, runtime: str, content: bytes | None = None) -> Run:
        """The file, or what `with_codes` made of it, in a runtime; coordinates are in pixels."""
        run = litert_session(content or self.path.read_bytes(), runtime)
        return lambda images: in_pixels(run(images), self.metadata, *images.shape[2:])

    def with_codes(self) -> tuple[bytes, list[str]]:
        """The model with all codes as further outputs, and their names."""
        names = list(dict.fromkeys([t for t, _ in self.codes.values()] + [t for t, *_ in self.outputs.values()]))
        kept, self.graph.outputs = self.graph.outputs, [*self.graph.outputs, *map(int, names)]
        try:
            return pack(self.model), names
        finally:
            self.graph.outputs = kept

    def _read(self) -> None:
        schema = self.schema
        operators = {v: k for k, v in vars(schema.BuiltinOperator).items()}
        kinds = {v: k for k, v in vars(schema.TensorType).items()}
        ops = [(operators[self.model.operatorCodes[o.opcodeIndex].builtinCode], o) for o in self.graph.operators]
        before = {o.outputs[0]: o.inputs[0] for op, o in ops if op in {"DEQUANTIZE", "PAD"}}
        for op, o in ops:
            if op not in {"CONV_2D", "DEPTHWISE_CONV_2D"}:
                continue
            x, weight = (_follow(before, i) for i in o.inputs[:2])
            name = self.graph.tensors[weight].name.decode()
            layer = name.removesuffix(".weight_codes")
            if layer == name:
                continue
            self.codes[layer] = str(x), self._grid(x)[1]
            self.weights[layer] = name
            self.values[name] = self._array(weight, kinds, depthwise=op != "CONV_2D")
            if kinds[self.graph.tensors[o.outputs[0]].type] == "INT8":
                self.outputs[layer] = str(o.outputs[0]), *self._grid(o.outputs[0])

    def _grid(self, tensor: int) -> tuple[float, int]:
        quantization = self.graph.tensors[tensor].quantization
        return float(quantization.scale[0]), int(quantization.zeroPoint[0])

    def _array(self, index: int, kinds: dict, depthwise: bool) -> np.ndarray:
        """A weight's codes (out, in, height, width)."""
        tensor = self.graph.tensors[index]
        data = np.asarray(self.model.buffers[tensor.buffer].data, np.uint8)
        codes = data.view(np.int8)
        if kinds[tensor.type] == "INT4":
            codes = unpack4(data, tensor.shape)
        codes = codes.reshape(tensor.shape)
        return codes.transpose((3, 0, 1, 2) if depthwise else (0, 3, 1, 2))


def _follow(before: dict[int, int], tensor: int) -> int:
    while tensor in before:
        tensor = before[tensor]
    return tensor


def litert_obstacle() -> str | None:
    """Why a file cannot be run here, or None."""
    return missing("ai_edge_litert") or too_old("ai_edge_litert", OLDEST, "this file")


def litert_metadata(path: Path) -> dict[str, str]:
    """What Ultralytics says of a LiteRT file, as texts."""
    with zipfile.ZipFile(path) as archive:
        return {k: str(v) for k, v in json.loads(archive.read("metadata.json")).items()}


def in_pixels(values: list[np.ndarray], metadata: dict[str, str], height: int, width: int) -> list[np.ndarray]:
    """A file's outputs with coordinates in pixels, in place: it gives shares of height and width."""
    if metadata["task"] == "classify" or metadata.get("end2end") == "True":
        return values
    y = values[0]
    y[:, [0, 2]] *= width
    y[:, [1, 3]] *= height
    if metadata["task"] == "pose":
        first, step = 4 + len(literal_eval(metadata["names"])), literal_eval(metadata["kpt_shape"])[1]
        y[:, first::step] *= width
        y[:, first + 1 :: step] *= height
    return values


def litert_session(model: bytes, name: str, threads: int | None = None) -> Run:
    """A session of LiteRT with a model's content: images -> outputs, codes among them with channels second."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    resolver = OpResolverType.AUTO if name == LITERT_RUNTIMES[0] else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = Interpreter(model_content=model, experimental_op_resolver_type=resolver, num_threads=threads)
    interpreter.allocate_tensors()
    image = interpreter.get_input_details()[0]["index"]
    outputs = [d["index"] for d in interpreter.get_output_details()]

    def run(images: np.ndarray) -> list[np.ndarray]:
        interpreter.set_tensor(image, images)
        interpreter.invoke()
        values = [interpreter.get_tensor(i) for i in outputs]
        return [v.transpose(0, 3, 1, 2) if v.dtype == np.int8 else v for v in values]

    return run
