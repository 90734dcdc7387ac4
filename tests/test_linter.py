"""The linter: graphs broken in one way each are refused for that reason; graphs that we ship are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pq_export.calib.checkpoint import load_checkpoint
from pq_export.calib.pipeline import calibrate
from pq_export.calibration import Calibration
from pq_export.errors import IntegrityError
from pq_export.export.fp_graph import export_fp_graph
from pq_export.plan import Plan
from pq_export.precision import Precision
from pq_export.rewrite.pipeline import quantized_model
from pq_export.rewrite.qlinear import Form
from pq_export.stages import Stages
from pq_export.targets import find_target, rknn_form
from pq_export.targets.base import TargetOptions
from pq_export.targets.lint import RULES, lint_bundle, lint_file, lint_model
from pq_export.targets.profile import Profile, find_profile
from pq_export.targets.static_form import StaticForm, save_static, static_graphs, tensors_to_observe
from pq_export.targets.static_ranges import observe_ranges
from tests.cli_runner import Runner
from tests.conftest import hf_model, word_tokenizer
from tests.static_graphs import (
    ELEM,
    PREFIX,
    TOKENS,
    VOCAB,
    WIDTH,
    find_node,
    make_constant,
    set_constant,
    static_graph,
)

Model = onnx.ModelProto
K_PROJ, O_PROJ = "layers.0.self_attn.k_proj", "layers.0.self_attn.o_proj"


@dataclass(frozen=True)
class Broken:
    """``change`` breaks ``rule``, on ``node``; ``also``: rules that no such graph can keep.

    ``make``: arguments of the graph before. ``profile``: changes the target's profile.
    """

    rule: str
    change: Callable[[Model], None]
    node: str
    target: str = "qnn-htp"
    soc: str | None = None
    also: tuple[str, ...] = ()
    make: tuple[tuple[str, str], ...] = ()
    profile: Callable[[Profile], Profile] = lambda profile: profile


def nothing(model: Model) -> None:
    """The graph was made broken."""


def before(model: Model, name: str, *nodes: onnx.NodeProto) -> None:
    """Insert ``nodes`` in front of the node ``name``."""
    at = [node.name for node in model.graph.node].index(name)
    for offset, node in enumerate(nodes):
        model.graph.node.insert(at + offset, node)


def constant(model: Model, name: str, values: Any, kind: str = "float32") -> str:
    model.graph.initializer.append(make_constant(name, values, kind))
    return name


def make(op: str, name: str, *inputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, list(inputs), [name], name=name, **attributes)


def graph_input(model: Model, name: str, kind: str, shape: list[Any]) -> None:
    model.graph.input.append(helper.make_tensor_value_info(name, ELEM[kind], shape))


def reread(model: Model, node: str, position: int, tensor: str) -> None:
    """Let the node ``node`` read ``tensor``."""
    find_node(model, node).input[position] = tensor


def dynamic_scale(model: Model) -> None:
    names = ["embedding/dynamic", "embedding/dynamic.scale", "embedding/dynamic.zero_point"]
    quantize = helper.make_node("DynamicQuantizeLinear", ["embedding"], names, name="embedding/dynamic")
    before(model, K_PROJ, quantize, make("DequantizeLinear", "embedding/again", *names))
    reread(model, K_PROJ, 0, "embedding/again")


def dynamic_product(model: Model) -> None:
    node = find_node(model, K_PROJ)
    weights = (f"{K_PROJ}.codes", f"{K_PROJ}.scale")
    node.CopyFrom(make("MatMulNBits", K_PROJ, "embedding", *weights, K=WIDTH, N=WIDTH, accuracy_level=4))
    node.domain = "com.microsoft"
    model.graph.node.remove(find_node(model, f"{K_PROJ}/weight"))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def scale_of_a_maximum(model: Model) -> None:
    before(model, "embedding16/codes", make("ReduceMax", "embedding/max", "embedding", keepdims=0))
    for name in ("embedding16/codes", "embedding16"):
        reread(model, name, 1, "embedding/max")


def rounding_by_a_maximum(model: Model) -> None:
    """What a fake-quantizer in plain operators is: x / max * 127, rounded."""
    before(
        model,
        "embedding16/codes",
        make("ReduceMax", "embedding/max", "embedding", keepdims=1),
        make("Div", "embedding/steps", "embedding", "embedding/max"),
        make("Round", "embedding/rounded", "embedding/steps"),
        make("Mul", "embedding/again", "embedding/rounded", "embedding/max"),
    )
    reread(model, "embedding16/codes", 0, "embedding/again")


def branch(model: Model) -> None:
    constant(model, "condition", True, "bool")
    value = helper.make_tensor_value_info("branch", TensorProto.FLOAT, [1])
    body = helper.make_graph([make("Constant", "branch", value_floats=[1.0])], "body", [], [value])
    before(model, K_PROJ, make("If", "chosen", "condition", then_branch=body, else_branch=body))


def loop(model: Model) -> None:
    constant(model, "trips", 2, "int64")
    constant(model, "condition", True, "bool")
    before(model, K_PROJ, make("Loop", "looped", "trips", "condition", body=helper.make_graph([], "body", [], [])))


def nonzero(model: Model) -> None:
    before(model, K_PROJ, make("NonZero", "found", "input_ids"))


def overridable(name: str) -> Callable[[Model], None]:
    """An initializer that is an input, too: the caller may give another value."""

    def change(model: Model) -> None:
        kind = next(t for t in model.graph.initializer if t.name == name)
        model.graph.input.append(helper.make_tensor_value_info(name, kind.data_type, kind.dims))

    return change


def scale_input(model: Model) -> None:
    model.graph.initializer.remove(next(t for t in model.graph.initializer if t.name == "hidden/codes.scale"))
    graph_input(model, "hidden/codes.scale", "float32", [])


def value(name: str, values: Any, kind: str | None = None) -> Callable[[Model], None]:
    return lambda model: set_constant(model, name, values, kind)


def another_scale(model: Model) -> None:
    reread(model, "embedding16", 1, constant(model, "other.scale", 0.04))


def another_zero_point(model: Model) -> None:
    reread(model, "embedding16", 2, constant(model, "other.zero_point", 100, "uint16"))


def baked_output(model: Model) -> None:
    baked = constant(model, "traced", np.zeros((1, TOKENS, VOCAB)), "uint16")
    model.graph.node.append(make("Identity", "baked", baked))
    model.graph.output.append(helper.make_tensor_value_info("baked", TensorProto.UINT16, [1, TOKENS, VOCAB]))


def unread_input(model: Model) -> None:
    graph_input(model, "position_ids", "int32", [1, TOKENS])


def opset(version: int) -> Callable[[Model], None]:
    return lambda model: setattr(model.opset_import[0], "version", version)


def operator(op: str, domain: str = "") -> Callable[[Model], None]:
    def change(model: Model) -> None:
        node = find_node(model, "layers.0.self_attn/softmax")
        node.op_type, node.domain = op, domain
        del node.attribute[:]
        if domain:
            model.opset_import.append(helper.make_opsetid(domain, 1))

    return change


def tensor_scatter(model: Model) -> None:
    before(
        model, "layers.0.self_attn/keys/codes", make("TensorScatter", "grown", "past_key_values.0.key", "present.0.key")
    )
    node = find_node(model, "layers.0.self_attn/keys/codes")
    node.input[1] = "grown"


def local_function(model: Model) -> None:
    body = [helper.make_node("Identity", ["x"], ["y"])]
    model.functions.append(helper.make_function("mine", "Same", ["x"], ["y"], body, [helper.make_opsetid("", 21)]))


def five_dimensions(model: Model) -> None:
    shape = constant(model, "five.shape", [1, 1, 1, TOKENS, WIDTH], "int64")
    gain = constant(model, "five.gain", np.ones(WIDTH), "uint8")
    constant(model, "five.gain.scale", 0.01)
    for node in (
        make("Reshape", "five/reshaped", "hidden", shape),
        make("QuantizeLinear", "five/codes", "five/reshaped", "hidden/codes.scale", "hidden/codes.zero_point"),
        make("DequantizeLinear", "five", "five/codes", "hidden/codes.scale", "hidden/codes.zero_point"),
        make("DequantizeLinear", "five/gain", gain, "five.gain.scale"),
        make("RMSNormalization", "five/norm", "five", "five/gain"),
        make("QuantizeLinear", "five/norm/codes", "five/norm", "hidden/codes.scale", "hidden/codes.zero_point"),
    ):
        model.graph.node.append(node)


def dimension(tensor: str, axis: int, size: int | str) -> Callable[[Model], None]:
    def change(model: Model) -> None:
        values = [*model.graph.input, *model.graph.output]
        dims = next(v for v in values if v.name == tensor).type.tensor_type.shape.dim
        if isinstance(size, str):
            dims[axis].dim_param = size
        else:
            dims[axis].dim_value = size

    return change


def shape_at_run_time(model: Model) -> None:
    graph_input(model, "shape", "int32", [3])
    before(model, "flat", make("Cast", "shape64", "shape", to=TensorProto.INT64))
    reread(model, "flat", 1, "shape64")


def activation_type(kind: str) -> Callable[[Model], None]:
    """The residual stream behind the embedding as ``kind``."""
    return lambda model: set_constant(model, "embedding16/codes.zero_point", 0, kind)


def scales_a_channel(model: Model) -> None:
    set_constant(model, "hidden/codes.scale", np.full(WIDTH, 0.02))
    set_constant(model, "hidden/codes.zero_point", np.full(WIDTH, 32768))
    for name in ("hidden/codes", "hidden"):
        find_node(model, name).attribute.append(helper.make_attribute("axis", 2))


def requantized_transpose(model: Model) -> None:
    set_constant(model, "layers.0.self_attn/turned/codes.zero_point", 32768, "uint16")


def converted_behind_a_split(model: Model) -> None:
    """DequantizeLinear -> QuantizeLinear of another type behind a transposition and a Split."""
    turned = "layers.0.self_attn/turned"
    parameters = (f"{turned}/codes.scale", f"{turned}/codes.zero_point")
    constant(model, "late.zero_point", 32768, "uint16")
    late = ("late/codes", parameters[0], "late.zero_point")
    before(
        model,
        "layers.0.self_attn/scores",
        make("Split", "cut", turned, axis=3, num_outputs=1),
        make("QuantizeLinear", "cut/codes", "cut", *parameters),
        make("DequantizeLinear", "cut/values", "cut/codes", *parameters),
        make("QuantizeLinear", "late/codes", "cut/values", *late[1:]),
        make("DequantizeLinear", "late", *late),
    )
    reread(model, "layers.0.self_attn/scores", 1, "late")


def weight_type(kind: str) -> Callable[[Model], None]:
    def change(model: Model) -> None:
        set_constant(model, f"{K_PROJ}.codes", np.ones((WIDTH, WIDTH)), kind)
        set_constant(model, f"{K_PROJ}.zero_point", np.zeros(WIDTH), kind)

    return change


def weight_blocks(model: Model) -> None:
    set_constant(model, f"{K_PROJ}.scale", np.full((2, WIDTH), 0.01))
    set_constant(model, f"{K_PROJ}.zero_point", np.zeros((2, WIDTH)))
    node = find_node(model, f"{K_PROJ}/weight")
    node.attribute[0].i = 0
    node.attribute.append(helper.make_attribute("block_size", WIDTH // 2))


def weight_axis(model: Model) -> None:
    find_node(model, f"{K_PROJ}/weight").attribute[0].i = 0


def transposed_weight_axis(model: Model) -> None:
    """Codes [N, K] behind a transposition, with the scales of axis 1, the inputs."""
    node = find_node(model, K_PROJ)
    before(model, K_PROJ, make("Transpose", f"{K_PROJ}/turned", node.input[1], perm=[1, 0]))
    node.input[1] = f"{K_PROJ}/turned"


def no_zero_point(model: Model) -> None:
    del find_node(model, f"{O_PROJ}/weight").input[2:]


def unit_types(name: str, reads: str, into: str, out: str) -> Callable[[Model], None]:
    """The linear ``name``, whose input is the codes ``reads``, with input and output of other types."""

    def change(model: Model) -> None:
        set_constant(model, f"{reads}.zero_point", 0, into)
        set_constant(model, f"{name}/output/codes.zero_point", 0, out)

    return change


def four_bit_input(model: Model) -> None:
    set_constant(model, "layers.0.self_attn.o_input/codes.zero_point", 0, "int4")


def no_output_quantizer(model: Model) -> None:
    """The linear's product goes straight into the next operator."""
    for name in (f"{K_PROJ}/output/codes", f"{K_PROJ}/output"):
        model.graph.node.remove(find_node(model, name))
    reread(model, "new_keys", 0, K_PROJ)


