"""A whole calibration of the tiny model: its files, their integrity, and going on after an interruption."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

import pq_export.calib.pipeline as pipeline
import pq_export.calib.steps as steps
from pq_export.calib.checkpoint import load_checkpoint
from pq_export.calib.outliers import compute_prefix_kv
from pq_export.calib.pipeline import calibrate
from pq_export.calib.rewrites import rewrite
from pq_export.calib.text import random_crops
from pq_export.calibration import (
    ASSETS_NAME,
    JSON_NAME,
    KV_SITES,
    SCHEMA_VERSION,
    SITES,
    TENSORS_NAME,
    Calibration,
    load_calibration,
    save_calibration,
)
from pq_export.errors import IntegrityError, PqExportError
from pq_export.plan import Plan
from pq_export.quantizer import quantize, scale_from_max, unpack_int4
from pq_export.stages import Stages
from tests.conftest import BOS, PLANTED_TOKEN, random_words

PLANS = ("w4a4", "w8a8", "w4a16")
MakePlan = Callable[..., Plan]
OUTLIERS, RANGES, BLOCKS = "find outlier tokens", "collect ranges", "quantize blocks"


def run(checkpoint_dir: Path, plan: Plan, output: Path, stages: Stages | None = None) -> Calibration:
    return calibrate(load_checkpoint(str(checkpoint_dir)), plan, output, stages or Stages())


@pytest.fixture(scope="module")
def finished(
    tiny_llama_dir: Path, small_plan: MakePlan, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Calibration, Path]]:
    """Name -> calibration as returned and the directory it was written to."""
    result = {}
    for name in PLANS:
        output = tmp_path_factory.mktemp("finished") / name
        result[name] = (run(tiny_llama_dir, small_plan(name), output), output)
    return result


def contents(directory: Path) -> dict[str, bytes]:
    """Every file but the timings."""
    return {
        str(p.relative_to(directory)): p.read_bytes()
        for p in sorted(directory.rglob("*"))
        if p.is_file() and p.name != pipeline.STAGES_NAME
    }


def assert_equal(one: Calibration, other: Calibration) -> None:
    """Every field, tensors bit by bit. Statistics as JSON has them: without tuples."""
    for field in dataclasses.fields(Calibration):
        ours, theirs = getattr(one, field.name), getattr(other, field.name)
        if field.name == "tensors":
            assert ours.keys() == theirs.keys()
            for name in ours:
                assert ours[name].dtype == theirs[name].dtype and ours[name].shape == theirs[name].shape, name
                assert ours[name].tobytes() == theirs[name].tobytes(), name
        elif field.name == "statistics":
            assert json.loads(json.dumps(ours)) == json.loads(json.dumps(theirs))
        else:
            assert ours == theirs, field.name


# --- what is in it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANS)
def test_file_pair_and_assets(finished: dict[str, tuple[Calibration, Path]], name: str) -> None:
    _, output = finished[name]
    files = set(contents(output))
    assert {JSON_NAME, TENSORS_NAME} <= files
    assert {f"{ASSETS_NAME}/{f}" for f in ("tokenizer.json", "config.json", "generation_config.json")} <= files
    assert not output.with_name(f"{name}.work").exists()
    stages = json.loads((output / pipeline.STAGES_NAME).read_text())
    assert [s["name"] for s in stages] == ["rewrite weights", OUTLIERS, RANGES, BLOCKS]
    assert all(s["seconds"] > 0 and s["peak_rss"] > 1e6 and not s["reused"] for s in stages)


@pytest.mark.parametrize("name", PLANS)
def test_scales_and_tensors_are_those_of_the_precision(
    finished: dict[str, tuple[Calibration, Path]], name: str
) -> None:
    c, _ = finished[name]
    sites = {f"layers.{i}.{site}" for i in range(3) for site in SITES}
    assert set(c.activation_scales) == (set() if name == "w4a16" else sites)
    kv = {f"layers.{i}.{site}" for i in range(3) for site in KV_SITES}
    assert set(c.kv_scales) == (set() if name == "w4a16" else kv)
    assert {len(s) for s in c.kv_scales.values()} == {"w4a4": {2}, "w8a8": {1}, "w4a16": set()}[name]
    for linear in c.linear_names():
        out, inner = c.linear_shape(linear)
        stored = c.tensors[f"{linear}.codes"]
        if name == "w8a8":
            assert stored.dtype == np.int8 and stored.shape == (out, inner)
        else:
            assert stored.dtype == np.uint8 and stored.shape == (out * inner // 2,)
        assert c.tensors[f"{linear}.scale"].shape == (out,) and c.tensors[f"{linear}.scale"].dtype == np.float32
        assert (c.store_codes(linear, c.weight_codes(linear)) == stored).all()
    assert c.rotation.mode == "online"
    assert c.rotation.online == (("R3", "R4") if name == "w4a4" else ("R4",))  # R3 serves 4-bit keys only
    assert {c.tensors[n].dtype for n in ("embed_tokens.weight", "lm_head.weight")} == {np.dtype(np.float16)}
    norms = [n for n in c.tensors if "norm" in n]
    assert len(norms) == 7 and all((c.tensors[n] == 1).all() for n in norms)


def test_prefix_is_the_planted_token_and_bos(
    finished: dict[str, tuple[Calibration, Path]], tiny_llama_dir: Path
) -> None:
    """And its KV is what the rewritten floating-point model gives."""
    c, _ = finished["w4a4"]
    assert c.prefix.token_ids == (PLANTED_TOKEN, BOS) and c.prefix.tokens == ("w77", "<s>") and c.bos_token_id == BOS
    decoder = load_checkpoint(str(tiny_llama_dir)).decoder
    rewrite(decoder, "online", 0)
    stored = c.prefix_kv()
    assert stored is not None and len(stored) == 3
    for (key, value), pair in zip(stored, compute_prefix_kv(decoder, c.prefix.token_ids), strict=True):
        for array, tensor in zip((key, value), pair, strict=True):
            assert array.dtype == np.float16 and (array == tensor[0].half().numpy()).all()


def test_statistics_tell_the_outliers(finished: dict[str, tuple[Calibration, Path]], small_plan: MakePlan) -> None:
    c, _ = finished["w4a4"]
    plan = small_plan("w4a4")
    tokens = np.array([int(w[1:]) for w in Path(plan.calib_data).read_text().split()])
    crops = random_crops(tokens, plan.calib_samples, plan.seq_len, plan.seed).numpy()
    before = c.statistics["outliers_before"]
    assert before["mean_count"] == pytest.approx([0, (crops == PLANTED_TOKEN).sum(1).mean(), 0])
    assert before["token_counts"] == [(PLANTED_TOKEN, (crops[:, 1:] == PLANTED_TOKEN).sum())]
    assert before["tokens"] == ["w77"] and before["max_ratio"][1] > 64
    assert before["example"]["tokens"] == [f"w{i}" if i > 2 else "?" for i in before["example"]["token_ids"]]
    assert len(c.statistics["layer_error"]) == len(c.statistics["clip_factors"]) == 3


def test_eight_bits_are_more_exact_than_four(finished: dict[str, tuple[Calibration, Path]]) -> None:
    four, eight = (finished[n][0].statistics["layer_error"] for n in ("w4a4", "w8a8"))
    assert all(0 < e < f < 1 for e, f in zip(eight, four, strict=True))


def test_weights_are_the_rewritten_ones(finished: dict[str, tuple[Calibration, Path]], tiny_llama_dir: Path) -> None:
    """w8a8 codes times scales are the rewritten weights to half a step, where nothing is clipped."""
    c, _ = finished["w8a8"]
    decoder = load_checkpoint(str(tiny_llama_dir)).decoder
    rewrite(decoder, "online", 0)
    for linear in c.linear_names():
        weight = decoder.get_submodule(linear).weight.numpy()
        codes, scale = c.weight_codes(linear), c.tensors[f"{linear}.scale"][:, None]
        inside = np.abs(codes.astype(int) + 0.5) < 127
        assert np.abs(codes * scale - weight)[inside].max() <= 0.501 * scale.max()
        assert inside.mean() > 0.9


def test_rotate_none_on_weights_only(tiny_llama_dir: Path, small_plan: MakePlan, tmp_path: Path) -> None:
    c = run(tiny_llama_dir, small_plan("w4a16", rotate="none", prefix="none"), tmp_path / "out")
    assert (c.rotation.offline, c.rotation.online, c.prefix.token_ids, c.prefix_kv()) == ((), (), (), None)
    assert not [n for n in c.tensors if ".prefix." in n]
    embedding = load_checkpoint(str(tiny_llama_dir)).decoder.embed_tokens.weight
    assert (c.tensors["embed_tokens.weight"] == embedding.half().numpy()).all()


def test_prefix_given_as_text(tiny_llama_dir: Path, small_plan: MakePlan, tmp_path: Path) -> None:
    c = run(tiny_llama_dir, small_plan("w8a8", prefix="w9 w300"), tmp_path / "out")
    assert c.prefix.token_ids == (9, 300)
    assert c.tensors["layers.2.prefix.key"].shape == (2, 2, 16)


# --- round trip ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANS)
def test_load_gives_back_what_was_calibrated(finished: dict[str, tuple[Calibration, Path]], name: str) -> None:
    calibration, output = finished[name]
    assert_equal(load_calibration(output), calibration)


@pytest.mark.parametrize("name", PLANS)
def test_save_after_load_gives_the_same_bytes(
    finished: dict[str, tuple[Calibration, Path]], name: str, tmp_path: Path
) -> None:
    _, output = finished[name]
    save_calibration(load_calibration(output), tmp_path)
    for file in (JSON_NAME, TENSORS_NAME):
        assert (tmp_path / file).read_bytes() == (output / file).read_bytes()


@pytest.mark.parametrize("name", PLANS)
def test_two_runs_write_the_same_bytes(
    finished: dict[str, tuple[Calibration, Path]], name: str, tiny_llama_dir: Path, small_plan: MakePlan, tmp_path: Path
) -> None:
    run(tiny_llama_dir, small_plan(name), tmp_path / "again")
    assert contents(tmp_path / "again") == contents(finished[name][1])


def test_another_seed_gives_another_calibration(
    finished: dict[str, tuple[Calibration, Path]], tiny_llama_dir: Path, small_plan: MakePlan, tmp_path: Path
) -> None:
    run(tiny_llama_dir, small_plan("w4a4", seed=1), tmp_path / "out")
    assert contents(tmp_path / "out")[TENSORS_NAME] != contents(finished["w4a4"][1])[TENSORS_NAME]


# --- tampering -------------------------------------------------------------------------------------

Tamper = Callable[[dict[str, Any], dict[str, np.ndarray]], object]


@pytest.fixture
def copy_of(finished: dict[str, tuple[Calibration, Path]], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(finished[name][1], tmp_path / "tampered"))


def refused(directory: Path) -> str:
    """The one line with which a directory is refused."""
    with pytest.raises(IntegrityError) as caught:
        load_calibration(directory)
    message = str(caught.value)
    assert "\n" not in message and str(directory) in message
    return message


def rewrite_files(directory: Path, tamper: Tamper) -> None:
    """Change JSON and tensors and make the hash fit again: what remains are the checks of content."""
    document = json.loads((directory / JSON_NAME).read_text())
    tensors = {n: t.copy() for n, t in safetensors.numpy.load_file(directory / TENSORS_NAME).items()}
    tamper(document, tensors)
    payload = safetensors.numpy.save(tensors)
    (directory / TENSORS_NAME).write_bytes(payload)
    document["tensors_sha256"] = hashlib.sha256(payload).hexdigest()
    (directory / JSON_NAME).write_text(json.dumps(document))


def test_rewriting_alone_is_no_tampering(copy_of: Callable[[str], Path]) -> None:
    directory = copy_of("w4a4")
    rewrite_files(directory, lambda d, t: None)
    load_calibration(directory)


@pytest.mark.parametrize("place", [0.0, 0.3, 0.999])
def test_a_changed_byte_of_the_tensors(copy_of: Callable[[str], Path], place: float) -> None:
    directory = copy_of("w4a4")
    payload = bytearray((directory / TENSORS_NAME).read_bytes())
    payload[int(place * len(payload))] ^= 1
    (directory / TENSORS_NAME).write_bytes(payload)
    assert "altered or truncated" in refused(directory)


def test_truncated_tensors(copy_of: Callable[[str], Path]) -> None:
    directory = copy_of("w4a4")
    payload = (directory / TENSORS_NAME).read_bytes()
    (directory / TENSORS_NAME).write_bytes(payload[:-10])
    assert "altered or truncated" in refused(directory)


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, None, "1"])
def test_another_schema_version(copy_of: Callable[[str], Path], version: object) -> None:
    directory = copy_of("w4a4")
    rewrite_files(directory, lambda d, t: d.update(schema_version=version))
    assert f"schema version {version}" in refused(directory)


@pytest.mark.parametrize("file", [JSON_NAME, TENSORS_NAME])
def test_a_missing_file(copy_of: Callable[[str], Path], file: str) -> None:
    directory = copy_of("w4a4")
    (directory / file).unlink()
    assert file in refused(directory)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "something else"}', "\xff"])
def test_json_that_is_something_else(copy_of: Callable[[str], Path], text: str) -> None:
    directory = copy_of("w4a4")
    (directory / JSON_NAME).write_bytes(text.encode("latin-1"))
    refused(directory)


ALTERED: dict[str, Tamper] = {
    "prefix token ids": lambda d, t: d["prefix"].update(token_ids=[PLANTED_TOKEN + 1, BOS]),
    "one prefix token less": lambda d, t: d["prefix"].update(token_ids=[PLANTED_TOKEN]),
    "no prefix tokens": lambda d, t: d["prefix"].update(token_ids=[]),
    "rotation seed": lambda d, t: d["rotation"].update(seed=1),
    "online rotations": lambda d, t: d["rotation"].update(online=[]),
    "RoPE": lambda d, t: d["decoder"].update(inv_freq=[2 * f for f in d["decoder"]["inv_freq"]]),
    "RoPE scaling": lambda d, t: d["decoder"].update(rope_scaling=1.5),
    "a weight code": lambda d, t: np.bitwise_xor(
        t["layers.1.mlp.up_proj.codes"], 1, out=t["layers.1.mlp.up_proj.codes"]
    ),
    "a weight scale": lambda d, t: np.multiply(t["layers.1.mlp.up_proj.scale"], 2, out=t["layers.1.mlp.up_proj.scale"]),
    "the embedding": lambda d, t: np.negative(t["embed_tokens.weight"], out=t["embed_tokens.weight"]),
    "the embedding is gone": lambda d, t: t.pop("embed_tokens.weight"),
}


@pytest.mark.parametrize("what", ALTERED)
def test_prefix_kv_that_belongs_to_something_else(copy_of: Callable[[str], Path], what: str) -> None:
    directory = copy_of("w4a4")
    rewrite_files(directory, ALTERED[what])
    assert "belongs to other weights" in refused(directory)


def set_first(t: dict[str, np.ndarray], name: str, value: float) -> None:
    t[name].reshape(-1)[0] = value


BAD_SCALES = [0.0, -1.0, float("nan"), float("inf")]
SCALE_PLACES: dict[str, Callable[[float], Tamper]] = {
    "weight": lambda v: lambda d, t: set_first(t, "layers.2.mlp.down_proj.scale", v),
    "activation": lambda v: lambda d, t: d["activation_scales"].update({"layers.1.mlp.down_input": v}),
    "key": lambda v: lambda d, t: d["kv_scales"]["layers.0.self_attn.key"].__setitem__(1, v),
    "value": lambda v: lambda d, t: d["kv_scales"]["layers.2.self_attn.value"].__setitem__(0, v),
}


@pytest.mark.parametrize("value", BAD_SCALES)
@pytest.mark.parametrize("place", SCALE_PLACES)
def test_a_scale_that_is_not_positive_and_finite(copy_of: Callable[[str], Path], place: str, value: float) -> None:
    directory = copy_of("w4a4")
    rewrite_files(directory, SCALE_PLACES[place](value))
    assert "not positive and finite" in refused(directory)


def test_codes_of_the_wrong_shape(copy_of: Callable[[str], Path]) -> None:
    directory = copy_of("w8a8")
    name = "layers.0.mlp.up_proj.codes"
    rewrite_files(directory, lambda d, t: t.update({name: np.ascontiguousarray(t[name].T)}))
    assert "wrong shape or range" in refused(directory)


MISSING: dict[str, Tamper] = {
    "hash of the tensors": lambda d, t: None,  # taken out below, after it was computed
    "activation scale": lambda d, t: d["activation_scales"].pop("layers.1.mlp.down_input"),
    "all activation scales": lambda d, t: d["activation_scales"].clear(),
    "key scale": lambda d, t: d["kv_scales"].pop("layers.1.self_attn.key"),
    "scale of one KV head": lambda d, t: d["kv_scales"]["layers.1.self_attn.key"].pop(),
    "weight scale": lambda d, t: t.pop("layers.1.mlp.up_proj.scale"),
    "weight codes": lambda d, t: t.pop("layers.1.mlp.up_proj.codes"),
    "prefix key": lambda d, t: t.pop("layers.1.prefix.key"),
    "prefix key that is NaN": lambda d, t: set_first(t, "layers.1.prefix.key", float("nan")),
    "prefix key of another length": lambda d, t: t.update(
        {"layers.1.prefix.key": t["layers.1.prefix.key"][:, :1].copy()}
    ),
    "number instead of a scale": lambda d, t: d["activation_scales"].update({"layers.1.mlp.down_input": None}),
    "plan": lambda d, t: d.pop("plan"),
    "precision": lambda d, t: d.pop("precision"),
    "precision that means something": lambda d, t: d.update(precision="many bits"),
    "decoder field": lambda d, t: d["decoder"].pop("num_heads"),
    "source as a mapping": lambda d, t: d.update(source="tiny"),
}


@pytest.mark.parametrize("what", MISSING)
def test_content_that_is_missing(copy_of: Callable[[str], Path], what: str) -> None:
    directory = copy_of("w4a4")
    rewrite_files(directory, MISSING[what])
    if what == "hash of the tensors":
        document = json.loads((directory / JSON_NAME).read_text())
        del document["tensors_sha256"]
        (directory / JSON_NAME).write_text(json.dumps(document))
    refused(directory)


# --- interruption ----------------------------------------------------------------------------------


class Interrupting:
    """Progress that raises KeyboardInterrupt at the n-th step of a stage."""

    def __init__(self, stage: str, step: int):
        self.stage, self.step, self.title, self.seen = stage, step, "", 0

    def start(self, title: str, total: int | None) -> None:
        self.title, self.seen = title, 0

    def advance(self, steps: int = 1) -> None:
        self.seen += 1
        if self.title == self.stage and self.seen == self.step:
            raise KeyboardInterrupt

    def note(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...


def interrupt(checkpoint_dir: Path, plan: Plan, output: Path, stage: str, step: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint_dir, plan, output, Stages(Interrupting(stage, step)))
    assert not output.exists()
    assert output.with_name(f"{output.name}.work").is_dir()


def resume(
    checkpoint_dir: Path, plan: Plan, output: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, bool], int]:
    """Run again; which stages were marked reused, and how many layers were searched."""
    searched = []
    real = steps.clip_search
    monkeypatch.setattr(steps, "clip_search", lambda block, *a: searched.append(block.index) or real(block, *a))
    stages = Stages()
    run(checkpoint_dir, plan, output, stages)
    return {r.name: r.reused for r in stages.records}, len(searched)


@pytest.mark.parametrize(
    ("stage", "step", "reused", "searched"),
    [
        (OUTLIERS, 1, (), 3),
        (RANGES, 1, (OUTLIERS,), 3),
        (BLOCKS, 1, (OUTLIERS, RANGES), 2),
        (BLOCKS, 2, (OUTLIERS, RANGES), 1),
        (BLOCKS, 3, (OUTLIERS, RANGES, BLOCKS), 0),
    ],
)
@pytest.mark.parametrize("name", ["w4a4", "w4a16"])
def test_interrupted_run_goes_on(
    finished: dict[str, tuple[Calibration, Path]],
    tiny_llama_dir: Path,
    small_plan: MakePlan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    stage: str,
    step: int,
    reused: tuple[str, ...],
    searched: int,
) -> None:
    output = tmp_path / "out"
    interrupt(tiny_llama_dir, small_plan(name), output, stage, step)
    marked, layers = resume(tiny_llama_dir, small_plan(name), output, monkeypatch)
    assert layers == searched
    assert {n for n, kept in marked.items() if kept} == set(reused)
    assert contents(output) == contents(finished[name][1])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_kept_parts_of_another_plan_are_thrown_away(
    tiny_llama_dir: Path, small_plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    interrupt(tiny_llama_dir, small_plan("w4a4", seed=1), output, BLOCKS, 2)
    marked, layers = resume(tiny_llama_dir, small_plan("w4a4"), output, monkeypatch)
    assert layers == 3 and not any(marked.values())


def test_kept_parts_of_another_text_are_thrown_away(
    tiny_llama_dir: Path, small_plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, output = tmp_path / "text.txt", tmp_path / "out"
    plan = small_plan("w4a4", calib_data=str(text))
    text.write_text(random_words(900, seed=1))
    interrupt(tiny_llama_dir, plan, output, BLOCKS, 2)
    text.write_text(random_words(900, seed=2))
    marked, layers = resume(tiny_llama_dir, plan, output, monkeypatch)
    assert layers == 3 and not any(marked.values())


@pytest.mark.parametrize("damage", ["layer000.0.safetensors", "layer000.0.json", "ranges.safetensors", "prefix.json"])
def test_a_damaged_part_is_made_again(
    finished: dict[str, tuple[Calibration, Path]],
    tiny_llama_dir: Path,
    small_plan: MakePlan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: str,
) -> None:
    output = tmp_path / "out"
    interrupt(tiny_llama_dir, small_plan("w4a4"), output, BLOCKS, 2)
    part = tmp_path / "out.work" / damage
    part.write_bytes(part.read_bytes()[:20])
    _, layers = resume(tiny_llama_dir, small_plan("w4a4"), output, monkeypatch)
    assert layers == (3 if damage.startswith("layer") else 1)  # with what stands behind the damaged layer
    assert contents(output) == contents(finished["w4a4"][1])


@pytest.mark.parametrize("damaged", [0, 1])
def test_a_damaged_layer_of_a_window_takes_what_was_trained_with_it(
    tiny_llama_dir: Path, small_plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: int
) -> None:
    tune = ("tune_blocks", {"samples": 6, "epochs": 1, "batch": 2, "window": 2, "weight_lr": 0.05})
    plan = small_plan("w4a4", steps=(("clip_search", {}), tune))
    run(tiny_llama_dir, plan, tmp_path / "whole")
    interrupt(tiny_llama_dir, plan, tmp_path / "out", BLOCKS, 2)
    (part,) = (tmp_path / "out.work").glob(f"layer{damaged:03d}.*.safetensors")
    part.write_bytes(part.read_bytes()[:20])
    _, layers = resume(tiny_llama_dir, plan, tmp_path / "out", monkeypatch)
    assert layers == 3
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# --- refusals --------------------------------------------------------------------------------------


def test_crops_longer_than_the_context(tiny_llama_dir: Path, small_plan: MakePlan, tmp_path: Path) -> None:
    with pytest.raises(PqExportError, match="context of 512"):
        run(tiny_llama_dir, small_plan("w4a4", seq_len=513), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_prefix_that_leaves_no_room(tiny_llama_dir: Path, tmp_path: Path, small_plan: MakePlan) -> None:
    text = tmp_path / "long.txt"
    text.write_text(random_words(1100))
    plan = small_plan("w4a4", calib_data=str(text), seq_len=511, calib_samples=1, prefix="w5 w6")
    with pytest.raises(PqExportError, match="exceed the model's context of 512"):
        run(tiny_llama_dir, plan, tmp_path / "out")


def test_text_too_short(tiny_llama_dir: Path, tmp_path: Path, small_plan: MakePlan) -> None:
    text = tmp_path / "short.txt"
    text.write_text(random_words(63))
    with pytest.raises(PqExportError, match="has 63 tokens, too few"):
        run(tiny_llama_dir, small_plan("w4a4", calib_data=str(text)), tmp_path / "out")


def test_scale_helpers_agree_with_the_file(finished: dict[str, tuple[Calibration, Path]], tiny_llama_dir: Path) -> None:
    """One weight by hand: codes of w4a4 are the rewritten weight over (factor · 2 max / 15)."""
    c, _ = finished["w4a4"]
    decoder = load_checkpoint(str(tiny_llama_dir)).decoder
    rewrite(decoder, "online", 0)
    weight = decoder.layers[2].mlp.down_proj.weight
    scale = torch.from_numpy(c.tensors["layers.2.mlp.down_proj.scale"])
    factors = scale / scale_from_max(weight.abs().amax(1), 4)
    assert ((factors * 20 - (factors * 20).round()).abs() < 1e-4).all() and (factors < 1.0001).all()
    codes = unpack_int4(c.tensors["layers.2.mlp.down_proj.codes"], (48, 96))
    assert (codes == quantize(weight, scale[:, None], 4).numpy()).all()
