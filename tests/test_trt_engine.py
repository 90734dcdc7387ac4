"""The engine for this machine's GPU: real polygraphy, a real builder (TensorRT for RTX), onnxruntime for the GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from pq_export.build import build
from pq_export.bundle import Bundle, file_record, open_bundle
from pq_export.calib.checkpoint import load_checkpoint
from pq_export.calib.pipeline import calibrate
from pq_export.calibration import load_calibration
from pq_export.errors import PqExportError
from pq_export.execute import open_decoder
from pq_export.plan import Plan
from pq_export.stages import Stages
from pq_export.targets import find_target, trt_engine, trt_worker
from pq_export.targets.base import TargetOptions
from pq_export.targets.tensorrt_levels import OLDEST
from pq_export.targets.tensorrt_options import Profile, profiles
from tests.conftest import hf_model, word_tokenizer
from tests.plugins.conftest import cached, pip, plugin_library, rtx_environment, tensorrt_include  # noqa: F401
from tests.plugins.test_tensorrt import linears

POLYGRAPHY = "polygraphy==0.53.6"
SM = 86
OPTIONS = TargetOptions(sms=(SM,), max_batch_size=2, max_input_len=16, max_seq_len=48)

# The worker as it is, but for what takes a GPU: TensorRT for RTX builds for one that is not here, and the session of
# onnxruntime over the graph in standard operators, which the test has put beside it, runs in the engine's place.
WITHOUT_A_GPU = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("trt_worker", {worker!r})
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
worker.MODULE = "tensorrt_rtx"
configure = worker.configuration

def configuration(trt, request):
    def configured(builder, network):
        config = configure(trt, request)(builder, network)
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM{sm}, 0)
        assert config.num_optimization_profiles == 2
        return config
    return configured

def engine_runner(engine, profile):
    import onnxruntime
    from polygraphy.backend.onnxrt import OnnxrtRunner
    return OnnxrtRunner(onnxruntime.InferenceSession({model!r}, providers=["CPUExecutionProvider"]))

worker.configuration, worker.engine_runner = configuration, engine_runner
worker.load_engine = lambda content: None
worker.list_layers = lambda trt, engine: [{{"Name": "a", "LayerType": "gemm"}}, "b"]
worker.check_version = lambda version, oldest: None
sys.path.pop(0)
worker.main(sys.argv[1])
"""


class Notes:
    """Progress that keeps what the user is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def start(self, title: str, total: int | None) -> None: ...
    def advance(self, steps: int = 1) -> None: ...
    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="session")
def polygraphy_site() -> Path:
    """The folder that polygraphy is imported from."""

    def make(directory: Path) -> None:
        pip("install", POLYGRAPHY, "--target", str(directory))

    return cached("polygraphy-0.53.6", make)


@pytest.fixture
def polygraphy(polygraphy_site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Polygraphy, importable."""
    monkeypatch.syspath_prepend(str(polygraphy_site))


@pytest.fixture(scope="module")
def calibration_directory(small_plan: Callable[..., Plan], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    hf_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(folder / "checkpoint")
    word_tokenizer().save_pretrained(folder / "checkpoint")
    calibrate(load_checkpoint(str(folder / "checkpoint")), small_plan("w8a8"), folder / "calibration", Stages())
    return folder / "calibration"


@pytest.fixture(scope="module")
def bundle(calibration_directory: Path) -> Bundle:
    return make(calibration_directory, calibration_directory.with_name("bundle"))


def make(calibration_directory: Path, output: Path) -> Bundle:
    calibration = load_calibration(calibration_directory)
    return build(calibration, calibration_directory, find_target("trt"), output, Stages(), options=OPTIONS)


def worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    (tmp_path / "worker.py").write_text(text)
    monkeypatch.setattr(trt_engine, "WORKER", tmp_path / "worker.py")


def versions(tensorrt: str | None) -> Callable[[str], str]:
    def version(name: str) -> str:
        if tensorrt is None:
            raise metadata.PackageNotFoundError(name)
        return tensorrt

    return version


def gpus(monkeypatch: pytest.MonkeyPatch, *sms: int, modules: tuple[str, ...] = trt_engine.MODULES) -> None:
    """A machine with GPUs of ``sms`` and these Python modules."""
    monkeypatch.setattr(trt_engine, "local_sms", lambda: list(sms))
    monkeypatch.setattr(
        trt_engine,
        "importlib",
        SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: name if name in modules else None)),
    )


# What an engine is compared with.


