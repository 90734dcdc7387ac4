"""``--target openvino``: the real package where it is installed, and every way in which no IR comes to be."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pq_export.build import build
from pq_export.bundle import Bundle, file_record
from pq_export.calibration import ASSETS_NAME, Calibration
from pq_export.errors import PqExportError
from pq_export.execute import running_decoder
from pq_export.runtime import OrtDecoder, generate
from pq_export.stages import Stages
from pq_export.targets import openvino as openvino_target
from pq_export.targets import openvino_compile
from pq_export.targets.base import TargetOptions
from pq_export.targets.openvino import OPENVINO
from pq_export.targets.openvino_compile import Agreement, check_layers, compare, find_openvino, linears_of, make_ir
from pq_export.targets.openvino_decoder import OpenVinoDecoder, open_ir
from tests.conftest import VOCAB

needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")

LINEARS = 14  # of the tiny Llama: two layers of seven
IDS = np.random.default_rng(5).integers(3, VOCAB, (2, 12))


@pytest.fixture(scope="module")
def bundles(
    calibrations: Callable[..., Calibration], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Bundle]:
    """``bundles("w8a8")``: a tiny bundle for OpenVINO, made once."""
    made: dict[str, Bundle] = {}

    def make(name: str) -> Bundle:
        if name not in made:
            folder = tmp_path_factory.mktemp("openvino")
            made[name] = build(calibrations(name), assets_folder(folder), OPENVINO, folder / "out", Stages())
        return made[name]

    return make


def assets_folder(folder: Path) -> Path:
    """A calibration's folder as far as ``build`` reads it: files of a tokenizer to copy."""
    (folder / "calibration" / ASSETS_NAME).mkdir(parents=True)
    return folder / "calibration"


# With the real package.


@needs_openvino
def test_w8a8_runs_in_integers(bundles: Callable[[str], Bundle]) -> None:
    bundle = bundles("w8a8")
    facts = bundle.config["openvino"]
    assert facts["int8_linears"] == facts["wanted_int8"] == facts["quantized_linears"] == LINEARS
    assert facts["agreement"]["cosine"] > 0.9999 and facts["agreement"]["equal_codes"] > 0.99
    assert bundle.config["form"] == "qdq" and facts["openvino"].startswith(find_openvino()[1])
    files = {name for name in bundle.config["files"] if name.startswith("openvino/")}
    names = ("model.xml", "model.bin", "config.json", "layers.json", "compile.log")
    assert files == {f"openvino/{name}" for name in names}
    layers = json.loads((bundle.directory / facts["layers"]).read_text())
    products = [layer for layer in layers if layer["type"] == "FullyConnected"]
    assert [layer["precision"] for layer in products].count("i8") == LINEARS
    assert any("q_proj" in layer["made_of"] for layer in products)
    properties = json.loads((bundle.directory / "openvino/config.json").read_text())
    assert properties == {"CPU": {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}}
    assert str(bundle.directory.parent) not in (bundle.directory / "openvino/model.xml").read_text()


@needs_openvino
def test_four_bits_are_unpacked_and_said_so(bundles: Callable[[str], Bundle]) -> None:
    bundle = bundles("w4a8")
    facts = bundle.config["openvino"]
    assert (facts["quantized_linears"], facts["wanted_int8"], facts["int8_linears"]) == (LINEARS, 0, 0)
    assert facts["counts"]["FullyConnected i4"] == LINEARS, "the weights have 4 bits in memory"
    assert "unpacks INT4 weights to fp32" in bundle.config["form_reason"]
    assert facts["agreement"]["cosine"] > 0.99


