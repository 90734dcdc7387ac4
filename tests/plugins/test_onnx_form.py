"""The lowering to what the TensorRT plugin reads: the same numbers as the model that it came from, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from pq_export.errors import PqExportError
from pq_export.plugins import reference
from pq_export.plugins.abi import Layout, Type
from pq_export.plugins.layouts import packed_bytes, unpack
from pq_export.plugins.onnx_form import layout_for, to_plugin_form
from pq_export.rewrite.qlinear import DOMAIN, OP, Form
from tests.graph_runs import run
from tests.test_qlinear import constants, linear_model

K, N = 96, 40  # neither is a multiple of the tiles' 64 and 16


class QLinear(OpRun):  # type: ignore[misc]  # onnx has no types for it
    """What ``csrc/plugin_linear.cpp`` does with its inputs, in NumPy."""

    op_domain = DOMAIN

    def _run(self, x, packed, scale, bias=None, **a):  # type: ignore[no-untyped-def]
        layout = Layout[a["layout"].upper()]
        assert packed.dtype == np.int8 and packed.ndim == 3 and packed.shape[2] == 512
        assert packed.shape[:2] == (-(-a["N"] // 16), -(-a["K"] // 64) * (2 if layout is Layout.W8 else 1))
        w = unpack(packed.reshape(-1), layout, a["N"], a["K"])
        rows = x.reshape(-1, a["K"])
        if x.dtype != np.int8:
            assert a["output_type"] == "same"
            rows = reference.quantize(rows, a["input_scale"], a["activation_bits"])
        else:
            assert a["output_type"] == "float32"
        y = reference.gemm(rows, w, scale, Type.F32, bias=bias)
        return (y.reshape(*x.shape[:-1], a["N"]),)


def nodes_of(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {node.name: node for node in model.graph.node}


def attributes_of(node: onnx.NodeProto) -> dict[str, object]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


@pytest.fixture
def model() -> onnx.ModelProto:
    """Two linears at one site, one of them with a bias; one of 8-bit activations; one of 8-bit weights."""
    return linear_model(
        [
            (constants("q", K, N, 4, 4, bias=False, seed=1), "x", "attention"),
            (constants("k", K, N, 4, 4, bias=True, seed=2), "x", "attention"),
            (constants("up", K, 33, 4, 8, bias=True, seed=3), "x", "mlp"),
            (constants("down", 64, N, 8, 8, bias=False, seed=4), "z", "down_input"),
        ],
        Form.PLUGIN,
    )


@pytest.fixture
def feeds() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {
        name: rng.normal(0, 0.3, (2, 3, size)).astype(np.float32) for name, size in (("x", K), ("z", 64))
    }  # some saturate at 4 bits


@pytest.mark.parametrize("shared_codes", [False, True])
@pytest.mark.parametrize("sm", [86, 90])
def test_numbers_are_those_of_the_model(
    model: onnx.ModelProto, feeds: dict[str, np.ndarray], sm: int, shared_codes: bool
) -> None:
    expected = run(model, feeds, plain=True)
    lowered = to_plugin_form(model, layout_for(sm), shared_codes=shared_codes)
    onnx.checker.check_model(lowered)
    outputs = ReferenceEvaluator(lowered, new_ops=[QLinear]).run(None, feeds)
    for value, y in zip(lowered.graph.output, outputs, strict=True):
        assert np.array_equal(y, expected[value.name]), value.name


def test_layouts_are_the_chosen_ones(model: onnx.ModelProto) -> None:
    for sm, int4 in ((80, "s4"), (86, "s4"), (89, "s4"), (90, "s8"), (120, "s8")):
        nodes = nodes_of(to_plugin_form(model, layout_for(sm)))
        layouts = {name: attributes_of(nodes[name])["layout"].decode() for name in ("q", "k", "up", "down")}
        assert layouts == {"q": int4, "k": int4, "up": "s8", "down": "w8"}


def test_node_and_constants(model: onnx.ModelProto) -> None:
    lowered = to_plugin_form(model, layout_for(90))
    node, old = nodes_of(lowered)["k"], constants("k", K, N, 4, 4, bias=True, seed=2)
    assert (node.op_type, node.domain, node.overload) == (OP, DOMAIN, "")
    assert list(node.input) == ["x", "k.codes.s8", "k.combined_scale", "k.bias"]
    added = {"layout": b"s8", "K": K, "N": N, "input_scale": old.input_scale, "output_type": b"same"}
    assert attributes_of(node) == {"weight_bits": 4, "activation_bits": 4, "site": b"attention", **added}
    tensors = {t.name: numpy_helper.to_array(t) for t in lowered.graph.initializer}
    assert old.input_scale is not None and old.bias is not None
    assert np.array_equal(tensors["k.combined_scale"], old.input_scale * old.scale)
    assert np.array_equal(tensors["k.bias"], old.bias)
    assert tensors["k.codes.s8"].nbytes == packed_bytes(Layout.S8, N, K)
    # nothing is left of the old form
    assert not lowered.functions and not [name for name in tensors if name.endswith((".codes", ".scale"))]
    assert [(o.domain, o.version) for o in lowered.opset_import] == [("", 21), (DOMAIN, 1)]
    assert (lowered.ir_version, lowered.graph.name) == (model.ir_version, model.graph.name)


def test_the_given_model_stays_as_it_is(model: onnx.ModelProto) -> None:
    before = model.SerializeToString(deterministic=True)
    first = to_plugin_form(model, layout_for(86), shared_codes=True)
    assert model.SerializeToString(deterministic=True) == before
    again = to_plugin_form(model, layout_for(86), shared_codes=True)
    assert first.SerializeToString(deterministic=True) == again.SerializeToString(deterministic=True)


def test_shared_codes_quantize_a_site_once(model: onnx.ModelProto) -> None:
    lowered = to_plugin_form(model, layout_for(90), shared_codes=True, output_type="float16")
    assert [n.op_type for n in lowered.graph.node if n.domain != DOMAIN and n.op_type != "Identity"] == [
        *("Clip", "QuantizeLinear"),  # q and k
        *("QuantizeLinear", "QuantizeLinear"),  # up, down
    ]
    nodes = nodes_of(lowered)
    assert nodes["q"].input[0] == nodes["k"].input[0] == "attention/x/codes"
    assert nodes["up"].input[0] == "mlp/x/codes" and nodes["down"].input[0] == "down_input/z/codes"
    assert {attributes_of(nodes[name])["output_type"] for name in ("q", "k", "up", "down")} == {b"float16"}
    # layout s4 reads packed codes, which no QuantizeLinear of INT8 makes
    nodes = nodes_of(to_plugin_form(model, layout_for(86), shared_codes=True))
    assert nodes["q"].input[0] == nodes["k"].input[0] == "x" and nodes["up"].input[0] == "mlp/x/codes"


def test_shared_codes_saturate_at_their_bits(model: onnx.ModelProto) -> None:
    lowered = to_plugin_form(model, layout_for(90), shared_codes=True)
    lowered.graph.output.append(helper.make_tensor_value_info("attention/x/codes", TensorProto.INT8, None))
    scale = constants("q", K, N, 4, 4, bias=False).input_scale
    assert scale is not None
    steps = np.array([-1e9, -9, -8.5, -8, -7.5, -0.5, 0, 0.5, 6.5, 7, 7.4, 7.5, 9, 1e9], np.float32)
    x = np.zeros((1, 1, K), np.float32)
    x[0, 0, : len(steps)] = steps * scale
    outputs = ReferenceEvaluator(lowered, new_ops=[QLinear]).run(None, {"x": x, "z": np.zeros((1, 1, 64), np.float32)})
    assert np.array_equal(outputs[-1].reshape(-1), reference.quantize(x[0], float(scale), 4).reshape(-1))


def test_tied_codes_are_packed_once(model: onnx.ModelProto) -> None:
    nodes = nodes_of(model)
    nodes["q"].input[1] = "k.codes"
    lowered = nodes_of(to_plugin_form(model, layout_for(90)))
    assert lowered["q"].input[1] == lowered["k"].input[1] == "k.codes.s8"


def test_constants_that_others_read_stay(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Cast", ["q.codes"], ["wide"], name="wide", to=TensorProto.INT8))
    model.graph.output.append(helper.make_tensor_value_info("wide", TensorProto.INT8, [K, N]))
    names = {t.name for t in to_plugin_form(model, layout_for(90)).graph.initializer}
    assert "q.codes" in names and "k.codes" not in names


def drop_codes(model: onnx.ModelProto) -> None:
    kept = [t for t in model.graph.initializer if t.name != "up.codes"]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def make_external(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == "up.codes")
    tensor.data_location = TensorProto.EXTERNAL


@pytest.mark.parametrize("change", [drop_codes, make_external])
def test_constants_must_be_there(model: onnx.ModelProto, change: Callable[[onnx.ModelProto], None]) -> None:
    change(model)
    with pytest.raises(PqExportError, match=r"up: up\.codes is not a constant in memory\. Load the model"):
        to_plugin_form(model, layout_for(90))


def test_what_no_kernel_multiplies(model: onnx.ModelProto) -> None:
    odd = linear_model([(constants("odd", 48, 8, 4, 4, bias=False), "x", "site")], Form.PLUGIN)
    with pytest.raises(PqExportError, match=r"odd: 48 inputs are not a multiple of 32"):
        to_plugin_form(odd, layout_for(90))
    wide = linear_model([(constants("wide", 64, 8, 4, 16, bias=True), "x", "site")], Form.PLUGIN)
    with pytest.raises(PqExportError, match=r"wide: weight-only linears have no kernel"):
        to_plugin_form(wide, layout_for(90))
    with pytest.raises(PqExportError, match="output type half is unknown"):
        to_plugin_form(model, layout_for(90), shared_codes=True, output_type="half")
