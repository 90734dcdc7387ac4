"""Every step of a recipe, alone and in order, on tiny models: static result, FP model untouched, resumable."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from pq_export.calib import steps as module
from pq_export.calib.checkpoint import load_checkpoint
from pq_export.calib.pipeline import begin, calibrate, quantize_decoder
from pq_export.calib.steps import STEPS, Phase
from pq_export.calib.work import WorkDirectory
from pq_export.calibration import Calibration, load_calibration
from pq_export.plan import Plan
from pq_export.simulate import simulated_decoder
from pq_export.stages import Silent, Stages

Steps = tuple[tuple[str, dict[str, Any]], ...]
SEARCH = ("clip_search", {})
QUICK: dict[str, dict[str, Any]] = {
    "gptq": {},
    "learned_rounding": {"samples": 6, "steps": 5},
    "tune_blocks": {"samples": 6, "epochs": 2, "batch": 2},
    "tune_model": {"samples": 6, "steps": 4, "batch": 2},
    "tune_prefix": {"steps": 4, "batch": 2},
    "learn_rotations": {"steps": 3, "batch": 2},
    "smooth_attention": {},
    "center": {},
    "smooth": {"sites": ["self_attn.qkv_input", "mlp.gate_up_input"]},  # R4 is on: not down_proj's input
    "keep_8bit": {"budget": 0.4},
    "key_bits": {"threshold": 0.0},
}


def recipe(*names: str) -> Steps:
    """The steps ``names`` with quick options, in order of phases, around a scale search."""
    before = [(n, QUICK[n]) for n in names if STEPS[n].phase < Phase.BLOCKS]
    after = [(n, QUICK[n]) for n in names if STEPS[n].phase >= Phase.BLOCKS]
    return (*before, SEARCH, *after)


@pytest.fixture
def run(checkpoint_dir: Callable[[str], Path], small_plan: Callable[..., Plan], tmp_path: Path) -> Callable[..., Any]:
    def make(name: str, steps: Steps, family: str = "llama", output: str = "out", **changes: object) -> Calibration:
        plan = small_plan(name, **{"prefix": "w77 w8 w9", "steps": steps, **changes})
        checkpoint = load_checkpoint(str(checkpoint_dir(family)))
        calibrate(checkpoint, plan, tmp_path / output, Stages())
        return load_calibration(tmp_path / output)  # checks ranges, scales, overrides and the prefix's key

    return make


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("step", sorted(QUICK))
def test_a_step_alone(run: Callable[..., Calibration], step: str, family: str) -> None:
    if family == "qwen3":
        calibration = run("w4a4", recipe(step), family, prefix="w77 w8")
    else:
        calibration = run("w4a4", recipe(step))
    decoder = simulated_decoder(calibration)
    ids = torch.arange(24)[None] + 3
    positions = torch.arange(24)[None]
    logits, _ = decoder(ids, torch.ones_like(ids), positions, decoder.empty_past(1))
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", ["w4a4", "w4a8", "w8a8", "w4a16"])
def test_all_block_and_model_steps_in_order(run: Callable[..., Calibration], name: str) -> None:
    steps = recipe("gptq", "learned_rounding", "tune_blocks", "tune_model", "tune_prefix")
    first = run(name, steps)
    again = run(name, steps, output="again")
    assert first.tensors.keys() == again.tensors.keys()
    assert all(np.array_equal(first.tensors[k], again.tensors[k]) for k in first.tensors)
    assert first.activation_scales == again.activation_scales and first.kv_scales == again.kv_scales


class Noting(Silent):
    """Keeps the notes, and how far each stage with a total went: [title, total, advanced]."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.went: list[list[Any]] = []

    def start(self, title: str, total: int | None) -> None:
        self.went.append([title, total, 0])

    def advance(self, steps: int = 1) -> None:
        self.went[-1][2] += steps

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize(("search_samples", "seen"), [(2, slice(2, 6)), (3, slice(3, 6)), (4, slice(0, 6))])
def test_smoothing_is_judged_on_crops_that_the_peaks_are_not_of(
    checkpoint_dir: Callable[[str], Path],
    small_plan: Callable[..., Plan],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    search_samples: int,
    seen: slice,
) -> None:
    """Six crops. Where fewer would be left than judge, the peaks are of all."""
    crops: dict[str, torch.Tensor] = {}

    def watching(name: str) -> Callable[..., Any]:
        compute = getattr(module, name)

        def call(decoder: Any, ids: torch.Tensor, *args: Any, **options: Any) -> Any:
            crops[name] = ids
            return compute(decoder, ids, *args, **options)

        return call

    for name in ("channel_peaks", "find_smoothing"):
        monkeypatch.setattr(module, name, watching(name))
    progress = Noting()
    plan = small_plan("w4a4", prefix="w77 w8 w9", steps=recipe("smooth"), search_samples=search_samples)
    work = WorkDirectory(tmp_path / "out", plan.fingerprint("tiny"))
    run = begin(load_checkpoint(str(checkpoint_dir("llama"))), plan, work, Stages(progress))
    quantize_decoder(run)
    assert torch.equal(crops["find_smoothing"], run.crops[:search_samples])
    assert torch.equal(crops["channel_peaks"], run.crops[seen])
    ((_, total, advanced),) = [stage for stage in progress.went if stage[0] == "smooth"]
    assert total == advanced == len(run.crops[seen]) + 2  # layers


