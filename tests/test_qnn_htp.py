"""Context binaries for Hexagon: compiled for real, simulated, and compared with the graphs that they were made from."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pq_export.build import build
from pq_export.bundle import Bundle, open_bundle
from pq_export.calib.checkpoint import load_checkpoint
from pq_export.calib.pipeline import calibrate
from pq_export.calibration import load_calibration
from pq_export.cli.samples import sample_windows
from pq_export.errors import IntegrityError, PqExportError, UsageError
from pq_export.execute import running_decoder
from pq_export.plan import Plan
from pq_export.stages import Stages
from pq_export.targets import find_target, qnn_compile
from pq_export.targets.base import TargetOptions
from pq_export.targets.profile import Soc, find_profile
from pq_export.targets.qnn_compile import compile_context, find_qnn, sha256_of
from pq_export.targets.qnn_layers import Layer, check_layers, linears_of
from pq_export.targets.qnn_simulator import Simulator, open_simulator
from tests.cli_runner import Runner
from tests.conftest import hf_model, word_tokenizer

pytest.importorskip("onnxruntime_qnn")

SOCS = find_profile("qnn-htp").socs
OPTIONS = TargetOptions(prefill_len=16, cache_len=48)
WIDE = ("gate_proj", "up_proj", "down_proj")  # of W8A8 here: so the others are computed in 8 bits
WIDTH = 64


# ---------------------------------------------------------------------------- a graph of two linears, made by hand


def linear_graph(
    tokens: int,
    weight_bits: int = 8,
    *,
    activations: type[np.unsignedinteger[Any]] = np.uint8,
    last: tuple[onnx.NodeProto, ...] = (),
) -> onnx.ModelProto:
    """codes -> DQ -> MatMul -> Q -> DQ -> MatMul -> Q -> codes; ``last`` nodes make ``y`` from ``layers.1.output``."""
    rng, top = np.random.default_rng(0), np.iinfo(activations).max
    nodes, constants = (
        [],
        [
            numpy_helper.from_array(np.float32(8 / top), "scale"),
            numpy_helper.from_array(np.asarray((int(top) + 1) // 2, activations), "zero_point"),
        ],
    )
    nodes.append(helper.make_node("DequantizeLinear", ["x", "scale", "zero_point"], ["x/values"], "x/values"))
    values, high = "x/values", 7 if weight_bits == 4 else 127
    elem = TensorProto.INT4 if weight_bits == 4 else TensorProto.INT8
    for name in ("layers.0.linear", "layers.1.linear"):
        weight = rng.integers(-high, high + 1, WIDTH * WIDTH).tolist()
        constants += [
            helper.make_tensor(f"{name}.codes", elem, [WIDTH, WIDTH], weight),
            helper.make_tensor(f"{name}.zero_point", elem, [WIDTH], [0] * WIDTH),
            numpy_helper.from_array(np.full(WIDTH, 1.2 / high / WIDTH**0.5, np.float32), f"{name}.scale"),
        ]
        output = "y" if name == "layers.1.linear" and not last else f"{name}/codes"
        quantizer = [f"{name}.codes", f"{name}.scale", f"{name}.zero_point"]
        nodes += [
            helper.make_node("DequantizeLinear", quantizer, [f"{name}/weight"], f"{name}/weight", axis=1),
            helper.make_node("MatMul", [values, f"{name}/weight"], [f"{name}/float"], name),
            helper.make_node("QuantizeLinear", [f"{name}/float", "scale", "zero_point"], [output], f"{name}/codes"),
        ]
        values = f"{name}/values"
        nodes.append(helper.make_node("DequantizeLinear", [output, "scale", "zero_point"], [values], values))
    nodes = [*nodes, *last] if last else nodes[:-1]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(activations))
    inputs = [helper.make_tensor_value_info("x", kind, [1, tokens, WIDTH])]
    outputs = [helper.make_tensor_value_info("y", kind, [1, tokens, WIDTH])]
    graph = helper.make_graph(nodes, "linears", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def save(folder: Path, **graphs: onnx.ModelProto) -> dict[str, Path]:
    """Files of ``graphs`` in ``folder``, by name."""
    for name, model in graphs.items():
        onnx.save(model, folder / f"{name}.onnx")
    return {name: folder / f"{name}.onnx" for name in graphs}


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, Path]:
    return save(tmp_path, prefill=linear_graph(8), decode=linear_graph(1))


def run_reference(path: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return np.asarray(ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, feeds)[0])


@pytest.mark.parametrize(("bits", "activations"), [(8, np.uint8), (4, np.uint8), (4, np.uint16)])
def test_two_graphs_in_one_binary(tmp_path: Path, bits: int, activations: type[np.unsignedinteger[Any]]) -> None:
    graphs = save(tmp_path, **{n: linear_graph(s, bits, activations=activations) for n, s in (("a", 8), ("b", 1))})
    record = compile_context(graphs, tmp_path, SOCS["sm8650"])
    assert (record.soc, record.soc_model) == ("sm8650", 57)
    assert {n: c["FullyConnected"] for n, c in record.counts.items()} == {"a": 2, "b": 2}
    assert (
        record.sha256 == sha256_of(tmp_path / record.file) and record.bytes == (tmp_path / record.file).stat().st_size
    )
    made = sorted(p.name for p in (tmp_path / "engines").iterdir())
    assert made == ["sm8650.a.onnx", "sm8650.b.onnx", "sm8650.bin", "sm8650.layers.json", "sm8650.log"]
    kind = {8: "sfixed8", 4: "sfixed8/4"}[bits]
    layers = json.loads((tmp_path / record.layers).read_text(encoding="utf-8"))
    assert [x["reads"][1] for x in layers["a"] if x["type"] == "FullyConnected"] == [kind] * 2
    with Simulator(graphs, SOCS["sm8650"], tmp_path / record.layers) as simulator:
        for name, tokens in (("a", 8), ("b", 1)):
            x = np.random.default_rng(1).integers(0, np.iinfo(activations).max, (1, tokens, WIDTH)).astype(activations)
            codes = simulator.graphs([name])[name].run(["y"], {"x": x})[0]
            reference = run_reference(graphs[name], {"x": x})
            assert codes.dtype == activations and reference.std() > np.iinfo(activations).max / 20
            assert np.abs(codes.astype(int) - reference.astype(int)).max() <= 1 + np.iinfo(activations).max // 1024


def test_compiling_twice_writes_the_same_bytes(pair: dict[str, Path], tmp_path: Path) -> None:
    records = []
    for name in ("one", "another"):
        (tmp_path / name).mkdir()
        records.append(compile_context(pair, tmp_path / name, SOCS["sm8750"]))
    assert records[0].sha256 == records[1].sha256
    assert (records[0].file, records[0].counts) == (records[1].file, records[1].counts)


def test_a_node_that_the_accelerator_leaves_to_the_cpu_is_named(tmp_path: Path) -> None:
    odd = helper.make_node("Erf", ["layers.1.linear/values"], ["odd"], "layers.1.odd")
    back = helper.make_node("QuantizeLinear", ["odd", "scale", "zero_point"], ["y"], "y")
    graphs = save(tmp_path, prefill=linear_graph(8, last=(odd, back)))
    with pytest.raises(PqExportError, match=r"layers\.1\.odd \(Erf\).*The log: .*sm8650\.log"):
        compile_context(graphs, tmp_path, SOCS["sm8650"], failed_logs=tmp_path)
    assert (tmp_path / "sm8650.log").is_file()
    assert not list((tmp_path / "engines").iterdir())


def test_floats_on_the_accelerator_are_found(tmp_path: Path) -> None:
    """A strict session takes them: only QNN's own listing tells."""
    middle = helper.make_node("Sigmoid", ["layers.1.linear/values"], ["squashed"], "layers.1.squash")
    again = helper.make_node("Sigmoid", ["squashed"], ["twice"], "layers.1.again")
    back = helper.make_node("QuantizeLinear", ["twice", "scale", "zero_point"], ["y"], "y")
    graphs = save(tmp_path, prefill=linear_graph(8, last=(middle, again, back)))
    with pytest.raises(PqExportError, match=r"layers\.1\.\w+ \(\w+\): has a float32 tensor"):
        compile_context(graphs, tmp_path, SOCS["sm8650"])
    assert compile_context(graphs, tmp_path, SOCS["sm8650"], floats=True).soc == "sm8650"