def no_input_quantizer(model: Model) -> None:
    before(model, K_PROJ, make("Relu", "activated", "embedding"))
    reread(model, K_PROJ, 0, "activated")


def float_softmax(kind: str) -> Callable[[Model], None]:
    """Softmax and the product behind it without quantizers between, as ``kind``."""

    def change(model: Model) -> None:
        before(model, "layers.0.self_attn/softmax16/codes", make("Neg", "negative", "layers.0.self_attn/softmax"))
        reread(model, "layers.0.self_attn/softmax16/codes", 0, "negative")
        for name in ("layers.0.self_attn/scores16/codes.scale", "layers.0.self_attn/softmax16/codes.scale"):
            set_constant(model, name, 0.01, kind)

    return change


def float_constant(model: Model) -> None:
    reread(model, "layers.0/residual", 1, constant(model, "offset", np.ones(WIDTH)))


def float_input(model: Model) -> None:
    graph_input(model, "image", "float32", [1, TOKENS, WIDTH])
    reread(model, "embedding16/codes", 0, "image")


def float_output(model: Model) -> None:
    model.graph.output.append(helper.make_tensor_value_info("hidden", TensorProto.FLOAT, [1, TOKENS, WIDTH]))


def input_type(name: str, kind: str) -> Callable[[Model], None]:
    def change(model: Model) -> None:
        next(v for v in model.graph.input if v.name == name).type.tensor_type.elem_type = ELEM[kind]

    return change


