"""One quantized linear in every form, against integer arithmetic."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import helper

from pq_export.quantizer import code_range
from pq_export.rewrite.edit import pack_int4_initializers
from pq_export.rewrite.qlinear import (
    DOMAIN,
    OP,
    Form,
    LinearConstants,
    function_proto,
    insert_qlinear,
    lower_qlinears,
    overload,
)
from tests.graph_runs import check, close, run


def constants(
    name: str,
    inner: int,
    out: int,
    weight_bits: int,
    activation_bits: int,
    bias: bool,
    seed: int = 0,
    powers_of_two: bool = False,
) -> LinearConstants:
    rng = np.random.default_rng(seed)
    low, high = code_range(weight_bits)
    scale = 2.0 ** rng.integers(-6, -2, out) if powers_of_two else rng.uniform(0.01, 0.1, out)
    shift = rng.integers(-8, 8, out) / 4 if powers_of_two else rng.normal(size=out)
    input_scale = 2.0**-3 if powers_of_two else 0.0373
    return LinearConstants(
        name=name,
        codes=rng.integers(low, high + 1, (inner, out)).astype(np.int8),
        scale=scale.astype(np.float32),
        bias=shift.astype(np.float32) if bias else None,
        input_scale=None if activation_bits == 16 else np.float32(input_scale),
        weight_bits=weight_bits,
        activation_bits=activation_bits,
    )


def linear_model(linears: list[tuple[LinearConstants, str, str]], form: Form) -> onnx.ModelProto:
    """A graph of quantized linears: (constants, input name, site) -> output ``<name>.output``."""
    sources = {name: gs.Variable(name, np.float32, ["batch", "sequence", c.codes.shape[0]]) for c, name, _ in linears}
    graph = gs.Graph(inputs=list(sources.values()), opset=21, import_domains=[helper.make_opsetid("", 21)])
    for c, source, site in linears:
        y = insert_qlinear(graph, sources[source], c, site)
        graph.outputs.append(gs.Variable(f"{c.name}.y", np.float32, ["batch", "sequence", c.codes.shape[1]]))
        graph.nodes.append(gs.Node("Identity", f"{c.name}.identity", inputs=[y], outputs=[graph.outputs[-1]]))
    lower_qlinears(graph, form)
    graph.cleanup().toposort()
    if form is Form.PLUGIN:
        graph.import_domains.append(helper.make_opsetid(DOMAIN, 1))
    model = gs.export_onnx(graph, do_type_check=False)
    pack_int4_initializers(model, {f"{c.name}.codes" for c, _, _ in linears if c.weight_bits == 4})
    pack_int4_initializers(
        model, {f"{s}.zero_point" for c, _, s in linears if c.activation_bits == 4 and form is Form.QDQ}
    )
    model.ir_version = 10
    if form is Form.PLUGIN:
        kinds = {(c.activation_bits, c.bias is not None) for c, _, _ in linears}
        model.functions.extend(function_proto(bits, bias, 21) for bits, bias in sorted(kinds))
        for node in model.graph.node:
            if node.domain == DOMAIN:
                node.overload = overload(
                    next(a.i for a in node.attribute if a.name == "activation_bits"), len(node.input) > 4
                )
    return model


def integers(c: LinearConstants, x: np.ndarray) -> np.ndarray:
    """The accumulator in int64."""
    assert c.input_scale is not None
    codes = np.clip(np.rint(x / c.input_scale), *code_range(c.activation_bits)).astype(np.int64)
    return codes @ c.codes.astype(np.int64)


KINDS = [(4, 4), (4, 8), (8, 8)]


@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("weight_bits", "activation_bits"), KINDS)
def test_linear_is_exact_on_friendly_numbers(weight_bits: int, activation_bits: int, bias: bool, form: Form) -> None:
    """Scales are powers of two: every form, fp32 products included, has no rounding but the quantizer's."""
    c = constants("lin", 70, 33, weight_bits, activation_bits, bias, powers_of_two=True)
    x = np.random.default_rng(1).normal(0, 1.0 if activation_bits == 4 else 10.0, (2, 3, 70)).astype(np.float32)
    model = linear_model([(c, "x", "site")], form)
    check(model)
    y = run(model, {"x": x})["lin.y"]
    assert c.input_scale is not None
    accumulator = (y - (0 if c.bias is None else c.bias)) / (c.input_scale * c.scale)
    assert (accumulator == integers(c, x)).all()


