"""The few graph edits that every pass needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from pq_export.export.fp_graph import FPGraph
from pq_export.quantizer import pack_int4


def add_node(
    graph: gs.Graph,
    op: str,
    inputs: Sequence[gs.Tensor],
    name: str,
    dtype: Any,
    *,
    domain: str | None = None,
    **attrs: Any,
) -> gs.Variable:
    """Append a node with one output called ``name`` and return that output."""
    output = gs.Variable(name, dtype=dtype)
    graph.nodes.append(gs.Node(op, name=name, attrs=attrs, inputs=list(inputs), outputs=[output], domain=domain))
    return output


class Int4Constant(gs.Constant):  # type: ignore[misc]  # graphsurgeon has no types
    """int8 codes in -8..7 that are written as an INT4 initializer, two to a byte.

    graphsurgeon holds NumPy arrays, and NumPy has no packed 4-bit type; see :func:`pack_int4_initializers`.
    """


def pack_int4_initializers(model: onnx.ModelProto, names: set[str]) -> None:
    """Turn the INT8 initializers in ``names`` into INT4 ones."""
    for tensor in model.graph.initializer:
        if tensor.name in names:
            codes = onnx.numpy_helper.to_array(tensor)
            tensor.raw_data = pack_int4(codes).tobytes()
            tensor.data_type = onnx.TensorProto.INT4


def reconnect(old: gs.Tensor, new: gs.Tensor, consumers: Sequence[gs.Node] | None = None) -> None:
    """Let ``consumers`` (default: all of them) read ``new`` where they read ``old``."""
    for node in list(old.outputs if consumers is None else consumers):
        for position, tensor in enumerate(node.inputs):
            if tensor is old:
                node.inputs[position] = new


def module_output(fp: FPGraph, module: str) -> gs.Variable:
    """The one tensor that leaves a module: made by its nodes, read outside them."""
    nodes = fp.nodes_in(module)
    inside = {id(node) for node in nodes}
    leaving = [
        output
        for node in nodes
        for output in node.outputs
        if output in fp.graph.outputs or any(id(consumer) not in inside for consumer in output.outputs)
    ]
    if len(leaving) != 1:
        raise AssertionError(f"module {module} has {len(leaving)} outputs in the exported graph")
    return leaving[0]


def single_node(fp: FPGraph, module: str, op: str) -> gs.Node:
    """The only node of type ``op`` that a module made."""
    found = [node for node in fp.nodes_in(module) if node.op == op]
    if len(found) != 1:
        raise AssertionError(f"module {module} has {len(found)} {op} nodes in the exported graph")
    return found[0]


ONNX_TYPES = {
    "float32": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "int8": onnx.TensorProto.INT8,
    "uint8": onnx.TensorProto.UINT8,
    "int32": onnx.TensorProto.INT32,
}


def cast(graph: gs.Graph, tensor: gs.Tensor, dtype: str, name: str) -> gs.Variable:
    """Append a Cast to ``dtype`` (a NumPy name)."""
    return add_node(graph, "Cast", [tensor], name, np.dtype(dtype), to=int(ONNX_TYPES[dtype]))