def test_steps_are_a_prefill_and_a_decode_step_behind_it(bundle: Bundle) -> None:
    wanted = profiles(bundle.config, OPTIONS)
    prefill, decode = trt_engine.reference_steps(bundle, wanted)
    assert (prefill.name, prefill.profile, prefill.tokens) == ("prefill", 0, 16)
    assert (decode.name, decode.profile, decode.tokens) == ("decode", 1, 1)
    for step, profile in ((prefill, wanted[0]), (decode, wanted[1])):
        assert step.inputs.keys() == profile.shapes.keys()
        for name, (smallest, _, largest) in profile.shapes.items():
            shape = step.inputs[name].shape
            assert all(a <= n <= b for a, n, b in zip(smallest, shape, largest, strict=True)), name
    assert decode.inputs["past_key_values.1.value"].dtype == np.int8
    ids = np.concatenate([prefill.inputs["input_ids"], decode.inputs["input_ids"]], axis=1)
    whole, state, _ = open_decoder(bundle).step(ids, open_decoder(bundle).empty())
    np.testing.assert_allclose(prefill.outputs["logits"][0, 0], whole[0, 15], rtol=0, atol=1e-4)
    for name, codes in state.past.items():
        present = decode.outputs[name.replace("past_key_values", "present")]
        assert np.mean(present != codes) < 0.01 and present.shape == codes.shape


class Echo:
    """A runner that answers what it was made with."""

    def __init__(self, outputs: dict[str, np.ndarray]):
        self.outputs = outputs

    def __enter__(self) -> Echo:
        return self

    def __exit__(self, *_: object) -> None: ...

    def infer(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.outputs


@pytest.fixture
def compared(
    polygraphy: None, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """``compared({"logits": change, ...})``: the worker's answer where the engine's decode step has these outputs."""
    step = trt_engine.reference_steps(bundle, profiles(bundle.config, OPTIONS))[1]
    request = trt_engine._written(step, tmp_path)

    def answer(changes: dict[str, Any]) -> dict[str, Any]:
        outputs = {name: values.copy() for name, values in step.outputs.items()}
        for name, change in changes.items():
            outputs[name] = change(outputs[name])
        monkeypatch.setattr(trt_worker, "engine_runner", lambda engine, profile: Echo(outputs))
        return trt_worker.compare(request, None)

    return answer


def test_equal_outputs_pass(compared: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    answer = compared({})
    assert answer["passed"] and answer["past_kept"]
    assert all(figures["equal"] == 1 and figures["max_difference"] == 0 for figures in answer["outputs"].values())
    judged = {name for name, figures in answer["outputs"].items() if figures["limit"] is not None}
    assert judged == {"logits", *(f"present.{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value"))}
    trt_engine.check_agreement([answer], "engine", Path("log"))


def last(change: Callable[[np.ndarray], Any]) -> Callable[[np.ndarray], np.ndarray]:
    """``change`` applied to the new token of a cache."""

    def changed(values: np.ndarray) -> np.ndarray:
        values[:, :, -1] = change(values[:, :, -1])
        return values

    return changed


def past(values: np.ndarray) -> np.ndarray:
    values[0, 0, 3, 0] += 1
    return values


def broken(values: np.ndarray) -> np.ndarray:
    values[0, 0, 0] = np.nan
    return values


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"logits": lambda values: values + 2 * values.std()}, "logits differs from onnxruntime's by .* in the mean"),
        ({"logits": np.zeros_like}, "logits differs"),
        ({"logits": broken}, "logits differs"),
        ({"present.0.value": last(lambda codes: -codes)}, "present.0.value differs"),
        ({"present.1.key": past}, "the cache does not come back as it went in"),
        ({"present.1.key": lambda codes: np.where(np.arange(17)[:, None] < 16, codes, np.nan)}, "differs .* by nan"),
    ],
)
def test_other_outputs_do_not(
    compared: Callable[[dict[str, Any]], dict[str, Any]], changes: dict[str, Any], said: str
) -> None:
    answer = json.loads(json.dumps(compared(changes)))
    assert not answer["passed"]
    with pytest.raises(PqExportError, match=f"^engine, decode: .*{said}") as caught:
        trt_engine.check_agreement([answer], "engine", Path("x.log"))
    assert "x.log" in str(caught.value) and "\n" not in str(caught.value)


