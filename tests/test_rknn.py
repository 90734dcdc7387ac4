"""``--target rknn``: its graphs, and its compiler behind the protocol of the worker, with a stand-in for the toolkit.

The real one is used where PQ_RKNN_PYTHON says that it is.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from pq_export.build import build
from pq_export.bundle import Bundle
from pq_export.calibration import ASSETS_NAME, Calibration
from pq_export.errors import PqExportError
from pq_export.precision import Precision
from pq_export.quantizer import pack_int4
from pq_export.runtime import OrtDecoder
from pq_export.stages import Stages
from pq_export.static_runtime import StaticDecoder, StaticFacts, onnxruntime_sessions
from pq_export.targets.base import TargetOptions
from pq_export.targets.ort import ORT
from pq_export.targets.rknn import RKNN
from pq_export.targets.rknn_compile import (
    PYTHON_VARIABLE,
    Rknn,
    check_layers,
    compile_graph,
    find_rknn,
    linears_of,
    read_layers,
)
from pq_export.targets.rknn_form import HIDDEN, rknn_graphs, tensors_to_observe
from pq_export.targets.static_ranges import observe_ranges
from tests.conftest import VOCAB

REAL = os.environ.get(PYTHON_VARIABLE)
PREFILL, CACHE = 8, 24
LINEARS = 14  # of the tiny models: two layers of seven
SAMPLES = np.random.default_rng(3).integers(3, VOCAB, (3, 40))
OPTIONS = TargetOptions(prefill_len=PREFILL, cache_len=CACHE, samples=SAMPLES)


def assets_folder(folder: Path) -> Path:
    """A calibration's folder as far as ``build`` reads it: files of a tokenizer to copy."""
    (folder / "calibration" / ASSETS_NAME).mkdir(parents=True)
    return folder / "calibration"


# The graphs.


@pytest.fixture(scope="module")
def models(
    calibrations: Callable[..., Calibration], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., onnx.ModelProto]:
    """``models("w8a8", family="qwen2")``: ``model.onnx`` in form ``qdq``, made once."""
    made: dict[Any, onnx.ModelProto] = {}

    def make(name: str, family: str = "llama") -> onnx.ModelProto:
        if (name, family) not in made:
            folder = tmp_path_factory.mktemp("model")
            calibration = calibrations(name, family=family)
            bundle = build(calibration, assets_folder(folder), ORT, folder / "out", Stages(), form="qdq")
            made[name, family] = onnx.load(bundle.model_path)
        return made[name, family]

    return make


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])  # grouped queries; biases; norms of queries and keys
def test_the_graphs_are_the_model_in_fixed_shapes(
    family: str, models: Callable[..., onnx.ModelProto], tmp_path: Path
) -> None:
    model = models("w8a8", family=family)
    graphs = rknn_graphs(model, PREFILL, CACHE, observe_ranges(model, tensors_to_observe(model), SAMPLES))
    sessions = {}
    for name, graph in graphs.models.items():
        onnx.checker.check_model(graph, full_check=True)
        assert [(o.domain, o.version) for o in graph.opset_import] == [("", 19)]
        for value in (*graph.graph.input, *graph.graph.output):
            assert all(dim.dim_value > 0 for dim in value.type.tensor_type.shape.dim), value.name
        types = {tensor.data_type for tensor in graph.graph.initializer}
        assert types <= {onnx.TensorProto.INT8, onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}
        assert len(linears_of(graph)) == LINEARS
        assert_linears_are_units(graph)
        sessions[name] = ort.InferenceSession(graph.SerializeToString())
    heads, size = next((d[1].dim_value, d[3].dim_value) for d in [graph.graph.input[3].type.tensor_type.shape.dim])
    decoder = StaticDecoder(StaticFacts.from_dict(graphs.facts, heads, size), sessions)
    reference = OrtDecoder(model.SerializeToString())
    ids, token = SAMPLES[:1, :13], SAMPLES[:1, 20:21]
    ours, state, _ = decoder.step(ids, decoder.empty())
    theirs, expected, _ = reference.step(ids, reference.empty())
    assert decoder.runs == {"prefill": 2, "decode": 0}
    assert cosine(ours, theirs) > 0.995
    assert cosine(decoder.step(token, state)[0], reference.step(token, expected)[0]) > 0.995
    assert decoder.runs["decode"] == 1
    for name, values in state.sequences[0].cache.items():
        codes = expected.past[name].astype(np.float32) - 128
        kept = values[:, :, : codes.shape[2]]
        scale = np.abs(kept).max() / np.abs(np.rint(kept / np.abs(kept)[kept != 0].min())).max()
        steps = kept / scale
        np.testing.assert_allclose(steps, np.rint(steps), atol=1e-2, err_msg=f"{name} holds no multiples of a scale")
        assert cosine(kept, codes) > 0.99
        assert not values[:, :, codes.shape[2] :].any()