def four_bit_output(model: Model) -> None:
    model.graph.output.append(helper.make_tensor_value_info(f"{O_PROJ}.codes", TensorProto.INT4, [WIDTH, WIDTH]))


def limits(**changes: Any) -> Callable[[Profile], Profile]:
    """A profile with other values."""

    def change(profile: Profile) -> Profile:
        tables = {"block_sizes": "weights", "granularity": "weights", "max_inputs": "linears", "max": "opset"}
        for key, values in changes.items():
            table = tables[key]
            profile = replace(profile, **{table: replace(getattr(profile, table), **{key: values})})
        return profile

    return change


EMBEDDED, PAST = "embedding16/codes", "past_key_values.0.key"
BROKEN = {
    "dynamic scale": Broken("dynamic-quantization", dynamic_scale, "embedding/dynamic"),
    "dynamically quantized product": Broken(
        "dynamic-quantization", dynamic_product, K_PROJ, also=("float-tensor",), target="static"
    ),
    "scale of a maximum": Broken("run-time-range", scale_of_a_maximum, "embedding/max"),
    "rounding by a maximum": Broken(
        "run-time-range", rounding_by_a_maximum, "embedding/max", also=("operator", "float-tensor")
    ),
    "branch": Broken("data-dependent", branch, "chosen"),
    "loop": Broken("data-dependent", loop, "looped"),
    "NonZero": Broken("data-dependent", nonzero, "found"),
    "scale that a caller may give": Broken("scale-not-constant", overridable(f"{K_PROJ}.scale"), f"{K_PROJ}/weight"),
    "scale as an input": Broken("scale-not-constant", scale_input, "hidden/codes", also=("float-tensor",)),
    "zero point that a caller may give": Broken(
        "zero-point-not-constant", overridable(f"{EMBEDDED}.zero_point"), EMBEDDED
    ),
    "scale of 0": Broken("scale-value", value(f"{EMBEDDED}.scale", 0.0), EMBEDDED),
    "scale of NaN": Broken("scale-value", value(f"{EMBEDDED}.scale", np.nan), EMBEDDED),
    "infinite scale": Broken("scale-value", value(f"{K_PROJ}.scale", np.full(WIDTH, np.inf)), f"{K_PROJ}/weight"),
    "negative scale": Broken(
        "scale-value", value(f"{K_PROJ}.scale", np.linspace(-0.1, 0.1, WIDTH)), f"{K_PROJ}/weight"
    ),
    "a scale too few": Broken("scale-shape", value(f"{K_PROJ}.scale", np.full(WIDTH - 1, 0.01)), f"{K_PROJ}/weight"),
    "codes read with another scale": Broken("quantizer-pair", another_scale, "embedding16"),
    "codes read with another zero point": Broken("quantizer-pair", another_zero_point, "embedding16"),
    "output of a constant": Broken("connected", baked_output, "baked"),
    "input that nobody reads": Broken("connected", unread_input, "position_ids"),
    "opset too new": Broken("opset", opset(25), "model"),
    "opset too old": Broken("opset", opset(20), "model"),
    "opset too new for the profile": Broken("opset", nothing, "model", profile=limits(max=19)),
    "unknown operator": Broken("operator", operator("Erf"), "layers.0.self_attn/softmax"),
    "TensorScatter": Broken("operator", tensor_scatter, "grown"),
    "refused attention": Broken(
        "operator", operator("GroupQueryAttention", "com.microsoft"), "layers.0.self_attn/softmax"
    ),
    "foreign domain": Broken("domain", operator("Softmax", "com.microsoft"), "layers.0.self_attn/softmax"),
    "local function": Broken("local-function", local_function, "Same"),
    "five dimensions": Broken("rank", five_dimensions, "five/norm"),
    "symbolic tokens": Broken("symbolic-dimension", dimension("input_ids", 1, "sequence"), "input_ids"),
    "symbolic cache": Broken(
        "symbolic-dimension", dimension("past_key_values.0.key", 2, "past"), "past_key_values.0.key"
    ),
    "shape decided at run time": Broken("symbolic-dimension", shape_at_run_time, "flat"),
    "empty cache": Broken("empty-dimension", dimension(PAST, 2, 0), PAST),
    "4-bit activations": Broken("activation-type", activation_type("int4"), EMBEDDED, target="static"),
    "activation scales a channel": Broken("activation-granularity", scales_a_channel, "hidden/codes"),
    "transposed into another type": Broken("moved-codes", requantized_transpose, "turned"),
    "converted behind a Split": Broken("moved-codes", converted_behind_a_split, "late/codes"),
    "zero point in the middle": Broken(
        "activation-zero-point", value(f"{EMBEDDED}.zero_point", 77), EMBEDDED, target="ethos-u"
    ),
    "unsigned 4-bit weights": Broken("weight-type", weight_type("uint4"), f"{K_PROJ}/weight"),
    "16-bit weights a channel": Broken(
        "weight-granularity", weight_type("int16"), f"{K_PROJ}/weight", also=("type-pair",)
    ),
    "weights in blocks": Broken("weight-granularity", weight_blocks, f"{K_PROJ}/weight"),
    "blocks of another size": Broken(
        "weight-block",
        weight_blocks,
        f"{K_PROJ}/weight",
        profile=limits(granularity=("tensor", "channel", "block"), block_sizes=(32,)),
    ),
    "weight scales of inputs": Broken("weight-axis", weight_axis, f"{K_PROJ}/weight"),
    "weight scales of inputs, transposed": Broken("weight-axis", transposed_weight_axis, f"{K_PROJ}/weight"),
    "weight zero point": Broken(
        "weight-zero-point", value(f"{K_PROJ}.zero_point", np.arange(WIDTH)), f"{K_PROJ}/weight"
    ),
    "4-bit weights without a zero point": Broken("weight-zero-point-missing", no_zero_point, f"{O_PROJ}/weight"),
    "int8 x int4": Broken("type-pair", unit_types(O_PROJ, "layers.0.self_attn.o_input/codes", "int8", "int8"), O_PROJ),
    "int4 x int4": Broken("type-pair", four_bit_input, O_PROJ, also=("linear-types",)),
    "linear without an output quantizer": Broken("linear-unit", no_output_quantizer, K_PROJ, also=("float-tensor",)),
    "linear without an input quantizer": Broken("linear-unit", no_input_quantizer, K_PROJ, also=("float-tensor",)),
    "uint8 in, uint16 out": Broken("linear-types", value(f"{O_PROJ}/output/codes.zero_point", 0, "uint16"), O_PROJ),
    "output scale too fine": Broken("requantization-multiplier", value(f"{O_PROJ}/output/codes.scale", 1e-6), O_PROJ),
    "one channel too coarse": Broken(
        "requantization-multiplier", value(f"{K_PROJ}.scale", np.r_[np.full(WIDTH - 1, 0.01), 9.0]), K_PROJ
    ),
    "too many inputs": Broken("linear-size", nothing, K_PROJ, profile=limits(max_inputs=WIDTH - 1)),
    "signed cache": Broken(
        "cache-type", nothing, "past_key_values.0.key", make=(("cache", "int8"),), also=("moved-codes",)
    ),
    "scattered cache": Broken(
        "cache-update", nothing, "layers.0.self_attn/scattered", target="ethos-u", make=(("update", "ScatterND"),)
    ),
    "prefix at run time": Broken("prefix-at-run-time", nothing, "prefix.0.key", make=(("prefix", "input"),)),
    "lost prefix": Broken("prefix-at-run-time", nothing, "past_key_values.0.key", make=(("prefix", "none"),)),
    "FP32 tensor": Broken("float-tensor", float_softmax("float32"), "layers.0.self_attn/softmax"),
    "FP16 tensor on v68": Broken("float-tensor", float_softmax("float16"), "layers.0.self_attn/softmax", soc="sm8350"),
    "floating-point constant": Broken("float-tensor", float_constant, "layers.0/residual"),
    "floating-point input": Broken("float-tensor", float_input, "image"),
    "floating-point output": Broken("float-tensor", float_output, "hidden"),
    "64-bit tokens": Broken("io-type", input_type("input_ids", "int64"), "input_ids"),
    "4-bit output": Broken("io-type", four_bit_output, f"{O_PROJ}.codes", also=("connected",)),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_graph_is_refused_for_its_reason(case: str) -> None:
    broken = BROKEN[case]
    model = static_graph(**dict(broken.make))
    broken.change(model)
    profile = broken.profile(find_profile(broken.target).for_soc(broken.soc))
    findings = lint_model(model, profile, prefix_length=PREFIX)
    rules = {found.rule for found in findings}
    named = [found for found in findings if found.rule == broken.rule and found.node == broken.node]
    assert named, [str(found) for found in findings]
    assert named[0].cure and named[0].reason
    assert rules - set(broken.also) == {broken.rule}, [str(found) for found in findings]


def test_every_rule_has_a_broken_graph() -> None:
    assert {broken.rule for broken in BROKEN.values()} == set(RULES)
    assert len(BROKEN) >= 30


@pytest.mark.parametrize("soc", [*find_profile("qnn-htp").socs])
@pytest.mark.parametrize("how", [{}, {"update": "ScatterND"}])
def test_the_graph_that_is_broken_above_is_whole(soc: str, how: dict[str, str]) -> None:
    model = static_graph(**how)
    onnx.checker.check_model(model, full_check=True)
    assert lint_model(model, find_profile("qnn-htp").for_soc(soc), prefix_length=PREFIX) == []


@pytest.mark.parametrize("target", ["static", "ethos-u"])
def test_other_static_targets_take_it_too(target: str) -> None:
    assert lint_model(static_graph(), find_profile(target).for_soc(), prefix_length=PREFIX) == []


def test_a_newer_chip_takes_fp16() -> None:
    model = static_graph()
    float_softmax("float16")(model)
    profile = find_profile("qnn-htp")
    assert lint_model(model, profile.for_soc("sm8650"), prefix_length=PREFIX) == []
    found = lint_model(model, profile.for_soc("SM8350"), prefix_length=PREFIX)
    assert "sm8450" in found[0].cure and "v68" in found[0].reason


def test_a_finding_names_the_layer() -> None:
    model = static_graph()
    for node in model.graph.node:
        node.name = node.name.replace("layers.0", "layers.7")
    set_constant(model, f"{K_PROJ}.scale", np.full(WIDTH, 0.0))
    found = lint_model(model, find_profile("qnn-htp").for_soc(), prefix_length=PREFIX)[0]
    assert (found.node, found.layer) == (f"{K_PROJ}/weight".replace("layers.0", "layers.7"), 7)
    assert "(layer 7)" in str(found)


def test_layers_are_found_through_names_in_front() -> None:
    model = static_graph()
    find_node(model, "layers.0.self_attn/softmax").name = "node_softmax"
    find_node(model, "node_softmax").op_type = "Erf"
    found = next(f for f in lint_model(model, find_profile("qnn-htp").for_soc()) if f.rule == "operator")
    assert (found.node, found.layer) == ("node_softmax", 0)


def test_scales_outside_the_file_are_read(tmp_path: Path) -> None:
    model = static_graph()
    set_constant(model, f"{K_PROJ}.scale", np.full(WIDTH, np.nan))
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    profile = find_profile("qnn-htp").for_soc()
    assert {found.rule for found in lint_file(tmp_path / "m.onnx", profile)} == {"scale-value"}
    (tmp_path / "m.data").unlink()
    with pytest.raises(IntegrityError, match="cannot be read"):
        lint_file(tmp_path / "m.onnx", profile)


def test_external_data_stays_in_its_directory(tmp_path: Path) -> None:
    model = static_graph()
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    model = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../m.data"
    with pytest.raises(IntegrityError, match="external data"):
        lint_model(model, find_profile("static"), directory=tmp_path)


def test_a_file_that_is_no_graph_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"\x08\x0a nonsense \xff")
    with pytest.raises(IntegrityError, match="not an ONNX model"):
        lint_file(tmp_path / "m.onnx", find_profile("static"))