def test_without_a_prefix_its_tuning_is_skipped(
    checkpoint_dir: Callable[[str], Path],
    small_plan: Callable[..., Plan],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a note, and without a copy of the floating-point model to follow."""

    def refuse(*args: Any) -> None:
        raise AssertionError("there is no prefix to tune")

    monkeypatch.setattr(module, "tune_prefix", refuse)
    monkeypatch.setattr(copy, "deepcopy", spy := mock.Mock(wraps=copy.deepcopy))
    progress = Noting()
    plan = small_plan("w4a4", prefix="none", steps=recipe("tune_prefix"))
    checkpoint = load_checkpoint(str(checkpoint_dir("llama")))
    calibration = calibrate(checkpoint, plan, tmp_path / "out", Stages(progress))
    assert calibration.prefix.token_ids == () and not [n for n in calibration.tensors if ".prefix." in n]
    assert [n for n in progress.notes if "tune_prefix" in n and "no prefix" in n]
    assert not any(call.args[0] is checkpoint.decoder for call in spy.call_args_list)


class StopAfter(Silent):
    """Interrupts at the n-th advance of the stage ``title``."""

    def __init__(self, title: str, count: int):
        self.title, self.count, self.here = title, count, False

    def start(self, title: str, total: int | None) -> None:
        self.here = title.startswith(self.title)

    def advance(self, steps: int = 1) -> None:
        if self.here:
            self.count -= 1
            if self.count == 0:
                raise KeyboardInterrupt


@pytest.mark.parametrize("window", [1, 2])
def test_interrupted_between_blocks_goes_on_to_the_same_result(
    checkpoint_dir: Callable[[str], Path], small_plan: Callable[..., Plan], tmp_path: Path, window: int
) -> None:
    tune = ("tune_blocks", {**QUICK["tune_blocks"], "window": window})
    steps = (SEARCH, ("gptq", {}), tune, ("tune_model", QUICK["tune_model"]))
    plan = small_plan("w4a4", prefix="w77 w8 w9", steps=steps)
    whole = calibrate(load_checkpoint(str(checkpoint_dir("llama"))), plan, tmp_path / "whole", Stages())
    for stage in ("quantize blocks", "tune model"):
        with pytest.raises(KeyboardInterrupt):
            stages = Stages(StopAfter(stage, 1))
            calibrate(load_checkpoint(str(checkpoint_dir("llama"))), plan, tmp_path / "cut", stages)
    stages = Stages()
    resumed = calibrate(load_checkpoint(str(checkpoint_dir("llama"))), plan, tmp_path / "cut", stages)
    assert [s.name for s in stages.records if s.reused] == ["find outlier tokens", "collect ranges", "quantize blocks"]
    assert all(np.array_equal(whole.tensors[k], resumed.tensors[k]) for k in whole.tensors)
    assert whole.activation_scales == resumed.activation_scales


ALL_OF_IT = {
    "smooth": {"sites": ["self_attn.qkv_input", "mlp.gate_up_input", "mlp.down_input"]},
    "split_channels": {},
    "center": {},
    "learn_rotations": QUICK["learn_rotations"],
}


@pytest.mark.parametrize("step", ALL_OF_IT)
def test_interrupted_behind_a_folding_step_goes_on_to_the_same_result(
    checkpoint_dir: Callable[[str], Path], small_plan: Callable[..., Plan], tmp_path: Path, step: str
) -> None:
    """What was folded is folded again from the file, in the same order: rounding is the same."""
    rotate = "online" if step == "center" else "offline"
    plan = small_plan("w4a4", prefix="w77 w8 w9", rotate=rotate, steps=((step, ALL_OF_IT[step]), SEARCH))
    whole = calibrate(load_checkpoint(str(checkpoint_dir("llama"))), plan, tmp_path / "whole", Stages())
    with pytest.raises(KeyboardInterrupt):
        stages = Stages(StopAfter("quantize blocks", 1))
        calibrate(load_checkpoint(str(checkpoint_dir("llama"))), plan, tmp_path / "cut", stages)
    resumed = calibrate(load_checkpoint(str(checkpoint_dir("llama"))), plan, tmp_path / "cut", Stages())
    assert [k for k in whole.tensors if not np.array_equal(whole.tensors[k], resumed.tensors[k])] == []
    assert whole.activation_scales == resumed.activation_scales