@needs_openvino
def test_the_decoder_is_that_of_onnxruntime(bundles: Callable[[str], Bundle]) -> None:
    bundle = bundles("w8a8")
    ours, theirs = open_ir(bundle.directory, threads=1), OrtDecoder(bundle.model_path)
    mask = np.ones_like(IDS)
    mask[1, :5] = 0
    found, state, nothing = ours.step(IDS, ours.empty(2), mask=mask)
    expected, reference, _ = theirs.step(IDS, theirs.empty(2), mask=mask)
    assert nothing == [] and found.dtype == np.float32 and found.shape == (2, 12, VOCAB)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    kept = {name: codes.copy() for name, codes in state.past.items()}
    for name, codes in reference.past.items():
        assert codes.dtype == kept[name].dtype == np.uint8
        np.testing.assert_array_equal(kept[name], codes)
    token = IDS[:, :1]
    step, after, _ = ours.step(token, state, last_only=True)
    np.testing.assert_allclose(step, theirs.step(token, reference, last_only=True)[0], atol=1e-3)
    assert ours.step(IDS, ours.empty(2), last_only=True)[0].shape == (2, 1, VOCAB)
    for name, codes in kept.items():
        np.testing.assert_array_equal(state.past[name], codes, "a step must not write to an earlier state")
        assert after.past[name].shape[2] == codes.shape[2] + 1


@needs_openvino
def test_it_generates_the_same_tokens(bundles: Callable[[str], Bundle]) -> None:
    """As ``pq-export generate --on runtime`` does."""
    bundle, tokens = bundles("w8a8"), []
    for run_on, kind in (("runtime", OpenVinoDecoder), (None, OrtDecoder)):
        with running_decoder(bundle, run_on) as decoder:
            assert isinstance(decoder, kind)
            tokens.append(list(generate(decoder, [5, 17, 40], 20, set())))
    assert tokens[0] == tokens[1] and len(set(tokens[0])) > 1


@needs_openvino
def test_without_its_properties_openvino_is_not_static(bundles: Callable[[str], Bundle]) -> None:
    """By default it quantizes the inputs of INT4 linears anew for each token. The IR says not to, also to others."""
    import openvino as ov

    bundle = bundles("w4a8")
    core, ir = ov.Core(), str(bundle.directory / "openvino/model.xml")
    assert core.compile_model(ir, "CPU").get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 0
    theirs = OrtDecoder(bundle.model_path)
    expected = theirs.step(IDS, theirs.empty(2))[0]

    def error(properties: dict[str, str]) -> float:
        compiled = core.compile_model(str(bundle.model_path), "CPU", properties)
        feeds = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), **theirs.empty(2).past}
        logits = compiled({**feeds, "position_ids": np.tile(np.arange(12), (2, 1))})["logits"]
        return float(np.abs(logits - expected).max())

    static = error(openvino_compile.PROPERTIES)
    assert error({"INFERENCE_PRECISION_HINT": "f32"}) > 10 * max(static, 1e-3)


@needs_openvino
def test_the_ir_can_be_pinned_to_fixed_shapes(bundles: Callable[[str], Bundle]) -> None:
    """As Intel's NPUs need it: a cache of fixed size whose unused columns, in front, the mask hides."""
    import openvino as ov

    bundle, new, cached = bundles("w8a8"), 4, 16
    decoder = open_ir(bundle.directory)
    ids = IDS[:1]
    expected, state, _ = decoder.step(ids, decoder.empty())
    wanted = decoder.step(ids[:, :new], state)[0]
    model = ov.Core().read_model(str(bundle.directory / "openvino/model.xml"))
    shapes = {"input_ids": [1, new], "position_ids": [1, new], "attention_mask": [1, cached + new]}
    shapes |= {name: [1, codes.shape[1], cached, codes.shape[3]] for name, codes in state.past.items()}
    model.reshape({**shapes, "num_logits_to_keep": [1]})
    assert not any(value.get_partial_shape().is_dynamic for value in model.inputs)
    assert not any(o.get_partial_shape().is_dynamic for o in model.outputs if o.get_any_name() != "logits")
    filled = ids.shape[1]
    feeds = {"input_ids": ids[:, :new], "position_ids": np.arange(filled, filled + new)[None]}
    feeds["attention_mask"] = np.concatenate(
        [np.zeros((1, cached - filled), np.int64), np.ones((1, filled + new), int)], 1
    )
    feeds |= {
        name: np.concatenate([np.full((1, c.shape[1], cached - filled, c.shape[3]), 7, np.uint8), c], 2)
        for name, c in state.past.items()
    }
    feeds["num_logits_to_keep"] = np.zeros(1, np.int64)
    found = ov.compile_model(model, "CPU", openvino_compile.PROPERTIES)(feeds)["logits"]
    np.testing.assert_allclose(found, wanted, atol=1e-3)
    assert np.abs(expected).max() > 1