FULL = ("FullyConnected", ("ufixed16", "sfixed8/4"), ("ufixed16",))


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ([Layer("a", *FULL)], ""),
        ([], "a: is no FullyConnected"),
        ([Layer("a", "Convert", *FULL[1:])], "a: is no FullyConnected"),
        ([Layer("a", "MatMul", ("float16", "sfixed8/4"), ("float16",))], "a: computes float16 x sfixed8/4 -> float16"),
        ([Layer("a", "FullyConnected", ("ufixed16", "sfixed8"), ("ufixed16",))], "its 4-bit weight is held as sfixed8"),
        ([Layer("a", *FULL), Layer("b", "Quantize", ("float32",), ("ufixed16",))], "b (Quantize): has a float32"),
    ],
)
def test_what_a_listing_must_hold(layers: list[Layer], says: str) -> None:
    findings = check_layers(layers, {"a": 4}, floats=False)
    assert (not findings and not says) or any(says in finding for finding in findings)


def test_which_products_are_linears() -> None:
    assert linears_of(linear_graph(1, 4)) == {"layers.0.linear": 4, "layers.1.linear": 4}
    assert linears_of(linear_graph(1, 8)) == {"layers.0.linear": 8, "layers.1.linear": 8}


# ---------------------------------------------------------------------------- crashes, hangs, mistakes


