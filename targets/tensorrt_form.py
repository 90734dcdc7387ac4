"""The graph as TensorRT's parser takes it, and back.

``lower`` turns a finished model (linears in ``qdq`` form, or ``pq::QLinear`` nodes with their function; the cache
signed) into what TensorRT and TensorRT for RTX build:

* only the last logits are computed: with their number an input, engines hold the weights of lm_head twice;
* weight-only linears are ``DequantizeLinear(int4) -> MatMul`` (``Cast`` and ``Mul``, which onnxruntime needs, would be
  folded into floating-point weights);
* 4-bit activations of ``qdq`` form are clipped and then int8: INT4 is for weights;
* ``pq::QLinear`` loses its function and gets packed weights (:mod:`pq_export.plugins.onnx_form`);
* arithmetic is FP16, as TensorRT networks are strongly typed;
* the opset is the highest that the oldest parser reads, where no INT4 type asks for a newer one.

``executable`` is the inverse for a runtime without the plugin: standard operators, weights unpacked from the very bytes
of the file, FP16 constants widened. onnxruntime runs it, and validation compares its integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pq_export.errors import PqExportError
from pq_export.plugins.abi import Layout
from pq_export.plugins.layouts import unpack
from pq_export.plugins.onnx_form import layout_for, to_plugin_form
from pq_export.quantizer import code_range, pack_int4
from pq_export.rewrite.half import to_half, to_single
from pq_export.rewrite.last_logits import NUM_LOGITS
from pq_export.rewrite.qlinear import DOMAIN, OP

INT4_OPSET = 21  # the first with INT4 tensors


@dataclass(frozen=True)
class TensorRTForm:
    """``sm``: the GPU whose layout weights are packed in. ``half``: FP16 arithmetic. ``opset``: the highest to write.

    ``block``: inputs that share a scale in weight-only linears, whose scales are repeated that often; 0: one scale a
    channel. TensorRT's documentation knows 4-bit weights in blocks of 64 and 128 only.
    """

    sm: int
    half: bool = True
    opset: int = INT4_OPSET
    block: int = 0


def lower(model: onnx.ModelProto, form: TensorRTForm) -> onnx.ModelProto:
    """``model`` (consumed) as TensorRT's parser takes it."""
    _fix_logits(model, 1)
    _write_weight_only_as_dequantize(model, form.block)
    _widen_int4_activations(model)
    if any((node.domain, node.op_type) == (DOMAIN, OP) for node in model.graph.node):
        model = to_plugin_form(model, layout_for(form.sm))
    if form.half:
        to_half(model)
    if form.opset < INT4_OPSET and not _has_int4(model):
        next(entry for entry in model.opset_import if entry.domain in ("", "ai.onnx")).version = form.opset
    return model


