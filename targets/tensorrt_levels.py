"""What each TensorRT takes: opsets, operators, tensor types, and which one a JetPack brings.

``check`` walks a finished model before anybody carries it to a board. The operators are those that pq-export's graphs
use or may come to use, with the first TensorRT whose ONNX parser is known to read them; a graph with any other is
refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from pq_export.errors import UsageError
from pq_export.rewrite.lint import Finding

Version = tuple[int, int]


@dataclass(frozen=True)
class Level:
    """One TensorRT: ``opset`` is the highest that its parser reads."""

    version: Version
    opset: int

    @property
    def name(self) -> str:
        return f"{self.version[0]}.{self.version[1]}"


@dataclass(frozen=True)
class JetPack:
    """``sms``: compute capabilities of its boards."""

    version: str
    level: Level
    cuda: str
    sms: tuple[int, ...]
    boards: str


TENSORRT_10_3 = Level((10, 3), 20)
TENSORRT_10_13 = Level((10, 13), 22)
TENSORRT_10_16 = Level((10, 16), 24)
INT4_OPSET = 21
OLDEST, NEWEST = TENSORRT_10_3, TENSORRT_10_16

JETPACKS = {
    jetpack.version: jetpack
    for jetpack in (
        JetPack("6.2", TENSORRT_10_3, "12.6", (87,), "Orin"),
        JetPack("7.1", TENSORRT_10_13, "13.0", (110,), "Thor"),
        JetPack("7.2", TENSORRT_10_16, "13.2", (87, 110), "Orin and Thor"),
    )
}

OPERATORS: dict[str, Version] = {
    **dict.fromkeys(
        (
            *(
                "Add",
                "And",
                "Cast",
                "Clip",
                "Concat",
                "Constant",
                "ConstantOfShape",
                "Div",
                "Equal",
                "Expand",
                "Gather",
            ),
            *(
                "Greater",
                "Identity",
                "Less",
                "LessOrEqual",
                "MatMul",
                "Max",
                "Min",
                "Mul",
                "Neg",
                "Not",
                "Or",
                "Pad",
                "Pow",
            ),
            *(
                "Range",
                "ReduceMean",
                "Reshape",
                "Shape",
                "Sigmoid",
                "Slice",
                "Softmax",
                "Split",
                "Sqrt",
                "Squeeze",
                "Sub",
            ),
            *("Tile", "Transpose", "Unsqueeze", "Where", "QuantizeLinear", "DequantizeLinear"),
        ),
        (10, 0),
    ),
}
PLUGIN_OPERATORS = {("pq", "QLinear"), ("pq", "RMSNormQuantize"), ("pq", "SiluMulHadamardQuantize")}
TYPES: dict[int, Version] = {
    TensorProto.FLOAT: (10, 0),
    TensorProto.FLOAT16: (10, 0),
    TensorProto.BFLOAT16: (10, 0),
    TensorProto.INT32: (10, 0),
    TensorProto.INT64: (10, 0),
    TensorProto.BOOL: (10, 0),
    TensorProto.INT8: (10, 0),
    TensorProto.INT4: (10, 0),  # constants in front of DequantizeLinear only
}


def find_jetpack(version: str) -> JetPack:
    if version not in JETPACKS:
        raise UsageError(f"unknown JetPack '{version}'", cure=f"There are: {', '.join(JETPACKS)}.")
    return JETPACKS[version]


def check(model: onnx.ModelProto, level: Level, *, int4_per_channel: bool = False) -> list[Finding]:
    """What in ``model`` TensorRT ``level`` does not take; empty if nothing.

    ``int4_per_channel``: whether 4-bit weights may have one scale a channel, as TensorRT for RTX takes them.
    """
    return [
        *_opset(model, level),
        *_nodes(model, level),
        *_types(model, level),
        *_quantizers(model, int4_per_channel),
    ]


def _opset(model: onnx.ModelProto, level: Level) -> Iterator[Finding]:
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    # ONNX has INT4 from opset 21 on, and TensorRT's parsers read its quantizers from 10.0 on.
    int4 = any(t.data_type == TensorProto.INT4 for t in model.graph.initializer)
    if opset > max(level.opset, INT4_OPSET if int4 else 0):
        yield Finding("model", "opset", f"{opset}; TensorRT {level.name} reads up to {level.opset}")
    if model.functions:
        yield Finding("model", "functions", "local functions keep the parser from finding the plugin")


def _nodes(model: onnx.ModelProto, level: Level) -> Iterator[Finding]:
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx"):
            if (node.domain, node.op_type) not in PLUGIN_OPERATORS:
                yield Finding(node.name, "operator", f"{node.domain}::{node.op_type} is none of the plugin's")
        elif node.op_type not in OPERATORS:
            yield Finding(node.name, "operator", f"{node.op_type} is not known to be read by TensorRT {level.name}")
        elif OPERATORS[node.op_type] > level.version:
            first = ".".join(map(str, OPERATORS[node.op_type]))
            yield Finding(node.name, "operator", f"{node.op_type} came with TensorRT {first}, not {level.name}")


def _types(model: onnx.ModelProto, level: Level) -> Iterator[Finding]:
    graph = model.graph
    for name, kind in (
        *((t.name, t.data_type) for t in graph.initializer),
        *((v.name, v.type.tensor_type.elem_type) for v in (*graph.input, *graph.output)),
        *((n.name, a.i) for n in graph.node if n.op_type == "Cast" for a in n.attribute if a.name == "to"),
        *((n.name, a.t.data_type) for n in graph.node for a in n.attribute if a.type == onnx.AttributeProto.TENSOR),
    ):
        if TYPES.get(kind, (99, 0)) > level.version:
            yield Finding(name, "type", f"{TensorProto.DataType.Name(kind)} is no tensor type of TensorRT {level.name}")
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == TensorProto.INT4:
            yield Finding(value.name, "type", "INT4 inputs and outputs do not exist: use 8-bit containers")


def _quantizers(model: onnx.ModelProto, int4_per_channel: bool) -> Iterator[Finding]:
    """Zero points are 0, activations have one scale a tensor, and 4-bit weights blocks."""
    constants = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        zero = constants.get(node.input[2]) if len(node.input) > 2 else None
        if zero is not None and onnx.numpy_helper.to_array(zero).astype(int).any():
            yield Finding(node.name, "zero point", f"'{zero.name}' is not 0")
        scale = constants.get(node.input[1])
        if node.input[0] not in constants and scale is not None and len(scale.dims) > 0:
            yield Finding(
                node.name, "granularity", f"activations have one scale, '{scale.name}' has {list(scale.dims)}"
            )
        weight = constants.get(node.input[0])
        blocked = any(a.name == "block_size" and a.i for a in node.attribute)
        if weight is not None and weight.data_type == TensorProto.INT4 and not (blocked or int4_per_channel):
            yield Finding(node.name, "granularity", "4-bit weights have blocks of 64 or 128, these one scale a channel")
        if node.op_type == "QuantizeLinear" and zero is not None and zero.data_type == TensorProto.INT4:
            yield Finding(node.name, "type", "INT4 is for weights: activations are quantized to INT8 or by the plugin")
