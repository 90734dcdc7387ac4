"""The plugin in TensorRT for RTX, on the CPU: it parses, builds engines, and refuses in its own words."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pq_export.calib.checkpoint import load_checkpoint
from pq_export.calib.pipeline import calibrate
from pq_export.export.fp_graph import export_fp_graph
from pq_export.plan import Plan
from pq_export.plugins.onnx_form import layout_for, to_plugin_form
from pq_export.rewrite.pipeline import quantized_model
from pq_export.rewrite.qlinear import DOMAIN, OP, Form
from pq_export.stages import Stages
from tests.conftest import hf_model, word_tokenizer
from tests.plugins.rtx import Rtx
from tests.test_qlinear import constants, linear_model

TARGETS = {"SM86": 86, "SM89": 89, "SM120": 120}
LINEARS = {"q", "k", "up", "down"}


def linears(sm: int, **options: Any) -> onnx.ModelProto:
    """W4A4 without and with a bias at one site, W4A8 with a bias, W8A8."""
    model = linear_model(
        [
            (constants("q", 96, 40, 4, 4, bias=False, seed=1), "x", "attention"),
            (constants("k", 96, 40, 4, 4, bias=True, seed=2), "x", "attention"),
            (constants("up", 96, 33, 4, 8, bias=True, seed=3), "x", "mlp"),
            (constants("down", 64, 40, 8, 8, bias=False, seed=4), "z", "down_input"),
        ],
        Form.PLUGIN,
    )
    return to_plugin_form(model, layout_for(sm), **options)


def node_of(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def constant_of(model: onnx.ModelProto, name: str) -> TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def attribute(name: str, value: object, node: str = "q") -> Callable[[onnx.ModelProto], None]:
    """A change of one attribute; None removes it."""

    def change(model: onnx.ModelProto) -> None:
        attributes = node_of(model, node).attribute
        kept = [a for a in attributes if a.name != name]
        del attributes[:]
        attributes.extend([*kept, *([] if value is None else [helper.make_attribute(name, value)])])

    return change


def half_precision(model: onnx.ModelProto) -> None:
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16


def nibbles(*names: str) -> Callable[[onnx.ModelProto], None]:
    """Packed weights typed INT4: the same bytes."""

    def change(model: onnx.ModelProto) -> None:
        for name in names:
            tensor = constant_of(model, node_of(model, name).input[1])
            tensor.data_type = TensorProto.INT4
            tensor.dims[2] *= 2

    return change


def block(sm: int, codes_type: str) -> onnx.ModelProto:
    """Norm with residual -> gate, up -> SiLU, Hadamard -> down: codes between all of them."""
    nodes = [
        helper.make_node(
            "RMSNormQuantize",
            ["x", "gain", "residual"],
            ["codes", "sum"],
            name="norm",
            domain=DOMAIN,
            epsilon=1e-5,
            scale=0.1,
            activation_bits=4,
            codes_type=codes_type,
            residual=1,
        )
    ]
    tensors = [
        numpy_helper.from_array(np.ones(64, np.float32), "gain"),
        numpy_helper.from_array(np.ones((3, 3), np.float32), "left"),
    ]
    rotation = helper.make_node(
        "SiluMulHadamardQuantize",
        ["gate", "up", "left"],
        ["rotated"],
        name="silu",
        domain=DOMAIN,
        scale=0.1,
        activation_bits=4,
        codes_type=codes_type,
        left_order=3,
        right_order=32,
    )
    for name, source, inner, out in (("gate", "codes", 64, 96), ("up", "codes", 64, 96), ("down", "rotated", 96, 64)):
        one = to_plugin_form(
            linear_model([(constants(name, inner, out, 4, 4, bias=False), "x", "site")], Form.PLUGIN), layout_for(sm)
        )
        attribute("output_type", "float32", name)(one)
        node = node_of(one, name)
        node.input[0], node.output[0] = source, name
        nodes.extend([rotation] * (name == "down") + [node])
        tensors.extend(one.graph.initializer)
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "sequence", 64]) for name in names]
        for names in (("x", "residual"), ("down", "sum"))
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    graph = helper.make_graph(nodes, "block", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def changed(model: onnx.ModelProto, *changes: Callable[[onnx.ModelProto], None]) -> onnx.ModelProto:
    for change in changes:
        change(model)
    return model


# What must become an engine: model for a compute capability, and the plugin layers that the engine must show.
GOOD: dict[str, tuple[Callable[[int], onnx.ModelProto], set[str]]] = {
    "floats": (linears, LINEARS),
    "half precision": (lambda sm: changed(linears(sm), half_precision), LINEARS),
    "shared codes": (lambda sm: linears(sm, shared_codes=True), LINEARS),
    "weights typed int4": (lambda sm: changed(linears(sm), nibbles("q", "k", "up")), LINEARS),
    "fused producers": (lambda sm: block(90, "int8"), {"norm", "gate", "up", "silu", "down"}),
    "fused producers, packed codes": (lambda sm: block(86, "int4"), {"norm", "gate", "up", "silu", "down"}),
}


@pytest.fixture(scope="module")
def engines(rtx: Rtx) -> dict[tuple[str, str], dict[str, Any]]:
    keys = [(case, target) for case in GOOD for target in TARGETS]
    results = rtx([(GOOD[case][0](TARGETS[target]), [target]) for case, target in keys])
    return dict(zip(keys, results, strict=True))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", GOOD)
def test_engines_hold_the_plugin(engines: dict[tuple[str, str], dict[str, Any]], case: str, target: str) -> None:
    result = engines[case, target]
    assert result["parsed"] and not result["errors"], result["errors"]
    plugins = {metadata for kind, metadata in result["engines"][target] if kind == "custom_layer"}
    assert plugins == {f"[ONNX Layer: {name}]" for name in GOOD[case][1]}


def test_a_decoder_becomes_an_engine(rtx: Rtx, small_plan: Callable[..., Plan], tmp_path: Path) -> None:
    """All of a Llama, at sizes that the kernels take, with a floating cache: every linear is the plugin."""
    checkpoint = tmp_path / "checkpoint"
    hf_model("llama", hidden_size=64, intermediate_size=96).save_pretrained(checkpoint)
    word_tokenizer().save_pretrained(checkpoint)
    plan = small_plan("w4a4", 16, prefix="w77 w8")
    c = calibrate(load_checkpoint(str(checkpoint)), plan, tmp_path / "calibration", Stages())
    model = quantized_model(export_fp_graph(c.decoder), c, Form.PLUGIN)
    tasks = [(to_plugin_form(model, layout_for(sm), shared_codes=sm >= 90), [name]) for name, sm in TARGETS.items()]
    for (_, (target,)), result in zip(tasks, rtx(tasks), strict=True):
        assert result["parsed"] and not result["errors"], result["errors"]
        plugins = [metadata for kind, metadata in result["engines"][target] if kind == "custom_layer"]
        assert sorted(plugins) == sorted(f"[ONNX Layer: {name}]" for name in c.linear_names())


def inputs(name: str, *tensors: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        node = node_of(model, name)
        del node.input[:]
        node.input.extend(tensors)

    return change


def constant(name: str, values: np.ndarray) -> Callable[[onnx.ModelProto], None]:
    return lambda model: constant_of(model, name).CopyFrom(numpy_helper.from_array(values, name))


def integer_input(model: onnx.ModelProto) -> None:
    for value in model.graph.input:
        value.type.tensor_type.elem_type = TensorProto.INT32


def on_linears(*changes: Callable[[onnx.ModelProto], None], **options: Any) -> Callable[[], onnx.ModelProto]:
    return lambda: changed(linears(90, **options), *changes)


def on_block(*changes: Callable[[onnx.ModelProto], None]) -> Callable[[], onnx.ModelProto]:
    return lambda: changed(block(90, "int8"), *changes)


# What must be refused, and what the plugin says then.
BAD: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "weight bits": (on_linears(attribute("weight_bits", 3)), "pq::QLinear q: weight_bits 3 and activation_bits 4"),
    "weight only": (on_linears(attribute("activation_bits", 16)), "activation_bits is 16: weight-only .* qdq form"),
    "layout": (on_linears(attribute("layout", "s5")), "layout 's5' is unknown. Pack the weights as s4, s8"),
    "layout for 8 bits": (on_linears(attribute("layout", "w8")), "layout w8 does not hold 4-bit weights"),
    "layout for 4 bits": (
        on_linears(
            attribute("layout", "s8", "down"),
        ),
        "layout s8 does not hold 8-bit weights",
    ),
    "s4 with 8-bit activations": (on_linears(attribute("layout", "s4", "up")), "activation_bits is 8. Pack .* as s8"),
    "K of no multiple": (on_linears(attribute("K", 48)), "K = 48, N = 40: K must be a multiple of 32"),
    "K of another x": (on_linears(attribute("K", 64)), "the last dimension of x is 96, but must be 64"),
    "N of another scale": (on_linears(attribute("N", 41)), r"scale is \[40\], but the attributes say \[41\]"),
    "packed shape": (
        on_linears(attribute("N", 72)),
        r"the packed weights is \[3, 2, 512\], but the attributes say \[5, 2, 512\]",
    ),
    "bias shape": (on_linears(constant("k.bias", np.ones(3, np.float32))), r"bias is \[3\], .* say \[40\]"),
    "scale of zero": (on_linears(attribute("input_scale", 0.0)), "input_scale is 0, but must be positive"),
    "no scale": (on_linears(attribute("input_scale", None)), "attribute input_scale is missing"),
    "scale as text": (on_linears(attribute("input_scale", "1")), "attribute input_scale must be one float"),
    "layout as number": (on_linears(attribute("layout", 8)), "attribute layout must be one string"),
    "output type": (on_linears(attribute("output_type", "half")), "output_type 'half' is unknown: same, float16"),
    "output type of floats": (
        on_linears(attribute("output_type", "float16")),
        "x is float32, so that y is too, but output_type is float16",
    ),
    "codes without output type": (
        on_linears(attribute("output_type", "same"), shared_codes=True),
        r"x holds codes \(int8\), which leaves y's type open. Set output_type",
    ),
    "type of x": (
        on_linears(integer_input),
        "x is int32, but must be float16, .* in layout s8, int8",
    ),
    "type of scale": (
        on_linears(constant("q.combined_scale", np.ones(40, np.float16))),
        "scale is float16, but must be float32. Cast it",
    ),
    "type of 8-bit weights": (on_linears(nibbles("down")), "the weights are int4, but must be packed bytes, int8"),
    "number of inputs": (on_linears(inputs("q", "x", "q.codes.s8")), "2 inputs, but it takes x, weights, scale"),
    "norm's bits": (
        on_block(attribute("activation_bits", 5, "norm")),
        "RMSNormQuantize norm: activation_bits is 5",
    ),
    "norm's epsilon": (on_block(attribute("epsilon", -1.0, "norm")), "epsilon is -1, but"),
    "norm's inputs": (
        on_block(inputs("norm", "x", "gain")),
        "2 inputs, but with residual = 1 it takes x, gain and",
    ),
    "norm's gain": (
        on_block(constant("gain", np.ones(8, np.float32))),
        r"gain is \[8\], .* say \[64\]",
    ),
    "codes type": (on_block(attribute("codes_type", "int2", "norm")), "codes_type 'int2' is unknown: int8 or int4"),
    "rotation's orders": (
        on_block(attribute("left_order", 2, "silu")),
        "pq::SiluMulHadamardQuantize silu: left_order 2 . right_order 32 is not the last dimension of gate, 96",
    ),
    "rotation's power": (on_block(attribute("right_order", 33, "silu")), "right_order must be a power of two"),
    "rotation's smallest power": (on_block(attribute("right_order", 2, "silu")), "a power of two from 4 to 16384"),
    "rotation's largest power": (on_block(attribute("right_order", 32768, "silu")), "a power of two from 4 to 16384"),
    "rotation's size": (on_block(attribute("left_order", 1025, "silu")), "left_order positive, their product at most"),
    "rotation's matrix": (
        on_block(constant("left", np.ones((4, 4), np.float32))),
        r"left is \[4, 4\], .* \[3, 3\]",
    ),
}


@pytest.fixture(scope="module")
def refusals(rtx: Rtx) -> dict[str, dict[str, Any]]:
    return dict(zip(BAD, rtx([(model(), []) for model, _ in BAD.values()]), strict=True))


@pytest.mark.parametrize("case", BAD)
def test_the_plugin_says_what_is_wrong(refusals: dict[str, dict[str, Any]], case: str) -> None:
    result = refusals[case]
    own = [text for text in result["errors"] if text.startswith("pq::")]
    assert not result["parsed"] and len(own) == 1, result["errors"]
    assert re.search(BAD[case][1], own[0]), own


def test_exports(plugin_library: Path) -> None:
    """The entry points that TensorRT looks for, and no need for its libraries."""
    symbols = subprocess.run(["nm", "-D", str(plugin_library)], capture_output=True, text=True, check=True).stdout
    defined = {line.split()[-1] for line in symbols.splitlines() if " T " in line}
    assert {"getCreators", "setLoggerFinder"} <= defined
    assert {name for name in defined if not name.startswith("pq_")} == {"getCreators", "setLoggerFinder"}
    undefined = [line.split()[-1] for line in symbols.splitlines() if " U " in line]
    assert not [name for name in undefined if "nvinfer" in name.lower() or OP in name]
