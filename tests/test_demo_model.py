"""The real model, end to end: SmolLM2-135M-Instruct from its GGUF, on the CPU.

``make test`` says where the model is; without it these tests have nothing to run on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from pq_export.calib.text import builtin_text, tokenize, windows
from pq_export.calibration import load_calibration
from pq_export.simulate import simulated_decoder
from pq_export.validate.perplexity import perplexity, torch_logits

MODEL = os.environ.get("PQ_EXPORT_DEMO_MODEL", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODEL, reason="PQ_EXPORT_DEMO_MODEL is not set; 'make test' sets it"),
]
GIB = 1024**3


def pq(*arguments: object) -> Any:
    """Run the command line with ``--json`` and return its document; it must pass."""
    done = subprocess.run(
        [sys.executable, "-m", "pq_export", *map(str, arguments), "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def recipe_file(folder: Path, **content: object) -> Path:
    """A recipe (JSON is YAML) with a smaller search than the defaults: minutes matter in CI."""
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({"seq_len": 256, "search_seq_len": 128, **content}))
    return path


@pytest.fixture(scope="module")
def w4a4(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """W4A4KV4 with GPTQ on little text; one window of perplexity."""
    folder = tmp_path_factory.mktemp("w4a4")
    steps = ["center", "clip_search", {"gptq": {"samples": 4, "refine": 0}}]
    recipe = recipe_file(folder, calib_samples=8, search_samples=2, steps=steps)
    return pq(MODEL, "--target", "ort", "--w4a4", "--recipe", recipe, "--windows", 1, "-o", folder / "out")


@pytest.fixture(scope="module")
def w8a8(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """W8A8KV8, rounded to nearest, with its speed."""
    folder = tmp_path_factory.mktemp("w8a8")
    recipe = recipe_file(folder, calib_samples=12, search_samples=2, steps=["clip_search"])
    return pq(MODEL, "--w8a8", "--recipe", recipe, "--windows", 1, "--speed", "-o", folder / "out")


def test_prefix_is_found_and_takes_the_outliers_away(w4a4: dict[str, Any]) -> None:
    tokens = w4a4["prefix"]["tokens"]
    assert " the" in tokens[:-1] and tokens[-1] == "<|im_start|>"
    before, after = w4a4["outliers_before"], w4a4["outliers_after"]
    assert before["max_value"][11] > 2000 and before["max_ratio"][11] > 1000
    assert after["max_value"][11] < 20
    assert max(after["max_ratio"]) <= 100 < max(before["max_ratio"]) / 10


def test_integers_equal_what_calibration_simulated(w4a4: dict[str, Any], w8a8: dict[str, Any]) -> None:
    for report in (w4a4, w8a8):
        validation = report["validation"]
        assert validation["passed"]
        assert validation["blocks"]["min_equal"] >= 0.999
        assert len(validation["blocks"]["sites"]) == 30 * 6
        assert min(validation["blocks"]["cosine"]) > 0.99999
        # Every code that differs is a rounding tie: fp32 round-off is the whole difference.
        distances = [
            c["worst_tie_distance"] for c in validation["blocks"]["sites"].values() if c["max_difference"] == 1
        ]
        assert all(distance < 1e-3 for distance in distances if distance is not None)
        assert validation["exact"]["min_equal"] >= 0.999
        assert validation["exact"]["greedy_equal"] == validation["exact"]["greedy_steps"] == 64
        assert validation["exact"]["perplexity_difference"] < 1e-6


def test_w8a8_is_as_good_as_floating_point_and_says_so(w8a8: dict[str, Any]) -> None:
    rows = {row["model"]: row for row in w8a8["validation"]["perplexity"]["rows"]}
    assert rows["ONNX"]["ratio"] < 1.02
    # Free running in fp32, ties fall differently here and there; the fp64 twin above has no difference at all.
    assert abs(rows["ONNX"]["perplexity"] / rows["fake-quant"]["perplexity"] - 1) < 1e-2
    assert w8a8["sample"]["text"].strip()


def test_w8a8_is_faster_than_fp32(w8a8: dict[str, Any]) -> None:
    rows = {row["model"]: row for row in w8a8["validation"]["speed"]["rows"]}
    assert rows["W8A8KV8"]["decode"] > rows["fp32 ONNX"]["decode"]
    assert rows["W8A8KV8"]["prefill"] > rows["fp32 ONNX"]["prefill"]


def test_sizes_and_memory(w4a4: dict[str, Any]) -> None:
    linears = next(part for part in w4a4["sizes"] if part["part"] == "quantized linears")
    assert linears["parameters"] == 30 * (2 * 576 * (576 + 192) + 3 * 576 * 1536)
    assert linears["bytes_per_parameter"] < 0.52
    assert max(stage["peak_rss"] for stage in w4a4["stages"]) < 6 * GIB


def test_every_quantized_linear_runs_in_an_integer_kernel(w8a8: dict[str, Any], tmp_path: Path) -> None:
    """In the graph that onnxruntime has optimized: no float product reads a quantized weight."""
    import onnx
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(str(Path(w8a8["bundle"]) / "model.onnx"), options, providers=["CPUExecutionProvider"])
    model = onnx.load(tmp_path / "optimized.onnx")
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    integer = [n for n in model.graph.node if n.op_type in ("MatMulIntegerToFloat", "MatMulInteger")]
    assert len(integer) == 30 * 7
    assert all(kinds[n.input[1]] == onnx.TensorProto.INT8 for n in integer)


def test_static_w4a4_needs_the_prefix(w4a4: dict[str, Any], tmp_path: Path) -> None:
    """Same window, no prefix, rounded to nearest: more than twice as bad."""
    recipe = recipe_file(tmp_path, calib_samples=6, search_samples=2, steps=["clip_search"])
    pq("calibrate", MODEL, "--w4a4", "--prefix", "none", "--recipe", recipe, "-o", tmp_path / "calib")
    simulated = simulated_decoder(load_calibration(tmp_path / "calib"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "calib" / "tokenizer")
    window = windows(tokenize(tokenizer, builtin_text(held_out=True)), 2048, 1)
    without = perplexity(torch_logits(simulated), window).value
    rows = {row["model"]: row["perplexity"] for row in w4a4["validation"]["perplexity"]["rows"]}
    assert w4a4["validation"]["perplexity"]["window"] == 2048
    assert without > 2 * rows["ONNX"]
