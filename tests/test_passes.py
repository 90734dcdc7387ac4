"""Every pass on one exported graph, run by onnxruntime and compared with torch or with integer arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
import transformers
from onnx import TensorProto, helper, numpy_helper

from pq_export.calib.checkpoint import Checkpoint, load_checkpoint
from pq_export.calib.pipeline import calibrate
from pq_export.calibration import Calibration, Source
from pq_export.decoder import Decoder, DecoderConfig, KVPair
from pq_export.export.fp_graph import FPGraph, export_fp_graph
from pq_export.hadamard import hadamard_factors
from pq_export.plan import Plan
from pq_export.quantizer import code_range
from pq_export.rewrite.edit import module_output, single_node
from pq_export.rewrite.hadamards import insert_online_hadamards
from pq_export.rewrite.kv_cache import quantize_kv_cache
from pq_export.rewrite.last_logits import NUM_LOGITS, keep_last_logits
from pq_export.rewrite.linears import linear_constants, quantize_linears
from pq_export.rewrite.lint import lint
from pq_export.rewrite.pipeline import finish, float_model, quantized_model
from pq_export.rewrite.prefix import bake_prefix
from pq_export.rewrite.qlinear import DOMAIN, OP, Form
from pq_export.rewrite.reshapes import make_reshapes_constant
from pq_export.rewrite.streams import block_output, name_streams
from pq_export.rewrite.weights import bind_float_parameters
from pq_export.simulate import KVQuantizer, insert_online_rotations, simulated_decoder
from pq_export.stages import Stages
from tests.conftest import VOCAB, word_tokenizer
from tests.graph_runs import Arrays, check, close, initializer, near, run, session

LAYERS, KV_HEADS = 2, 2

# Every option that the tiny Llama lacks, and an intermediate size without a Paley factor.
RICH = DecoderConfig(
    model_type="rich",
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=92,
    num_layers=LAYERS,
    num_heads=4,
    num_kv_heads=KV_HEADS,
    head_dim=24,
    rms_norm_eps=1e-6,
    max_position_embeddings=512,
    inv_freq=tuple(float(f) for f in 5000.0 ** (-np.arange(12) / 12)),
    rope_scaling=1.1,
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
    qk_norm=True,
)


def rich_decoder() -> Decoder:
    decoder, generator = Decoder(RICH), torch.Generator().manual_seed(0)
    for name, parameter in decoder.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        size = 1.0 if "embed" in name else 0.3 if name.endswith("bias") else 0.15
        parameter.data = 1 + 0.25 * noise if "norm" in name else size * noise
    return decoder.eval().requires_grad_(False)


@pytest.fixture(params=["llama", "rich"])
def decoder(request: pytest.FixtureRequest, checkpoint_dir: Callable[[str], Path]) -> Decoder:
    """A fresh floating-point decoder."""
    return rich_decoder() if request.param == "rich" else load_checkpoint(str(checkpoint_dir("llama"))).decoder


@pytest.fixture(scope="module")
def fresh() -> Callable[[DecoderConfig], FPGraph]:
    """``fresh(config)`` -> its exported graph, unaltered."""
    return export_fp_graph


Fresh = Callable[[DecoderConfig], FPGraph]


@pytest.fixture(scope="module")
def calibrated(
    calibrations: Callable[..., Calibration],
    small_plan: Callable[..., Plan],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Calibration]:
    """``calibrated("rich", "w4a4")`` or ``calibrated("llama", "w8a8", kv=4)``."""
    made: dict[object, Calibration] = {}

    def make(which: str, name: str, kv: int | None = None, **changes: object) -> Calibration:
        if which == "llama":
            return calibrations(name, kv, **changes)
        key = (name, kv, tuple(sorted(changes.items())))
        if key not in made:
            checkpoint = Checkpoint(
                rich_decoder(),
                word_tokenizer(),
                transformers.LlamaConfig(),
                transformers.GenerationConfig(),
                Source("rich", "none", "RichForCausalLM", "00"),
            )
            plan = small_plan(name, kv, **{"prefix": "w77 w8 w9", **changes})
            made[key] = calibrate(checkpoint, plan, tmp_path_factory.mktemp("rich") / "out", Stages())
        return made[key]

    return make


Calibrated = Callable[..., Calibration]

# --- running a graph -------------------------------------------------------------------------------

SCENARIOS = ("prefill", "with past", "padded", "one token", "padded with past")


def inputs(config: DecoderConfig, scenario: str, kv_bits: int = 16, seed: int = 0) -> Arrays:
    """Batch 2. Past values are arbitrary numbers, or arbitrary codes of ``kv_bits``."""
    rng = np.random.default_rng(seed)
    new = 1 if scenario == "one token" else 5
    past = 0 if scenario in ("prefill", "padded") else 3
    mask = np.ones((2, past + new), np.int64)
    if scenario.startswith("padded"):
        mask[1, :2] = 0
    feeds: Arrays = {
        "input_ids": rng.integers(3, VOCAB, (2, new)),
        "attention_mask": mask,
        "position_ids": np.maximum(mask.cumsum(1) - 1, 0)[:, past:],
    }
    shape = (2, config.num_kv_heads, past, config.head_dim)
    for layer in range(config.num_layers):
        for kind in ("key", "value"):
            values = rng.normal(size=shape).astype(np.float32)
            codes = rng.integers(0, 2 ** min(kv_bits, 8), shape).astype(np.uint8)
            feeds[f"past_key_values.{layer}.{kind}"] = values if kv_bits == 16 else codes
    return feeds


def torch_run(decoder: Decoder, feeds: Arrays, calibration: Calibration | None = None) -> Arrays:
    """The same by torch; codes in ``feeds`` are turned into numbers with the scales of ``calibration``."""
    past: list[KVPair] = []
    for layer in range(decoder.config.num_layers):
        pair = []
        for kind in ("key", "value"):
            values = feeds[f"past_key_values.{layer}.{kind}"]
            if values.dtype == np.uint8:
                assert calibration is not None
                zero = 2 ** (calibration.precision.kv_bits - 1)
                scale = np.array(calibration.kv_scales[f"layers.{layer}.self_attn.{kind}"], np.float32)
                values = (values.astype(np.float32) - zero) * scale.reshape(1, -1, 1, 1)
            pair.append(torch.from_numpy(values).to(decoder.embed_tokens.weight.dtype))
        past.append((pair[0], pair[1]))
    ids, mask, positions = (torch.from_numpy(feeds[n]) for n in ("input_ids", "attention_mask", "position_ids"))
    logits, presents = decoder(ids, mask, positions, past)
    result = {"logits": logits.numpy()}
    for layer, (key, value) in enumerate(presents):
        result |= {f"present.{layer}.key": key.numpy(), f"present.{layer}.value": value.numpy()}
    return result


def assert_close(graph: Arrays, reference: Arrays) -> None:
    assert graph.keys() == reference.keys()
    for name, values in reference.items():
        assert close(graph[name], values), name


def bound(fp: FPGraph, decoder: Decoder) -> onnx.ModelProto:
    """``fp`` with the decoder's weights in floating point, otherwise as the passes left it."""
    tensors = {name: p.numpy() for name, p in decoder.named_parameters()}
    bind_float_parameters(fp, tensors, decoder.config)
    return finish(fp.graph, decoder.config)


