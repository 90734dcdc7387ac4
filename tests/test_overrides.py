"""Mixed precision: linears, inputs and caches with bits of their own, from the file to the graph."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

import pq_export.runtime as runtime
import pq_export.validate.pipeline as validation
from pq_export.bundle import CONFIG_NAME, Bundle, calibration_sha256, kv_cache_facts, open_bundle
from pq_export.calibration import (
    JSON_NAME,
    SITE_OF_LINEAR,
    SITES,
    TENSORS_NAME,
    Calibration,
    input_site,
    load_calibration,
    prefix_key,
    save_calibration,
)
from pq_export.errors import IntegrityError
from pq_export.export.fp_graph import export_fp_graph
from pq_export.quantizer import pack_int4, quantize, scale_from_max
from pq_export.report.html import render
from pq_export.rewrite.lint import lint
from pq_export.rewrite.pipeline import quantized_model
from pq_export.rewrite.qlinear import DOMAIN, Form
from pq_export.runtime import OrtDecoder, decoder_of, session_options
from pq_export.simulate import KVQuantizer, QuantLinear, simulated_decoder
from pq_export.targets.base import TargetOptions
from pq_export.targets.ort import ORT
from pq_export.validate.codes import compare_blocks, compare_running
from pq_export.validate.greedy import onnx_greedy, torch_greedy
from pq_export.validate.widen import widen
from tests.cli_runner import Runner
from tests.conftest import VOCAB

Calibrations = Callable[..., Calibration]
ModelOf = Callable[[Calibration, Form], onnx.ModelProto]
IDS = torch.randint(3, VOCAB, (1, 24), generator=torch.Generator().manual_seed(7))
STEPS = {4: 15.0, 8: 255.0}  # of a scale from the largest value

# What a model at (precision, KV bits) gets.
CASES: dict[str, tuple[str, int | None, dict[str, int]]] = {
    "w4a4, a linear and its input": ("w4a4", None, {"layers.1.mlp.down_proj": 8, "layers.1.mlp.down_input": 8}),
    "w4a4, weights beside others at one site": ("w4a4", None, {"layers.0.mlp.up_proj": 8}),
    "w4a4, an input alone": ("w4a4", None, {"layers.1.self_attn.qkv_input": 8, "layers.0.self_attn.o_input": 8}),
    "w4a4, a key": ("w4a4", None, {"layers.1.self_attn.key": 8}),
    "w4a4, a cache of three kinds": ("w4a4", None, {"layers.0.self_attn.key": 8, "layers.1.self_attn.value": 16}),
    "w4a8, everything": (
        "w4a8",
        None,
        {
            "layers.0.self_attn.q_proj": 8,
            "layers.1.self_attn.o_proj": 8,
            "layers.0.mlp.gate_up_input": 4,
            "layers.0.self_attn.value": 8,
            "layers.1.self_attn.key": 8,
        },
    ),
    "w8a8, downwards": (
        "w8a8",
        None,
        {"layers.0.mlp.gate_proj": 4, "layers.1.mlp.down_input": 4, "layers.0.self_attn.key": 4},
    ),
    "w4a16, weights": ("w4a16", None, {"layers.0.mlp.down_proj": 8, "layers.1.self_attn.v_proj": 8}),
    "w4a16, weights and cache": (
        "w4a16",
        None,
        {"layers.0.mlp.down_proj": 8, "layers.0.self_attn.key": 8, "layers.1.self_attn.value": 4},
    ),
}


def overridden(c: Calibration, overrides: dict[str, int]) -> Calibration:
    """``c`` quantized again where ``overrides`` says. Weights move a little, else 4-bit values use few 8-bit codes."""
    tensors, rng = dict(c.tensors), np.random.default_rng(0)
    activation_scales, kv_scales = dict(c.activation_scales), dict(c.kv_scales)
    for name, bits in overrides.items():
        if name in c.activation_scales:
            activation_scales[name] *= STEPS[c.activation_bits(name)] / STEPS[bits]
        elif name in c.kv_sites():
            kv_scales.pop(name, None)
            if bits < 16:
                old = np.array(c.kv_scales.get(name, (8 / STEPS[8],))) * STEPS[min(c.kv_bits(name), 8)]
                heads = c.decoder.num_kv_heads if bits == 4 else 1
                kv_scales[name] = tuple(float(s) for s in np.linspace(0.8, 1.0, heads) * old.max() / STEPS[bits])
        elif name in c.linear_names():
            scale = c.tensors[f"{name}.scale"][:, None]
            codes = c.weight_codes(name)
            moved = torch.from_numpy(((codes + rng.uniform(-0.5, 0.5, codes.shape)) * scale).astype(np.float32))
            new = scale_from_max(moved.abs().amax(1), bits)
            codes = quantize(moved, new[:, None], bits).numpy().astype(np.int8)
            tensors[f"{name}.codes"] = pack_int4(codes) if bits == 4 else codes
            tensors[f"{name}.scale"] = new.numpy()
    key = prefix_key(tensors, c.prefix.token_ids, c.rotation, c.decoder)
    # In the order of the model, as calibration writes them.
    kv_scales = {site: kv_scales[site] for site in c.kv_sites() if site in kv_scales}
    return dataclasses.replace(
        c,
        tensors=tensors,
        activation_scales=activation_scales,
        kv_scales=kv_scales,
        prefix=dataclasses.replace(c.prefix, key=key),
        overrides=overrides,
    )


@pytest.fixture(params=CASES)
def mixed(request: pytest.FixtureRequest, calibrations: Calibrations) -> Calibration:
    name, kv, overrides = CASES[request.param]
    return overridden(calibrations(name, kv), overrides)


@pytest.fixture(scope="module")
def one(calibrations: Calibrations) -> Calibration:
    return overridden(calibrations("w4a4"), CASES["w4a4, a linear and its input"][2])


@pytest.fixture(scope="module")
def model_of() -> ModelOf:
    """``model_of(calibration, form)`` -> a model of its own."""
    return lambda c, form: quantized_model(export_fp_graph(c.decoder), c, form)


def bits_of(c: Calibration) -> dict[str, int]:
    return {s: c.activation_bits(s) for s in c.activation_scales} | {s: c.kv_bits(s) for s in c.kv_scales}


def is_static_and_valid(model: onnx.ModelProto) -> bool:
    onnx.checker.check_model(model, full_check=True)
    return lint(model) == []


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


# --- the contract ----------------------------------------------------------------------------------


def test_bits_are_those_of_the_override_or_of_the_model(mixed: Calibration) -> None:
    c, p = mixed, mixed.precision
    named = {
        **{n: (c.weight_bits(n), p.weight_bits) for n in c.linear_names()},
        **{n: (c.activation_bits(n), p.activation_bits) for n in c.activation_sites()},
        **{n: (c.kv_bits(n), p.kv_bits) for n in c.kv_sites()},
    }
    assert len(named) == 2 * (7 + 4 + 2)
    assert {name for name, (bits, model) in named.items() if bits != model} == set(c.overrides)
    assert all(named[name][0] == bits for name, bits in c.overrides.items())


def test_every_linear_reads_the_site_of_its_layer() -> None:
    found = [input_site(f"layers.11.{linear}") for linear in SITE_OF_LINEAR]
    assert found == [f"layers.11.{site}" for site in SITE_OF_LINEAR.values()]
    assert set(SITE_OF_LINEAR.values()) == set(SITES)


def test_round_trip(mixed: Calibration, tmp_path: Path) -> None:
    save_calibration(mixed, tmp_path)
    loaded = load_calibration(tmp_path)
    assert loaded.overrides == mixed.overrides and list(loaded.overrides) == list(mixed.overrides)
    for linear in mixed.linear_names():
        codes, stored = loaded.weight_codes(linear), mixed.tensors[f"{linear}.codes"]
        bits = mixed.weight_bits(linear)
        assert codes.dtype == np.int8 and codes.shape == mixed.linear_shape(linear)
        assert (codes == mixed.weight_codes(linear)).all() and np.abs(codes.astype(int)).max() > 2 ** (bits - 1) // 2
        assert (loaded.store_codes(linear, codes) == stored).all()
        assert stored.dtype == (np.uint8 if bits == 4 else np.int8)
    files = {name: (tmp_path / name).read_bytes() for name in (JSON_NAME, TENSORS_NAME)}
    again = tmp_path / "again"
    again.mkdir()
    save_calibration(loaded, again)
    assert {name: (again / name).read_bytes() for name in files} == files


def test_files_without_overrides_are_those_of_the_first_schema(calibrations: Calibrations, tmp_path: Path) -> None:
    """But for one line, and without that line they load too."""
    c = calibrations("w4a4")
    assert c.overrides == {}
    save_calibration(c, tmp_path)
    text = (tmp_path / JSON_NAME).read_text()
    assert text.count(' "overrides": {},\n') == 1
    document = json.loads(text)
    assert document["schema_version"] == 1
    (tmp_path / JSON_NAME).write_text(text.replace(' "overrides": {},\n', ""))
    loaded = load_calibration(tmp_path)
    assert loaded.overrides == {}
    save_calibration(loaded, tmp_path)
    assert (tmp_path / JSON_NAME).read_text() == text


def test_files_with_overrides_are_refused_by_readers_that_know_none(
    one: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a reader would unpack the 8-bit codes as 4-bit ones."""
    save_calibration(one, tmp_path)
    monkeypatch.setattr("pq_export.calibration.SCHEMA_VERSION", 1)
    with pytest.raises(IntegrityError, match="schema version 2; this pq-export reads up to 1"):
        load_calibration(tmp_path)


