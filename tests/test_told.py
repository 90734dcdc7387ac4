"""What a user must be told without asking for more: warnings, and where memory ran out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.cli_runner import Runner

CROPS = ("--calib-samples", 4, "--seq-len", 32)


@pytest.fixture
def pq(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(monkeypatch, capsys)


@pytest.fixture
def model(checkpoint_dir: Callable[[str], Path]) -> Path:
    return checkpoint_dir("llama")


def recipe(folder: Path, *steps: object) -> Path:
    path = folder / "mine.yaml"
    path.write_text(json.dumps({"search_samples": 2, "search_seq_len": 24, "steps": ["clip_search", *steps]}))
    return path


@pytest.mark.parametrize(
    ("step", "says"),
    [
        ({"tune_blocks": {"samples": 4, "epochs": 2, "batch": 2, "scale_lr": 1000.0}}, "the best state so far is kept"),
        ({"tune_model": {"samples": 4, "steps": 3, "batch": 2, "scale_lr": 1000.0}}, "the best state so far is kept"),
    ],
)
@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_divergence_is_said(
    pq: Runner, model: Path, text_file: Path, tmp_path: Path, step: object, says: str, flags: tuple[str, ...]
) -> None:
    words = ("--w4a4", "--calib-data", text_file, *CROPS, "--recipe", recipe(tmp_path, step), *flags)
    result = pq("calibrate", model, *words, "-o", tmp_path / "out")
    assert result.code == 0, result.err
    lines = [line for line in result.err.splitlines() if line.startswith("warning:") and says in line]
    assert lines and all("nan" in line or "times" in line for line in lines), result.err
    if flags:
        json.loads(result.out)


def test_a_step_that_cannot_do_its_work_is_named_with_its_line(
    pq: Runner, model: Path, text_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 1\nsteps:\n  - keep_8bit: {linears: [layers.9.mlp.up_proj]}\n  - clip_search\n")
    words = ("--w4a4", "--calib-data", text_file, *CROPS, "--recipe", path)
    says = (f"{path}:3: step 'keep_8bit'", "layers.9.mlp.up_proj")
    pq.refuses("calibrate", model, *words, "-o", tmp_path / "out", code=2, says=says)
    assert not list(tmp_path.glob("out*"))


def out_of_memory(*args: object, **options: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")


def test_memory_that_ran_out_names_the_stage(
    pq: Runner, model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--w4a4", "--calib-data", text_file, *CROPS, "--recipe", recipe(tmp_path))
    output = ("-o", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("pq_export.calib.checkpoint.load_checkpoint", out_of_memory)
        pq.refuses("calibrate", model, *words, *output, says=("stage 'load checkpoint'", "ran out of memory", "--num"))
        pq.refuses("evaluate", model, "--text", text_file, says=("stage 'load checkpoint'", "ran out of memory"))
    with monkeypatch.context() as patch:
        patch.setattr("pq_export.calib.baselines.harness.quantize_blocks", out_of_memory)
        rivals = ("--methods", "rtn", "--windows", 1, "--window", 64)
        pq.refuses("compare", model, *words[:-2], *rivals, *output, says=("method rtn", "'quantize blocks'"))
    assert not (tmp_path / "out").exists()