def assert_linears_are_units(graph: onnx.ModelProto) -> None:
    """DequantizeLinear of both sides in front, one QuantizeLinear behind: else the compiler makes FP16 of it."""
    made = {node.output[0]: node for node in graph.graph.node}
    readers: dict[str, list[str]] = {}
    for node in graph.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    for name in linears_of(graph):
        assert made[made[name].input[0]].op_type == "DequantizeLinear"
        assert readers[name] == ["QuantizeLinear"], name


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def test_other_bits_are_refused(models: Callable[..., onnx.ModelProto]) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(models("w8a8"))
    names = tensors_to_observe(model)
    assert len(names) == LINEARS
    weight = next(t for t in model.graph.initializer if t.name == "layers.1.mlp.up_proj.codes")
    weight.raw_data = pack_int4(np.clip(onnx.numpy_helper.to_array(weight), -8, 7)).tobytes()
    weight.data_type = onnx.TensorProto.INT4
    with pytest.raises(
        PqExportError, match=r"layers\.1\.mlp\.up_proj: has W4A8; RKNN runs static W8A8 only\. .*--w8a8"
    ):
        rknn_graphs(model, PREFILL, CACHE, dict.fromkeys(names, (-1.0, 1.0)))
    for name, kv in (("w4a8", 8), ("w4a4", 4), ("w4a16", 16), ("w8a8", 4)):
        with pytest.raises(PqExportError, match="--target rknn has no W"):
            RKNN.choose_form(Precision.named(name, kv), False, TargetOptions())
    assert RKNN.choose_form(Precision.named("w8a8"), False, TargetOptions())[0].value == "qdq"


def test_a_missing_range_is_named(models: Callable[..., onnx.ModelProto]) -> None:
    with pytest.raises(PqExportError, match="_proj/product: has no observed range"):
        rknn_graphs(models("w8a8"), PREFILL, CACHE, {})


# The compiler, with a stand-in for rknn-toolkit2.

