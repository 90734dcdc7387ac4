"""The graph as TensorRT reads it: the same integers as onnxruntime's, nothing that an old TensorRT does not know."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pq_export.calib.checkpoint import load_checkpoint
from pq_export.calib.pipeline import calibrate
from pq_export.calibration import Calibration
from pq_export.errors import PqExportError
from pq_export.export.fp_graph import export_fp_graph
from pq_export.plan import Plan
from pq_export.rewrite.half import MASKED, to_half
from pq_export.rewrite.kv_cache import CacheForm
from pq_export.rewrite.pipeline import quantized_model
from pq_export.rewrite.qlinear import Form
from pq_export.runtime import decoder_of, session_options
from pq_export.simulate import simulated_decoder
from pq_export.stages import Stages
from pq_export.targets.tensorrt_form import TensorRTForm, executable, lower
from pq_export.targets.tensorrt_levels import JETPACKS, TENSORRT_10_3, check
from pq_export.validate.codes import compare_blocks
from tests.conftest import byte_tokenizer, hf_model, word_tokenizer
from tests.tiny_blocks import random_ids

CASES = {  # precision, family, steps beside the scale search
    "w4a4": ("w4a4", "llama", ()),
    "w4a4 centered": ("w4a4", "llama", (("center", {}),)),
    "w4a4 biases": ("w4a4", "qwen2", ()),
    "w4a8": ("w4a8", "llama", ()),
    "w8a8": ("w8a8", "llama", ()),
    "w4a16": ("w4a16", "llama", ()),
}
FORMS = [(name, form) for name in CASES for form in (Form.PLUGIN, Form.QDQ) if (name, form) != ("w4a16", Form.PLUGIN)]


@pytest.fixture(scope="module")
def calibration(
    small_plan: Callable[..., Plan], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Calibration]:
    """Of tiny models whose sizes the plugin takes: multiples of 32."""
    made: dict[str, Calibration] = {}

    def make(case: str) -> Calibration:
        if case not in made:
            name, family, steps = CASES[case]
            folder = tmp_path_factory.mktemp("tensorrt")
            hf_model(family, hidden_size=64, intermediate_size=128).save_pretrained(folder / "checkpoint")
            tokenizer = byte_tokenizer() if family == "qwen2" else word_tokenizer()
            tokenizer.save_pretrained(folder / "checkpoint")
            plan = small_plan(name, prefix="w77 w8 w9", steps=(*steps, ("clip_search", {})))
            made[case] = calibrate(load_checkpoint(str(folder / "checkpoint")), plan, folder / "out", Stages())
        return made[case]

    return make


def tensorrt_model(c: Calibration, form: Form, options: TensorRTForm) -> onnx.ModelProto:
    return lower(quantized_model(export_fp_graph(c.decoder), c, form, cache=CacheForm.SIGNED), options)


def run(model: onnx.ModelProto, ids: np.ndarray) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Logits of a prefill and two steps behind it, and the cache then."""
    decoder = decoder_of(model, session_options(4))
    state, logits = decoder.empty(len(ids)), []
    for part in np.split(ids, [ids.shape[1] - 2, ids.shape[1] - 1], axis=1):
        step, state, _ = decoder.step(part, state)
        logits.append(step)
    return logits, state.past


@pytest.mark.parametrize(("case", "form"), FORMS)
def test_the_file_computes_what_the_onnxruntime_file_computes(
    calibration: Callable[[str], Calibration], case: str, form: Form
) -> None:
    """Bit for bit where the products are integers; sums of floats have an order of their own in a 4-bit Q/DQ graph."""
    c = calibration(case)
    ids = random_ids(2, 14, seed=9).numpy()
    expected, cache = run(quantized_model(export_fp_graph(c.decoder), c, Form.INTEGER), ids)
    actual, codes = run(executable(tensorrt_model(c, form, TensorRTForm(87, half=False, opset=20))), ids)
    exact = form is Form.PLUGIN or case in ("w8a8", "w4a16")
    for a, b in zip(expected, actual, strict=True):
        assert np.array_equal(a, b) if exact else np.allclose(a, b, atol=1e-3)
    for name, values in cache.items():
        if values.dtype == np.uint8:
            zero = 1 << (c.precision.kv_bits - 1)
            assert codes[name].dtype == np.int8 and np.array_equal(values.astype(int) - zero, codes[name])


@pytest.mark.parametrize("sm", [87, 110])
@pytest.mark.parametrize("case", ["w4a4", "w4a4 biases", "w8a8"])
def test_half_precision_keeps_the_quantizers(
    calibration: Callable[[str], Calibration], case: str, sm: int, text_file: Path
) -> None:
    """Block by block: FP16 constants move values by 2^-11, so a code differs where a value lies that near a tie."""
    c = calibration(case)
    form = Form.QDQ if case == "w8a8" else Form.PLUGIN
    model = executable(tensorrt_model(c, form, TensorRTForm(sm)))
    bits = {site: c.activation_bits(site) for site in c.activation_scales}
    bits |= {site: c.kv_bits(site) for site in c.kv_scales}
    blocks = compare_blocks(model, simulated_decoder(c), random_ids(1, 16, seed=3), bits)
    assert set(blocks["sites"]) == set(bits)
    assert blocks["min_equal"] > 0.98 and min(blocks["cosine"]) > 0.99999


