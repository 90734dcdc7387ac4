"""``--target trt-rtx`` from a calibration to an engine, with the real builder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from pq_export.build import build
from pq_export.bundle import Bundle, open_bundle, size_by_part
from pq_export.calib.checkpoint import load_checkpoint
from pq_export.calib.pipeline import calibrate
from pq_export.calibration import load_calibration
from pq_export.plan import Plan
from pq_export.stages import Stages
from pq_export.targets import find_target
from pq_export.targets.base import TargetOptions
from tests.cli_runner import Runner
from tests.conftest import hf_model, word_tokenizer
from tests.plugins.conftest import plugin_library, rtx_environment, tensorrt_include  # noqa: F401
from tests.plugins.libraries import CACHE
from tests.test_rtx_engines import package  # noqa: F401

LINEARS = 2 * 7
OPTIONS = TargetOptions(sms=(86,), max_input_len=16, max_seq_len=48)


@pytest.fixture(scope="module")
def calibrated(small_plan: Callable[..., Plan], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``calibrated("w4a4")`` -> calibration directory of a tiny Llama with a prefix, made once."""
    folder = tmp_path_factory.mktemp("rtx")
    hf_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(folder / "checkpoint")
    word_tokenizer().save_pretrained(folder / "checkpoint")

    def make(precision: str) -> Path:
        directory = folder / precision
        if not directory.exists():
            plan = small_plan(precision, prefix="w77 w8 w9")
            calibrate(load_checkpoint(str(folder / "checkpoint")), plan, directory, Stages())
        return directory

    return make


def built(directory: Path, output: Path, form: str | None) -> Bundle:
    target, calibration = find_target("trt-rtx"), load_calibration(directory)
    return build(calibration, directory, target, output, Stages(), form=form, options=OPTIONS)


@pytest.mark.parametrize(
    ("precision", "form"),
    [("w4a4", "qdq"), ("w4a8", "qdq"), ("w8a8", None), ("w4a16", None), ("w4a16", "qdq")],
)
def test_q_dq_becomes_an_engine(
    package: Path,  # noqa: F811
    calibrated: Callable[[str], Path],
    tmp_path: Path,
    precision: str,
    form: str | None,
) -> None:
    bundle = built(calibrated(precision), tmp_path / "out", form)
    (record,) = bundle.config["engines"]
    assert (bundle.config["form"], record["sm"]) == ("qdq", 86) and "custom_layer" not in record["counts"]
    assert "plugin" not in bundle.config and bundle.config["deploy"]["remaining"] is None
    assert (bundle.directory / record["file"]).stat().st_size == record["bytes"]


@pytest.mark.parametrize("precision", ["w4a4", "w4a8"])
def test_the_plugin_becomes_an_engine(
    package: Path,  # noqa: F811
    plugin_library: Path,  # noqa: F811
    calibrated: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(CACHE))
    bundle = built(calibrated(precision), tmp_path / "out", None)
    (record,) = bundle.config["engines"]
    assert (
        bundle.config["form"] == "plugin" and record["counts"]["custom_layer"] == 2 * LINEARS
    )  # each in both profiles
    assert bundle.config["plugin"] == record["plugin"] == "deploy/libpq-sm86.so"
    assert (bundle.directory / "deploy" / "libpq-sm86.so").read_bytes() == plugin_library.read_bytes()


# The real model.

MODEL = os.environ.get("PQ_EXPORT_DEMO_MODEL", "")
REAL_LINEARS, REAL_PARAMETERS = 30 * 7, 30 * (576 * 576 * 2 + 576 * 192 * 2 + 576 * 1536 * 3)


@pytest.mark.slow
@pytest.mark.skipif(not MODEL, reason="PQ_EXPORT_DEMO_MODEL is not set; 'make test' sets it")
def test_the_whole_real_model_becomes_an_engine(
    package: Path,  # noqa: F811
    plugin_library: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(CACHE))
    pq, recipe = Runner(monkeypatch, capsys), tmp_path / "recipe.yaml"
    crops = {"calib_samples": 4, "seq_len": 128, "search_samples": 1, "search_seq_len": 64, "steps": ["clip_search"]}
    recipe.write_text(json.dumps(crops), encoding="utf-8")
    made = pq("calibrate", MODEL, "--w4a4", "--recipe", recipe, "-o", tmp_path / "calibration")
    assert made.code == 0, made.err
    done = pq("build", tmp_path / "calibration", "--target", "trt-rtx", "--sm", "86", "-o", tmp_path / "bundle")
    assert done.code == 0, done.err
    bundle = open_bundle(tmp_path / "bundle")
    (record,) = bundle.config["engines"]
    assert record["counts"]["custom_layer"] == 2 * REAL_LINEARS
    linears = next(part for part in size_by_part(onnx.load(bundle.model_path)) if part["part"] == "quantized linears")
    assert linears["parameters"] == REAL_PARAMETERS and linears["bytes_per_parameter"] <= 0.53