TOOLKIT = '''
"""Speaks as rknn-toolkit2 does: 0 is well, and the table of layers goes to standard output."""
import os, time
import numpy as np, onnx, onnxruntime

FAULT = os.environ.get("FAULT", "")

class RKNN:
    def __init__(self, verbose=False):
        assert verbose
    def config(self, target_platform, disable_rules, optimization_level):
        assert target_platform == "rk3588" and disable_rules == ["adjust_element_rs"] and optimization_level == 3
        return 0
    def load_onnx(self, path):
        self.path = path
        if FAULT == "hang":
            time.sleep(60)
        return -1 if FAULT == "refuse" else 0
    def build(self, do_quantization):
        assert do_quantization is False
        if FAULT == "crash":
            os.abort()
        if FAULT == "raise":
            raise ValueError("Traceback (most recent call last):\\n  File x\\nValueError: bad weight")
        open("dropped.onnx", "w").close()
        nodes = onnx.load(self.path, load_external_data=False).graph.node
        for i, name in enumerate(n.output[0] for n in nodes if n.op_type == "MatMul"):
            kind = "INT8   " if "_proj/" in name and not (FAULT == "float" and "up_proj" in name) else "FLOAT16"
            print(f"D RKNN: [00:00:00.000] {i:<4} Conv  {kind}  NPU  (1,48,1,1)  (1,64,1,1)  1/2/3  4  Conv:{name}#2 ")
        return 0
    def export_rknn(self, path):
        with open(path, "wb") as file:
            file.write(b"RKNN")
        return 0
    def init_runtime(self):
        return 0
    def inference(self, inputs, data_format):
        assert data_format == ["nchw"] * len(inputs)
        session = onnxruntime.InferenceSession(self.path)
        names = [i.name for i in session.get_inputs()]
        return session.run(None, dict(zip(names, inputs)))
'''


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """``toolkit(fault)``: a Python with a stand-in for the toolkit, which PQ_RKNN_PYTHON points to."""

    def make(fault: str = "", version: str = "2.5.0") -> Path:
        site = tmp_path / "site"
        (site / "rknn").mkdir(parents=True, exist_ok=True)
        (site / "rknn/api.py").write_text(TOOLKIT, encoding="utf-8")
        facts = site / f"rknn_toolkit2-{version}.dist-info"
        facts.mkdir(exist_ok=True)
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: rknn-toolkit2\nVersion: {version}\n")
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nFAULT={fault} PYTHONPATH={site} exec {sys.executable} "$@"\n')
        python.chmod(0o755)
        monkeypatch.setenv(PYTHON_VARIABLE, str(python))
        monkeypatch.setenv("PYTHONPATH", "/nowhere")  # another Python must not look there
        return python

    return make


def test_a_bundle_is_whole(
    toolkit: Callable[..., Path], calibrations: Callable[..., Calibration], tmp_path: Path
) -> None:
    toolkit()
    bundle = build(calibrations("w8a8"), assets_folder(tmp_path), RKNN, tmp_path / "out", Stages(), options=OPTIONS)
    check_bundle(bundle, "rk3588")
    for record in bundle.config["engines"]:
        assert (bundle.directory / record["file"]).read_bytes() == b"RKNN"
        assert record["rknn_toolkit"] == "2.5.0"
        assert record["simulated"]["cosine"] > 0.999 and record["simulated"]["max_logit"] > 1
    assert not list(bundle.directory.rglob("dropped.onnx")), "what the toolkit drops goes away"


def check_bundle(bundle: Bundle, platform: str) -> None:
    """Files and records of a bundle, whoever compiled it."""
    config = bundle.config
    wanted = {f"engines/{platform}.{graph}.{end}" for graph in ("prefill", "decode") for end in ("rknn", "log")}
    static = {f"static/{name}" for name in ("prefill.onnx", "decode.onnx", "weights.data", "static.json")}
    assert wanted | static | {"model.onnx", f"engines/{platform}.layers.json"} <= set(config["files"])
    assert [(r["platform"], r["graph"], r["linears"]) for r in config["engines"]] == [
        (platform, "prefill", LINEARS),
        (platform, "decode", LINEARS),
    ]
    tables = json.loads((bundle.directory / f"engines/{platform}.layers.json").read_text())
    for record in config["engines"]:
        assert record["bytes"] == (bundle.directory / record["file"]).stat().st_size
        assert record["counts"]["NPU INT8"] >= LINEARS
        assert sum(record["counts"].values()) <= len(tables[record["graph"]])
    facts = StaticFacts.read(bundle.directory, config)
    assert (facts.prefill_len, facts.cache_len, facts.prefix_len) == (PREFILL, CACHE, 3)
    assert (facts.visible, facts.hidden, facts.logits) == (0.0, HIDDEN, None)
    decoder = StaticDecoder(facts, onnxruntime_sessions(bundle.directory, config))
    reference = OrtDecoder(bundle.model_path)
    ids = SAMPLES[:1, :11]
    ours, theirs = decoder.step(ids, decoder.empty())[0], reference.step(ids, reference.empty())[0]
    assert cosine(ours, theirs) > 0.995