@needs_openvino
def test_the_same_file_makes_the_same_ir(bundles: Callable[[str], Bundle], tmp_path: Path) -> None:
    bundle = bundles("w8a8")
    found = OPENVINO.finish(again(bundle, tmp_path), bundle.config, TargetOptions(), Stages())
    for name in ("model.xml", "model.bin", "layers.json"):
        assert file_record(tmp_path / "openvino" / name) == bundle.config["files"][f"openvino/{name}"]
    assert found["openvino"]["counts"] == bundle.config["openvino"]["counts"]


@needs_openvino
def test_another_answer_than_onnxruntimes_is_refused(
    bundles: Callable[[str], Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundles("w8a8")
    wrong = Agreement(tokens=17, cosine=0.985, max_error=1.0, max_logit=2.0, equal_codes=0.5)
    monkeypatch.setattr(openvino_compile, "compare", lambda *_: wrong)
    with pytest.raises(PqExportError, match=r"cosine 0\.9850, at least 0\.99 is expected at 8-bit activations"):
        OPENVINO.finish(again(bundle, tmp_path), bundle.config, TargetOptions(), Stages())


def again(bundle: Bundle, folder: Path) -> Path:
    """``folder`` with the graph of ``bundle`` alone."""
    shutil.copy(bundle.model_path, folder)
    return folder


@needs_openvino
def test_what_openvino_refuses_is_one_line(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.onnx", domain="nowhere")
    with pytest.raises(
        PqExportError, match=r"^OpenVINO IR: OpenVINO refuses it: .*The log: .*openvino\.compile\.log\.$"
    ) as e:
        make_ir(model, tmp_path / "out", no_reference, [1], 2, failed_logs=tmp_path)
    assert "\n" not in str(e.value)
    assert not list((tmp_path / "out/openvino").iterdir())


@needs_openvino
def test_a_damaged_ir_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.xml").write_text("<net")
    with pytest.raises(PqExportError, match=r"model\.xml: OpenVINO cannot load it \(.*Build the bundle again\."):
        OpenVinoDecoder(tmp_path / "model.xml")


# Without it.


def write_model(path: Path, domain: str = "") -> Path:
    """One node: enough for whoever only reads inputs and nodes."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "logits"))
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["logits"], domain=domain)], "g", [x], [y])
    opsets = [helper.make_opsetid(name, 1 if name else 21) for name in {"", domain}]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def no_reference(input_ids: list[int], next_id: int) -> dict[str, np.ndarray]:
    raise AssertionError("nothing to compare with")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """``stand_in(code)``: a worker that says "last words" and runs ``code``; a model for it."""

    def make(code: str) -> Path:
        worker = tmp_path / "worker.py"
        worker.write_text(f"import json, os, sys, time\nprint('last words', flush=True)\n{code}\n")
        monkeypatch.setattr(openvino_compile, "WORKER", worker)
        monkeypatch.setattr(openvino_compile, "find_openvino", lambda: (tmp_path, "2026.4.1"))
        return write_model(tmp_path / "model.onnx")

    return make


@pytest.mark.parametrize(
    "code, said",
    [
        ("os.abort()", "OpenVINO ended by SIGABRT"),
        ("os.kill(os.getpid(), 9)", "SIGKILL, which the kernel sends when memory runs out"),
        ("sys.exit(3)", "OpenVINO failed: last words"),
        ("pass", "OpenVINO failed: last words"),
        ("time.sleep(60)", "OpenVINO took more than 1.5 s"),
        ("r = json.load(open(sys.argv[1])); json.dump({'error': 'no.'}, open(r['result'], 'w'))", "OpenVINO IR: no"),
        ("r = json.load(open(sys.argv[1])); open(r['result'], 'w').write('[')", "OpenVINO failed: last words"),
    ],
)
def test_a_worker_that_fails_is_one_line_and_a_log(
    code: str, said: str, stand_in: Callable[[str], Path], tmp_path: Path
) -> None:
    model = stand_in(code)
    with pytest.raises(PqExportError) as error:
        make_ir(model, tmp_path / "out", no_reference, [1], 2, failed_logs=tmp_path, timeout=1.5)
    text = str(error.value)
    assert said in text and "\n" not in text and text.endswith(f"The log: {tmp_path}/openvino.compile.log.")
    assert (tmp_path / "openvino.compile.log").read_text().startswith("last words")
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["openvino"], "nothing of a failure stays"


def test_a_missing_package_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PqExportError, match=r"OpenVINO is not installed.* pip install openvino==.*Apache-2\.0"):
        OPENVINO.resolve(TargetOptions(), None)


def test_it_takes_no_flags_of_other_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_target, "find_openvino", lambda: (Path(), "2026.4.1"))
    with pytest.raises(PqExportError, match="--soc is not for this target"):
        OPENVINO.resolved(TargetOptions(socs=("sm8650",)), None)


def linear_model(x: int, weight: int) -> onnx.ModelProto:
    """x -> Q -> DQ -> MatMul <- DQ <- codes, with the code types ``x`` and ``weight``; 0: without those of x."""
    tensors = [numpy_helper.from_array(np.float32(1), "s"), helper.make_tensor("w", weight, [2, 2], [1, 2, 3, 4])]
    nodes = [helper.make_node("DequantizeLinear", ["w", "s"], ["wide"])]
    if x:
        tensors.append(helper.make_tensor("zero", x, [], [0]))
        nodes.append(helper.make_node("QuantizeLinear", ["x", "s", "zero"], ["codes"]))
        nodes.append(helper.make_node("DequantizeLinear", ["codes", "s", "zero"], ["values"]))
    nodes.append(helper.make_node("MatMul", ["values" if x else "x", "wide"], ["y"], name="layers.0.up_proj/product"))
    return helper.make_model(helper.make_graph(nodes, "g", [], [], tensors))


@pytest.mark.parametrize(
    "x, weight, integer",
    [
        (TensorProto.INT8, TensorProto.INT8, True),
        (TensorProto.UINT8, TensorProto.INT8, True),
        (TensorProto.INT8, TensorProto.INT4, False),
        (TensorProto.INT4, TensorProto.INT8, False),
        (TensorProto.UINT16, TensorProto.INT8, False),
        (0, TensorProto.INT8, False),
    ],
)
def test_which_linears_can_be_integer_products(x: int, weight: int, integer: bool) -> None:
    assert linears_of(linear_model(x, weight)) == {"layers.0.up_proj": integer}


def test_a_linear_that_could_be_int8_and_is_not_is_refused() -> None:
    def layer(name: str, precision: str) -> dict[str, str]:
        return {"type": "FullyConnected", "name": "f", "made_of": f"{name}/product", "precision": precision}

    linears, log = {"up": True, "down": True, "gate": False}, Path("the.log")
    good = [layer("up", "i8"), layer("down", "u8"), layer("gate", "f32")]
    assert check_layers(good, linears, True, "a CPU", log) == 2
    bad = [layer("up", "i8"), layer("down", "f32"), layer("gate", "f32")]
    with pytest.raises(
        PqExportError, match=r"^down: OpenVINO runs 1 of 2 int8 linears as integers on a CPU\..*the\.log"
    ):
        check_layers(bad, linears, True, "a CPU", log)
    assert check_layers(bad, linears, False, "a CPU without int8", log) == 1


def test_how_answers_are_compared() -> None:
    answer = {"prefill": np.array([3.0, 0]), "decode": np.array([0.0, 4]), "present.0.key": np.array([1, 2], np.uint8)}
    other = {**answer, "prefill": np.array([3.0, 1]), "present.0.key": np.array([1, 3], np.uint8)}
    found = compare(other, answer, 3)
    assert (found.max_error, found.max_logit, found.equal_codes) == (1.0, 4.0, 0.5)
    assert found.cosine == pytest.approx(25 / (5 * np.sqrt(26)))
    floats = {**answer, "present.0.key": np.array([0.5])}
    assert compare(floats, floats, 3).equal_codes is None
    with pytest.raises(PqExportError, match="not finite"):
        compare({**answer, "decode": np.array([np.nan, 0])}, answer, 3)