def stand_in(path: Path, code: str) -> Path:
    path.write_text(f"import os, sys, time\n{code}\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("os.abort()", "QNN ended by SIGABRT"),
        ("sys.exit('no licence')", "QNN failed: no licence"),
        ("time.sleep(60)", "QNN took more than 1 s"),
    ],
)
def test_a_compiler_that_fails_is_one_line(
    pair: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, says: str
) -> None:
    monkeypatch.setattr(qnn_compile, "WORKER", stand_in(tmp_path / "worker.py", code))
    with pytest.raises(PqExportError, match=says) as caught:
        compile_context(pair, tmp_path, SOCS["sm8650"], timeout=1.0)
    assert str(tmp_path / "engines" / "sm8650.log") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_simulator_that_dies_or_hangs_is_one_line(pair: dict[str, Path]) -> None:
    x = {"x": np.zeros((1, 1, WIDTH), np.uint8)}
    with Simulator(pair, SOCS["sm8650"]) as simulator:
        graph = simulator.graphs(["decode"])["decode"]
        with pytest.raises(PqExportError, match=r"QNN's simulator failed: .*nonsense"):
            graph.run(["nonsense"], x)
        assert graph.run(["y"], x)[0].shape == (1, 1, WIDTH)  # it goes on
        simulator._process.kill()
        with pytest.raises(PqExportError, match=r"QNN's simulator ended by SIGKILL.*The log: "):
            graph.run(["y"], x)
        simulator.log.unlink()
    with pytest.raises(PqExportError, match=r"gave no answer within 0.01 s"):
        Simulator(pair, SOCS["sm8650"], timeout=0.001)


def test_other_layers_than_the_recorded_ones_are_refused(pair: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "layers.json").write_text("{}", encoding="utf-8")
    with pytest.raises(IntegrityError, match="made other layers for sm8650"):
        Simulator(pair, SOCS["sm8650"], tmp_path / "layers.json")


