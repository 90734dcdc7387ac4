"""The static form in onnxruntime, unfused, beside the portable graph of the same calibration."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from pq_export.calibration import Calibration
from pq_export.errors import PqExportError, UsageError
from pq_export.export.fp_graph import export_fp_graph
from pq_export.rewrite.lint import lint
from pq_export.rewrite.pipeline import quantized_model
from pq_export.rewrite.qlinear import Form
from pq_export.runtime import OrtDecoder, session_options
from pq_export.targets.static_form import (
    StaticForm,
    StaticGraphs,
    save_static,
    static_graphs,
    tensors_to_observe,
)
from pq_export.targets.static_ranges import observe_ranges
from tests.conftest import VOCAB

PREFILL, CACHE = 8, 24
PROMPT, TOTAL = 13, 18  # two chunks of prefill, the second padded, then decode
OPS = {
    "Add", "Concat", "DequantizeLinear", "Gather", "MatMul", "Mul", "QuantizeLinear", "RMSNormalization", "Reshape",
    "Sigmoid", "Softmax", "Split", "Sub", "Transpose", "Unsqueeze",
}  # fmt: skip


class Static:
    """A minimal host: what static.json says is all that it knows."""

    def __init__(self, directory: Path):
        self.facts = json.loads((directory / "static.json").read_text(encoding="utf-8"))
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
        self.sessions = {
            length: ort.InferenceSession(str(directory / f"{name}.onnx"), options, providers=["CPUExecutionProvider"])
            for name, length in (("prefill", self.facts["prefill_len"]), ("decode", 1))
        }
        cache = self.facts["cache"].items()
        self.cache = {n: np.full(c["shape"], c["zero_point"], c["dtype"]) for n, c in cache}
        self.filled = 0

    def step(self, tokens: np.ndarray, length: int) -> np.ndarray:
        """Logits [k, V] of the k ``tokens``, padded on the right to ``length``; their codes enter the cache."""
        count, bias = len(tokens), self.facts["attention_bias"]
        ids, positions = np.full((1, length), 7, np.int32), np.zeros((1, length), np.int32)
        ids[0, :count], positions[0, :count] = tokens, self.filled + np.arange(count)
        mask = np.full((1, 1, length, self.facts["cache_len"] + length), bias["hidden"], bias["dtype"])
        mask[..., : self.filled] = bias["visible"]
        for row in range(length):
            new = self.facts["cache_len"]
            mask[0, 0, row, new : new + min(row, count - 1) + 1] = bias["visible"]
        session = self.sessions[length]
        feeds = {"input_ids": ids, "position_ids": positions, "attention_bias": mask, **self.cache}
        outputs = dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))
        for name, held in self.cache.items():
            held[:, :, self.filled : self.filled + count] = outputs[name.replace("past_key_values", "present")][
                :, :, :count
            ]
        self.filled += count
        facts = self.facts["logits"]
        return (outputs["logits"][0, :count].astype(np.float32) - facts["zero_point"]) * np.float32(facts["scale"])

    def run(self, tokens: np.ndarray, prompt: int) -> np.ndarray:
        """Chunked prefill of the first ``prompt`` tokens, then one token a step -> logits [T, V]."""
        size = self.facts["prefill_len"]
        chunks = [tokens[i : min(i + size, prompt)] for i in range(0, prompt, size)]
        rows = [self.step(chunk, size) for chunk in chunks]
        return np.concatenate([*rows, *(self.step(tokens[i : i + 1], 1) for i in range(prompt, len(tokens)))])


def portable(calibration: Calibration) -> onnx.ModelProto:
    return quantized_model(export_fp_graph(calibration.decoder), calibration, Form.QDQ)


def sample_tokens(count: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCAB, (count, length))


@pytest.fixture(scope="module")
def made(
    calibrations: Callable[..., Calibration], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[onnx.ModelProto, StaticGraphs, Path]]:
    """``made("w8a8", kv, family, form fields)`` -> portable model, its static graphs, the folder they were saved to."""
    done: dict[object, tuple[onnx.ModelProto, StaticGraphs, Path]] = {}

    def make(
        name: str, kv: int | None = None, family: str = "llama", plan: dict[str, Any] | None = None, **form: Any
    ) -> tuple[onnx.ModelProto, StaticGraphs, Path]:
        key = (name, kv, family, repr(plan), repr(sorted(form.items())))
        if key not in done:
            model = portable(calibrations(name, kv, family, **{"rotate": "offline", **(plan or {})}))
            ranges = observe_ranges(model, tensors_to_observe(model), sample_tokens(12, 48), threads=1)
            graphs = static_graphs(model, StaticForm(PREFILL, CACHE, **form), ranges)
            folder = tmp_path_factory.mktemp("static")
            save_static(graphs, folder)
            done[key] = model, graphs, folder
        return done[key]

    return make


def reference(model: onnx.ModelProto, tokens: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    decoder = OrtDecoder(model.SerializeToString(), session_options(threads=1, fuse=False))
    logits, state, _ = decoder.step(tokens[None].astype(np.int64), decoder.empty())
    return logits[0], state.past


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


CASES = [
    # precision, kv bits, family, fields of the form, smallest cosine
    ("w4a16", 8, "llama", {}, 0.9995),
    ("w4a16", None, "llama", {}, 0.9995),  # cache of 16 bits
    ("w8a8", None, "llama", {}, 0.998),
    ("w8a8", None, "llama", {"wide_outputs": ("down_proj",)}, 0.995),
    ("w8a8", None, "llama-bias", {"wide_outputs": ()}, 0.995),
    ("w8a8", None, "qwen2", {}, 0.995),
    ("w8a8", None, "qwen3", {}, 0.995),
    ("w4a8", 8, "llama", {}, 0.995),
    ("w4a4", None, "llama", {}, 0.95),  # a code of 4 bits that rounds the other way moves much
    ("w4a8", 8, "qwen3", {"float_parts": True}, 0.995),
]


@pytest.mark.parametrize(("name", "kv", "family", "form", "smallest"), CASES)
def test_prefill_and_decode_follow_the_portable_graph(
    made: Any, name: str, kv: int | None, family: str, form: dict[str, Any], smallest: float
) -> None:
    model, _, folder = made(name, kv, family, **form)
    tokens = sample_tokens(1, TOTAL, seed=1)[0]
    logits, _ = reference(model, tokens)
    host = Static(folder)
    assert cosine(host.run(tokens, PROMPT), logits) > smallest
    assert host.filled == TOTAL


def test_first_codes_are_those_of_the_portable_graph(made: Any) -> None:
    """In the first layer nothing but round-off of 16 bits lies before the keys and values."""
    model, _, folder = made("w8a8")
    tokens = sample_tokens(1, TOTAL, seed=2)[0]
    _, past = reference(model, tokens)
    host = Static(folder)
    host.run(tokens, PROMPT)
    for name in ("past_key_values.0.key", "past_key_values.0.value"):
        difference = np.abs(host.cache[name][:, :, :TOTAL].astype(int) - past[name].astype(int))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.05


def test_padding_and_what_is_hidden_change_nothing(made: Any) -> None:
    _, _, folder = made("w4a16", 8)
    tokens = sample_tokens(1, 5, seed=3)[0]
    host, other = Static(folder), Static(folder)
    for held in other.cache.values():
        held[:] = 200  # garbage that the bias hides
    np.testing.assert_array_equal(host.step(tokens, PREFILL), other.step(tokens, PREFILL))


def test_chunks_make_no_difference(made: Any) -> None:
    _, _, folder = made("w4a16", 8)
    tokens = sample_tokens(1, TOTAL, seed=4)[0]
    assert cosine(Static(folder).run(tokens, PROMPT), Static(folder).run(tokens, 1)) > 0.9999


def test_prefix_is_inside(made: Any) -> None:
    model, graphs, folder = made("w4a16", 8)
    assert graphs.facts["prefix_len"] == 3
    tokens = sample_tokens(1, TOTAL, seed=5)[0]
    logits, _ = reference(model, tokens)
    changed = {name: onnx.ModelProto.FromString(m.SerializeToString()) for name, m in graphs.models.items()}
    for m in changed.values():
        for tensor in m.graph.initializer:
            if ".prefix.value" in tensor.name and tensor.name.endswith("/codes"):
                codes = onnx.numpy_helper.to_array(tensor)
                tensor.CopyFrom(onnx.numpy_helper.from_array(np.full_like(codes, 32768), tensor.name))
    without = folder / "without"
    without.mkdir()
    save_static(StaticGraphs(changed, graphs.facts), without)
    same = cosine(Static(folder).run(tokens, PROMPT), logits)
    assert cosine(Static(without).run(tokens, PROMPT), logits) < same - 1e-3


def test_without_a_prefix(made: Any) -> None:
    model, graphs, folder = made("w4a16", 8, plan={"prefix": "none"})
    tokens = sample_tokens(1, TOTAL, seed=6)[0]
    assert graphs.facts["prefix_len"] == 0
    assert cosine(Static(folder).run(tokens, PROMPT), reference(model, tokens)[0]) > 0.9995


def test_online_rotations_and_heads_with_scales_of_their_own(made: Any) -> None:
    model, graphs, folder = made("w4a8", 4, plan={"rotate": "online"})
    assert any(t.name == "rotation.R4.right/codes" for t in graphs.models["decode"].graph.initializer)
    tokens = sample_tokens(1, TOTAL, seed=7)[0]
    host = Static(folder)
    assert cosine(host.run(tokens, PROMPT), reference(model, tokens)[0]) > 0.995
    assert all(held.max() <= 15 for held in host.cache.values())  # 4 bits in 8


@pytest.mark.parametrize(
    ("name", "kv", "family"), [("w8a8", None, "qwen3"), ("w4a16", 8, "llama"), ("w4a4", None, "llama")]
)
def test_every_tensor_has_codes_and_a_fixed_shape(made: Any, name: str, kv: int | None, family: str) -> None:
    _, graphs, _ = made(name, kv, family)
    for model in graphs.models.values():
        onnx.checker.check_model(model, full_check=True)
        assert lint(model) == []
        assert {node.op_type for node in model.graph.node} <= OPS
        assert not any(
            d.dim_param for v in (*model.graph.input, *model.graph.output) for d in v.type.tensor_type.shape.dim
        )
        assert not any(
            v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for v in (*model.graph.input, *model.graph.output)
        )
        scales = {n.input[1] for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")}
        floats = {t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
        assert floats == scales
        assert not list(unquantized(model))


def unquantized(model: onnx.ModelProto) -> Iterator[str]:
    """Floating-point tensors between two operators neither of which quantizes or dequantizes."""
    made = {o: n.op_type for n in model.graph.node for o in n.output}
    for node in model.graph.node:
        for name in node.input:
            if node.op_type not in ("QuantizeLinear", "DequantizeLinear") and made.get(name) not in (
                None,
                "DequantizeLinear",
            ):
                yield name


@pytest.mark.parametrize(
    ("name", "kv", "wide"),
    [
        ("w8a8", None, None),
        ("w8a8", None, ("down_proj",)),
        ("w8a8", None, ()),
        ("w4a8", 8, None),
        ("w4a16", 8, None),
        ("w4a4", None, None),
    ],
)
def test_linears_are_units_that_hexagon_takes(
    made: Any, name: str, kv: int | None, wide: tuple[str, ...] | None
) -> None:
    """DQ, DQ -> MatMul -> Q with one type on both sides, a requantization of at most 1, and zero points written out."""
    _, graphs, _ = made(name, kv, wide_outputs=wide)
    model = graphs.models["prefill"]
    values = {t.name: t for t in model.graph.initializer}
    producer = {o: n for n in model.graph.node for o in n.output}
    readers = {i: n for n in model.graph.node for i in n.input}
    linears = [n for n in model.graph.node if n.op_type == "MatMul" and producer[n.input[1]].input[0] in values]
    assert {n.name for n in linears} >= {"layers.0.self_attn.q_proj", "layers.1.mlp.down_proj", "lm_head"}
    for node in linears:
        x, weight, y = producer[node.input[0]], producer[node.input[1]], readers[node.output[0]]
        assert (x.op_type, weight.op_type, y.op_type) == ("DequantizeLinear", "DequantizeLinear", "QuantizeLinear")
        assert values[x.input[2]].data_type == values[y.input[2]].data_type
        narrow = name == "w8a8" and wide is not None and not node.name.endswith((*wide, "lm_head"))
        assert values[x.input[2]].data_type == (onnx.TensorProto.UINT8 if narrow else onnx.TensorProto.UINT16)
        int4 = name.startswith("w4") and node.name != "lm_head"
        assert values[weight.input[0]].data_type == (onnx.TensorProto.INT4 if int4 else onnx.TensorProto.INT8)
        assert values[weight.input[2]].data_type == values[weight.input[0]].data_type
        scale_x, scale_w, scale_y = (onnx.numpy_helper.to_array(values[n.input[1]]) for n in (x, weight, y))
        assert (scale_x * scale_w / scale_y).max() <= 1.0001


def test_both_graphs_share_the_bytes_of_weights(made: Any) -> None:
    _, graphs, folder = made("w4a16", 8)
    places = []
    for name in graphs.models:
        light = onnx.load(folder / f"{name}.onnx", load_external_data=False)
        places.append(
            {t.name: [(e.key, e.value) for e in t.external_data] for t in light.graph.initializer if t.external_data}
        )
    assert places[0] == places[1]
    assert "layers.0.self_attn.q_proj.codes" in places[0]
    size = sum(int(dict(place)["length"]) for place in places[0].values())
    assert size <= (folder / "weights.data").stat().st_size < size + 64 * len(places[0])


def test_two_runs_write_the_same_bytes(made: Any, tmp_path: Path) -> None:
    model, _, folder = made("w4a16", 8)
    ranges = observe_ranges(model, tensors_to_observe(model), sample_tokens(12, 48), threads=1)
    save_static(static_graphs(model, StaticForm(PREFILL, CACHE), ranges), tmp_path)
    for name in ("prefill.onnx", "decode.onnx", "weights.data", "static.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_ranges_cover_all_windows(made: Any) -> None:
    model, _, _ = made("w4a16", 8)
    names = ["layers.0/output", "layers.0.mlp.down_proj/product"]
    windows = sample_tokens(4, 12)
    whole = observe_ranges(model, names, windows, threads=1)
    single = [observe_ranges(model, names, window[None], threads=1) for window in windows]
    for name in names:
        assert whole[name] == (min(s[name][0] for s in single), max(s[name][1] for s in single))
        assert whole[name][0] < 0 < whole[name][1]


def test_errors_name_what_is_wrong(made: Any) -> None:
    model, _, _ = made("w4a16", 8)
    names = tensors_to_observe(model)
    ranges = dict.fromkeys(names, (-1.0, 1.0))
    with pytest.raises(PqExportError, match=r"layers\.0/output: has no observed range"):
        static_graphs(model, StaticForm(PREFILL, CACHE), {k: v for k, v in ranges.items() if k != "layers.0/output"})
    with pytest.raises(PqExportError, match=r"layers\.0/output: has the observed range nan"):
        static_graphs(model, StaticForm(PREFILL, CACHE), {**ranges, "layers.0/output": (float("nan"), 1.0)})
    with pytest.raises(PqExportError, match="no tokens"):
        observe_ranges(model, names, np.zeros((0, 8), np.int64))
    with pytest.raises(UsageError, match="prefill of 1"):
        StaticForm(prefill_len=1)
    with pytest.raises(PqExportError, match=r"layers\.0\.self_attn\.q_proj: is not a linear of 8 bits"):
        static_graphs(model, StaticForm(PREFILL, CACHE, float_parts=True), ranges)