@pytest.fixture(scope="module")
def tiny_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """x [1, 2] -> Q -> DQ -> MatMul <- DQ(int8) -> logits."""
    constants = {
        "s": np.float32(0.1),
        "zero": np.int8(0),
        "codes": np.array([[1, 2], [3, 4]], np.int8),
        "scales": np.array([0.1, 0.2], np.float32),
    }
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "s", "zero"], ["xq"]),
        onnx.helper.make_node("DequantizeLinear", ["xq", "s", "zero"], ["xd"]),
        onnx.helper.make_node("DequantizeLinear", ["codes", "scales"], ["w"], axis=1),
        onnx.helper.make_node("MatMul", ["xd", "w"], ["layers.0.mlp.up_proj/product"]),
        onnx.helper.make_node("Neg", ["layers.0.mlp.up_proj/product"], ["logits"]),
    ]
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 2]) for name in ("x", "logits"))
    tensors = [onnx.numpy_helper.from_array(np.asarray(values), name) for name, values in constants.items()]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "g", [x], [y], tensors),
        opset_imports=[onnx.helper.make_opsetid("", 19)],
        ir_version=9,
    )
    path = tmp_path_factory.mktemp("graph") / "decode.onnx"
    onnx.save(model, path)
    return path


FEEDS = {"x": np.array([[1.0, 2.0]], np.float32)}
EXPECTED = {"logits": -np.array([[0.7, 2.0]], np.float32)}


def test_one_graph(toolkit: Callable[..., Path], tiny_graph: Path, tmp_path: Path) -> None:
    toolkit()
    record, layers = compile_graph("decode", tiny_graph, tmp_path / "b", "rk3588", FEEDS, EXPECTED)
    assert record.simulated.max_error < 1e-6 and record.counts == {"NPU INT8": 1} and record.linears == 1
    assert layers == [
        {"name": "Conv:layers.0.mlp.up_proj/product#2", "type": "Conv", "precision": "INT8", "unit": "NPU"}
    ]
    assert {path.name for path in (tmp_path / "b/engines").iterdir()} == {"rk3588.decode.rknn", "rk3588.decode.log"}


@pytest.mark.parametrize(
    "fault, said",
    [
        ("crash", "rknn-toolkit2 ended by SIGABRT"),
        ("hang", "rknn-toolkit2 took more than 4 s"),
        ("refuse", "rknn-toolkit2 refuses it: load_onnx answered -1"),
        ("raise", "rknn-toolkit2 refuses it: ValueError: bad weight"),
        ("float", "layers.0.mlp.up_proj/product runs as FLOAT16 on NPU, not as INT8 on NPU"),
    ],
)
def test_a_failure_is_one_line_and_a_log(
    fault: str, said: str, toolkit: Callable[..., Path], tiny_graph: Path, tmp_path: Path
) -> None:
    rknn = Rknn(toolkit(fault), "2.5.0")
    with pytest.raises(PqExportError) as error:
        compile_graph(
            "decode",
            tiny_graph,
            tmp_path / "b",
            "rk3588",
            FEEDS,
            EXPECTED,
            rknn=rknn,
            failed_logs=tmp_path,
            timeout=4 if fault == "hang" else 60,
        )
    text = str(error.value)
    assert text.startswith("decode for rk3588: ") and said in text and "\n" not in text
    assert text.endswith(f"The log: {tmp_path}/rk3588.decode.log.") and (tmp_path / "rk3588.decode.log").is_file()
    assert not list((tmp_path / "b/engines").iterdir())


def test_another_answer_of_the_simulator_is_in_the_record(
    toolkit: Callable[..., Path], tiny_graph: Path, tmp_path: Path
) -> None:
    toolkit()
    other = {"logits": np.array([[1.0, 0.0]], np.float32)}
    record, _ = compile_graph("decode", tiny_graph, tmp_path, "rk3588", FEEDS, other)
    assert record.simulated.cosine == pytest.approx(-0.7 / np.hypot(0.7, 2.0), abs=1e-6)
    assert record.simulated.max_error == pytest.approx(2.0)