def test_a_missing_package_is_a_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_qnn", None)
    monkeypatch.setattr(qnn_compile.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PqExportError, match=r"pip install onnxruntime-qnn==2\.7\.0 .*AI Stack License"):
        find_qnn()


# ---------------------------------------------------------------------------- bundles of a tiny model


@pytest.fixture
def pq(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(monkeypatch, capsys)


@pytest.fixture(scope="module")
def calibrated(
    checkpoint_dir: Callable[[str], Path], small_plan: Callable[..., Plan], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """``calibrated("w8a8", 8)`` -> calibration directory of the tiny Llama with a prefix, without online rotation."""
    made: dict[object, Path] = {}

    def make(name: str, kv: int, rotate: str = "offline") -> Path:
        key = (name, kv, rotate)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("qnn") / f"{name}-{rotate}.calib"
            plan = small_plan(name, kv, rotate=rotate, prefix="w77 w8 w9")
            calibrate(load_checkpoint(str(checkpoint_dir("llama"))), plan, made[key], Stages())
        return made[key]

    return make


@pytest.fixture(scope="module")
def bundles(calibrated: Callable[..., Path]) -> Callable[[str, int], Bundle]:
    """``bundles("w8a8", 8)`` -> bundle of that calibration for SM8650, made once."""
    made: dict[tuple[str, int], Bundle] = {}

    def make(name: str, kv: int) -> Bundle:
        if (name, kv) not in made:
            folder = calibrated(name, kv)
            target, output = find_target("qnn-htp"), folder.with_name(f"{name}-kv{kv}")
            calibration = load_calibration(folder)
            options = replace(OPTIONS, samples=sample_windows(calibration, folder, Stages()))
            if name == "w8a8":
                options = replace(options, wide_outputs=WIDE)
            build(calibration, folder, target, output, Stages(), options=options)
            made[name, kv] = open_bundle(output)
        return made[name, kv]

    return make


PRECISIONS = [("w8a8", 8), ("w4a8", 8), ("w4a16", 8), ("w4a4", 8)]


@pytest.mark.parametrize(("name", "kv"), PRECISIONS)
def test_the_whole_model_is_on_the_accelerator_in_integers(
    bundles: Callable[[str, int], Bundle], name: str, kv: int
) -> None:
    bundle = bundles(name, kv)
    (record,) = bundle.config["engines"]
    assert (record["soc"], record["soc_model"]) == ("sm8650", 57)
    compared = record["simulator"]
    assert min(*compared["prefill"], compared["decode"]) > LEAST_COSINE[name] and compared["seconds"] > 0
    assert set(record["contexts"]) == set(bundle.config["static"]["graphs"]) == {"prefill", "decode"}
    layers = json.loads((bundle.directory / record["layers"]).read_text(encoding="utf-8"))
    for graph in ("prefill", "decode"):
        kinds = {kind for layer in layers[graph] for kind in (*layer["reads"], *layer["writes"])}
        assert not any(kind.startswith("float") for kind in kinds)
        products = [layer for layer in layers[graph] if layer["type"] == "FullyConnected"]
        assert len(products) == 2 * 7 + 1  # lm_head too
        projections = [layer["reads"] for layer in products if layer["name"].endswith("_proj")]
        weight = "sfixed8/4" if name.startswith("w4") else "sfixed8"
        assert len(projections) == 14 and {reads[1] for reads in projections} == {weight}
        narrow = sum(reads[0] == "ufixed8" for reads in projections)
        assert narrow == (2 * (7 - len(WIDE)) if name == "w8a8" else 0)
    assert {"prefill.onnx", "decode.onnx"} <= {p.name for p in (bundle.directory / "static").iterdir()}
    if name == "w4a4":
        assert "gain nothing" in bundle.config["form_reason"]


LEAST_COSINE = {"w8a8": 0.99, "w4a8": 0.99, "w4a16": 0.9999, "w4a4": 0.9}


@pytest.mark.parametrize(("name", "kv"), PRECISIONS)
def test_the_simulator_computes_what_the_graphs_say(bundles: Callable[[str, int], Bundle], name: str, kv: int) -> None:
    bundle, ids = bundles(name, kv), np.random.default_rng(2).integers(3, 300, (1, 37))
    logits = {}
    for where in ("model", "static", "simulator"):
        with running_decoder(bundle, where) as decoder:
            first, state, _ = decoder.step(ids[:, :36], decoder.empty())  # 16, 16 and 4 padded
            second, _, _ = decoder.step(ids[:, 36:], state)  # the decode graph
            logits[where] = np.concatenate([first[0], second[0]], 0)
    assert cosine(logits["simulator"], logits["static"]) > LEAST_COSINE[name]
    assert cosine(logits["static"], logits["model"]) > LEAST_COSINE[name] - 0.01


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float((one * other).sum() / np.sqrt((one * one).sum() * (other * other).sum()))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "hidden", "prefill"),
    [(9, 3, 64, 144, 64), (4, 2, 16, 64, 8)],
    ids=["rotary embedding", "merged heads"],
)
def test_shapes_of_attention_that_the_compiler_got_wrong(
    small_plan: Callable[..., Plan],
    tmp_path: Path,
    heads: int,
    kv_heads: int,
    head_dim: int,
    hidden: int,
    prefill: int,
) -> None:
    """Same function, other nodes: with those of ``model.onnx``, cosines of half of the tokens are 0.3."""
    shape = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    model = hf_model("llama", hidden_size=hidden, num_hidden_layers=1, **shape)
    model.save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    folder, plan = tmp_path / "calib", small_plan("w8a8", 8, rotate="offline", prefix="w77 w8 w9")
    calibration = calibrate(load_checkpoint(str(tmp_path / "model")), plan, folder, Stages())
    samples = sample_windows(calibration, folder, Stages())
    options = TargetOptions(prefill_len=prefill, cache_len=prefill + 16, samples=samples, simulation=False)
    build(calibration, folder, find_target("qnn-htp"), tmp_path / "bundle", Stages(), options=options)
    bundle, ids, logits = open_bundle(tmp_path / "bundle"), np.random.default_rng(0).integers(3, 300, (1, prefill)), {}
    for where in ("static", "simulator"):
        with running_decoder(bundle, where) as decoder:
            logits[where] = decoder.step(ids, decoder.empty())[0][0]
    tokens = zip(logits["simulator"], logits["static"], strict=True)
    assert min(cosine(one, other) for one, other in tokens) > 0.98


