"""``pq::QLinear``, the quantized linear: one definition, written out in one of three forms.

Definition, for input x [..., K], codes w [K, N], scales s_x (scalar) and s_w [N]::

    y = (clamp(round(x / s_x), lo, hi) @ w) · (s_x · s_w) [+ bias]        fp32 result of an exact int32

``qdq``
    ``x -> QuantizeLinear -> DequantizeLinear -> MatMul <- DequantizeLinear <- w``, ``+ bias``.
    Zero point 0; INT4 or INT8 by the activation's bits. What static compilers and TensorRT read.
``integer``
    ``x -> QuantizeLinear(uint8) [-> Min] -> MatMulInteger <- [Cast] w -> Cast -> Mul -> + bias``.
    uint8 with a zero point, because x86 multiplies unsigned by signed bytes; a 4-bit code is clamped by
    one Min. onnxruntime runs it exactly, in VNNI where there is VNNI.
``plugin``
    The node as it is, for a runtime that knows the operator.

With 16-bit activations there is no s_x and the product is a floating-point one: ``x @ (w · s_w)``.

Bits belong to the node: one graph may hold linears of 4- and 8-bit weights and sites of 4- and 8-bit codes,
in any pairing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper

from pq_export.quantizer import code_range
from pq_export.rewrite.edit import Int4Constant, add_node, cast, reconnect

DOMAIN, OP, VERSION = "pq", "QLinear", 1


class Form(str, Enum):
    """How quantized linears are written to disk."""

    QDQ = "qdq"
    INTEGER = "integer"
    PLUGIN = "plugin"


# (input tensor, site) -> what its shared quantizer made, and the zero point.
Quantized = dict[tuple[int, str], tuple[gs.Variable, gs.Constant]]


@dataclass(frozen=True)
class LinearConstants:
    """Integers and scales of one linear. codes: int8 [K, N]; scale: float32 [N]; bias: float32 [N]."""

    name: str
    codes: np.ndarray
    scale: np.ndarray
    bias: np.ndarray | None
    input_scale: np.float32 | None
    weight_bits: int
    activation_bits: int


def insert_qlinear(graph: gs.Graph, x: gs.Tensor, c: LinearConstants, site: str) -> gs.Variable:
    """Append one ``pq::QLinear`` node reading ``x``; linears that read ``x`` at one ``site`` share its scale."""
    weight = _codes_constant(f"{c.name}.codes", c.codes, c.weight_bits)
    inputs: list[gs.Tensor] = [x, weight, gs.Constant(f"{c.name}.scale", c.scale)]
    attrs: dict[str, object] = {"weight_bits": c.weight_bits, "activation_bits": c.activation_bits, "site": site}
    if c.input_scale is not None:
        shared = (t for node in x.outputs if node.op == OP for t in node.inputs if t.name == f"{site}.scale")
        inputs.append(next(shared, gs.Constant(f"{site}.scale", np.asarray(c.input_scale, dtype=np.float32))))
    if c.bias is not None:
        if c.input_scale is None:
            inputs.append(gs.Variable.empty())
        inputs.append(gs.Constant(f"{c.name}.bias", c.bias))
    y = add_node(graph, OP, inputs, f"{c.name}/output", np.dtype(np.float32), domain=DOMAIN, **attrs)
    y.inputs[0].name = c.name
    return y


def _codes_constant(name: str, codes: np.ndarray, bits: int) -> gs.Constant:
    return (Int4Constant if bits == 4 else gs.Constant)(name, codes)


def lower_qlinears(graph: gs.Graph, form: Form) -> None:
    """Replace every ``pq::QLinear`` by its body. Linears that share a site share its QuantizeLinear."""
    if form is Form.PLUGIN:
        return
    quantized: Quantized = {}
    for node in [n for n in graph.nodes if n.op == OP and n.domain == DOMAIN]:
        result = (
            _lower_float(graph, node)
            if node.attrs["activation_bits"] == 16
            else (_lower_qdq(graph, node, quantized) if form is Form.QDQ else _lower_integer(graph, node, quantized))
        )
        reconnect(node.outputs[0], result)
        node.inputs.clear()
        graph.nodes.remove(node)


def _parts(node: gs.Node) -> tuple[gs.Tensor, gs.Constant, gs.Constant, gs.Constant | None, gs.Constant | None]:
    x, weight, weight_scale, *rest = node.inputs
    input_scale = rest[0] if rest and not rest[0].is_empty() else None
    return x, weight, weight_scale, input_scale, rest[1] if len(rest) > 1 else None


def _add_bias(graph: gs.Graph, y: gs.Variable, bias: gs.Constant | None, name: str) -> gs.Variable:
    return y if bias is None else add_node(graph, "Add", [y, bias], f"{name}/bias", np.dtype(np.float32))


def _lower_qdq(graph: gs.Graph, node: gs.Node, quantized: Quantized) -> gs.Variable:
    x, weight, weight_scale, input_scale, bias = _parts(node)
    name, site, f32 = node.name, str(node.attrs["site"]), np.dtype(np.float32)
    key = (id(x), site)
    if key not in quantized:
        bits = int(node.attrs["activation_bits"])
        zero = _codes_constant(f"{site}.zero_point", np.zeros((), np.int8), bits)
        codes = add_node(graph, "QuantizeLinear", [x, input_scale, zero], f"{site}/codes", None)
        values = add_node(graph, "DequantizeLinear", [codes, input_scale, zero], f"{site}/dequantized", f32)
        quantized[key] = (values, zero)
    wide = add_node(graph, "DequantizeLinear", [weight, weight_scale], f"{name}/weight", f32, axis=1)
    y = add_node(graph, "MatMul", [quantized[key][0], wide], f"{name}/product", f32)
    return _add_bias(graph, y, bias, name)


def _lower_integer(graph: gs.Graph, node: gs.Node, quantized: Quantized) -> gs.Variable:
    x, weight, weight_scale, input_scale, bias = _parts(node)
    assert input_scale is not None  # only weight-only linears lack it, and they are lowered to floats
    name, site, bits = node.name, str(node.attrs["site"]), int(node.attrs["activation_bits"])
    low, high = code_range(bits)
    key = (id(x), site)
    if key not in quantized:
        u8 = np.dtype(np.uint8)
        zero = gs.Constant(f"{site}.zero_point", np.asarray(-low, dtype=np.uint8))
        codes = add_node(graph, "QuantizeLinear", [x, input_scale, zero], f"{site}/codes", u8)
        if bits < 8:  # uint8 saturates below at 0 by itself
            codes = add_node(
                graph,
                "Min",
                [codes, gs.Constant(f"{site}.max", np.asarray(high - low, np.uint8))],
                f"{site}/codes_clamped",
                u8,
            )
        quantized[key] = (codes, zero)
    codes, zero = quantized[key]
    if int(node.attrs["weight_bits"]) == 4:  # a constant: onnxruntime unpacks it once, when it loads
        weight = cast(graph, weight, "int8", f"{name}/weight_int8")
    accumulator = add_node(graph, "MatMulInteger", [codes, weight, zero], f"{name}/accumulator", np.dtype(np.int32))
    combined = gs.Constant(f"{name}.combined_scale", input_scale.values * weight_scale.values)
    y = add_node(
        graph,
        "Mul",
        [cast(graph, accumulator, "float32", f"{name}/accumulator_fp32"), combined],
        f"{name}/product",
        np.dtype(np.float32),
    )
    return _add_bias(graph, y, bias, name)


def _lower_float(graph: gs.Graph, node: gs.Node) -> gs.Variable:
    """Weight-only: Cast and Mul, not DequantizeLinear, which onnxruntime would turn into MatMulNBits
    with dynamically quantized activations."""
    x, weight, weight_scale, _, bias = _parts(node)
    name, f32 = node.name, np.dtype(np.float32)
    wide = cast(graph, weight, "float32", f"{name}/weight_fp32")
    scaled = add_node(graph, "Mul", [wide, weight_scale], f"{name}/weight", f32)
    return _add_bias(graph, add_node(graph, "MatMul", [x, scaled], f"{name}/product", f32), bias, name)


def function_proto(activation_bits: int, has_bias: bool, opset: int) -> onnx.FunctionProto:
    """The definition as an ONNX model-local function, in standard operators.

    Overloads ``a{bits}[_bias]`` differ in the clamp and in the last input. A graph of ``pq::QLinear``
    nodes with these functions attached is a valid ONNX model that any runtime can execute.
    """
    product = "product" if has_bias else "y"
    body = _float_body(product) if activation_bits == 16 else _integer_body(activation_bits, product)
    if has_bias:
        body.append(helper.make_node("Add", [product, "bias"], ["y"]))
    function = helper.make_function(
        DOMAIN,
        OP,
        [
            "x",
            "w",
            "w_scale",
            *(["x_scale"] if activation_bits < 16 or has_bias else []),
            *(["bias"] if has_bias else []),
        ],
        ["y"],
        body,
        [helper.make_opsetid("", opset)],
        attributes=["weight_bits", "activation_bits", "site"],
    )
    function.overload = overload(activation_bits, has_bias)
    return function


def _integer_body(bits: int, result: str) -> list[onnx.NodeProto]:
    low, high = code_range(bits)
    return [
        helper.make_node("Constant", [], ["low"], value_float=float(low)),
        helper.make_node("Constant", [], ["high"], value_float=float(high)),
        helper.make_node("Div", ["x", "x_scale"], ["steps"]),
        helper.make_node("Round", ["steps"], ["rounded"]),
        helper.make_node("Clip", ["rounded", "low", "high"], ["clamped"]),
        helper.make_node("Cast", ["clamped"], ["codes"], to=onnx.TensorProto.INT8),
        helper.make_node("Cast", ["w"], ["w_int8"], to=onnx.TensorProto.INT8),
        helper.make_node("MatMulInteger", ["codes", "w_int8"], ["accumulator"]),
        helper.make_node("Cast", ["accumulator"], ["accumulator_fp32"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", ["x_scale", "w_scale"], ["scale"]),
        helper.make_node("Mul", ["accumulator_fp32", "scale"], [result]),
    ]


def _float_body(result: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Cast", ["w"], ["w_fp32"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", ["w_fp32", "w_scale"], ["w_scaled"]),
        helper.make_node("MatMul", ["x", "w_scaled"], [result]),
    ]


def overload(activation_bits: int, has_bias: bool) -> str:
    return f"a{activation_bits}{'_bias' if has_bias else ''}"