PRECISIONS = {"w4a4": 4, "w4a8": 4, "w8a8": 8, "w4a16": 16}  # and bits of the cache


@pytest.fixture(scope="module")
def shipped(
    small_plan: Callable[..., Plan], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str, Form], Model]:
    """``shipped("ort", "w4a8", Form.QDQ)``: the graph that the target writes of a tiny model with a prefix."""
    folder = tmp_path_factory.mktemp("shipped")
    hf_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(folder / "checkpoint")
    word_tokenizer().save_pretrained(folder / "checkpoint")
    calibrations: dict[tuple[str, int, str], Calibration] = {}

    def make_model(
        name: str, precision: str, form: Form | None, kv: int | None = None, rotate: str = "online"
    ) -> Model:
        key = (precision, kv or PRECISIONS[precision], rotate)
        if key not in calibrations:
            plan = small_plan(precision, key[1], prefix="w77 w8 w9", rotate=rotate)
            checkpoint = load_checkpoint(str(folder / "checkpoint"))
            calibrations[key] = calibrate(checkpoint, plan, folder / "-".join(map(str, key)), Stages())
        target = find_target(name)
        options = target.resolve(TargetOptions(), None) if name == "trt" else TargetOptions((86,), float_type="fp16")
        form = form or target.choose_form(Precision.named(precision), False, options)[0]
        fp = export_fp_graph(calibrations[key].decoder)
        model = quantized_model(fp, calibrations[key], form, cache=target.cache)
        return target.lower(model, options)

    return make_model


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("target", "form"), [("ort", Form.INTEGER), ("ort", Form.QDQ), ("trt", None), ("trt-rtx", Form.QDQ)]
)
def test_no_false_alarm_on_what_we_ship(
    target: str, form: Form | None, precision: str, shipped: Callable[..., Model]
) -> None:
    findings = lint_model(shipped(target, precision, form), find_profile(target).for_soc(), prefix_length=3)
    assert findings == [], str(findings[0])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tensorrt_for_rtx_takes_what_tensorrt_takes(precision: str, shipped: Callable[..., Model]) -> None:
    assert lint_model(shipped("trt", precision, None), find_profile("trt-rtx").for_soc(), prefix_length=3) == []


