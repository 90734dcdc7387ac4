"""The fp64 twin of a model: the same nodes and integers, floating-point arithmetic widened to fp64.

Two fp32 programs of one formula differ by round-off, and a quantizer turns a difference at a rounding
boundary into a whole step; in a 4-bit model one such step changes every later code. In fp64 the boundary
is a billion times thinner, so the twin of a correct graph equals the fp64 fake-quant model code by code.

QuantizeLinear reads fp32 and DequantizeLinear makes fp32, as in the model: casts are put around them.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FP32_ONLY = {"QuantizeLinear": "before", "DequantizeLinear": "after"}


def widen(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``model`` (weights inside) that computes in fp64; float inputs and outputs are fp64."""
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    graph = twin.graph
    keep = {name for node in graph.node if node.op_type in FP32_ONLY for name in node.input[1:]}
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in keep:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    nodes = []
    for node in graph.node:
        _widen_attributes(node)
        if FP32_ONLY.get(node.op_type) == "before":
            narrow = f"{node.output[0]}/fp32_input"
            nodes.append(helper.make_node("Cast", [node.input[0]], [narrow], name=narrow, to=TensorProto.FLOAT))
            node.input[0] = narrow
            nodes.append(node)
        elif FP32_ONLY.get(node.op_type) == "after":
            wide, node.output[0] = node.output[0], f"{node.output[0]}/fp32"
            nodes += [
                node,
                helper.make_node("Cast", [node.output[0]], [wide], name=f"{wide}/fp64", to=TensorProto.DOUBLE),
            ]
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    for value in [*graph.input, *graph.output, *graph.value_info]:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
    del graph.value_info[:]
    return twin


def _widen_attributes(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.DOUBLE
        if node.op_type == "Constant" and attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT:
            attribute.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(attribute.t).astype(np.float64)))