# --- the exported graph ----------------------------------------------------------------------------


def test_interface(fresh: Fresh, decoder: Decoder) -> None:
    model = float_model(fresh(decoder.config), decoder)
    names = [f"{i}.{kind}" for i in range(LAYERS) for kind in ("key", "value")]
    required = [i.name for i in model.graph.input if i.name != NUM_LOGITS]
    assert required == ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{n}" for n in names)]
    assert [o.name for o in model.graph.output] == ["logits", *(f"present.{n}" for n in names)]
    assert [o.version for o in model.opset_import if o.domain == ""] == [21]
    assert model.ir_version == 10


def test_scopes_name_the_modules(fresh: Fresh, decoder: Decoder) -> None:
    """What every pass relies on: one MatMul a linear, the parameters under their PyTorch names."""
    fp = fresh(decoder.config)
    names = dict(decoder.named_parameters())
    assert fp.parameters >= set(names) and {n for n in fp.parameters if n not in names} <= {"rotary.cos", "rotary.sin"}
    linears = [n for n, m in decoder.named_modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 7 * LAYERS + 1
    for name in linears:
        matmul = single_node(fp, name, "MatMul")
        weight = matmul.inputs[1]
        while weight.inputs:
            weight = weight.inputs[0].inputs[0]
        assert weight.name == f"{name}.weight"


def test_lookups_refuse_to_guess(fresh: Fresh, decoder: Decoder) -> None:
    fp = fresh(decoder.config)
    with pytest.raises(AssertionError, match="0 Conv"):
        single_node(fp, "layers.0.mlp.up_proj", "Conv")
    with pytest.raises(AssertionError, match="outputs in the exported graph"):
        module_output(fp, "layers.7")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_float_model_is_the_decoder(fresh: Fresh, decoder: Decoder, scenario: str) -> None:
    model, feeds = float_model(fresh(decoder.config), decoder), inputs(decoder.config, scenario)
    assert_close(run(model, feeds), torch_run(decoder, feeds))


def test_float_model_of_other_sizes(fresh: Fresh, decoder: Decoder) -> None:
    """Batch, sequence and past that the export never saw, on one session."""
    runner = session(float_model(fresh(decoder.config), decoder))
    for batch, new, past in ((1, 1, 0), (1, 1, 1), (3, 7, 0), (1, 2, 40), (5, 1, 5)):
        rng = np.random.default_rng(batch)
        feeds: Arrays = {
            "input_ids": rng.integers(3, VOCAB, (batch, new)),
            "attention_mask": np.ones((batch, past + new), np.int64),
            "position_ids": np.broadcast_to(np.arange(past, past + new), (batch, new)).copy(),
        }
        for name in (i.name for i in runner.get_inputs() if i.name.startswith("past")):
            feeds[name] = rng.normal(size=(batch, KV_HEADS, past, decoder.config.head_dim)).astype(np.float32)
        outputs = dict(zip([o.name for o in runner.get_outputs()], runner.run(None, feeds), strict=True))
        assert_close(outputs, torch_run(decoder, feeds))


def test_every_input_matters(fresh: Fresh, decoder: Decoder) -> None:
    runner, feeds = session(float_model(fresh(decoder.config), decoder)), inputs(decoder.config, "with past")
    logits = runner.run(["logits"], feeds)[0]
    changes = {
        "input_ids": feeds["input_ids"] + np.array([[0, 1, 0, 0, 0]]),
        "attention_mask": feeds["attention_mask"] * np.array([[1, 0, 1, 1, 1, 1, 1, 1]]),
        "position_ids": feeds["position_ids"] + np.array([[0, 0, 9, 0, 0]]),
        **{name: -values for name, values in feeds.items() if name.startswith("past")},
    }
    assert set(changes) == set(feeds)
    for name, value in changes.items():
        changed = runner.run(["logits"], {**feeds, name: value})[0]
        assert not close(changed, logits, 1e-3), name


def test_masked_past_does_not_matter(fresh: Fresh, decoder: Decoder) -> None:
    runner, feeds = session(float_model(fresh(decoder.config), decoder)), inputs(decoder.config, "padded with past")
    other = {n: v.copy() for n, v in feeds.items()}
    for name in other:
        if name.startswith("past"):
            other[name][1, :, :2] = 7.0
    assert close(runner.run(["logits"], other)[0], runner.run(["logits"], feeds)[0], 1e-6)


# --- reshapes, streams, logits ---------------------------------------------------------------------


def reshape_targets(fp: FPGraph) -> list[gs.Tensor]:
    nodes = [
        n for n in fp.graph.nodes if n.op == "Reshape" and fp.scope_of.get(n.outputs[0].name, "").startswith("layers.")
    ]
    return [n.inputs[1] for n in nodes]


def test_reshapes_have_constant_targets(fresh: Fresh, decoder: Decoder) -> None:
    before, fp = fresh(decoder.config), fresh(decoder.config)
    make_reshapes_constant(fp)
    fp.graph.cleanup(remove_unused_graph_inputs=False)
    assert len(reshape_targets(fp)) == len(reshape_targets(before)) > 0
    assert any(not isinstance(t, gs.Constant) for t in reshape_targets(before))
    assert all(isinstance(t, gs.Constant) for t in reshape_targets(fp))

    def shape_nodes(graph: FPGraph) -> list[str]:
        scoped = [n for n in graph.graph.nodes if graph.scope_of.get(n.outputs[0].name, "").startswith("layers.")]
        return [n.name for n in scoped if n.op == "Shape"]

    assert shape_nodes(fp) == []


def test_constant_reshapes_change_no_number(fresh: Fresh, decoder: Decoder) -> None:
    fp, feeds = fresh(decoder.config), inputs(decoder.config, "with past")
    make_reshapes_constant(fp)
    assert_close(run(bound(fp, decoder), feeds), torch_run(decoder, feeds))


@torch.no_grad()
def test_streams_are_named(fresh: Fresh, decoder: Decoder) -> None:
    fp, feeds = fresh(decoder.config), inputs(decoder.config, "prefill")
    name_streams(fp, decoder.config)
    seen: dict[str, np.ndarray] = {}
    for index, layer in enumerate(decoder.layers):
        layer.register_forward_hook(lambda m, a, o, i=index: seen.update({block_output(i): o[0].numpy()}))
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda m, a, i=index: seen.update({f"layers.{i}/attention_residual": a[0].numpy()})
        )
    reference = torch_run(decoder, feeds)
    outputs = run(bound(fp, decoder), feeds, list(seen))
    assert len(seen) == 2 * LAYERS
    assert_close(outputs, {**reference, **seen})