# --- refusals --------------------------------------------------------------------------------------


def refused(c: Calibration, directory: Path) -> str:
    save_calibration(c, directory)
    with pytest.raises(IntegrityError) as caught:
        load_calibration(directory)
    message = str(caught.value)
    assert "\n" not in message and str(directory) in message
    return message


UNKNOWN = [
    "layers.2.mlp.down_proj",
    "layers.0.mlp.down_proj.weight",
    "mlp.down_proj",
    "layers.0.mlp.down",
    "layers.-1.mlp.down_input",
    "layers.00.mlp.down_input",
    "layers.0.self_attn.query",
    "lm_head",
    "a\nb",
    "",
]


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_override_of_what_is_not_there(calibrations: Calibrations, tmp_path: Path, name: str) -> None:
    c = dataclasses.replace(calibrations("w4a4"), overrides={name: 8})
    assert f"overrides the bits of {name!r}, which this model does not have" in refused(c, tmp_path)


NAMES = {
    "layers.0.mlp.down_proj": "4 or 8",
    "layers.1.self_attn.qkv_input": "4 or 8",
    "layers.1.self_attn.key": "4 or 8 or 16",
}


@pytest.mark.parametrize("bits", [3, 0, -8, 32, 8.0, True, "8", None])
@pytest.mark.parametrize("name", NAMES)
def test_bits_that_nothing_can_have(calibrations: Calibrations, tmp_path: Path, name: str, bits: Any) -> None:
    message = refused(dataclasses.replace(calibrations("w4a4"), overrides={name: bits}), tmp_path)
    assert f"{name}: overrides its bits with {bits!r}; possible: {NAMES[name]}" in message


