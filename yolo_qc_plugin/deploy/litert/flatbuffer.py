# yolo_qc_plugin, AGPL-3.0
"""A LiteRT file: tensors, constants and operators, written by the schema that ai-edge-litert ships."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..nodes import pack4

SCHEMA_VERSION = 3
ALIGNMENT = 16  # of constants in bytes, as the schema demands; the generated code leaves it out
# operator -> version by the type of its constants or inputs, where that is not 2 for INT8 and 1 for the rest
VERSIONS = {
    "CONV_2D": {"INT8": 3, "INT4": 8},
    "DEPTHWISE_CONV_2D": {"INT8": 3, "INT4": 7},
    "DEQUANTIZE": {"INT8": 2, "INT4": 6},
    "QUANTIZE": {},
    "RESHAPE": {},
}


@dataclass(frozen=True)
class Grid:
    """Value = scale * (code - zero_point) of INT8 codes.

    Attributes:
        scale: Positive.
        zero_point: The code of 0.
        low: The lowest code; the highest is 127.
    """

    scale: float
    zero_point: int
    low: int = -128

    @property
    def lowest(self) -> float:
        """The lowest value."""
        return self.scale * (self.low - self.zero_point)


class Flatbuffer:
    """A model of one graph, built tensor by tensor. Tensors are named by their index.

    Args:
        description: What the file says of itself.
    """

    def __init__(self, description: str):
        from ai_edge_litert import schema_py_generated as schema

        self.schema: Any = schema
        self.graph = schema.SubGraphT(tensors=[], operators=[], inputs=[], outputs=[], name="main")
        self.model = schema.ModelT(
            version=SCHEMA_VERSION,
            description=description,
            operatorCodes=[],
            subgraphs=[self.graph],
            buffers=[schema.BufferT()],  # the empty one, of all that is computed
        )
        self._codes: dict[tuple[str, int], int] = {}
        self._constants: dict[tuple, int] = {}

    def tensor(self, name: str, shape: Sequence[int], grid: Grid | None = None, buffer: int = 0) -> int:
        """A tensor that is computed: INT8 on a grid, else FLOAT32."""
        quantization = grid and self._quantization([grid.scale], [grid.zero_point])
        return self._tensor(name, shape, "INT8" if grid else "FLOAT32", quantization, buffer)

    def constant(self, name: str, array: np.ndarray, kind: str = "", scale: Any = None,
                 zero_point: int = 0, axis: int = 0) -> int:  # fmt: skip
        """A constant, written once for each name and content.

        Args:
            name: Its name.
            array: INT4 comes as int8.
            kind: Type in the schema, that of the array by default.
            scale: Of integers: one, or one for each slice along `axis`.
            zero_point: See `scale`.
            axis: See `scale`.
        """
        kind = kind or array.dtype.name.upper()
        key = (name, kind, array.shape, array.tobytes())
        if key not in self._constants:
            data = pack4(array) if kind == "INT4" else np.ascontiguousarray(array)
            self.model.buffers.append(self.schema.BufferT(data=data.reshape(-1).view(np.uint8)))
            quantization = None if scale is None else self._quantization(scale, [zero_point] * len(scale), axis)
            buffer = len(self.model.buffers) - 1
            self._constants[key] = self._tensor(name, array.shape, kind, quantization, buffer)
        return self._constants[key]

    def add(self, op: str, inputs: Sequence[int], output: int, options: str = "", **values) -> int:
        """Add an operator with one output and return that.

        Args:
            op: Name in the schema, e.g. "CONV_2D".
            inputs: Tensors; -1 is one left out.
            output: Tensor.
            options: Name of its options in the schema, e.g. "Conv2DOptions".
            **values: Of the options.
        """
        types = {self.type_of(i) for i in inputs if i >= 0}
        integer = "INT4" if "INT4" in types else "INT8" if "INT8" in types else ""
        version = VERSIONS.get(op, {"INT8": 2}).get(integer, 1)
        node = self.schema.OperatorT(opcodeIndex=self._code(op, version), inputs=list(inputs), outputs=[output])
        if options:
            node.builtinOptionsType = getattr(self.schema.BuiltinOptions, options)
            node.builtinOptions = getattr(self.schema, f"{options}T")(**values)
        self.graph.operators.append(node)
        return output

    def type_of(self, tensor: int) -> str:
        """A tensor's type, as the schema names it."""
        kinds = self.schema.TensorType
        return next(k for k, v in vars(kinds).items() if v == self.graph.tensors[tensor].type)

    def finish(self, inputs: Sequence[int], outputs: Sequence[int]) -> bytes:
        """The file's content; the signature's names are those of Ultralytics' own files."""
        self.graph.inputs, self.graph.outputs = list(inputs), list(outputs)
        names = lambda stem, of: [  # noqa: E731
            self.schema.TensorMapT(name=f"{stem}_{i}", tensorIndex=t) for i, t in enumerate(of)
        ]
        signature = self.schema.SignatureDefT(
            inputs=names("args", inputs), outputs=names("output", outputs), signatureKey="serving_default"
        )
        self.model.signatureDefs = [signature]
        return pack(self.model)

    def _tensor(self, name, shape, kind: str, quantization, buffer: int) -> int:
        tensor = self.schema.TensorT(
            name=name,
            shape=[int(n) for n in shape],
            type=getattr(self.schema.TensorType, kind),
            quantization=quantization,
            buffer=buffer,
            hasRank=True,
        )
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def _quantization(self, scale, zero_point, axis: int = 0):
        return self.schema.QuantizationParametersT(
            scale=np.asarray(scale, np.float32), zeroPoint=np.asarray(zero_point, np.int64), quantizedDimension=axis
        )

    def _code(self, op: str, version: int) -> int:
        if (op, version) not in self._codes:
            code = getattr(self.schema.BuiltinOperator, op)
            # readers of old take the first field, of one byte
            self.model.operatorCodes.append(
                self.schema.OperatorCodeT(deprecatedBuiltinCode=min(code, 127), builtinCode=code, version=version)
            )
            self._codes[op, version] = len(self._codes)
        return self._codes[op, version]


def pack(model) -> bytes:
    """A model of the schema's object API as the content of a file, its constants aligned.

    Equal vectors are written once: zero points of a scale per channel, 8 bytes each, are a twentieth of a small file.
    """
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    class Builder(flatbuffers.Builder):
        def __init__(self):
            super().__init__(1024)
            self._vectors: dict[tuple, int] = {}

        def CreateNumpyVector(self, x) -> int:
            key = x.dtype.str, x.tobytes()
            if key not in self._vectors:
                self._vectors[key] = super().CreateNumpyVector(x)
            return self._vectors[key]

    def aligned(builder, data) -> int:
        builder.StartVector(1, len(data), ALIGNMENT)
        builder.head -= len(data)
        builder.Bytes[builder.head : builder.head + len(data)] = data.tobytes()
        vector = builder.EndVector()
        schema.BufferStart(builder)
        schema.BufferAddData(builder, vector)
        return schema.BufferEnd(builder)

    for buffer in model.buffers:
        if buffer.data is not None and len(buffer.data):
            buffer.Pack = lambda builder, data=buffer.data: aligned(builder, data)
    builder = Builder()
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())