def test_the_toolkit_is_found_or_its_pip_line_said(
    toolkit: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = toolkit(version="2.5.1")
    assert find_rknn() == Rknn(python, "2.5.1")
    monkeypatch.setenv(PYTHON_VARIABLE, sys.executable)
    line = r"proprietary, .*pip install --no-deps rknn-toolkit2==2\.5\.0 numpy==1\.26\.4 .* && pip install torch"
    if importlib.util.find_spec("rknn") is None:
        with pytest.raises(PqExportError, match=rf"has no rknn-toolkit2.*{line}"):
            find_rknn()
        monkeypatch.delenv(PYTHON_VARIABLE)
        with pytest.raises(PqExportError, match=rf"^rknn-toolkit2 is not installed.*{line}.*set PQ_RKNN_PYTHON"):
            RKNN.resolve(TargetOptions(), None)
    for name, why in (("nothing", "No such file"), ("site", "Permission denied")):
        monkeypatch.setenv(PYTHON_VARIABLE, str(tmp_path / name))
        with pytest.raises(PqExportError, match=rf"{name}: PQ_RKNN_PYTHON is no Python that runs: {why}"):
            find_rknn()


def test_unknown_chips_and_lengths_are_refused(toolkit: Callable[..., Path]) -> None:
    toolkit()
    resolved = RKNN.resolved(TargetOptions(socs=("RK3576",), prefill_len=4, cache_len=8), 100)
    assert (resolved.socs, resolved.prefill_len, resolved.cache_len) == (("rk3576",), 4, 8)
    assert RKNN.resolved(TargetOptions(), 100).socs == ("rk3588",)
    with pytest.raises(PqExportError, match="rk9999"):
        RKNN.resolved(TargetOptions(socs=("rk9999",)), 100)
    with pytest.raises(PqExportError, match="--cache-len 200 is longer"):
        RKNN.resolved(TargetOptions(cache_len=200), 100)


TABLE = """\
D RKNN: [00:40:31.819] ID   OpType             DataType Target InputShape   OutputShape  Cycles(DDR/NPU/Total)    RW(KB)       FullName
D RKNN: [00:40:31.819] 0    InputOperator      INT32    CPU    \\            (1,1)        0/0/0                    0            InputOperator:input_ids
I OpFusing 0:   5%|##        | 5/100 [00:00<00:00, 291.16it/s]\rD RKNN: [00:40:31.819] 18   Conv               INT8     NPU    (1,48,1,1),(64,48,1,1),(64)   (1,64,1,1)   157/128/157  3   Conv:layers.0.self_attn.q_proj/product#2
D RKNN: [00:40:31.819] 19   Conv               FLOAT16  NPU    (1,48,1,1),(32,48,1,1)   (1,32,1,1)  137/64/137   3   Conv:layers.0.self_attn.k_proj/product#2
"""  # noqa: E501


def test_the_table_of_layers_is_read_from_the_log() -> None:
    layers = read_layers(TABLE)
    assert [(layer["type"], layer["precision"], layer["unit"]) for layer in layers] == [
        ("InputOperator", "INT32", "CPU"),
        ("Conv", "INT8", "NPU"),
        ("Conv", "FLOAT16", "NPU"),
    ]
    names = [f"layers.0.self_attn.{kind}_proj/product" for kind in "qkv"]
    check_layers(layers, names[:1], "decode", Path("the.log"))
    with pytest.raises(PqExportError, match="k_proj/product runs as FLOAT16 on NPU, not as INT8 on NPU"):
        check_layers(layers, names[:2], "decode", Path("the.log"))
    with pytest.raises(PqExportError, match="v_proj/product runs as no unit"):
        check_layers(layers, names[2:], "decode", Path("the.log"))


# With the real one.


@pytest.mark.skipif(REAL is None, reason="PQ_RKNN_PYTHON does not say where rknn-toolkit2 is")
def test_a_bundle_by_the_real_toolkit(calibrations: Callable[..., Calibration], tmp_path: Path) -> None:
    bundle = build(calibrations("w8a8"), assets_folder(tmp_path), RKNN, tmp_path / "out", Stages(), options=OPTIONS)
    check_bundle(bundle, "rk3588")
    for record in bundle.config["engines"]:
        assert record["simulated"]["cosine"] > 0.99
        assert (bundle.directory / record["file"]).read_bytes()[:4] == b"RKNN"