@pytest.mark.parametrize("name", list(NAMES)[:2])
def test_sixteen_bits_are_for_caches_only(calibrations: Calibrations, tmp_path: Path, name: str) -> None:
    message = refused(dataclasses.replace(calibrations("w4a4"), overrides={name: 16}), tmp_path)
    assert "overrides its bits with 16; possible: 4 or 8" in message


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_inputs_of_a_weight_only_model_stay_as_they_are(calibrations: Calibrations, tmp_path: Path, bits: int) -> None:
    c = dataclasses.replace(calibrations("w4a16"), overrides={"layers.0.mlp.down_input": bits})
    assert "layers.0.mlp.down_input: overrides its bits" in (message := refused(c, tmp_path))
    assert "possible: only those of W4A16KV16" in message


@pytest.mark.parametrize(("name", "linear", "bits"), [("w4a4", "mlp.up_proj", 8), ("w8a8", "mlp.up_proj", 4)])
def test_codes_that_are_not_those_of_the_override(
    calibrations: Calibrations, tmp_path: Path, name: str, linear: str, bits: int
) -> None:
    """Both ways round: taken for the other kind, they would be codes of the right shape and range."""
    c = dataclasses.replace(calibrations(name), overrides={f"layers.1.{linear}": bits})
    assert f"layers.1.{linear}: has weight codes that are not stored as {bits}-bit ones" in refused(c, tmp_path)