def test_generate_runs_the_simulator(pq: Runner, bundles: Callable[[str, int], Bundle]) -> None:
    directory = bundles("w4a16", 8).directory
    texts = {}
    for where in ((), ("--on", "static"), ("--on", "model")):
        result = pq("generate", directory, "-p", "w5 w6 w7 w77 w9", "-n", "12", "--raw", "--json", *where)
        assert result.code == 0, result.err
        texts[where] = json.loads(result.out)["text"]
    assert texts[()] == texts["--on", "static"] == texts["--on", "model"]
    assert len(texts[()].split()) == 12


def test_evaluate_on_the_simulator(pq: Runner, bundles: Callable[[str, int], Bundle], other_text_file: Path) -> None:
    found = {}
    text = ("--text", other_text_file, "--windows", "1", "--window", "40", "--json")
    for where in ("model", "static", "simulator"):
        result = pq("evaluate", bundles("w4a16", 8).directory, *text, "--on", where)
        assert result.code == 0, result.err
        found[where] = math.log(json.loads(result.out)["text"]["rows"][0]["perplexity"])
    assert found["static"] == pytest.approx(found["model"], rel=0.005)
    assert found["simulator"] == pytest.approx(found["static"], rel=0.005)


def test_several_chips_and_a_simulator_of_one(pq: Runner, calibrated: Callable[..., Path], tmp_path: Path) -> None:
    lengths = ("--prefill-len", "16", "--cache-len", "48")
    built = pq(
        "build", calibrated("w8a8", 8), "--target", "qnn-htp", "--soc", "SM8750,sm8350", *lengths, "-o", tmp_path / "b"
    )
    assert built.code == 0, built.err
    bundle = open_bundle(tmp_path / "b")
    assert [r["soc_model"] for r in bundle.config["engines"]] == [69, 30]
    with running_decoder(bundle, "simulator", "sm8350") as decoder:
        assert decoder.step(np.array([[5]]), decoder.empty())[0].shape == (1, 1, 320)
    pq.refuses("generate", tmp_path / "b", "-p", "w5", "--soc", "sm8650", code=2, says=("sm8650", "sm8750, sm8350"))