def test_tensorrt_wants_blocks_of_4_bit_weights(shipped: Callable[..., Model]) -> None:
    """As ``targets/tensorrt_levels.py`` says: TensorRT for RTX takes a scale a channel."""
    model = to_channels(shipped("trt", "w4a16", None))
    assert {found.rule for found in lint_model(model, find_profile("trt").for_soc())} == {"weight-granularity"}
    assert lint_model(model, find_profile("trt-rtx").for_soc()) == []


def to_channels(model: Model) -> Model:
    """Blocks of weights become channels."""
    scales = {n.input[1] for n in model.graph.node if any(a.name == "block_size" for a in n.attribute)}
    for tensor in model.graph.initializer:
        if tensor.name in scales:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[0].copy(), tensor.name))
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[1] in scales:
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("axis", 1))
    return model


@pytest.mark.parametrize(
    ("precision", "kv"), [("w4a4", 8), ("w4a8", 8), ("w8a8", 8), ("w4a16", 8), ("w4a16", 16), ("w4a8", 4)]
)
def test_no_false_alarm_on_static_graphs(
    precision: str, kv: int, shipped: Callable[..., Model], tmp_path: Path
) -> None:
    model = shipped("ort", precision, Form.QDQ, kv, "offline")
    form = StaticForm(prefill_len=8, cache_len=16)
    windows = np.random.default_rng(0).integers(3, 300, (2, 16))
    graphs = static_graphs(model, form, observe_ranges(model, tensors_to_observe(model), windows))
    save_static(graphs, tmp_path)
    four_bits = precision == "w4a4" or kv == 4
    names = ["qnn-htp"] if four_bits else ["qnn-htp", "static"]
    for profile in (find_profile(name).for_soc() for name in names):
        for path in tmp_path.glob("*.onnx"):
            findings = lint_file(path, profile, prefix_length=3)
            assert findings == [], str(findings[0])
    assert len(list(tmp_path.glob("*.onnx"))) == 2