def test_codes_that_are_not_packed(calibrations: Calibrations, tmp_path: Path) -> None:
    """One to a byte: unpacked, the first half of them would fill the whole weight."""
    c, name = calibrations("w8a8"), "layers.0.mlp.up_proj"
    tensors = {**c.tensors, f"{name}.codes": c.weight_codes(name).view(np.uint8)}
    c = dataclasses.replace(c, tensors=tensors, overrides={name: 4})
    assert f"{name}: has weight codes that are not stored as 4-bit ones" in refused(c, tmp_path)


@pytest.mark.parametrize(
    ("name", "bits", "says"),
    [
        ("w4a4", 8, "layers.1.self_attn.key: has 2 KV scales; 8 bits take 1"),
        ("w8a8", 4, "layers.1.self_attn.key: has 1 KV scales; 4 bits take 2"),
        ("w4a4", 16, "layers.1.self_attn.key: lacks the scale of a quantizer, or has one too many"),
        ("w4a16", 8, "layers.1.self_attn.key: lacks the scale of a quantizer, or has one too many"),
    ],
)
def test_cache_scales_that_are_not_those_of_the_override(
    calibrations: Calibrations, tmp_path: Path, name: str, bits: int, says: str
) -> None:
    c = dataclasses.replace(calibrations(name), overrides={"layers.1.self_attn.key": bits})
    assert says in refused(c, tmp_path)


@pytest.mark.parametrize("value", [None, [["layers.0.mlp.down_proj", 8, 8]], 8, "w8"])
def test_overrides_that_are_no_mapping(one: Calibration, tmp_path: Path, value: object) -> None:
    save_calibration(one, tmp_path)
    document = json.loads((tmp_path / JSON_NAME).read_text())
    (tmp_path / JSON_NAME).write_text(json.dumps({**document, "overrides": value}))
    with pytest.raises(IntegrityError, match="incomplete or malformed"):
        load_calibration(tmp_path)


# --- the fake-quant model and the graph ------------------------------------------------------------


def test_fake_quant_modules_have_their_bits(mixed: Calibration) -> None:
    decoder = simulated_decoder(mixed)
    for name in mixed.linear_names():
        linear = decoder.get_submodule(name)
        assert isinstance(linear, QuantLinear) and linear.input_bits == mixed.activation_bits(input_site(name))
    for name in mixed.kv_sites():
        quantizer = decoder.get_submodule(f"{name}_quantizer")
        bits = mixed.kv_bits(name)
        assert isinstance(quantizer, KVQuantizer) == (bits < 16)
        if isinstance(quantizer, KVQuantizer):
            assert quantizer.bits == bits and quantizer.scale.numel() == (2 if bits == 4 else 1)


def test_an_override_changes_the_model(calibrations: Calibrations, mixed: Calibration) -> None:
    c = mixed
    plain = calibrations(str(c.precision).split("KV")[0].lower())
    positions = torch.arange(IDS.shape[1])[None]
    logits = [
        decoder(IDS, torch.ones_like(IDS), positions, decoder.empty_past(1))[0]
        for decoder in map(simulated_decoder, (c, plain))
    ]
    assert not torch.allclose(*logits, atol=1e-3)


@pytest.mark.parametrize("form", [Form.INTEGER, Form.QDQ])
def test_graph_is_the_fake_quant_model(mixed: Calibration, form: Form, model_of: ModelOf) -> None:
    """Every code of the file as it ships, on the fake-quant model's own inputs: ties alone may differ."""
    model = model_of(mixed, form)
    assert is_static_and_valid(model)
    if form is Form.INTEGER:
        ORT.lower(model, TargetOptions())
    blocks = compare_blocks(model, simulated_decoder(mixed), IDS, bits_of(mixed))
    assert set(blocks["sites"]) == set(mixed.activation_scales) | set(mixed.kv_scales)
    assert sum(c["different"] for c in blocks["sites"].values()) <= 2
    assert all(c["worst_tie_distance"] is None or c["worst_tie_distance"] < 1e-4 for c in blocks["sites"].values())
    assert min(blocks["cosine"]) > 1 - 1e-6