def test_some_codes_may_differ(compared: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """A tie that falls the other way changes codes behind it: half of the second layer's may, not of the first's."""
    every_second = last(lambda codes: codes ^ (np.arange(16) % 2).astype(np.int8))
    answer = compared({"present.1.key": every_second})
    assert answer["passed"] and trt_engine._judged(answer)["lowest_share_of_equal_codes"] == 0.5
    assert not compared({"present.0.key": every_second})["passed"]


@pytest.mark.parametrize("wrong", [lambda values: values[..., :-1], None])
def test_outputs_of_another_graph_are_refused(
    compared: Callable[[dict[str, Any]], dict[str, Any]], monkeypatch: pytest.MonkeyPatch, wrong: Any
) -> None:
    if wrong is None:
        monkeypatch.setattr(Echo, "infer", lambda self, feeds: {})
    with pytest.raises(trt_worker.RefusedError):
        compared({"logits": wrong} if wrong else {})


def test_an_older_tensorrt_is_refused() -> None:
    trt_worker.check_version("10.3.0.26", "10.3")
    trt_worker.check_version("11.1", "10.3")
    with pytest.raises(trt_worker.RefusedError, match=r"TensorRT 10.2.0 is older than 10.3"):
        trt_worker.check_version("10.2.0", "10.3")


# Building.


@pytest.fixture
def builder(
    rtx_environment: dict[str, str],  # noqa: F811
    polygraphy_site: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The worker with TensorRT for RTX, in an environment where it can be imported."""
    monkeypatch.setenv("PYTHONPATH", f"{polygraphy_site}:{rtx_environment['PYTHONPATH']}")
    monkeypatch.setenv("LD_LIBRARY_PATH", rtx_environment["LD_LIBRARY_PATH"])
    monkeypatch.setenv("POLYGRAPHY_USE_TENSORRT_RTX", "1")
    text = WITHOUT_A_GPU.format(worker=str(trt_engine.WORKER), sm=SM, model=str(tmp_path / "reference.onnx"))
    worker(monkeypatch, tmp_path, text)


def test_an_engine_is_built_and_compared(
    builder: None, bundle: Bundle, calibration_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it, with a builder that needs no GPU, and onnxruntime in the engine's place."""
    reference = find_target("trt").executable(onnx.load(bundle.model_path))
    for tensor in reference.graph.initializer:
        if tensor.name == "num_logits_to_keep":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.ones(1, np.int64), tensor.name))
    onnx.save(reference, tmp_path / "reference.onnx")
    gpus(monkeypatch, SM)
    made = make(calibration_directory, tmp_path / "made")
    (record,) = made.config["engines"]
    assert made.config["deploy"]["remaining"] is None
    assert record["file"] == "engines/sm86.engine" and record["plugin"] is None
    engine = made.directory / record["file"]
    assert record["bytes"] == engine.stat().st_size > 100_000
    assert record["sha256"] == made.config["files"][record["file"]]["sha256"]
    assert record["tensorrt"].startswith("1.") and record["counts"] == {"gemm": 1, "unknown": 1}
    assert record["peak_rss"] > 2**20 and record["comparison"]["polygraphy"] == "0.53.6"
    for step in record["comparison"]["steps"]:
        assert step["lowest_share_of_equal_codes"] > 0.99
        assert step["outputs"]["logits"]["mean_difference"] < step["outputs"]["logits"]["limit"]
    assert {path.name for path in (made.directory / "engines").iterdir()} == {
        *("sm86.engine", "sm86.layers.json", "sm86.log")
    }
    open_bundle(made.directory)
    assert not list(tmp_path.glob("*.log"))


def plugin_profiles() -> list[Profile]:
    sizes = {"x": [(1, n, 96) for n in (1, 4, 8)], "z": [(1, n, 64) for n in (1, 4, 8)]}
    return [Profile(name, {key: (a, b, c) for key, (a, b, c) in sizes.items()}) for name in ("prefill", "decode")]


def test_an_engine_with_the_plugin(builder: None, plugin_library: Path, tmp_path: Path) -> None:  # noqa: F811
    """TensorRT gets the library from its registry: polygraphy's own loader would only open it."""
    (tmp_path / "bundle/deploy").mkdir(parents=True)
    model, library = tmp_path / "bundle/model.onnx", tmp_path / "bundle/deploy/libpq-sm86.so"
    onnx.save(linears(SM), model)
    with pytest.raises(PqExportError, match=r"engine for SM86: .*Plugin not found.*sm86\.log"):
        trt_engine.build_engine(model, model.parent, SM, plugin_profiles(), [], OLDEST, None)
    library.symlink_to(plugin_library)
    record = trt_engine.build_engine(model, model.parent, SM, plugin_profiles(), [], OLDEST, library)
    assert record.plugin == "deploy/libpq-sm86.so" and record.plugin_sha256 == file_record(library)["sha256"]