def test_no_false_alarm_on_graphs_for_rknn(shipped: Callable[..., Model]) -> None:
    model = shipped("ort", "w8a8", Form.QDQ, 8, "offline")
    windows = np.random.default_rng(0).integers(3, 300, (2, 16))
    ranges = observe_ranges(model, rknn_form.tensors_to_observe(model), windows)
    for name, graph in rknn_form.rknn_graphs(model, 8, 16, ranges).models.items():
        assert lint_model(graph, find_profile("rknn").for_soc(), name=name, prefix_length=3) == []


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_false_alarm_on_what_openvino_reads(precision: str, shipped: Callable[..., Model]) -> None:
    profile = find_profile("openvino").for_soc()
    assert lint_model(shipped("openvino", precision, Form.QDQ), profile, prefix_length=3) == []
    if precision != "w4a16":  # whose linears onnxruntime has no operator of its own for
        findings = lint_model(shipped("ort", precision, Form.INTEGER), profile, prefix_length=3)
        assert {found.rule for found in findings} == {"domain"}


BUNDLE: dict[str, Any] = {"format": "pq-export/bundle", "schema_version": 1, "target": "ort", "form": "qdq"}
BUNDLE |= {"precision": "W8A8KV8", "kv_cache": {}, "source": {}}


def test_a_bundle_of_linears_is_read_as_one(shipped: Callable[..., Model], tmp_path: Path) -> None:
    onnx.save(shipped("ort", "w8a8", Form.QDQ, 8, "offline"), tmp_path / "model.onnx")
    record = {"bytes": (tmp_path / "model.onnx").stat().st_size, "sha256": ""}
    config: dict[str, Any] = BUNDLE | {"files": {"model.onnx": record}}
    config |= {"prefix": {"length": 3}, "ethos_u": {"not_lowered": ["attention"]}}
    (tmp_path / "pq_config.json").write_text(json.dumps(config))
    assert lint_bundle(tmp_path, find_profile("ethos-u").for_soc()) == []
    assert lint_bundle(tmp_path, find_profile("qnn-htp").for_soc())
    # A profile may be called as any key of the configuration.
    assert lint_bundle(tmp_path, replace(find_profile("ethos-u").for_soc(), name="schema-version"))