def test_codes_of_the_twin_are_those_of_the_fake_quant_model(mixed: Calibration, model_of: ModelOf) -> None:
    """Free running in fp64, all of them. In integers: DequantizeLinear of the qdq form makes fp32 in a twin too."""
    exact = compare_running(
        widen(model_of(mixed, Form.INTEGER)), simulated_decoder(mixed).double(), IDS, bits_of(mixed)
    )
    assert set(exact["sites"]) == set(mixed.activation_scales) | set(mixed.kv_scales)
    assert set(exact["sites"].values()) <= {1.0}
    weight_only = mixed.precision.activation_bits == 16  # whose weights are fp32 numbers in the fake-quant model
    assert exact["logits_max_error"] < (1e-4 if weight_only else 1e-9)


def test_lowering_for_onnxruntime_is_taken_back(one: Calibration, model_of: ModelOf) -> None:
    model = model_of(one, Form.INTEGER)
    ORT.lower(model, TargetOptions())
    assert sum(n.op_type == "MatMulIntegerToFloat" for n in model.graph.node) == 14
    ORT.portable(model)
    exact = compare_running(widen(model), simulated_decoder(one).double(), IDS, bits_of(one))
    assert exact["min_equal"] == 1.0


def test_decoding_through_the_mixed_cache(mixed: Calibration, model_of: ModelOf) -> None:
    """Greedy tokens of the fp64 twin, which reads the cache back from codes of each tensor's bits."""
    graph = decoder_of(widen(model_of(mixed, Form.INTEGER)), session_options(fuse=False))
    assert onnx_greedy(graph, IDS[:, :8], 12) == torch_greedy(simulated_decoder(mixed).double(), IDS[:, :8], 12)


def run(model: onnx.ModelProto, ids: np.ndarray) -> list[np.ndarray]:
    """Logits and cache of a prefill and of one token after it."""
    options = session_options(fuse=False)
    decoder = OrtDecoder(model.SerializeToString(), options)
    first, state, _ = decoder.step(ids[:, :-1], decoder.empty())
    last, after, _ = decoder.step(ids[:, -1:], state)
    return [first, last, *state.past.values(), *after.past.values()]


def test_plugin_form_equals_the_integer_form(mixed: Calibration, model_of: ModelOf) -> None:
    plugin = model_of(mixed, Form.PLUGIN)
    assert is_static_and_valid(plugin)
    nodes = {n.name: n for n in plugin.graph.node if n.domain == DOMAIN}
    assert set(nodes) == set(mixed.linear_names())
    types = {t.name: t.data_type for t in plugin.graph.initializer}
    functions = {f.overload for f in plugin.functions}
    for name, node in nodes.items():
        weight, activation = mixed.weight_bits(name), mixed.activation_bits(input_site(name))
        found = attributes(node)
        assert (found["weight_bits"], found["activation_bits"]) == (weight, activation)
        assert types[node.input[1]] == (TensorProto.INT4 if weight == 4 else TensorProto.INT8)
        assert node.overload == f"a{activation}" and node.overload in functions
    assert len(functions) == len({n.overload for n in nodes.values()})
    ours, theirs = run(plugin, IDS.numpy()), run(model_of(mixed, Form.INTEGER), IDS.numpy())
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)


def test_both_functions_are_attached_where_sites_differ(one: Calibration, model_of: ModelOf) -> None:
    assert [f.overload for f in model_of(one, Form.PLUGIN).functions] == ["a4", "a8"]


def test_codes_have_the_type_of_their_site(mixed: Calibration, model_of: ModelOf) -> None:
    """qdq: INT4 or INT8 by site. Cache: uint8, or fp32 at 16 bits, and the zero point of its bits."""
    model = model_of(mixed, Form.QDQ)
    tensors = {t.name: t for t in model.graph.initializer}
    for site in mixed.activation_scales:
        expected = TensorProto.INT4 if mixed.activation_bits(site) == 4 else TensorProto.INT8
        assert tensors[f"{site}.zero_point"].data_type == expected
    values = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}
    for site in mixed.kv_sites():
        _, layer, _, kind = site.split(".")
        bits = mixed.kv_bits(site)
        for end in ("past_key_values", "present"):
            assert values[f"{end}.{layer}.{kind}"] == (TensorProto.FLOAT if bits == 16 else TensorProto.UINT8)
        if bits < 16:
            zero = onnx.numpy_helper.to_array(tensors[f"{site}.zero_point"])
            assert (zero == 2 ** (bits - 1)).all() and zero.shape == ((2,) if bits == 4 else ())
        assert (f"{site}.max" in tensors) == (bits == 4) and (f"{site}.scale" in tensors) == (bits < 16)


