"""pq-run from the command line, with a TensorRT, a GPU and a tokenizer of the tests' own (fake/)."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pq_export.targets.base import TargetOptions
from pq_export.targets.tensorrt_options import Profile, profiles
from tests.runner.test_text import CHATML, write_bundle

Run = Callable[..., subprocess.CompletedProcess[str]]


def as_spec(profile: Profile) -> dict[str, list[int]]:
    """What the toy engine is told of a profile: its first and last sizes."""
    ends = (0, 2)
    tokens, past = (profile.shapes[name] for name in ("input_ids", "past_key_values.0.key"))
    return {
        "batch": [tokens[i][0] for i in ends],
        "tokens": [tokens[i][1] for i in ends],
        "past": [past[i][2] for i in ends],
    }


PREFILL, DECODE = map(
    as_spec,
    profiles(
        {"kv_cache": {"heads": 2, "head_dim": 4}, "num_layers": 2},
        TargetOptions(max_batch_size=4, max_input_len=8, max_seq_len=24),
    ),
)
SPEC: dict[str, Any] = {
    "layers": 2,
    "heads": 2,
    "width": 4,
    "bits": 8,
    "vocabulary": 11,
    "logits": "float",
    "num_logits": "device",
    "profiles": [PREFILL, DECODE],
}


def expected_tokens(prompt: list[int], count: int, bits: int = 8, vocabulary: int = 11) -> list[int]:
    """What the toy says (fake_tensorrt.cpp)."""
    ids = list(prompt)
    for _ in range(count):
        ids.append((sum(i % 2 ** (bits - 1) for i in ids) + len(ids)) % vocabulary)
    return ids[len(prompt) :]


def write_engine(bundle: Path, **changes: Any) -> Path:
    engine = bundle / "deploy" / "model.engine"
    engine.parent.mkdir(exist_ok=True)
    engine.write_text(json.dumps({**SPEC, **changes}))
    digest = hashlib.sha256(engine.read_bytes()).hexdigest()
    (bundle / "deploy" / "model.engine.sha256").write_text(f"{digest}  model.engine\n")
    return engine


@pytest.fixture
def bundle(tmp_path: Path, fake_libraries: dict[str, Path]) -> Path:
    directory = write_bundle(tmp_path / "bundle", max_position_embeddings=100)
    write_engine(directory)
    (directory / "deploy" / "libpq.so").symlink_to(fake_libraries["plugin"])
    return directory


@pytest.fixture
def run(runner_program: Path, fake_libraries: dict[str, Path], bundle: Path) -> Run:
    def start(*words: str, tensorrt: Path | str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        library = fake_libraries["tensorrt"] if tensorrt is None else tensorrt
        command = [str(runner_program), str(bundle), "--tensorrt-library", str(library), *words]
        env = {**os.environ, "FAKE_LOG": str(bundle / "log"), **environment}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=env)

    return start


def ids_of(done: subprocess.CompletedProcess[str]) -> list[int]:
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split(",")]


def steps(bundle: Path) -> list[str]:
    """profile, batch, tokens, past of every step that the engine ran."""
    return (bundle / "log").read_text().splitlines()


def refused(done: subprocess.CompletedProcess[str], code: int = 1) -> str:
    assert done.returncode == code and done.stdout == "", done
    assert done.stderr.startswith("pq-run: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize("logits", ["float", "half"])
@pytest.mark.parametrize("num_logits", ["device", "host", "none"])
@pytest.mark.parametrize("bits", [4, 8])
def test_tokens_are_the_models(run: Run, bundle: Path, bits: int, num_logits: str, logits: str) -> None:
    write_engine(bundle, bits=bits, num_logits=num_logits, logits=logits)
    assert ids_of(run("--prompt-ids", "5,9,2", "-n", "12")) == expected_tokens([5, 9, 2], 12, bits)
    assert steps(bundle)[:3] == ["0 1 3 0", "1 1 1 3", "1 1 1 4"] and len(steps(bundle)) == 12


def test_long_prompts_are_prefilled_in_pieces(run: Run, bundle: Path) -> None:
    prompt = list(range(2, 20))
    words = ",".join(map(str, prompt))
    assert ids_of(run("--prompt-ids", words, "-n", "3")) == expected_tokens(prompt, 3)
    assert steps(bundle) == ["0 1 2 0", "0 1 8 2", "0 1 8 10", "1 1 1 18", "1 1 1 19"]


@pytest.mark.parametrize("length", [9, 16, 17, 23, 24])
def test_every_prompt_that_the_cache_holds_is_prefilled(run: Run, bundle: Path, length: int) -> None:
    """24 tokens of which 8 at once: behind 16 at most, which is where the profile that we ship ends."""
    assert (PREFILL["tokens"], PREFILL["past"]) == ([1, 8], [0, 16])
    prompt = [i % 11 for i in range(length)]
    words = ",".join(map(str, prompt))
    assert ids_of(run("--prompt-ids", words, "-n", "1")) == expected_tokens(prompt, 1)


def test_one_profile_is_enough(run: Run, bundle: Path) -> None:
    write_engine(bundle, profiles=[PREFILL])
    assert ids_of(run("--prompt-ids", "5", "-n", "3")) == expected_tokens([5], 3)
    assert steps(bundle) == ["0 1 1 0", "0 1 1 1", "0 1 1 2"]


def test_generation_ends_where_the_cache_does(run: Run, bundle: Path) -> None:
    done = run("--prompt-ids", "5,6", "-n", "50")
    assert ids_of(done) == expected_tokens([5, 6], 23) and "the cache is full (24 tokens)" in done.stderr
    done = run("--prompt-ids", "5,6", "-n", "50", "--max-seq-len", "10")
    assert ids_of(done) == expected_tokens([5, 6], 9) and "the cache is full (10 tokens)" in done.stderr
    assert "but the engine holds" in refused(run("--prompt-ids", "5", "--max-seq-len", "99"))


def test_text_streams_and_special_tokens_are_silent(run: Run, bundle: Path) -> None:
    added = [{"id": 256, "content": "<s>", "special": True}]
    (bundle / "tokenizer.json").write_text(json.dumps({"added_tokens": added, "model": {"vocab": {}}}))
    write_engine(bundle, vocabulary=257)
    done = run("-p", "Hi", "-n", "6", "--stats")
    expected = expected_tokens(list(b"Hi"), 6, vocabulary=257)
    assert (
        done.returncode == 0 and done.stdout == bytes(i for i in expected if i < 256).decode("utf-8", "replace") + "\n"
    )
    assert "prompt of 2 tokens" in done.stderr and "5 steps" in done.stderr


def test_a_stop_token_ends_it(run: Run, bundle: Path) -> None:
    expected = expected_tokens([5, 9, 2], 12)
    (bundle / "generation_config.json").write_text(json.dumps({"eos_token_id": expected[3]}))
    assert ids_of(run("--prompt-ids", "5,9,2")) == expected[: expected.index(expected[3])]


def test_dry_run_needs_no_gpu(run: Run, bundle: Path) -> None:
    (bundle / "deploy" / "chat.json").write_text(json.dumps(CHATML))
    chat = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    system = "<|im_start|>system\nBe short.<|im_end|>\n"
    nothing = {"FAKE_GPU": "none", "tensorrt": "absent.so"}
    write_bundle(bundle, max_position_embeddings=999)
    done = run("-p", "Hi", "--dry-run", "--system", "Be short.", **nothing)
    assert bytes(ids_of(done)).decode() == system + chat
    assert bytes(ids_of(run("-p", "Hi", "--dry-run", **nothing))).decode() == CHATML["default_system"] + chat
    assert bytes(ids_of(run("-p", "Hi", "--dry-run", "--raw", **nothing))) == b"Hi"
    (bundle / "text").write_text("from a file")
    assert bytes(ids_of(run("--prompt-file", str(bundle / "text"), "--dry-run", "--raw", **nothing))) == b"from a file"
    assert ids_of(run("--prompt-ids", "1,5", "--dry-run", **nothing)) == [5]  # the prefix holds the BOS


def test_bench(run: Run, bundle: Path) -> None:
    done = run("--bench", "--prompt-length", "10", "-n", "4", "--batch", "3", "--repeats", "2", "--json", "-")
    figures = json.loads(done.stdout)
    assert figures["batch"] == 3 and figures["repeats"] == 2 and figures["device"]["tensorrt"] == "10.3.0"
    assert figures["cache_bytes_per_token"] == 2 * 2 * 2 * 4 and figures["cache_bytes"] == 2 * 3 * 24 * 32
    assert figures["device"]["sm"] == 87 and figures["device"]["memory_used_bytes"] > figures["cache_bytes"]
    assert steps(bundle) == ["0 3 2 0", "0 3 8 2", "1 3 1 10", "1 3 1 11", "1 3 1 12"] * 3
    table = run("--bench", "--prompt-length", "3", "-n", "2", "--json", str(bundle / "figures.json")).stdout
    assert "Fake GPU (sm_87)" in table and "time to first token, p95" in table
    assert json.loads((bundle / "figures.json").read_text())["prompt_length"] == 3
    assert "no profile of the engine allows 9 x 3" in refused(
        run("--bench", "--batch", "9", "--prompt-length", "3", "-n", "2")
    )


def test_an_altered_engine_is_refused(run: Run, bundle: Path) -> None:
    engine = bundle / "deploy" / "model.engine"
    engine.write_text(engine.read_text() + " ")
    assert "was altered" in refused(run("--prompt-ids", "5"))
    assert ids_of(run("--prompt-ids", "5", "-n", "2", "--force")) == expected_tokens([5], 2)


def test_an_engine_of_another_tensorrt_is_refused(run: Run, bundle: Path) -> None:
    engine = write_engine(bundle)
    digest = hashlib.sha256(engine.read_bytes()).hexdigest()
    record = {"file": "deploy/model.engine", "sha256": digest, "tensorrt": "10.14.1"}
    write_bundle(bundle, engines=[record])
    line = refused(run("--prompt-ids", "5"))
    assert "was built by TensorRT 10.14.1, this is 10.3.0" in line and "deploy/build_engine.sh" in line
    engine.write_text("an engine of who knows whom")
    line = refused(run("--prompt-ids", "5", "--force"))
    assert "Version tag does not match" in line and "deploy/build_engine.sh" in line


def test_of_several_engines_that_of_the_gpu_runs_with_its_plugin(
    run: Run, bundle: Path, fake_libraries: dict[str, Path]
) -> None:
    """Nothing is named on the command line; the GPU has SM 87."""
    content = write_engine(bundle).read_bytes()
    (bundle / "deploy/model.engine").unlink()
    (bundle / "deploy/libpq.so").unlink()
    (bundle / "engines").mkdir()
    records = []
    for sm in (86, 87):
        (bundle / f"engines/sm{sm}.engine").write_bytes(content if sm == 87 else b"of another GPU")
        (bundle / f"deploy/libpq-sm{sm}.so").write_text("no library")
        records.append({"file": f"engines/sm{sm}.engine", "sm": sm, "plugin": f"deploy/libpq-sm{sm}.so"})
        records[-1] |= {"sha256": hashlib.sha256(content).hexdigest(), "tensorrt": "10.3.0"}
    write_bundle(bundle, max_position_embeddings=100, engines=records)
    assert "libpq-sm87.so" in refused(run("--prompt-ids", "5"))
    plugin = str(fake_libraries["plugin"])
    assert ids_of(run("--prompt-ids", "5", "-n", "2", "--plugin", plugin)) == expected_tokens([5], 2)
    (bundle / "deploy/libpq-sm87.so").unlink()
    (bundle / "deploy/libpq-sm87.so").symlink_to(plugin)
    assert ids_of(run("--prompt-ids", "5", "-n", "2")) == expected_tokens([5], 2)
    assert "was altered" in refused(run("--prompt-ids", "5", "--engine", str(bundle / "engines/sm86.engine")))


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"FAKE_GPU": "none"}, "there is no GPU to run on"),
        ({"FAKE_TENSORRT": "110400"}, "TensorRT is version 11.4.0, but pq-run was built for 10.x"),
        ({"FAKE_PQ_VARIANTS": "0"}, "holds no kernel for Fake GPU, sm_87"),
        ({"FAKE_PQ_ABI": "9"}, "has interface version 9"),
        ({"FAKE_REGISTRY_FAILS": "1"}, "does not take the plugin library (Unable to load library)"),
        ({"FAKE_ENQUEUE_FAILS": "1"}, "the engine does not run (an illegal memory access was encountered)"),
        ({"tensorrt": "absent.so"}, "the library cannot be loaded (absent.so"),
    ],
)
def test_what_can_be_wrong_with_the_machine(run: Run, environment: dict[str, str], words: str) -> None:
    assert words in refused(run("--prompt-ids", "5", **environment))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"extra": {"pixels": [1]}}, "does not know the engine's tensor pixels"),
        ({"layers": 0}, "has not the inputs and outputs of a pq-export graph"),
        ({"profiles": [{**PREFILL, "past": [0, 10**8]}], "layers": 9}, "not enough memory"),
        ({"profiles": [{**PREFILL, "tokens": [2, 2]}]}, "no profile of the engine allows one token behind a prompt"),
        ({"profiles": [DECODE]}, "no profile of the engine allows 1 x 1 tokens behind 0"),
    ],
)
def test_engines_that_do_not_fit(run: Run, bundle: Path, changes: dict[str, Any], words: str) -> None:
    write_bundle(bundle, max_position_embeddings=10**9)
    write_engine(bundle, **changes)
    assert words in refused(run("--prompt-ids", "5"))


def test_usage_errors_have_their_own_code(run: Run) -> None:
    assert "there is no such option: --nope" in refused(run("--nope"), code=2)
    assert run("--help").stdout.startswith("pq-run BUNDLE [options]")