def test_linears_that_are_lowered_alone(shipped: Callable[..., Model]) -> None:
    """Ethos-U takes the linears of a portable graph; what is around them is the host's."""
    profile = find_profile("ethos-u").for_soc()
    for precision in ("w8a8", "w4a8"):
        model = shipped("ort", precision, Form.QDQ, 8, "offline")
        assert lint_model(model, profile, linears_only=True) == []
        assert lint_model(model, profile)
    model = shipped("ort", "w4a4", Form.QDQ, 8, "offline")
    found = lint_model(model, profile, linears_only=True)
    assert {f.rule for f in found} == {"type-pair"} and len(found) == 14


def test_a_portable_graph_is_refused_by_a_static_target(shipped: Callable[..., Model]) -> None:
    model = shipped("ort", "w4a8", Form.QDQ)
    rules = {found.rule for found in lint_model(model, find_profile("qnn-htp").for_soc(), prefix_length=3)}
    assert {"symbolic-dimension", "type-pair", "linear-unit", "activation-granularity", "float-tensor"} <= rules
    assert {"symbolic-dimension", "io-type", "operator"} <= rules


@pytest.fixture
def pq(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(monkeypatch, capsys)


def test_check_says_yes_and_no(pq: Runner, tmp_path: Path) -> None:
    model = static_graph()
    onnx.save(model, tmp_path / "good.onnx")
    result = pq("check", tmp_path / "good.onnx", "--target", "qnn-htp", "--soc", "sm8750")
    assert result.code == 0 and "sm8750" in result.out
    set_constant(model, f"{K_PROJ}.scale", np.full(WIDTH, 0.0))
    onnx.save(model, tmp_path / "bad.onnx")
    result = pq("check", tmp_path / "bad.onnx", "--target", "qnn-htp")
    assert result.code == 1
    for text in ("scale-value", f"{K_PROJ}/weight", "cure:", "1 findings"):
        assert text in result.out
    result = pq("check", tmp_path / "bad.onnx", "--target", "qnn-htp", "--json")
    document = json.loads(result.out)
    assert result.code == 1 and document["soc"] == "sm8650"
    assert [(f["rule"], f["layer"]) for f in document["findings"]] == [("scale-value", 0)]


def test_check_refuses_what_it_cannot_read(pq: Runner, tmp_path: Path) -> None:
    pq.refuses("check", tmp_path, "--target", "ort", says=("pq_config.json",))
    pq.refuses("check", tmp_path, "--target", "nowhere", code=2, says=("nowhere", "qnn-htp"))
    onnx.save(static_graph(), tmp_path / "m.onnx")
    pq.refuses("check", tmp_path / "m.onnx", "--target", "qnn-htp", "--soc", "sm1", code=2, says=("sm1", "sm8650"))
    pq.refuses("check", tmp_path / "m.onnx", "--target", tmp_path / "no.toml", code=2, says=("no.toml",))
    pq.refuses("check", tmp_path / "none.onnx", "--target", "ort", says=("none.onnx: No such file",))


def test_graphs_of_fixed_shapes_are_those_that_a_static_target_is_about(tmp_path: Path) -> None:
    """``model.onnx`` beside them is for onnxruntime, and only that profile looks at it."""
    (tmp_path / "static").mkdir()
    onnx.save(static_graph(), tmp_path / "static" / "decode.onnx")
    bad = static_graph()
    dimension("input_ids", 1, "sequence")(bad)
    onnx.save(bad, tmp_path / "model.onnx")
    files = {
        name: {"bytes": (tmp_path / name).stat().st_size, "sha256": ""} for name in ("model.onnx", "static/decode.onnx")
    }
    config = BUNDLE | {"files": files, "prefix": {"length": PREFIX}}
    (tmp_path / "pq_config.json").write_text(json.dumps(config))
    profile = find_profile("qnn-htp").for_soc()
    assert {found.rule for found in lint_bundle(tmp_path, profile)} == {"symbolic-dimension"}
    config["static"] = {"graphs": {"decode": "static/decode.onnx"}}
    (tmp_path / "pq_config.json").write_text(json.dumps(config))
    assert lint_bundle(tmp_path, profile) == []
    assert lint_bundle(tmp_path, find_profile("ort")) == []