# --- the bundle and the command line ---------------------------------------------------------------


def test_cache_facts(calibrations: Calibrations, model_of: ModelOf) -> None:
    """2 layers, 2 heads of 16: 32 values a tensor."""
    plain = calibrations("w4a4")
    heads = {"heads": 2, "head_dim": 16}
    assert kv_cache_facts(plain, model_of(plain, Form.INTEGER)) == {
        "bits": 4, "container": "uint8", "bytes_per_token": 128, "fp16_bytes_per_token": 256, **heads
    }  # fmt: skip
    mixed = overridden(plain, CASES["w4a4, a cache of three kinds"][2])
    facts = kv_cache_facts(mixed, model_of(mixed, Form.INTEGER))
    four = {"bits": 4, "container": "uint8", "zero_point": 8}
    assert facts == {
        "bits": 4,
        "container": "float32 and uint8",
        "bytes_per_token": 3 * 32 + 4 * 32,
        "fp16_bytes_per_token": 256,
        **heads,
        "tensors": {
            "past_key_values.0.key": {"bits": 8, "container": "uint8", "zero_point": 128},
            "past_key_values.0.value": four,
            "past_key_values.1.key": four,
            "past_key_values.1.value": {"bits": 16, "container": "float32", "zero_point": None},
        },
    }


@pytest.mark.parametrize(
    ("precision", "overrides", "bits"),
    [
        ("W4A4KV4", {}, 4),
        ("W4A4KV4", {"layers.1.mlp.down_input": 8, "layers.1.self_attn.key": 8}, 4),
        ("W4A4KV4", {"layers.1.mlp.down_input": 8, "layers.1.mlp.down_proj": 8}, 8),
        ("W8A8KV8", {"layers.1.mlp.down_proj": 4}, 8),
    ],
)
def test_largest_weights_of_a_bundle(precision: str, overrides: dict[str, int], bits: int) -> None:
    config = {"precision": precision, "overrides": overrides}
    assert Bundle(Path("x"), config).max_weight_bits == bits


def test_a_bundle_without_the_key_has_no_overrides() -> None:
    bundle = Bundle(Path("x"), {"precision": "W4A8KV8"})
    assert bundle.overrides == {} and bundle.max_weight_bits == 4