def test_a_context_of_something_else_is_refused(bundles: Callable[[str, int], Bundle], tmp_path: Path) -> None:
    source = bundles("w8a8", 8)
    shutil.copytree(source.directory, tmp_path / "copy")

    def opened(**changes: object) -> None:
        record = {**source.config["engines"][0], **changes}
        open_simulator(tmp_path / "copy", {**source.config, "engines": [record]})

    with pytest.raises(PqExportError, match=r"compiled by onnxruntime-qnn 2\.0\.0, and "):
        opened(package="2.0.0")
    with pytest.raises(IntegrityError, match="records soc_model 69 for sm8650"):
        opened(soc_model=69)
    with pytest.raises(IntegrityError, match="belongs to another context binary"):
        opened(qnn="v1")
    with pytest.raises(IntegrityError, match="is not the context binary"):
        opened(sha256="0" * 64)
    graph = tmp_path / "copy" / "static" / "decode.onnx"
    graph.write_bytes(graph.read_bytes() + b"\0")
    with pytest.raises(IntegrityError, match=r"decode\.onnx: is not the file"):
        opened()
    shutil.copy(source.directory / "static" / "decode.onnx", graph)
    weights = tmp_path / "copy" / "static" / "weights.data"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    with pytest.raises(IntegrityError, match=r"weights\.data: is not the file"):
        opened()
    with pytest.raises(PqExportError, match="has no context binary"):
        open_simulator(tmp_path / "copy", {**source.config, "engines": []})
    for damaged in (None, {"graphs": 3}, {"graphs": {"prefill": "static/prefill.onnx"}}):
        with pytest.raises(IntegrityError, match="does not list the graphs prefill and decode"):
            open_simulator(tmp_path / "copy", {**source.config, "static": damaged})


def test_online_rotations_are_refused_before_any_work(
    pq: Runner, calibrated: Callable[..., Path], checkpoint_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    says = ("cannot execute online Hadamards", "--rotate offline")
    folder = calibrated("w4a8", 8, "online")
    pq.refuses("build", folder, "--target", "qnn-htp", "-o", tmp_path / "b", code=2, says=says)
    model = checkpoint_dir("llama")
    pq.refuses(model, "--w8a8", "--target", "qnn-htp", "--rotate", "online", "-o", tmp_path / "c", code=2, says=says)
    assert not (tmp_path / "b").exists() and not (tmp_path / "c.calib").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--soc", "sm1"), 2, "knows no SoC 'sm1'"),
        (("--sm", "87"), 2, "--sm is not for this target"),
        (("--prefill-len", "64", "--cache-len", "32"), 2, "--prefill-len 64 is longer than the cache"),
        (("--cache-len", "100000"), 2, "--cache-len 100000 is longer than the model's context"),
        (("--wide-outputs", "down_proj,lm_head"), 2, "--wide-outputs: no linear is called 'lm_head'"),
        (("--form", "integer"), 1, "does not run form 'integer'"),
    ],
)
def test_refusals(
    pq: Runner, calibrated: Callable[..., Path], tmp_path: Path, arguments: tuple[str, ...], code: int, says: str
) -> None:
    output = ("--target", "qnn-htp", "-o", tmp_path / "out")
    pq.refuses("build", calibrated("w8a8", 8), *arguments, *output, code=code, says=(says,))
    assert not (tmp_path / "out").exists()


