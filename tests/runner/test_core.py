"""The runner's arithmetic and bookkeeping: arguments, sampling, cache, token loop, checksums, figures."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runner.conftest import Probe
from tests.runner.test_text import write_bundle


def kept(logits: list[float], temperature: float, top_p: float) -> list[int]:
    """The candidates of pq_export.runtime.sample."""
    scaled = np.array(logits, np.float32).astype(np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    return order[: int(np.searchsorted(probabilities[order].cumsum(), top_p)) + 1].tolist()


def test_arguments_of_all_kinds(probe: Probe) -> None:
    words = ["out/b", "-p", "Hi there", "--top-p=0.9", "--temperature", "0.7", "--seed", "3", "-n", "5", "--raw"]
    a = probe("arguments", words=words)
    assert (a["bundle"], a["prompt"], a["top_p"], a["temperature"], a["seed"]) == ("out/b", "Hi there", 0.9, 0.7, 3)
    assert a["max_new_tokens"] == 5 and a["chat"] == 2 and not a["bench"]
    assert probe("arguments", words=["b", "-p", "-x"])["prompt"] == "-x"
    assert probe("arguments", words=["b", "--prompt-ids", "1,20,3"])["prompt_ids"] == [1, 20, 3]
    assert probe("arguments", words=["b", "-p", "x", "--system", "Be short."])["chat"] == 1
    assert probe("arguments", words=["--bench", "--batch=4", "--", "-b"])["bundle"] == "-b"
    assert probe("arguments", words=["--help"])["help"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the bundle's directory is missing"),
        (["b"], "there is no prompt"),
        (["b", "-p", "x", "--prompt-ids", "1"], "more than one prompt"),
        (["b", "c", "-p", "x"], "one bundle too many: c"),
        (["b", "--nope"], "no such option: --nope"),
        (["b", "-p"], "needs a value: --prompt"),
        (["b", "-p", "x", "--raw=1"], "takes no value: --raw"),
        (["b", "-p", "x", "-n", "0"], "must be at least 1: --max-new-tokens"),
        (["b", "-p", "x", "-n", "5x"], "a whole number is needed, not '5x': --max-new-tokens"),
        (["b", "-p", "x", "--seed", "-1"], "must be at least 0: --seed"),
        (["b", "-p", "x", "--top-p", "1.5"], "1.5 is out of range: --top-p"),
        (["b", "-p", "x", "--top-p", "nan"], "nan is out of range"),
        (["b", "-p", "x", "--temperature", ""], "a number is needed"),
        (["b", "--prompt-ids", "1,,2"], "a whole number is needed, not ''"),
        (["b", "--prompt-ids", "1", "--chat"], "a text is needed: --chat"),
        (["b", "--bench", "-p", "x"], "makes its own prompts"),
        (["b", "--bench", "--dry-run"], "--dry-run measures nothing: --bench"),
        (["b", "-p", "x", "--batch", "2"], "is for --bench: --batch"),
        (["b", "-p", "x", "--json", "f"], "is for --bench: --json"),
        (["b", "-p", "x", "-n", "99999999999999999999"], "a whole number is needed"),
    ],
)
def test_arguments_that_are_refused(probe: Probe, words: list[str], message: str) -> None:
    assert message in probe("arguments", words=words)["usage_error"]


def test_help_names_every_option(probe: Probe) -> None:
    source = (Path(__file__).parents[2] / "plugins/runner/src/arguments.cpp").read_text(encoding="utf-8")
    options = re.findall(r'^        \{"(--[a-z-]+)"', source, re.MULTILINE)
    text = probe("arguments", words=["--help"])["usage"]
    assert len(options) > 20 and all(option in text for option in options)


@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("size", [1, 5, 64, 65, 3000])
def test_nucleus_is_that_of_the_python_runtime(probe: Probe, size: int, top_p: float) -> None:
    logits = np.random.default_rng(size).normal(0, 2, size).astype(np.float32).round(1).tolist()  # with equals
    answer = probe("sample", logits=logits, temperature=0.8, top_p=top_p)
    tokens = [token for token, _ in answer]
    if top_p == 1.0:  # whether the last of them counts is a matter of the last bit
        assert sorted(tokens) == sorted(set(tokens)) and len(tokens) >= 0.99 * size
    else:
        assert tokens == kept(logits, 0.8, top_p)
    assert sum(probability for _, probability in answer) == pytest.approx(1)


def test_draws_follow_the_probabilities(probe: Probe) -> None:
    logits = np.log([0.5, 0.3, 0.15, 0.05]).tolist()
    draws = probe("sample", logits=logits, temperature=1.0, top_p=0.9, seed=1, draws=20000)
    counts = np.bincount(draws, minlength=4) / 20000
    np.testing.assert_allclose(counts, np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.015)
    assert draws == probe("sample", logits=logits, temperature=1.0, top_p=0.9, seed=1, draws=20000)
    assert draws != probe("sample", logits=logits, temperature=1.0, top_p=0.9, seed=2, draws=20000)
    assert probe("sample", logits=[1, 3, 3, 2], temperature=0.0, top_p=1.0, seed=0, draws=3) == [1, 1, 1]


def test_logits_that_are_no_numbers(probe: Probe) -> None:
    answer = probe("broken logits")
    assert answer["argmax"] == 3
    assert len(answer["errors"]) == 2 and "the logits are not numbers" in answer["errors"][0]


def test_half_precision_to_float(probe: Probe) -> None:
    bits = np.array(probe("halves"), np.uint64).astype(np.uint32).reshape(-1, 2)
    codes = np.arange(65536, dtype=np.uint16)
    half, expected = bits[:, 0].copy().view(np.float32), codes.view(np.float16)
    np.testing.assert_array_equal(half, expected.astype(np.float32))
    np.testing.assert_array_equal(bits[:, 1], codes.astype(np.uint32) << 16)


def test_the_cache_alternates_between_two_sets(probe: Probe) -> None:
    tensors = [[2, 32, 8], [2, 32, 4], [3, 5, 16]]
    answer = probe("cache", tensors=tensors, batch=2, capacity=10, steps=[4, 1, 1, -1, 3])
    token = 2 * 32 + 2 * 16 + 3 * 5 * 2
    assert answer["bytes_per_token"] == token and answer["bytes"] == 2 * 2 * 10 * token
    assert answer["steps"] == [
        [0, 1, 0, [0, 1, 2, 3, 0, 1, 2, 3]],
        [1, 0, 4, [4, 4]],
        [0, 1, 5, [5, 5]],
        [0, 1, 0, [0, 1, 2, 0, 1, 2]],
    ]
    assert answer["length"] == 3


def test_odd_widths_of_4_bits_round_up(probe: Probe) -> None:
    assert probe("cache", tensors=[[1, 3, 4]], batch=1, capacity=3, steps=[])["bytes"] == 2 * 5


def test_a_cache_that_is_too_small(probe: Probe) -> None:
    full = probe("cache", tensors=[[1, 1, 8]], batch=1, capacity=4, steps=[3, 2])["error"]
    assert "the cache holds 4 tokens; 5 are needed" in full
    assert "it takes 2" in probe("cache", tensors=[], batch=1, capacity=1, steps=[])["error"]


def generate(
    probe: Probe, prompt: list[int], new: int, stop: list[int], capacity: int = 100, max_input: int = 100
) -> Any:
    decoder = {"vocabulary": 50, "capacity": capacity, "max_input": max_input}
    return probe("generate", decoder=decoder, prompt=prompt, max_new_tokens=new, stop=stop)


def test_the_token_loop(probe: Probe) -> None:
    answer = generate(probe, [3, 10], 4, [])
    assert answer["tokens"] == [11, 12, 13, 14] and answer["ending"] == 1 and answer["timed"] == 3
    assert answer["steps"] == ["reset", [3, 10], [11], [12], [13]]  # the last token is not run
    stopped = generate(probe, [10], 9, [13, 30])
    assert stopped["tokens"] == [11, 12] and stopped["ending"] == 0
    assert generate(probe, [10], 1, [])["tokens"] == [11]
    assert generate(probe, [10], 5, [11])["tokens"] == []


def test_the_loop_ends_where_the_cache_does(probe: Probe) -> None:
    answer = generate(probe, [1, 2, 3], 99, [], capacity=5)
    assert answer["tokens"] == [4, 5, 6] and answer["ending"] == 2  # 3 + 2 are in the cache, the third needs no place
    assert generate(probe, [1, 2, 3], 1, [], capacity=3)["tokens"] == [4]
    assert "the prompt has 4 tokens; the cache holds 3" in generate(probe, [1] * 4, 1, [], capacity=3)["error"]


def test_long_prompts_go_in_pieces(probe: Probe) -> None:
    assert generate(probe, [1, 2, 3, 4, 5], 1, [], max_input=2)["steps"] == ["reset", [1], [2, 3], [4, 5]]


def test_the_benchmark_does_what_it_says(probe: Probe) -> None:
    decoder = {"vocabulary": 50, "capacity": 8, "max_input": 3}
    answer = probe("bench", decoder=decoder, batch=2, prompt_length=5, new_tokens=4, repeats=2)
    run = answer["steps"][:6]
    assert [len(step) for step in run[1:]] == [4, 6, 2, 2, 2] and run[0] == "reset"
    assert answer["steps"] == run * 3  # one warm-up and two that count
    first, second = run[1], run[2]
    assert run[3] == [(second[2] + 1) % 50, (second[5] + 1) % 50]  # each sequence goes on by itself
    assert first[:2] != first[2:] and answer["timed"] == 6
    assert answer["json"]["device"]["clocks"] == ["GPU 1 MHz"] * 2
    too_long = probe("bench", decoder=decoder, batch=1, prompt_length=6, new_tokens=4, repeats=1)["error"]
    assert "take 9 places; the cache holds 8" in too_long


def test_percentiles_are_numpys(probe: Probe) -> None:
    values = np.random.default_rng(0).random(17)
    for percent in (0, 5, 50, 95, 100):
        answer = probe("percentile", values=values.tolist(), percent=percent)
        assert answer == pytest.approx(np.percentile(values, percent))
    assert probe("percentile", values=[3], percent=95) == 3
    assert "nothing" in probe("percentile", values=[], percent=50)["error"]


def test_figures(probe: Probe) -> None:
    answer = probe("figures", first_ms=[10, 30, 20], step_ms=[1, 2, 3, 2])
    f = answer["json"]
    assert f["first_token_ms"] == {"p50": 20, "p95": 29} and f["step_ms"]["p50"] == 2
    assert f["prefill_tokens_per_s"] == 2 * 100 / 0.020 and f["decode_tokens_per_s"] == 2 * 4 / 0.008
    assert f["device"]["memory_used_bytes"] == 1 << 30 and f["cache_bytes_per_token"] == 64
    for words in ("Orin (sm_87)", "20.00 ms", "29.00 ms", "1000.0 tokens/s", "1024.0 MiB of 8192.0 MiB", "a; b\n"):
        assert words in answer["table"], words
    unknown = probe("figures", first_ms=[10], step_ms=[], device=False)
    assert "decode_tokens_per_s" not in unknown["json"] and unknown["json"]["device"]["memory_bytes"] is None
    assert "unknown of unknown" in unknown["table"] and "decode" not in unknown["table"]


def test_clocks_of_a_jetson(probe: Probe, tmp_path: Path) -> None:
    assert probe("devfreq", sysfs=str(tmp_path), power="/nowhere") == ""
    other, gpu = tmp_path / "class/devfreq/13e40000.host1x", tmp_path / "class/devfreq/17000000.gpu"
    for directory, now in ((other, 1), (gpu, 624750000)):
        directory.mkdir(parents=True)
        (directory / "cur_freq").write_text(f"{now}\n")
        (directory / "max_freq").write_text("1300500000\n")
    assert probe("devfreq", sysfs=str(tmp_path), power="/nowhere") == "GPU 624 of 1300 MHz"
    (tmp_path / "status").write_text("pmode:0000\n")
    assert probe("devfreq", sysfs=str(tmp_path), power=str(tmp_path / "status")).endswith("power mode pmode:0000")


@pytest.mark.parametrize("size", [0, 1, 100_000])
def test_sha256(probe: Probe, tmp_path: Path, size: int) -> None:
    data = np.random.default_rng(0).bytes(size)
    (tmp_path / "file").write_bytes(data)
    assert probe("sha256", file=str(tmp_path / "file")) == hashlib.sha256(data).hexdigest()


def test_files_that_cannot_be_read(probe: Probe, tmp_path: Path) -> None:
    assert "No such file" in probe("json", file=str(tmp_path / "absent"))["error"]
    assert "not a file" in probe("json", file=str(tmp_path))["error"]


def test_engines_are_found_and_compared(probe: Probe, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    ask: dict[str, Any] = {"directory": str(bundle)}
    assert "deploy/build_engine.sh" in probe("bundle", **ask, find="")["error"]
    engine = bundle / "deploy" / "model.engine"
    engine.parent.mkdir()
    engine.write_bytes(b"engine")
    digest = hashlib.sha256(b"engine").hexdigest()
    assert probe("bundle", **ask, find="")["found"] == str(engine)
    assert "has no recorded checksum" in probe("bundle", **ask, check=str(engine))["error"]
    assert probe("bundle", **ask, check=str(engine), force=True)["record"]["sha256"] == ""
    (bundle / "deploy" / "model.engine.sha256").write_text(f"{digest}  model.engine\n")  # sha256sum's line
    assert probe("bundle", **ask, check=str(engine))["record"] == {"sha256": digest, "tensorrt": ""}
    (bundle / "deploy" / "model.engine.tensorrt").write_text("10.3.0\n")
    assert probe("bundle", **ask, check=str(engine))["record"]["tensorrt"] == "10.3.0"
    engine.write_bytes(b"engine!")
    altered = probe("bundle", **ask, check=str(engine))["error"]
    assert "was altered" in altered and digest[:12] in altered and "--force" in altered

    write_bundle(bundle, engines=[{"file": "deploy/model.engine", "sha256": digest, "tensorrt": "10.3.0"}])
    assert "was altered" in probe("bundle", **ask, check=str(engine))["error"]  # the config counts, not the file beside
    engine.write_bytes(b"engine")
    assert probe("bundle", **ask, check=str(engine))["record"]["tensorrt"] == "10.3.0"
    assert "there is no engine" in probe("bundle", **ask, find="elsewhere.engine")["error"]


def test_the_engine_for_this_gpu_is_taken(probe: Probe, tmp_path: Path) -> None:
    listed = [{"file": f"engines/sm{sm}.engine", "sm": sm} for sm in (86, 120)]
    bundle = write_bundle(tmp_path / "bundle", target="trt-rtx", engines=listed)
    (bundle / "engines").mkdir()
    for record in listed:
        (bundle / str(record["file"])).touch()
    ask: dict[str, Any] = {"directory": str(bundle), "find": ""}
    assert probe("bundle", **ask, sm=120)["found"] == str(bundle / "engines/sm120.engine")
    for sm, said in ((89, "for this GPU, SM 89"), (0, "for an unknown GPU")):
        error = probe("bundle", **ask, sm=sm)["error"]
        assert f"(engines/sm86.engine, engines/sm120.engine) is {said}" in error
        assert "--target trt-rtx" in error and "--engine" in error
    write_bundle(bundle, engines=listed[:1])
    assert "for this GPU, SM 89" in probe("bundle", **ask, sm=89)["error"]
    assert probe("bundle", **ask)["found"] == str(bundle / "engines/sm86.engine"), "without a GPU, the only one"
    (bundle / "deploy").mkdir()
    (bundle / "deploy/model.engine").touch()
    assert probe("bundle", **ask, sm=86)["found"] == str(bundle / "deploy/model.engine"), "built on this machine"


def test_plugin_libraries_are_found(probe: Probe, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    ask: dict[str, Any] = {"directory": str(bundle), "find_plugin": ""}
    assert probe("bundle", **ask)["found_plugin"] == ""
    (bundle / "deploy").mkdir()
    (bundle / "deploy" / "libpq.so").touch()
    assert probe("bundle", **ask)["found_plugin"] == str(bundle / "deploy" / "libpq.so")
    write_bundle(bundle, plugin="plugins/libpq.so")
    assert "there is no plugin library" in probe("bundle", **ask)["error"]


def test_an_engine_names_its_plugin_library(probe: Probe, tmp_path: Path) -> None:
    """Several engines, each with the library of its GPU; ``--plugin`` still decides."""
    listed = [{"file": f"sm{sm}.engine", "sm": sm, "plugin": f"deploy/libpq-sm{sm}.so"} for sm in (86, 89)]
    listed.append({"file": "old.engine", "plugin": "0" * 64})  # version 0.5 had a checksum there
    bundle = write_bundle(tmp_path / "bundle", engines=[*listed, {"file": "own.engine", "plugin": None}])
    (bundle / "deploy").mkdir()
    for name in ("sm86.engine", "sm89.engine", "old.engine", "own.engine"):
        (bundle / name).touch()
    for name in ("libpq.so", "libpq-sm86.so", "libpq-sm89.so", "mine.so"):
        (bundle / "deploy" / name).touch()
    for engine, library in (("sm86", "libpq-sm86"), ("sm89", "libpq-sm89"), ("old", "libpq"), ("own", "libpq")):
        ask: dict[str, Any] = {"directory": str(bundle), "engine": f"{bundle}/./{engine}.engine"}
        assert probe("bundle", **ask, find_plugin="")["found_plugin"] == str(bundle / f"deploy/{library}.so")
        mine = str(bundle / "deploy/mine.so")
        assert probe("bundle", **ask, find_plugin=mine)["found_plugin"] == mine
    (bundle / "deploy/libpq-sm86.so").unlink()
    ask = {"directory": str(bundle), "engine": str(bundle / "sm86.engine")}
    assert "there is no plugin library" in probe("bundle", **ask, find_plugin="")["error"]