@pytest.fixture
def pq(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(monkeypatch, capsys)


def test_from_calibration_to_report(
    pq: Runner,
    tiny_llama_dir: Path,
    text_file: Path,
    other_text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, calib, out = tmp_path / "plain", tmp_path / "out.calib", tmp_path / "out"
    fast = ("--calib-samples", 4, "--seq-len", 32, "--calib-data", text_file)
    assert pq("calibrate", tiny_llama_dir, "--w4a4", *fast, "-o", plain).code == 0
    overrides = {
        "layers.2.mlp.down_proj": 8,
        "layers.2.mlp.down_input": 8,
        "layers.0.self_attn.key": 8,
        "layers.1.self_attn.key": 8,
    }
    assert pq("calibrate", tiny_llama_dir, "--w4a4", *fast, "-o", calib).code == 0
    save_calibration(overridden(load_calibration(plain), overrides), calib)
    assert pq("build", calib, "-o", out).code == 0

    config = json.loads((out / CONFIG_NAME).read_text())
    assert config["overrides"] == overrides and config["kv_cache"]["tensors"]["past_key_values.1.key"]["bits"] == 8
    for what in (calib, out):
        assert json.loads(pq("inspect", what, "--json").out)["overrides"] == overrides
    assert open_bundle(out).max_weight_bits == 8

    asked: list[int] = []
    real = session_options

    def spy(weight_bits: int = 8, *args: Any, **options: Any) -> Any:
        asked.append(weight_bits)
        return real(weight_bits, *args, **options)

    monkeypatch.setattr(runtime, "session_options", spy)
    monkeypatch.setattr(validation, "session_options", spy)
    result = pq("validate", out, "--text", other_text_file, "--windows", 2, "--window", 64, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["exact"]["min_equal"] == 1.0 and found["exact"]["greedy_equal"] == 64
    assert pq("generate", out, "-p", "w5", "-n", 2, "--raw").code == 0
    assert asked and set(asked) == {8}
    assert json.loads((out / "report.json").read_text())["overrides"] == overrides
    assert "Mixed precision" in (out / "report.html").read_text()
    pq.refuses(
        "validate", out, "--calib", plain, "--text", other_text_file, says=("was not built from this calibration",)
    )


def test_bundle_of_other_overrides_is_refused(calibrations: Calibrations) -> None:
    """Where nothing else differs: an input's bits are in no tensor."""
    c = calibrations("w4a4")
    config = {
        "source": dataclasses.asdict(c.source),
        "prefix": {"key": c.prefix.key},
        "precision": str(c.precision),
        "overrides": {},
    }
    validation.check_belongs(Bundle(Path("x"), config), c)
    other = dataclasses.replace(c, overrides={"layers.0.mlp.down_input": 8})
    with pytest.raises(IntegrityError, match="not built from this calibration"):
        validation.check_belongs(Bundle(Path("x"), config), other)


@pytest.mark.parametrize("part", ["prefix KV", "activation scale", "KV scale"])
def test_bundle_of_a_calibration_that_differs_in_one_number_is_refused(
    calibrations: Calibrations, tmp_path: Path, part: str
) -> None:
    """Prefix KV and scales are not in the prefix's key; bundles of before this check have no other one."""
    c = calibrations("w4a4")
    config = {
        "source": dataclasses.asdict(c.source),
        "prefix": {"key": c.prefix.key},
        "precision": str(c.precision),
        "overrides": {},
        "calibration_sha256": calibration_sha256(c),
    }
    if part == "prefix KV":
        tensors = {**c.tensors, "layers.1.prefix.value": c.tensors["layers.1.prefix.value"] + np.float16(0.5)}
        other = dataclasses.replace(c, tensors=tensors)
    elif part == "activation scale":
        scales = {**c.activation_scales, "layers.1.mlp.down_input": 2 * c.activation_scales["layers.1.mlp.down_input"]}
        other = dataclasses.replace(c, activation_scales=scales)
    else:
        first, *rest = c.kv_scales["layers.0.self_attn.key"]
        kv_scales = {**c.kv_scales, "layers.0.self_attn.key": (2 * first, *rest)}
        other = dataclasses.replace(c, kv_scales=kv_scales)
    save_calibration(c, tmp_path)
    validation.check_belongs(Bundle(Path("x"), config), load_calibration(tmp_path))
    with pytest.raises(IntegrityError, match="not built from this calibration"):
        validation.check_belongs(Bundle(Path("x"), config), other)
    older = {name: value for name, value in config.items() if name != "calibration_sha256"}
    validation.check_belongs(Bundle(Path("x"), older), other)


def test_report_tells_what_differs() -> None:
    overrides = {f"layers.{i}.mlp.down_proj": 8 for i in (11, 1, 2)} | {
        "layers.0.self_attn.key": 8,
        "layers.3.self_attn.key": 16,
    }
    report = {"title": "m", "precision": "W4A4KV4", "overrides": overrides}
    page = render(report)
    rows = [
        '<td class="name">self_attn.key</td><td>8</td><td>1</td><td class="name">0</td>',
        '<td class="name">self_attn.key</td><td>16</td><td>1</td><td class="name">3</td>',
        '<td class="name">mlp.down_proj</td><td>8</td><td>3</td><td class="name">1, 2, 11</td>',
    ]
    places = [page.index(row) for row in rows]
    assert places == sorted(places)
    assert "W4A4KV4, mixed" in page
    plain = render({**report, "overrides": {}})
    assert plain == render({"title": "m", "precision": "W4A4KV4"}) and "Mixed precision" not in plain
    cache = {"bits": 4, "bytes_per_token": 1, "fp16_bytes_per_token": 2}
    assert "KV cache at 4 bits:" in render({"title": "m", "kv_cache": cache})
    assert "KV cache at 4 bits, some tensors at others:" in render(
        {"title": "m", "kv_cache": {**cache, "tensors": {"x": {}}}}
    )