ANSWERS = [
    ("sys.exit(3)", "TensorRT failed: last words"),
    ("os.kill(os.getpid(), signal.SIGSEGV)", "TensorRT ended by SIGSEGV"),
    (
        "json.dump({'error': 'no memory', 'where': 'MatMul 3', 'cure': 'Buy some.'}, open(request['result'], 'w'))",
        "MatMul 3: no memory. Buy some.",
    ),
]


@pytest.mark.parametrize("line, said", ANSWERS)
def test_a_build_that_fails_is_one_line_and_leaves_the_log(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, said: str
) -> None:
    head = "import json, os, signal, sys\nrequest = json.load(open(sys.argv[1]))\nprint('last words', flush=True)\n"
    worker(monkeypatch, tmp_path, head + line)
    wanted = profiles(bundle.config, OPTIONS)
    with pytest.raises(PqExportError, match=f"engine for SM86.*{said}") as caught:
        trt_engine.build_engine(bundle.model_path, tmp_path / "made", SM, wanted, [], OLDEST, None)
    assert "\n" not in str(caught.value) and str(tmp_path / "sm86.log") in str(caught.value)
    assert (tmp_path / "sm86.log").read_text() == "last words\n" and not list((tmp_path / "made/engines").iterdir())


def test_memory_is_estimated_before(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker(monkeypatch, tmp_path, "raise SystemExit('was started')")
    gpus(monkeypatch, SM)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**28))
    notes = Notes()
    assert trt_engine.build_here(bundle.directory, bundle.config, OPTIONS, OLDEST, Stages(notes)) is None
    (note,) = notes.notes
    assert note.startswith("no engine is built here: ") and "GiB of memory, 0.2 are free" in note


@pytest.mark.parametrize(
    "here, modules, version, said",
    [
        ((), trt_engine.MODULES, None, None),
        ((90,), trt_engine.MODULES, None, None),
        ((SM,), ("polygraphy",), None, 'no module tensorrt. Install it: pip install "pq-export[trt]"'),
        ((SM,), ("tensorrt",), None, "no module polygraphy"),
        ((SM,), trt_engine.MODULES, "8.6.1", f"TensorRT 8.6.1 is older than {OLDEST.name}"),
        ((SM, 90), trt_engine.MODULES, None, "different GPUs, SM 86, 90. Choose one with CUDA_VISIBLE_DEVICES"),
    ],
)
def test_where_none_can_be_built_the_bundle_is_whole(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    here: tuple[int, ...],
    modules: tuple[str, ...],
    version: str | None,
    said: str | None,
) -> None:
    worker(monkeypatch, tmp_path, "raise SystemExit('was started')")
    gpus(monkeypatch, *here, modules=modules)
    monkeypatch.setattr("importlib.metadata.version", versions(version))
    notes = Notes()
    assert trt_engine.build_here(tmp_path, {"form": "qdq"}, OPTIONS, OLDEST, Stages(notes)) is None
    assert [said in note for note in notes.notes] == [True] if said else not notes.notes


def test_the_plugin_is_found_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a library and without TensorRT's headers: what builds one. With one for all GPUs: that one."""
    gpus(monkeypatch, SM)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "10.14.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr(trt_engine, "find_tensorrt", lambda option: None)
    notes, deploy = Notes(), tmp_path / "deploy"
    deploy.mkdir()
    assert trt_engine.build_here(tmp_path, {"form": "plugin"}, OPTIONS, OLDEST, Stages(notes)) is None
    assert "no engine is built here: no library with the TensorRT plugin is built for sm_86" in notes.notes[0]
    (tmp_path / "libpq.so").write_text("for sm_86")
    monkeypatch.setattr(trt_engine, "find_library", lambda sm, plugin: tmp_path / "libpq.so")
    assert trt_engine._library(tmp_path, SM, Stages()) == deploy / "libpq-sm86.so"
    assert (deploy / "libpq-sm86.so").read_text() == "for sm_86"
    (deploy / "libpq.so").touch()
    assert trt_engine._library(tmp_path, SM, Stages()) == deploy / "libpq.so"


def test_the_worker_stands_alone() -> None:
    """It is run by its path, so nothing of this package can be imported there."""
    text = Path(trt_worker.__file__).read_text()
    assert "from pq_export" not in text and "import pq_export" not in text