def test_keep_last_logits(fresh: Fresh, decoder: Decoder) -> None:
    fp, feeds = fresh(decoder.config), inputs(decoder.config, "with past")
    keep_last_logits(fp)
    model = bound(fp, decoder)
    check(model)
    runner, reference = session(model), torch_run(decoder, feeds)
    assert NUM_LOGITS in [i.name for i in runner.get_overridable_initializers()]
    assert NUM_LOGITS not in [i.name for i in runner.get_inputs()]  # so it need not be fed
    for count, kept in ((None, 5), (0, 5), (1, 1), (2, 2), (5, 5), (9, 5)):
        own = {} if count is None else {NUM_LOGITS: np.array([count])}
        outputs = dict(zip([o.name for o in runner.get_outputs()], runner.run(None, {**feeds, **own}), strict=True))
        assert outputs["logits"].shape == (2, kept, VOCAB)
        assert_close(outputs, {**reference, "logits": reference["logits"][:, -kept:]})


# --- weights ---------------------------------------------------------------------------------------


def test_half_precision_parameters_are_widened_where_used(fresh: Fresh, decoder: Decoder) -> None:
    tensors = {n: p.numpy() for n, p in decoder.named_parameters()}
    for name in ("embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name].astype(np.float16)
        decoder.get_submodule(name.rpartition(".")[0]).weight.data = torch.from_numpy(tensors[name]).float()
    fp, feeds = fresh(decoder.config), inputs(decoder.config, "prefill")
    bind_float_parameters(fp, tensors, decoder.config)
    model = finish(fp.graph, decoder.config)
    check(model)
    for name in ("embed_tokens.weight", "lm_head.weight"):
        stored = initializer(model, name)
        assert stored.data_type == TensorProto.FLOAT16
        assert (numpy_helper.to_array(stored) == tensors[name]).all()
    # The table itself is never cast: only gathered rows are.
    casts = [n for n in model.graph.node if n.op_type == "Cast"]
    assert not [n for n in casts if "embed_tokens.weight" in n.input]
    assert_close(run(model, feeds), torch_run(decoder, feeds))


def test_no_parameter_is_left_dangling(fresh: Fresh, decoder: Decoder) -> None:
    model = bound(fresh(decoder.config), decoder)
    known = {t.name for t in model.graph.initializer} | {i.name for i in model.graph.input}
    known |= {o for n in model.graph.node for o in n.output}
    assert all(name in known for n in model.graph.node for name in n.input if name)
    assert not {i.name for i in model.graph.input} & set(dict(decoder.named_parameters()))


# --- online Hadamards ------------------------------------------------------------------------------


@pytest.mark.parametrize("online", [("R3",), ("R4",), ("R3", "R4")])
def test_online_hadamards(fresh: Fresh, decoder: Decoder, online: tuple[str, ...]) -> None:
    """Weights are left alone, so R4 changes the function and R3 the cached keys."""
    fp, feeds = fresh(decoder.config), inputs(decoder.config, "with past")
    plain = torch_run(decoder, feeds)
    insert_online_hadamards(fp, decoder.config, online)
    model = bound(fp, decoder)
    check(model)
    insert_online_rotations(decoder, online)
    outputs = run(model, feeds)
    assert_close(outputs, torch_run(decoder, feeds))
    assert close(outputs["present.0.key"], plain["present.0.key"], 1e-3) != ("R3" in online)
    assert not close(outputs["logits"], plain["logits"], 1e-3)  # past keys are not rotated: R3 shows too


def test_hadamard_constants_are_factored(fresh: Fresh, decoder: Decoder) -> None:
    fp, c = fresh(decoder.config), decoder.config
    insert_online_hadamards(fp, c, ("R3", "R4"))
    model = bound(fp, decoder)
    factors = hadamard_factors(c.intermediate_size)
    assert (factors.left_order, factors.construction) == {96: (12, "paley"), 92: (23, "block")}[c.intermediate_size]
    right = numpy_helper.to_array(initializer(model, "rotation.R4.right"))
    assert right.shape == (factors.right_order, factors.right_order)
    assert (right == factors.right().astype(np.float32)).all()
    assert numpy_helper.to_array(initializer(model, "rotation.R4.left")).shape == (
        factors.left_order,
        factors.left_order,
    )
    dense = numpy_helper.to_array(initializer(model, "rotation.R3"))
    assert (dense == hadamard_factors(c.head_dim).matrix().astype(np.float32)).all()


# --- the quantized graph ---------------------------------------------------------------------------

WHICH = ["llama", "rich"]
PRECISIONS: list[tuple[str, int | None]] = [("w4a4", None), ("w4a8", 8), ("w8a8", None), ("w4a16", None), ("w4a16", 4)]


def test_quantize_linears(fresh: Fresh, calibrated: Calibrated) -> None:
    for which in WHICH:
        c = calibrated(which, "w4a4")
        fp = fresh(c.decoder)
        quantize_linears(fp, c)
        fp.graph.cleanup(remove_unused_graph_inputs=False)
        nodes = [n for n in fp.graph.nodes if n.op == OP and n.domain == DOMAIN]
        assert [n.name for n in nodes] == c.linear_names()
        weights = {f"{name}.weight" for name in c.linear_names()} | {f"{name}.bias" for name in c.linear_names()}
        assert not [t for t in fp.graph.inputs if t.name in weights and t.outputs]
        assert not [n for n in fp.graph.nodes if n.op == "MatMul" and any(t.name in weights for t in n.inputs)]
        # attention's two a layer, and lm_head
        assert len([n for n in fp.graph.nodes if n.op == "MatMul"]) == 2 * LAYERS + 1
        for node, name in zip(nodes, c.linear_names(), strict=True):
            constant = linear_constants(c, name)
            assert (node.inputs[1].values == c.weight_codes(name).T).all()
            assert node.inputs[3].values == np.float32(c.input_scale(name))
            assert (constant.bias is not None) == (which == "rich") == (len(node.inputs) == 5)


@pytest.fixture(scope="module")
def finished(fresh: Fresh, calibrated: Calibrated) -> Callable[..., tuple[Calibration, onnx.ModelProto]]:
    """``finished("llama", Form.QDQ, "w4a4")`` -> calibration and finished model, made once."""
    made: dict[object, tuple[Calibration, onnx.ModelProto]] = {}

    def make(
        which: str, form: Form, name: str, kv: int | None = None, **changes: Any
    ) -> tuple[Calibration, onnx.ModelProto]:
        key = (which, form, name, kv, tuple(sorted(changes.items())))
        if key not in made:
            c = calibrated(which, name, kv, **changes)
            made[key] = c, quantized_model(fresh(c.decoder), c, form)
        return made[key]

    return make


Finished = Callable[..., tuple[Calibration, onnx.ModelProto]]


@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize(("name", "kv"), PRECISIONS)
@pytest.mark.parametrize("which", WHICH)
def test_finished_models_are_valid_and_static(
    finished: Finished, which: str, name: str, kv: int | None, form: Form
) -> None:
    c, model = finished(which, form, name, kv)
    check(model)
    assert lint(model) == []
    kept = [n for n in model.graph.node if n.domain == DOMAIN]
    assert len(kept) == (7 * LAYERS if form is Form.PLUGIN else 0)
    dtype = TensorProto.FLOAT if c.precision.kv_bits == 16 else TensorProto.UINT8
    for value in (*model.graph.input, *model.graph.output):
        if value.name.startswith(("past", "present")):
            assert value.type.tensor_type.elem_type == dtype


@pytest.mark.parametrize("scenario", ["prefill", "padded with past"])
@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize(("name", "kv"), PRECISIONS)
@pytest.mark.parametrize("which", WHICH)
def test_quantized_graph_is_the_simulated_decoder(
    finished: Finished, which: str, name: str, kv: int | None, form: Form, scenario: str
) -> None:
    c, model = finished(which, form, name, kv)
    feeds = inputs(c.decoder, scenario, c.precision.kv_bits)
    reference = torch_run(simulated_decoder(c), feeds, c)
    outputs = run(model, feeds)
    assert near(outputs["logits"], reference["logits"])
    for layer in range(LAYERS):
        for kind in ("key", "value"):
            ours, theirs = outputs[f"present.{layer}.{kind}"], reference[f"present.{layer}.{kind}"]
            if c.precision.kv_bits == 16:
                assert near(ours, theirs)
                continue
            scale = np.array(c.kv_scales[f"layers.{layer}.self_attn.{kind}"], np.float32).reshape(1, -1, 1, 1)
            codes = np.rint(theirs / scale).astype(int) + 2 ** (c.precision.kv_bits - 1)
            difference = np.abs(ours.astype(int) - codes)
            assert ours.dtype == np.uint8 and ours.max() < 2**c.precision.kv_bits
            assert difference.max() <= 1 and (difference != 0).mean() < 0.01
    floating = torch_run(simulated_decoder(c), {**feeds, "input_ids": feeds["input_ids"][:, ::-1].copy()}, c)
    assert not near(floating["logits"], reference["logits"])  # the comparison can tell models apart


@pytest.mark.parametrize(("name", "kv"), [("w4a4", None), ("w4a8", None), ("w8a8", None), ("w8a8", 4)])
@pytest.mark.parametrize("which", WHICH)
def test_integer_form_is_exact_inside(finished: Finished, which: str, name: str, kv: int | None) -> None:
    """Each quantizer and each product in the running graph, on the numbers that it really reads."""
    c, model = finished(which, Form.INTEGER, name, kv)
    quantizers = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    products = [n for n in model.graph.node if n.op_type == "MatMulInteger"]
    assert len(quantizers) == (4 + 2) * LAYERS and len(products) == 7 * LAYERS
    clamped = {n.input[0]: n.output[0] for n in model.graph.node if n.op_type == "Min"}
    codes_of = {n.output[0]: clamped.get(n.output[0], n.output[0]) for n in quantizers}
    extra = {*codes_of.values(), *(n.input[0] for n in quantizers), *(n.output[0] for n in products)}
    outputs = run(model, inputs(c.decoder, "with past", c.precision.kv_bits), sorted(extra), plain=True)
    for node in quantizers:
        site = node.output[0].removesuffix("/codes")
        if site in c.activation_scales:
            scale, bits = np.float32(c.activation_scales[site]), c.precision.activation_bits
        else:
            scale, bits = np.array(c.kv_scales[site], np.float32).reshape(1, -1, 1, 1), c.precision.kv_bits
        low, high = code_range(bits)
        expected = np.clip(np.rint(outputs[node.input[0]] / scale), low, high) - low
        codes = outputs[codes_of[node.output[0]]]
        assert codes.dtype == np.uint8 and (codes == expected).all(), site
        assert len(np.unique(codes)) > 4
    zero = 2 ** (c.precision.activation_bits - 1)
    for node in products:
        linear = node.name.removesuffix("/accumulator")
        expected = (outputs[node.input[0]].astype(np.int64) - zero) @ c.weight_codes(linear).T.astype(np.int64)
        assert outputs[node.output[0]].dtype == np.int32 and (outputs[node.output[0]] == expected).all(), linear


@pytest.mark.parametrize(("name", "kv"), [("w4a4", None), ("w4a8", 8), ("w8a8", None)])
@pytest.mark.parametrize("which", WHICH)
def test_plugin_form_runs_and_equals_the_integer_form(
    finished: Finished, which: str, name: str, kv: int | None
) -> None:
    c, integer = finished(which, Form.INTEGER, name, kv)
    _, plugin = finished(which, Form.PLUGIN, name, kv)
    assert {f.name for f in plugin.functions} == {OP} and not integer.functions
    for scenario in ("prefill", "with past"):
        feeds = inputs(c.decoder, scenario, c.precision.kv_bits)
        ours, theirs = run(plugin, feeds, plain=True), run(integer, feeds, plain=True)
        assert all(np.array_equal(ours[n], theirs[n]) for n in theirs)


@pytest.mark.parametrize(("name", "kv"), [("w4a4", None), ("w8a8", None), ("w4a16", 4)])
@pytest.mark.parametrize("which", WHICH)
def test_prefill_and_decode_of_the_graph_agree(finished: Finished, which: str, name: str, kv: int | None) -> None:
    """Tokens one by one through the graph's own codes."""
    c, model = finished(which, Form.INTEGER, name, kv)
    feeds = inputs(c.decoder, "prefill", c.precision.kv_bits)
    together, runner = run(model, feeds), session(model)
    names = [o.name for o in runner.get_outputs()]
    past = {n: v for n, v in feeds.items() if n.startswith("past")}
    logits = []
    for step in range(5):
        own = {n: feeds[n][:, step : step + 1] for n in ("input_ids", "position_ids")}
        mask = {"attention_mask": feeds["attention_mask"][:, : step + 1]}
        outputs = dict(zip(names, runner.run(None, {**own, **mask, **past}), strict=True))
        past = {n: outputs[n.replace("past_key_values", "present")] for n in past}
        logits.append(outputs["logits"])
    assert near(np.concatenate(logits, 1), together["logits"])
    for name_, codes in past.items():
        difference = codes.astype(int) - together[name_.replace("past_key_values", "present")]
        assert (difference != 0).mean() < 0.01 and np.abs(difference).max() <= 1


@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize(("name", "bits"), [("w4a4", 4), ("w4a16", 4), ("w8a8", 8)])
@pytest.mark.parametrize("which", WHICH)
def test_weight_codes_in_the_file(
    finished: Finished, tmp_path: Path, which: str, name: str, bits: int, form: Form
) -> None:
    c, model = finished(which, form, name)
    onnx.save(model, tmp_path / "model.onnx")
    stored = onnx.load(tmp_path / "model.onnx")
    for linear in c.linear_names():
        tensor, expected = initializer(stored, f"{linear}.codes"), c.weight_codes(linear).T
        assert tensor.data_type == (TensorProto.INT4 if bits == 4 else TensorProto.INT8)
        assert len(tensor.raw_data) == expected.size * bits // 8
        assert (numpy_helper.to_array(tensor).astype(np.int8) == expected).all()
        combined = form is Form.INTEGER and c.precision.activation_bits < 16
        scale = initializer(stored, f"{linear}.combined_scale" if combined else f"{linear}.scale")
        factor = np.float32(c.input_scale(linear) if combined else 1)
        assert (numpy_helper.to_array(scale) == factor * c.tensors[f"{linear}.scale"]).all()


@pytest.mark.parametrize("form", Form)
def test_bytes_are_reproducible(fresh: Fresh, calibrated: Calibrated, form: Form) -> None:
    c = calibrated("llama", "w4a4")
    one, two = (quantized_model(fresh(c.decoder), c, form).SerializeToString(deterministic=True) for _ in range(2))
    assert one == two


def test_passes_are_announced(fresh: Fresh, calibrated: Calibrated) -> None:
    c, names = calibrated("llama", "w4a4"), []
    quantized_model(fresh(c.decoder), c, Form.QDQ, names.append)
    assert len(names) == len(set(names)) >= 8 and "write linears as qdq" in names


# --- cache and prefix on the floating-point graph ----------------------------------------------------


@pytest.mark.parametrize("kv", [4, 8])
@pytest.mark.parametrize("scenario", ["prefill", "with past", "padded with past"])
def test_kv_cache_pass_alone(fresh: Fresh, decoder: Decoder, calibrated: Calibrated, kv: int, scenario: str) -> None:
    """Only the cache is quantized: the codes are those of the numbers in front of the quantizer, with ==."""
    c = calibrated("rich" if decoder.config is RICH else "llama", "w8a8", kv, rotate="none")
    fp, feeds = fresh(decoder.config), inputs(decoder.config, scenario, kv)
    quantize_kv_cache(fp, c)
    model = bound(fp, decoder)
    check(model)
    quantizers = {n.output[0].removesuffix("/codes"): n for n in model.graph.node if n.op_type == "QuantizeLinear"}
    assert set(quantizers) == set(c.kv_scales) and len(quantizers) == 2 * LAYERS
    outputs = run(model, feeds, [n.input[0] for n in quantizers.values()], plain=True)
    low, high = code_range(kv)
    for site, node in quantizers.items():
        _, layer, _, kind = site.split(".")
        scale = np.array(c.kv_scales[site], np.float32).reshape(1, -1, 1, 1)
        assert scale.size == (KV_HEADS if kv == 4 else 1)
        codes = np.clip(np.rint(outputs[node.input[0]] / scale), low, high).astype(int) - low
        past = feeds[f"past_key_values.{layer}.{kind}"]
        present = outputs[f"present.{layer}.{kind}"]
        assert present.dtype == np.uint8
        assert (present == np.concatenate([past, codes], 2)).all()

    for index, block in enumerate(decoder.layers):
        for kind in ("key", "value"):
            scales = c.kv_scales[f"layers.{index}.self_attn.{kind}"]
            setattr(block.self_attn, f"{kind}_quantizer", KVQuantizer(scales, kv))
    assert near(outputs["logits"], torch_run(decoder, feeds, c)["logits"])


def test_nothing_to_quantize_at_sixteen_bits(fresh: Fresh, calibrated: Calibrated) -> None:
    c = calibrated("llama", "w4a16", rotate="none", prefix="none")
    fp = fresh(c.decoder)
    before = [n.name for n in fp.graph.nodes]
    quantize_kv_cache(fp, c)
    bake_prefix(fp, c)
    insert_online_hadamards(fp, c.decoder, c.rotation.online)
    assert [n.name for n in fp.graph.nodes] == before


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_bake_prefix_alone(fresh: Fresh, decoder: Decoder, calibrated: Calibrated, scenario: str) -> None:
    """Against torch, and against the graph without prefix that gets the same keys and values as its past."""
    c = calibrated("rich" if decoder.config is RICH else "llama", "w4a16", rotate="none")
    prefix, length = c.prefix_kv(), len(c.prefix.token_ids)
    assert prefix is not None and length == 3
    fp, feeds = fresh(decoder.config), inputs(decoder.config, scenario)
    bake_prefix(fp, c)
    model = bound(fp, decoder)
    check(model)
    outputs = run(model, feeds)

    in_front = dict(feeds)
    in_front["position_ids"] = feeds["position_ids"] + length
    in_front["attention_mask"] = np.concatenate([np.ones((2, length), np.int64), feeds["attention_mask"]], 1)
    for layer, pair in enumerate(prefix):
        for kind, values in zip(("key", "value"), pair, strict=True):
            name = f"past_key_values.{layer}.{kind}"
            wide = np.repeat(values[None].astype(np.float32), 2, 0)
            in_front[name] = np.concatenate([wide, feeds[name]], 2)
    without = run(bound(fresh(decoder.config), decoder), in_front)
    for name in outputs:
        expected = without[name] if name == "logits" else without[name][:, :, length:]  # the cache excludes the prefix
        assert close(outputs[name], expected), name

    plain = torch_run(decoder, feeds)
    decoder.set_prefix([(torch.from_numpy(k).float()[None], torch.from_numpy(v).float()[None]) for k, v in prefix])
    assert_close(outputs, torch_run(decoder, feeds))
    assert not close(outputs["logits"], plain["logits"], 1e-2)


@pytest.mark.parametrize("kv", [4, 8])
def test_prefix_is_not_quantized_with_the_cache(finished: Finished, kv: int) -> None:
    """It lies in the file as FP16, as calibrated, and keys read it behind the cache's DequantizeLinear."""
    c, model = finished("llama", Form.INTEGER, "w8a8", kv)
    prefix = c.prefix_kv()
    assert prefix is not None
    for layer, pair in enumerate(prefix):
        for kind, values in zip(("key", "value"), pair, strict=True):
            tensor = initializer(model, f"layers.{layer}.prefix.{kind}")
            assert tensor.data_type == TensorProto.FLOAT16
            assert (numpy_helper.to_array(tensor)[0] == values).all()
    feeds = inputs(c.decoder, "with past", kv)
    assert run(model, feeds)["present.0.key"].shape == (2, KV_HEADS, 3 + 5, c.decoder.head_dim)


# --- lint ------------------------------------------------------------------------------------------


def altered(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def test_lint_finds_what_is_not_static(finished: Finished) -> None:
    _, model = finished("llama", Form.INTEGER, "w4a4")
    site = "layers.0.self_attn.qkv_input"

    overridable = altered(model)
    overridable.graph.input.append(helper.make_tensor_value_info(f"{site}.scale", TensorProto.FLOAT, []))
    assert "is not a constant" in str(lint(overridable)[0])

    for value in (0.0, -1.0, float("nan"), float("inf")):
        zero = altered(model)
        initializer(zero, f"{site}.scale").CopyFrom(numpy_helper.from_array(np.float32(value), f"{site}.scale"))
        assert [f.rule for f in lint(zero)] == ["scale"]

    computed = altered(model)
    node = next(n for n in computed.graph.node if n.op_type == "QuantizeLinear")
    computed.graph.node.insert(0, helper.make_node("Identity", [node.input[1]], ["computed_scale"]))
    next(n for n in computed.graph.node if n.op_type == "QuantizeLinear").input[1] = "computed_scale"
    assert "'computed_scale' is not a constant" in str(lint(computed)[0])

    unread = altered(model)
    unread.graph.input.append(helper.make_tensor_value_info("token_type_ids", TensorProto.INT64, [1]))
    assert [str(f) for f in lint(unread)] == ["token_type_ids: connected: no node reads this input"]

    constant = altered(model)
    constant.graph.output.append(helper.make_tensor_value_info("prefix.length", TensorProto.INT64, []))
    assert {f.node for f in lint(constant)} == {"prefix.length"}
