"""Linears as TOSA graphs: the integers of Arm's reference model and of model.onnx, and files that Vela compiled."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from pq_export.build import build
from pq_export.calib.checkpoint import load_checkpoint
from pq_export.calib.pipeline import calibrate
from pq_export.calibration import Calibration, input_site
from pq_export.errors import PqExportError, UsageError
from pq_export.plan import Plan
from pq_export.precision import Precision
from pq_export.quantizer import pack_int4
from pq_export.rewrite.edit import Int4Constant, pack_int4_initializers
from pq_export.rewrite.linears import linear_constants
from pq_export.rewrite.qlinear import Form, insert_qlinear, lower_qlinears
from pq_export.stages import Stages
from pq_export.targets import ethos_u, tosa_reference, tosa_tools, vela
from pq_export.targets.base import TargetOptions
from pq_export.targets.ethos_u import ETHOS_U, check_exact
from pq_export.targets.tosa_linears import (
    LoweredLinear,
    StaticLinear,
    find_linears,
    floating_linears,
    lower_linear,
    not_lowered,
    rescale_by,
    tosa_graph,
)
from pq_export.targets.tosa_reference import count_differences, run_reference
from pq_export.targets.tosa_tools import find_tools
from pq_export.targets.vela import compile_tosa

PACKAGES = ("ethosu", "tosa_serializer", "tosa_reference_model")
with_packages = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in PACKAGES), reason=f"needs {tosa_tools.INSTALL}"
)
U85, U55 = "ethos-u85-256", "ethos-u55-128"


def linear(bits: int = 8, input_bits: int = 8, bias: bool = True, lowest: int | None = None) -> StaticLinear:
    rng = np.random.default_rng(0)
    largest, k, n = 2 ** (bits - 1), 32, 24
    return StaticLinear(
        name="layers.0.mlp.up_proj",
        output="y",
        codes=rng.integers(-largest if lowest is None else lowest, largest, (k, n)).astype(np.int8),
        weight_scale=rng.uniform(0.001, 0.1, n).astype(np.float32),
        bias=rng.normal(size=n).astype(np.float32) if bias else None,
        input_scale=0.03 if input_bits == 8 else 0.0001,
        weight_bits=bits,
        input_bits=input_bits,
    )


def write_model(path: Path, **changes: Any) -> onnx.ModelProto:
    """x -> Q -> DQ -> MatMul(int8 [8, 4]) -> Add(bias) -> Softmax."""
    tensors = {
        "w": np.arange(-16, 16, dtype=np.int8).reshape(8, 4),
        "w_scale": np.full(4, 0.01, np.float32),
        "x_scale": np.asarray(0.1, np.float32),
        "zero": np.zeros((), np.int8),
        "bias": np.ones(4, np.float32),
        **changes,
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "x_scale", "zero"], ["x_wide"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale"], ["w_wide"], axis=1),
        helper.make_node("MatMul", ["x_wide", "w_wide"], ["product"], name="layers.0.mlp.up_proj/product"),
        helper.make_node("Add", ["product", "bias"], ["sum"]),
        helper.make_node("Softmax", ["sum"], ["y"]),
    ]
    ends = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2, size]) for name, size in (("x", 8), ("y", 4)))
    constants = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    graph = helper.make_graph(nodes, "g", [next(ends)], [next(ends)], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path)
    return model


# From ONNX to integers.


def test_a_linear_is_found_with_its_bias_and_the_rest_is_listed(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.onnx")
    (found,) = find_linears(model)
    assert (found.name, found.output) == ("layers.0.mlp.up_proj", "sum")
    assert found.codes.shape == (8, 4) and found.weight_scale.tolist() == [np.float32(0.01)] * 4
    assert found.bias is not None and found.input_scale == float(np.float32(0.1))
    assert (found.weight_bits, found.input_bits) == (8, 8)
    assert not_lowered(model) == {"QuantizeLinear": 1, "Softmax": 1}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"zero": np.ones((), np.int8)}, "zero point is not 0"),
        ({"x_scale": np.asarray(np.nan, np.float32)}, "scale of its input is not positive"),
        ({"x_scale": np.ones(8, np.float32)}, "more than one scale"),
        ({"w_scale": np.array([0.1, 0.0, 0.1, 0.1], np.float32)}, "scale of its weights is not positive"),
        ({"w_scale": np.ones(8, np.float32)}, "no scale for each output channel"),
        ({"w": np.zeros((8, 4), np.int16)}, "weights are not INT4 or INT8"),
    ],
)
def test_constants_that_are_no_static_linear_are_refused(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(PqExportError, match=reason) as error:
        find_linears(write_model(tmp_path / "model.onnx", **changes))
    assert "layers.0.mlp.up_proj" in str(error.value)


def test_a_scale_that_is_computed_is_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.onnx")
    model.graph.node.insert(0, helper.make_node("ReduceMax", ["x"], ["dynamic"], keepdims=0))
    for node in model.graph.node[1:3]:
        node.input[1] = "dynamic"
    with pytest.raises(PqExportError, match="'dynamic' is no constant"):
        find_linears(model)


def test_four_bit_weights_are_read_as_signed_codes(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.onnx")
    codes = np.random.default_rng(1).integers(-8, 8, (8, 4)).astype(np.int8)
    tensor = next(t for t in model.graph.initializer if t.name == "w")
    tensor.raw_data, tensor.data_type = pack_int4(codes).tobytes(), TensorProto.INT4
    (found,) = find_linears(model)
    assert found.weight_bits == 4 and np.array_equal(found.codes, codes)


@given(st.floats(2.0**-80, 2.0**12), st.sampled_from([15, 31]))
def test_rescale_is_the_factor(factor: float, bits: int) -> None:
    rescale = rescale_by(np.array([factor]), bits)
    multiplier, shift = int(rescale.multiplier[0]), int(rescale.shift[0])
    assert 0 <= multiplier < 1 << bits and 2 <= shift <= 62
    error = abs(multiplier / 2.0**shift - factor)
    assert error <= max(factor * 2.0**-bits, 2.0**-62)


def test_a_factor_beyond_rescale_is_refused() -> None:
    with pytest.raises(PqExportError, match="RESCALE cannot express"):
        rescale_by(np.array([2.0**30]), 31)


@pytest.mark.parametrize("output_bits", [8, 16])
@pytest.mark.parametrize("bits", [4, 8])
def test_integer_output_is_the_value_rounded_once(bits: int, output_bits: int) -> None:
    static = linear(bits)
    lowered = lower_linear(static, output_bits)
    x = np.random.default_rng(2).integers(-128, 128, (50, 32)).astype(np.int8)
    exact = (x.astype(np.float64) @ static.codes) * static.accumulator_scale + static.bias
    step = float(lowered.output_scale)
    # half a step of the output, half a step of the accumulator for the bias, 31 bits of the multiplier
    allowed = 0.5 * step + 0.5 * static.accumulator_scale + np.abs(exact) * 2.0**-30 + 1e-12
    assert np.all(np.abs(lowered.integer_output(x) * step - exact) <= allowed)


def test_minus_eight_needs_eight_bits() -> None:
    static = linear(4)
    assert static.codes.min() == -8 and lower_linear(static).weight_type_bits == 8  # TOSA's INT4 ends at -7
    narrow = lower_linear(linear(4, lowest=-7))
    assert narrow.weight_type_bits == 4 and narrow.weight_bits == 4


def test_accumulators_keep_everything() -> None:
    static = linear(bias=False)
    lowered = lower_linear(static, 32)
    x = np.random.default_rng(3).integers(-128, 128, (5, 32)).astype(np.int8)
    assert np.array_equal(lowered.integer_output(x), x.astype(np.int64) @ static.codes)
    assert lowered.rescale is None and np.array_equal(lowered.output_scale, static.accumulator_scale)


def test_the_default_scale_is_reached_and_never_exceeded() -> None:
    static = linear(bias=False)
    worst = np.where(static.codes.T > 0, 127, -128).astype(np.int8)  # a token for each channel
    codes = lower_linear(static, 16).integer_output(np.concatenate([worst, -1 - worst]))
    assert 32000 < np.abs(codes.astype(np.int64)).max() <= 32767


@pytest.mark.parametrize(
    ("static", "reason", "cure"),
    [
        (linear(8, 4), "input has 4 bits", "--w4a8"),
        (dataclasses.replace(linear(), bias=np.full(24, 1e12, np.float32)), "bias of channel", "Calibrate again"),
    ],
)
def test_what_tosa_cannot_express_is_refused_with_a_cure(static: StaticLinear, reason: str, cure: str) -> None:
    with pytest.raises(PqExportError, match=reason) as error:
        lower_linear(static)
    assert error.value.where == "layers.0.mlp.up_proj" and cure in str(error.value)


def test_an_output_scale_that_overflows_rescale_is_refused() -> None:
    with pytest.raises(PqExportError, match="too small for its accumulator"):
        lower_linear(linear(), 8, output_scale=1e-8)


# In Arm's reference model.


@pytest.fixture(scope="module")
def model(calibrations: Callable[..., Calibration]) -> Callable[..., onnx.ModelProto]:
    """The linears of a tiny model in form ``qdq``, without the rest of its graph."""

    def make(name: str, family: str = "llama") -> onnx.ModelProto:
        c = calibrations(name, family=family)
        graph = gs.Graph(opset=21)
        for linear_name in c.linear_names():
            constants, site = linear_constants(c, linear_name), input_site(linear_name)
            x = gs.Variable(f"{site}.x", np.dtype(np.float32), ("tokens", len(constants.codes)))
            x = next((known for known in graph.inputs if known.name == x.name), x)
            if not x.outputs:
                graph.inputs.append(x)
            graph.outputs.append(insert_qlinear(graph, x, constants, site))
        lower_qlinears(graph, Form.QDQ)
        four_bits = {t.name for t in graph.tensors().values() if isinstance(t, Int4Constant)}
        exported = gs.export_onnx(graph.toposort())
        pack_int4_initializers(exported, four_bits)
        return exported

    return make


CASES = {"w8a8": "llama", "w4a8": "llama", "w8a8 with biases": "qwen2"}


@with_packages
@pytest.mark.parametrize("case", CASES)
def test_all_linears_of_a_model_are_bit_exact(case: str, model: Callable[..., onnx.ModelProto], tmp_path: Path) -> None:
    linears = find_linears(model(case.split()[0], CASES[case]))
    assert len(linears) == 14  # of two layers
    assert any(static.bias is not None for static in linears) == (case == "w8a8 with biases")
    assert {static.weight_bits for static in linears} == {int(case[1])}
    named = {f"{one.name} to {bits} bits": lower_linear(one, bits) for one in linears for bits in (8, 16, 32)}
    lowered = [dataclasses.replace(one, name=name) for name, one in named.items()]
    for tokens in (1, 5, 16):
        assert count_differences(lowered, tokens, failed_logs=tmp_path) == dict.fromkeys(named, 0)
    assert not list(tmp_path.iterdir())  # no log of what went well


@with_packages
def test_int4_weights_are_bit_exact(tmp_path: Path) -> None:
    lowered = [lower_linear(linear(4, lowest=-7), output_bits) for output_bits in (8, 16, 32)]
    lowered = [dataclasses.replace(one, name=f"{one.output_bits} bits") for one in lowered]
    assert {one.weight_type_bits for one in lowered} == {4}
    assert count_differences(lowered, 5, failed_logs=tmp_path) == {one.name: 0 for one in lowered}


@with_packages
def test_sixteen_bit_inputs_are_bit_exact(tmp_path: Path) -> None:
    lowered = [lower_linear(linear(bits, 16), output_bits) for bits in (4, 8) for output_bits in (8, 16)]
    samples = [np.random.default_rng(4).integers(-32768, 32768, (1, 1, 7, 32)).astype(np.int16)] * 4
    outputs = run_reference([tosa_graph(one, 7) for one in lowered], samples, failed_logs=tmp_path)
    for one, x, y in zip(lowered, samples, outputs, strict=True):
        assert np.array_equal(y.view(one.output_type).reshape(1, 1, 7, 24), one.integer_output(x))


@with_packages
@pytest.mark.parametrize("part", ["weight", "bias", "multiplier", "shift"])
def test_one_wrong_integer_shows(part: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = lower_linear(linear(), 16)
    assert right.rescale is not None
    whole = right.rescale if part in ("multiplier", "shift") else right
    values = np.array(getattr(whole, part))
    values.flat[0] += {"weight": 3, "bias": 500, "multiplier": 1 << 24, "shift": 1}[part]
    changed = dataclasses.replace(whole, **{part: values})
    other = changed if whole is right else dataclasses.replace(right, rescale=changed)
    wrong = tosa_graph(other, 9)
    monkeypatch.setattr(tosa_reference, "tosa_graph", lambda one, tokens: wrong)
    assert count_differences([right], 9, failed_logs=tmp_path)[right.name] > 0
    with pytest.raises(PqExportError, match=r"differs in .* codes from the exact integers"):
        check_exact([right], [9], failed_logs=tmp_path)


@with_packages
def test_a_graph_that_the_reference_model_refuses_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(PqExportError, match="TOSA's reference model") as error:
        run_reference([b"no flatbuffer"], [np.zeros(1, np.int8)], failed_logs=tmp_path)
    assert "\n" not in str(error.value) and (tmp_path / "tosa-reference-model.log").is_file()


# Vela.


def lowered_file(folder: Path, one: LoweredLinear, tokens: int = 4) -> Path:
    path = folder / f"{one.name}.tosa"
    path.write_bytes(tosa_graph(one, tokens))
    return path


@with_packages
@pytest.mark.parametrize(
    ("static", "output_bits", "name"),
    [
        (linear(8), 16, U85),
        (linear(8), 8, U55),
        (linear(4, lowest=-7), 16, U55),
        (linear(4, lowest=-7), 16, U85),
        (linear(4), 32, U85),
        (linear(8, 16), 16, U85),
    ],
)
def test_vela_puts_a_linear_on_the_npu(static: StaticLinear, output_bits: int, name: str, tmp_path: Path) -> None:
    tosa = lowered_file(tmp_path, lower_linear(static, output_bits))
    record = compile_tosa(tosa, tmp_path / "out.tflite", name, failed_logs=tmp_path)
    assert record.npu_operators > 0 and record.estimated_cycles > 0 and record.weight_bytes > 0
    assert record.bytes == (tmp_path / "out.tflite").stat().st_size
    assert (tmp_path / "out.tflite").read_bytes()[4:8] == b"TFL3"
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".tflite", ".tosa"]


@with_packages
def test_a_graph_without_operators_is_no_success(tmp_path: Path) -> None:
    ts = tosa_tools.tosa_module("tosa_serializer")
    builder = ts.TosaSerializer("", ts.ConstMode.EMBED, 1, 0, 0, False)
    block = builder.currRegion.currBasicBlock
    block.addTensor("x", [1, 4], ts.DType.INT8)
    block.addInput("x")
    block.addOutput("x")
    (tmp_path / "empty.tosa").write_bytes(bytes(builder.serialize()))
    with pytest.raises(PqExportError, match=r"Vela .*The log: .*out\.ethos-u85-256\.log"):
        compile_tosa(tmp_path / "empty.tosa", tmp_path / "out.tflite", U85, failed_logs=tmp_path)
    assert not (tmp_path / "out.tflite").exists() and (tmp_path / f"out.{U85}.log").is_file()


@with_packages
def test_vela_on_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.tosa").write_bytes(b"no flatbuffer at all")
    with pytest.raises(PqExportError, match="Vela") as error:
        compile_tosa(tmp_path / "x.tosa", tmp_path / "x.tflite", U85, failed_logs=tmp_path, where="layer 3")
    assert "\n" not in str(error.value) and "layer 3" in str(error.value)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})", "Vela ended by SIGSEGV"),
        ("import time; time.sleep(60)", "Vela took more than 1 s"),
        ("raise SystemExit('no memory mode')", "Vela failed: no memory mode"),
        ("import json, sys; open(json.load(open(sys.argv[1]))['result'], 'w').write('{}')", "without a result"),
    ],
)
def test_a_compiler_that_crashes_hangs_or_fails(
    code: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "worker.py").write_text(code)
    monkeypatch.setattr(vela, "WORKER", tmp_path / "worker.py")
    monkeypatch.setattr(vela, "tools_environment", lambda: dict(os.environ))
    (tmp_path / "x.tosa").write_bytes(b"")
    with pytest.raises(PqExportError, match=message) as error:
        compile_tosa(tmp_path / "x.tosa", tmp_path / "x.tflite", U85, failed_logs=tmp_path, timeout=1)
    log = tmp_path / f"x.{U85}.log"
    assert log.is_file() and str(log) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "x.tflite").exists()


def test_operators_on_the_cpu_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x_vela.tflite").write_bytes(b"")
    with pytest.raises(PqExportError, match="1 operators on the CPU and 2 on the NPU"):
        vela._record("CPU operators = 1 (33.3%)\nNPU operators = 2 (66.7%)\n", tmp_path, "x", U85)


# The target.


def options(**changes: Any) -> TargetOptions:
    return TargetOptions(linears_only=True, **changes)


def test_a_whole_model_is_refused_with_what_is_not_lowered() -> None:
    with pytest.raises(PqExportError, match=r"not lowered: embedding, RMSNorm, .*softmax.*lm_head.*--linears-only"):
        ETHOS_U.resolved(TargetOptions(), None)


@pytest.mark.parametrize(("name", "cure"), [("w4a4", "--w4a8"), ("w4a16", "--w8a8")])
def test_precisions_without_8_bit_inputs_are_refused(name: str, cure: str) -> None:
    with pytest.raises(PqExportError, match=cure):
        ETHOS_U.form_for(Precision.named(name), False, None, options())


def test_packages_that_are_missing_are_named_with_their_licence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PqExportError, match=r"ethos-u-vela is not installed.*pip install ethos-u-vela.*Apache-2\.0"):
        ETHOS_U.resolve(options(), None)


@pytest.fixture
def no_packages_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ethos_u, "find_tools", lambda: tosa_tools.Tools("5.2.0", "2026.8.0", ()))


def test_options(no_packages_needed: None) -> None:
    resolved = ETHOS_U.resolve(options(socs=("U55-128", "ethos-u55-128", "u85-256")), 512)
    assert resolved.socs == (U55, U85) and resolved.prefill_len == 64
    assert ETHOS_U.resolve(options(), None).socs == (U85,)
    with pytest.raises(UsageError, match=r"unknown Ethos-U 'ethos-u99'.*ethos-u55-32.*ethos-u85-2048"):
        ETHOS_U.resolve(options(socs=("u99",)), None)
    with pytest.raises(UsageError, match="--prefill-len 64 is longer than the model's context beside the prefix, 20"):
        ETHOS_U.resolve(options(), 20)


def test_online_rotations_are_refused() -> None:
    with pytest.raises(PqExportError, match=r"online Hadamards.*--rotate offline"):
        ETHOS_U.refuse_online_rotation(("R4",))


def test_weight_only_linears_are_named(model: Callable[..., onnx.ModelProto]) -> None:
    floating = floating_linears(model("w4a16"))
    assert len(floating) == 14 and "layers.1.mlp.down_proj" in floating and not find_linears(model("w4a16"))
    assert not floating_linears(model("w8a8"))


@with_packages
def test_a_bundle_has_every_linear(
    checkpoint_dir: Callable[[str], Path], small_plan: Callable[..., Plan], tmp_path: Path
) -> None:
    plan = small_plan("w4a8", prefix="w77 w8 w9", rotate="offline", num_layers=1)
    c = calibrate(load_checkpoint(str(checkpoint_dir("llama")), num_layers=1), plan, tmp_path / "calib", Stages())
    flags = options(socs=("u55-128",), prefill_len=1)
    bundle = build(c, tmp_path / "calib", ETHOS_U, tmp_path / "bundle", Stages(), options=flags)
    facts = bundle.config["ethos_u"]
    assert set(facts["linears"]) == set(c.linear_names()) and len(facts["linears"]) == 7
    assert facts["token_counts"] == [1] and facts["not_lowered"]["Softmax"] == 1
    for name, described in facts["linears"].items():
        (files,) = described["files"]
        assert described["weight_bits"] == 4 and described["input"]["dtype"] == "int8"
        assert described["input"]["scale"] == pytest.approx(c.input_scale(name), rel=1e-6)
        for path in (files["tosa"], files[U55]["file"]):
            assert (bundle.directory / path).stat().st_size > 0 and path in bundle.config["files"]
    assert not list(tmp_path.glob("*.log"))


@with_packages
def test_every_accelerator_and_token_count_has_its_file(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    write_model(tmp_path / "bundle" / "model.onnx")
    facts = ETHOS_U.finish(tmp_path / "bundle", {}, options(prefill_len=6, socs=(U85, U55)), Stages())["ethos_u"]
    assert facts["vela"] == find_tools().vela and facts["token_counts"] == [1, 6]
    assert [(t["accelerator"], t["tokens"]) for t in facts["totals"]] == [(U85, 1), (U85, 6), (U55, 1), (U55, 6)]
    for total in facts["totals"]:
        assert total["graphs"] == 1 and total["npu_operators"] >= 1 and total["cpu_operators"] == 0
    files = facts["linears"]["layers.0.mlp.up_proj"]["files"]
    listed = {p for f in files for p in (f["tosa"], f[U85]["file"], f[U55]["file"])}
    found = {p.relative_to(tmp_path / "bundle").as_posix() for p in (tmp_path / "bundle" / "ethos_u").rglob("*.*")}
    assert len(listed) == 6 and found == listed
    assert json.loads(json.dumps(facts)) == facts


@with_packages
def test_a_failed_compilation_keeps_its_log_outside_the_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "worker.py").write_text("raise SystemExit('out of SRAM')")
    monkeypatch.setattr(vela, "WORKER", tmp_path / "worker.py")
    (tmp_path / "bundle").mkdir()
    write_model(tmp_path / "bundle" / "model.onnx")
    with pytest.raises(PqExportError, match="Vela failed: out of SRAM"):
        ETHOS_U.finish(tmp_path / "bundle", {}, options(prefill_len=1, socs=(U85,)), Stages())
    assert (tmp_path / f"layers.0.mlp.up_proj.1.{U85}.log").is_file()