def test_flags_of_npus_are_refused_elsewhere(pq: Runner, calibrated: Callable[..., Path], tmp_path: Path) -> None:
    for flag in (("--soc", "sm8650"), ("--cache-len", "64"), ("--prefill-len", "8"), ("--wide-outputs", "none")):
        for target in ("ort", "trt"):
            out = ("--target", target, "-o", tmp_path / "out")
            pq.refuses("build", calibrated("w8a8", 8), *flag, *out, code=2, says=(f"{flag[0]} is not for this target",))


def test_where_a_bundle_can_run(pq: Runner, bundles: Callable[[str, int], Bundle]) -> None:
    directory = bundles("w8a8", 8).directory
    pq.refuses("generate", directory, "-p", "w5", "--on", "runtime", code=2, says=("no runtime of its own",))
    pq.refuses("generate", directory, "-p", "w5", "--on", "static", "--soc", "sm8650", code=2, says=("--soc is for",))
    on_cuda = ("generate", directory, "-p", "w5", "--device", "cuda")
    for flag in (("--on", "static"), ("--soc", "sm8650")):
        pq.refuses(*on_cuda, *flag, code=2, says=("--on and --soc are for --device cpu",))


def test_soc_numbers_are_those_of_qnn() -> None:
    """A wrong number is not an error for QNN: it compiles for another chip."""
    assert {name: soc.number for name, soc in SOCS.items()} == {
        "sm8350": 30,
        "sm8450": 36,
        "sm8550": 43,
        "sm8650": 57,
        "sm8750": 69,
        "sm8850": 87,
        "sc8380xp": 60,
        "qcm6490": 93,
    }
    assert isinstance(SOCS["sm8650"], Soc)
    with pytest.raises(UsageError, match="knows no SoC"):
        find_profile("qnn-htp").for_soc("snapdragon")


@pytest.fixture(autouse=True)
def no_logs_left() -> Iterator[None]:
    """Logs of simulators that failed on purpose."""
    import tempfile

    folder = Path(tempfile.gettempdir())
    before = set(folder.glob("pq-export-simulator-*.log"))
    yield
    for log in set(folder.glob("pq-export-simulator-*.log")) - before:
        log.unlink(missing_ok=True)


# ---------------------------------------------------------------------------- the real model

MODEL = os.environ.get("PQ_EXPORT_DEMO_MODEL", "")
LINEAR_PARAMETERS = 30 * (576 * 576 * 2 + 576 * 192 * 2 + 576 * 1536 * 3)
OTHER_BYTES = 49152 * 576 * 3 + 8192 * 64 * 2 * 2  # a table of uint16, an int8 lm_head, cos and sin


@pytest.mark.slow
@pytest.mark.skipif(not MODEL, reason="PQ_EXPORT_DEMO_MODEL is not set; 'make test' sets it")
def test_the_whole_real_model_is_compiled(pq: Runner, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    crops = {"calib_samples": 4, "seq_len": 128, "search_samples": 1, "search_seq_len": 64, "steps": ["clip_search"]}
    recipe.write_text(json.dumps({**crops, "rotate": "offline"}), encoding="utf-8")
    made = pq("calibrate", MODEL, "--w4a16", "--kv", "8", "--recipe", recipe, "-o", tmp_path / "calibration")
    assert made.code == 0, made.err
    built = pq("build", tmp_path / "calibration", "--target", "qnn-htp", "--no-simulation", "-o", tmp_path / "bundle")
    assert built.code == 0, built.err
    (record,) = open_bundle(tmp_path / "bundle").config["engines"]
    assert {graph: counts["FullyConnected"] for graph, counts in record["counts"].items()} == {
        "prefill": 211,
        "decode": 211,
    }
    assert (record["bytes"] - OTHER_BYTES) / LINEAR_PARAMETERS < 0.6  # programs of both graphs too
    assert record["peak_rss"] < 4 * 2**30