def test_half_precision_is_everywhere_but_where_it_must_not_be(calibration: Callable[[str], Calibration]) -> None:
    model = tensorrt_model(calibration("w4a4 centered"), Form.PLUGIN, TensorRTForm(87))
    constants = {t.name: t for t in model.graph.initializer}
    single = {name for name, t in constants.items() if t.data_type == TensorProto.FLOAT}
    readers = {n.op_type for n in model.graph.node if single & set(n.input)}
    assert readers == {"QLinear", "Pow", "Add"}
    assert all(constants[n].dims == [] for n in single if not n.startswith("layers"))  # an exponent and an epsilon
    smallest = min(
        numpy_helper.to_array(t).astype(float).min() for t in constants.values() if t.data_type == TensorProto.FLOAT16
    )
    assert smallest == MASKED
    outputs = {o.name: o.type.tensor_type.elem_type for o in model.graph.output}
    assert outputs["logits"] == TensorProto.FLOAT and outputs["present.0.key"] == TensorProto.INT8


def one_product(values: np.ndarray, scale: float = 0.1) -> onnx.ModelProto:
    """Q/DQ of x, and x @ values."""
    constants = {"w": values, "s": np.float32(scale), "z": np.int8(0)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("MatMul", ["d", "w"], ["logits"]),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", "logits"))
    tensors = [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()]
    return helper.make_model(helper.make_graph(nodes, "g", [x], [y], tensors))


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (one_product(np.full((2, 2), 1e5, np.float32)), "w holds 1e[+]05, which FP16 cannot.*--float-type fp32"),
        (one_product(np.ones((2, 2), np.float32), 1e-7), "scale s is 1e-07, which FP16 holds to .*% only"),
    ],
)
def test_constants_that_half_precision_cannot_hold(model: onnx.ModelProto, says: str) -> None:
    with pytest.raises(PqExportError, match=says):
        to_half(model)


# --- levels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize(("case", "form"), FORMS)
def test_a_file_for_jetpack_6_uses_nothing_newer(
    calibration: Callable[[str], Calibration], case: str, form: Form, half: bool
) -> None:
    level = JETPACKS["6.2"].level
    model = tensorrt_model(calibration(case), form, TensorRTForm(87, half=half, opset=level.opset, block=64))
    findings = check(model, level)
    # Beside quantized activations no TensorRT is known to take 4-bit weights: such a file is refused.
    refused = form is Form.QDQ and case.startswith(("w4a4", "w4a8"))
    assert {f.rule for f in findings} == ({"granularity"} if refused else set()), findings
    assert not check(model, level, int4_per_channel=True)


def broken(change: Callable[[onnx.ModelProto], object]) -> onnx.ModelProto:
    model = one_product(np.ones((2, 2), np.float32))
    model.opset_import[0].version = 20
    assert not check(model, TENSORRT_10_3)
    change(model)
    return model


def replace(name: str, values: np.ndarray) -> Callable[[onnx.ModelProto], object]:
    def change(model: onnx.ModelProto) -> None:
        next(t for t in model.graph.initializer if t.name == name).CopyFrom(numpy_helper.from_array(values, name))

    return change


@pytest.mark.parametrize(
    ("change", "rule", "detail"),
    [
        (lambda m: setattr(m.opset_import[0], "version", 21), "opset", "21; TensorRT 10.3 reads up to 20"),
        (lambda m: setattr(m.graph.node[2], "op_type", "Attention"), "operator", "Attention is not known"),
        (lambda m: setattr(m.graph.node[2], "domain", "com.microsoft"), "operator", "com.microsoft::MatMul is none"),
        (replace("z", np.asarray(3, np.int8)), "zero point", "'z' is not 0"),
        (replace("s", np.ones(2, np.float32)), "granularity", "activations have one scale"),
        (replace("w", np.ones((2, 2), np.uint8)), "type", "UINT8 is no tensor type"),
        (lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", TensorProto.INT4), "type", "INT4 inputs"),
        (lambda m: m.functions.add(), "functions", "keep the parser from finding the plugin"),
    ],
)
def test_what_a_level_does_not_take(change: Callable[[onnx.ModelProto], object], rule: str, detail: str) -> None:
    findings = check(broken(change), TENSORRT_10_3)
    assert any(f.rule == rule and detail in f.detail for f in findings), findings


def test_weights_alone_are_blocks_of_64(calibration: Callable[[str], Calibration]) -> None:
    """The repeated scales are the channel's own."""
    c = calibration("w4a16")
    model = tensorrt_model(c, Form.QDQ, TensorRTForm(87, half=False, block=64))
    node = next(n for n in model.graph.node if n.name.endswith("down_proj/weight"))
    attributes = {a.name: a.i for a in node.attribute}
    scale = next(numpy_helper.to_array(t) for t in model.graph.initializer if t.name == node.input[1])
    assert (node.op_type, attributes, scale.shape) == ("DequantizeLinear", {"axis": 0, "block_size": 64}, (2, 64))
    assert np.array_equal(scale[0], scale[1])
    name = node.name.removesuffix("/weight")
    assert np.array_equal(scale[0], c.tensors[f"{name}.scale"])
    odd = dataclasses.replace(TensorRTForm(87, half=False), block=48)
    with pytest.raises(PqExportError, match="64 inputs are not a multiple of 48"):
        tensorrt_model(c, Form.QDQ, odd)
