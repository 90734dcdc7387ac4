"""Pass on a finished model: arithmetic in FP16, for runtimes that compute in the type that the graph says.

What stays FP32, each for a reason:

* a norm, from ``Pow`` to ``Div``: squares leave FP16's range, and Hugging Face takes their mean in FP32 too;
* scale and bias of ``pq::QLinear``, which its kernels read as FP32;
* the output ``logits``, behind a ``Cast``.

The constant that hides masked tokens becomes one that FP16 can add to a score without reaching infinity. A cache
of 16 bits is FP16 in and out.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pq_export.errors import PqExportError
from pq_export.rewrite.qlinear import DOMAIN

MASKED = -30_000.0  # exp of it is 0, and with any score beside it still finite
WORST_SCALE = 2.0**-8  # largest relative error of a scale: that of BF16. Small numbers have few bits in FP16
LOGITS = "logits"


def to_half(model: onnx.ModelProto) -> None:
    """Rewrite ``model`` in place. Raises :class:`PqExportError` for a constant that FP16 cannot hold."""
    graph = model.graph
    wide = _norm_nodes(graph)
    aliases = _drop_widening_casts(graph)
    constants = {t.name: t for t in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    halves: dict[str, str] = {}  # FP32 constant -> its FP16 twin
    keep: set[str] = set()  # FP32 constants that something still reads
    for node in graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = name = aliases.get(name, name)
            constant = constants.get(name)
            if constant is None or constant.data_type != TensorProto.FLOAT:
                continue
            if node.output[0] in wide or node.domain == DOMAIN:
                keep.add(name)
            else:
                node.input[position] = halves.setdefault(name, f"{name}/fp16")
                if node.op_type in ("QuantizeLinear", "DequantizeLinear", "Div") and position == 1:
                    _check_scale(constant)
        nodes.extend(_with_casts(node, wide))
    made = [_half(constants[name], twin) for name, twin in halves.items()]
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].data_type == TensorProto.FLOAT and graph.initializer[index].name not in keep:
            del graph.initializer[index]
    graph.initializer.extend(made)
    _replace_nodes(graph, nodes)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT and value.name != LOGITS:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    _widen_logits(graph)
    del graph.value_info[:]


def to_single(model: onnx.ModelProto) -> None:
    """``model`` in place with every FP16 tensor in FP32: the same function of the same constants, for a CPU."""
    graph = model.graph
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT
            if node.domain == DOMAIN and attribute.name == "output_type" and attribute.s == b"float16":
                attribute.s = b"float32"
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    del graph.value_info[:]


def _norm_nodes(graph: onnx.GraphProto) -> set[str]:
    """First outputs of the nodes of every ``x / sqrt(mean(x²) + eps)``."""
    producer = {name: node for node in graph.node for name in node.output}
    found: set[str] = set()
    for node in graph.node:
        if node.op_type != "Div":
            continue
        chain, inside = node, [node]
        for op in ("Sqrt", "Add", "ReduceMean", "Pow"):
            source = next((producer[n] for n in chain.input if n in producer and producer[n].op_type == op), None)
            if source is None:
                break
            chain = source
            inside.append(source)
        else:
            if chain.input[0] == node.input[0]:
                found.update(n.output[0] for n in inside)
    return found


def _drop_widening_casts(graph: onnx.GraphProto) -> dict[str, str]:
    """Take away every Cast from FP16 to FP32 of a constant, or of rows of one; its output -> its input."""
    half = {t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT16}
    aliases: dict[str, str] = {}
    nodes = []
    for node in graph.node:
        if node.op_type == "Gather" and node.input[0] in half:
            half.add(node.output[0])
        if node.op_type == "Cast" and node.input[0] in half:
            aliases[node.output[0]] = node.input[0]
        else:
            nodes.append(node)
    _replace_nodes(graph, nodes)
    return aliases


def _with_casts(node: onnx.NodeProto, wide: set[str]) -> Iterator[onnx.NodeProto]:
    """``node``, in FP32 between casts if it is of a norm."""
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16
    if node.output[0] in wide and node.op_type == "Pow":
        x = f"{node.output[0]}/fp32"
        yield helper.make_node("Cast", [node.input[0]], [x], name=x, to=TensorProto.FLOAT)
        node.input[0] = x
        yield node
    elif node.output[0] in wide and node.op_type == "Div":
        x, y = f"{node.output[0]}/x_fp32", f"{node.output[0]}/fp32"
        yield helper.make_node("Cast", [node.input[0]], [x], name=x, to=TensorProto.FLOAT)
        yield helper.make_node("Div", [x, node.input[1]], [y], name=node.name)
        yield helper.make_node("Cast", [y], node.output, name=f"{y}/fp16", to=TensorProto.FLOAT16)
    else:
        yield node


def _half(tensor: TensorProto, name: str) -> TensorProto:
    values = numpy_helper.to_array(tensor)
    if values.size == 1 and values.item() < MASKED:
        values = np.full_like(values, MASKED)
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise PqExportError(
            f"{tensor.name} holds {np.abs(values).max():.3g}, which FP16 cannot",
            cure="Use --float-type fp32.",
        )
    return numpy_helper.from_array(half, name)


def _check_scale(tensor: TensorProto) -> None:
    values = numpy_helper.to_array(tensor)
    with np.errstate(over="ignore"):
        errors = np.abs(values.astype(np.float16).astype(np.float32) / values - 1)
    if not errors.max() <= WORST_SCALE:
        raise PqExportError(
            f"scale {tensor.name} is {values.flat[errors.argmax()]:.3g}, which FP16 holds to {errors.max():.1%} only",
            cure="Use --float-type fp32.",
        )


def _widen_logits(graph: onnx.GraphProto) -> None:
    inner = f"{LOGITS}/fp16"
    for node in graph.node:
        for position, name in enumerate(node.output):
            if name == LOGITS:
                node.output[position] = inner
    graph.node.append(helper.make_node("Cast", [inner], [LOGITS], name=f"{LOGITS}/fp32", to=TensorProto.FLOAT))


def _replace_nodes(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """Also where ``nodes`` are those of ``graph`` itself."""
    kept = onnx.GraphProto()
    kept.node.extend(nodes)
    del graph.node[:]
    graph.node.extend(kept.node)