def executable(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` (consumed) in standard operators of opset 21 and FP32; all logits are computed again."""
    to_single(model)
    next(entry for entry in model.opset_import if entry.domain in ("", "ai.onnx")).version = INT4_OPSET
    _fix_logits(model, 0)
    model.graph.input.append(helper.make_tensor_value_info(NUM_LOGITS, TensorProto.INT64, [1]))
    _write_linears_as_integers(model)
    _write_weight_only_as_products(model)
    return model


def _fix_logits(model: onnx.ModelProto, count: int) -> None:
    """Make ``num_logits_to_keep`` a constant and no input."""
    for index, value in enumerate(model.graph.input):
        if value.name == NUM_LOGITS:
            del model.graph.input[index]
            break
    for tensor in model.graph.initializer:
        if tensor.name == NUM_LOGITS:
            tensor.CopyFrom(numpy_helper.from_array(np.array([count], np.int64), NUM_LOGITS))


def _has_int4(model: onnx.ModelProto) -> bool:
    return any(t.data_type == TensorProto.INT4 for t in model.graph.initializer)


def _write_weight_only_as_dequantize(model: onnx.ModelProto, block: int) -> None:
    """``Cast(codes) -> Mul(scale)`` in front of a weight-only linear becomes ``DequantizeLinear``."""
    constants = {t.name: t for t in model.graph.initializer}
    codes = {name for name, t in constants.items() if t.data_type in (TensorProto.INT4, TensorProto.INT8)}
    casts = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "Cast" and n.input[0] in codes}
    for node in model.graph.node:
        if node.op_type != "Mul" or node.input[0] not in casts:
            continue
        weight, scale = casts[node.input[0]], node.input[1]
        granularity: dict[str, Any] = {"axis": 1}
        if block and constants[weight].data_type == TensorProto.INT4:
            inner = constants[weight].dims[0]
            if inner % block:
                raise PqExportError(
                    f"{inner} inputs are not a multiple of {block}, the smallest block of TensorRT's 4-bit weights",
                    where=node.name,
                    cure="Choose --w8a8, --w4a8 or --w4a4.",
                )
            values = numpy_helper.to_array(constants[scale])
            constants[scale].CopyFrom(numpy_helper.from_array(np.tile(values, (inner // block, 1)), scale))
            granularity = {"axis": 0, "block_size": block}
        node.CopyFrom(helper.make_node("DequantizeLinear", [weight, scale], node.output, name=node.name, **granularity))
    for index in reversed(range(len(model.graph.node))):
        if model.graph.node[index].output[0] in casts:
            del model.graph.node[index]


def _widen_int4_activations(model: onnx.ModelProto) -> None:
    """``QuantizeLinear(INT4)`` of an activation -> ``Clip -> QuantizeLinear(INT8)``: the same 16 codes."""
    constants = {t.name: t for t in model.graph.initializer}
    kept = onnx.GraphProto()
    for node in model.graph.node:
        zero = constants.get(node.input[2]) if node.op_type == "QuantizeLinear" else None
        if zero is not None and zero.data_type == TensorProto.INT4:
            scale = numpy_helper.to_array(constants[node.input[1]])
            ends = [f"{node.name}/lowest", f"{node.name}/highest"]
            for name, code in zip(ends, code_range(4), strict=True):
                model.graph.initializer.append(numpy_helper.from_array(np.asarray(scale * np.float32(code)), name))
            clipped = f"{node.name}/clipped"
            kept.node.append(helper.make_node("Clip", [node.input[0], *ends], [clipped], name=clipped))
            node.input[0] = clipped
            zero.CopyFrom(numpy_helper.from_array(np.zeros((), np.int8), zero.name))
        kept.node.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept.node)


def _write_weight_only_as_products(model: onnx.ModelProto) -> None:
    """The inverse. onnxruntime would quantize activations of such a MatMul dynamically, at 4 bits."""
    codes = {t.name for t in model.graph.initializer if t.data_type == TensorProto.INT4}
    _drop_repeated_scales(model, codes)
    kept = onnx.GraphProto()
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in codes:
            kept.node.append(node)
            continue
        wide = f"{node.name}/fp32"
        kept.node.append(helper.make_node("Cast", [node.input[0]], [wide], name=wide, to=TensorProto.FLOAT))
        kept.node.append(helper.make_node("Mul", [wide, node.input[1]], node.output, name=node.name))
    del model.graph.node[:]
    model.graph.node.extend(kept.node)


def _drop_repeated_scales(model: onnx.ModelProto, codes: set[str]) -> None:
    scales = {n.input[1] for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in codes}
    for tensor in model.graph.initializer:
        if tensor.name in scales and len(tensor.dims) == 2:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[0].copy(), tensor.name))


def _write_linears_as_integers(model: onnx.ModelProto) -> None:
    """Packed ``pq::QLinear`` -> ``QuantizeLinear(uint8) [-> Min] -> MatMulInteger -> Cast -> Mul [-> Add]``."""
    constants = {t.name: t for t in model.graph.initializer}
    graph = model.graph
    nodes: list[onnx.NodeProto] = []
    made: dict[str, TensorProto] = {}
    codes_of: dict[tuple[str, str], tuple[str, str]] = {}
    packed: set[str] = set()

    def constant(name: str, values: np.ndarray) -> str:
        made[name] = numpy_helper.from_array(values, name)
        return name

    for node in graph.node:
        if (node.domain, node.op_type) != (DOMAIN, OP):
            nodes.append(node)
            continue
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        x, weights, scale, *bias = node.input
        name, site, bits = node.name, attributes["site"].decode(), attributes["activation_bits"]
        low, high = code_range(bits)
        if (x, site) not in codes_of:
            zero = constant(f"{site}.zero_point", np.asarray(-low, np.uint8))
            step = constant(f"{site}.scale", np.asarray(attributes["input_scale"], np.float32))
            codes = f"{site}/codes"
            nodes.append(helper.make_node("QuantizeLinear", [x, step, zero], [codes], name=codes))
            if bits < 8:
                top = constant(f"{site}.max", np.asarray(high - low, np.uint8))
                nodes.append(helper.make_node("Min", [codes, top], [f"{codes}_clamped"], name=f"{codes}_clamped"))
                codes = f"{codes}_clamped"
            codes_of[x, site] = codes, zero
        layout = Layout[attributes["layout"].decode().upper()]
        packed.add(weights)
        w = unpack(numpy_helper.to_array(constants[weights]).reshape(-1), layout, attributes["N"], attributes["K"])
        w8 = constant(f"{name}.codes", np.ascontiguousarray(w.T))
        if attributes["weight_bits"] == 4:  # stays 4 bits in memory until onnxruntime unpacks it
            made[w8] = helper.make_tensor(w8, TensorProto.INT4, w.T.shape, pack_int4(w.T).tobytes(), raw=True)
            nodes.append(helper.make_node("Cast", [w8], [f"{name}/w8"], name=f"{name}/w8", to=TensorProto.INT8))
            w8 = f"{name}/w8"
        product = f"{name}/product" if bias else node.output[0]
        codes, zero = codes_of[x, site]
        nodes += [
            helper.make_node("MatMulInteger", [codes, w8, zero], [f"{name}/sum"], name=f"{name}/sum"),
            helper.make_node("Cast", [f"{name}/sum"], [f"{name}/wide"], name=f"{name}/wide", to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{name}/wide", scale], [product], name=name),
        ]
        if bias:
            nodes.append(helper.make_node("Add", [product, bias[0]], node.output, name=f"{name}/bias"))
    kept = onnx.GraphProto()
    kept.node.extend(nodes)
    del graph.node[:]
    graph.node.extend(kept.node)
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name in packed:
            del graph.initializer[index]
    graph.initializer.extend(made.values())
    for index, entry in enumerate(model.opset_import):
        if entry.domain == DOMAIN:
            del model.opset_import[index]
            break