@pytest.mark.parametrize("form", [Form.INTEGER, Form.PLUGIN])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("weight_bits", "activation_bits"), KINDS)
def test_linear_is_its_definition(weight_bits: int, activation_bits: int, bias: bool, form: Form) -> None:
    """Arbitrary scales; ``(codes @ w) · (s_x · s_w) + bias`` in fp32, bit for bit."""
    c = constants("lin", 70, 33, weight_bits, activation_bits, bias)
    x = np.random.default_rng(1).normal(0, 2, (2, 3, 70)).astype(np.float32)
    assert c.input_scale is not None
    expected = integers(c, x).astype(np.float32) * (c.input_scale * c.scale)
    if c.bias is not None:
        expected = expected + c.bias
    model = linear_model([(c, "x", "site")], form)
    for plain in (False, True):
        assert (run(model, {"x": x}, plain=plain)["lin.y"] == expected).all()
    qdq = run(linear_model([(c, "x", "site")], Form.QDQ), {"x": x}, plain=True)["lin.y"]
    assert close(qdq, expected, 1e-5)


@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize("activation_bits", [4, 8])
def test_linear_rounds_half_to_even_and_saturates(activation_bits: int, form: Form) -> None:
    c = constants("lin", 1, 1, 8, activation_bits, bias=False)
    c = LinearConstants(
        "lin", np.array([[1]], np.int8), np.ones(1, np.float32), None, np.float32(0.5), 8, activation_bits
    )
    low, high = code_range(activation_bits)
    steps = np.concatenate([np.arange(low - 3, high + 4, 0.5), [1e9, -1e9]]).astype(np.float32)
    y = run(linear_model([(c, "x", "site")], form), {"x": (steps * 0.5)[None, :, None]})["lin.y"]
    expected = [min(max(round(float(s)), low), high) for s in steps]  # Python's round is half to even
    assert (y[0, :, 0] / 0.5).tolist() == expected


@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weight_bits", [4, 8])
def test_weight_only_linear(weight_bits: int, bias: bool, form: Form) -> None:
    c = constants("lin", 70, 33, weight_bits, 16, bias)
    x = np.random.default_rng(1).normal(0, 2, (2, 3, 70)).astype(np.float32)
    model = linear_model([(c, "x", "site")], form)
    check(model)
    expected = x.astype(np.float64) @ (c.codes * c.scale).astype(np.float64) + (0 if c.bias is None else c.bias)
    for plain in (False, True):
        assert close(run(model, {"x": x}, plain=plain)["lin.y"], expected, 1e-5)


@pytest.mark.parametrize("form", [Form.QDQ, Form.INTEGER])
def test_linears_of_one_site_share_a_quantizer(form: Form) -> None:
    def numbered(i: int) -> LinearConstants:
        return constants(f"lin{i}", 16, 8, 4, 8, bias=False, seed=i)

    model = linear_model(
        [(numbered(0), "x", "one"), (numbered(1), "x", "one"), (numbered(2), "x", "two"), (numbered(3), "z", "three")],
        form,
    )
    assert len([n for n in model.graph.node if n.op_type == "QuantizeLinear"]) == 3
    rng = np.random.default_rng(0)
    feeds = {name: rng.normal(size=(1, 4, 16)).astype(np.float32) for name in ("x", "z")}
    outputs = run(model, feeds, plain=True)
    for i in range(4):
        c, x = numbered(i), feeds["z" if i == 3 else "x"]
        assert c.input_scale is not None
        assert close(outputs[f"lin{i}.y"], integers(c, x) * (c.input_scale * c.scale), 1e-5)


def test_plugin_form_keeps_the_operator() -> None:
    c = constants("lin", 16, 8, 4, 8, bias=True)
    model = linear_model([(c, "x", "site")], Form.PLUGIN)
    node = next(n for n in model.graph.node if n.domain == DOMAIN)
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    assert (node.op_type, attributes) == (OP, {"weight_bits": 4, "activation_bits": 8, "site": b"site"})
    assert len(node.input) == 5
