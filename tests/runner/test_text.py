"""The runner between text and tokens: prompts, chat template, tokenizer, streaming, as pq_export/runtime.py has it."""

from __future__ import annotations

import codecs
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pq_export.errors import PqExportError
from pq_export.runtime import prompt_ids, stop_tokens
from tests.runner.conftest import Probe

CHATML = {
    "bos": "",
    "system": ["<|im_start|>system\n", "<|im_end|>\n"],
    "default_system": "<|im_start|>system\nYou help.<|im_end|>\n",
    "user": ["<|im_start|>user\n", "<|im_end|>\n"],
    "assistant": ["<|im_start|>assistant\n", "<|im_end|>\n"],
    "generation": "<|im_start|>assistant\n",
}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def write_bundle(directory: Path, **changes: Any) -> Path:
    """What the runner reads of a bundle, with changed entries of pq_config.json."""
    config = {
        "format": "pq-export/bundle",
        "schema_version": 1,
        "precision": "W4A4KV4",
        "prefix": {"token_ids": [7, 1], "tokens": ["x", "<s>"], "length": 2, "key": ""},
        "bos_token_id": 1,
        "max_position_embeddings": 12,
        "files": {},
        **changes,
    }
    directory.mkdir(exist_ok=True)
    (directory / "pq_config.json").write_text(json.dumps(config))
    return directory


def test_chat_pieces_make_a_conversation(probe: Probe) -> None:
    answered = [user("Hi"), {"role": "assistant", "content": "Hello"}, user(" Bye ")]
    turns = (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\n Bye <|im_end|>\n"
    )
    assert probe("chat", pieces=CHATML, messages=answered) == CHATML["default_system"] + turns + CHATML["generation"]
    with_system = [{"role": "system", "content": "Short."}, user("Hi")]
    text = probe("chat", pieces={**CHATML, "bos": "<s>"}, messages=with_system)
    assert text.startswith("<s><|im_start|>system\nShort.<|im_end|>\n<|im_start|>user\nHi") and "You help" not in text
    stripped = probe("chat", pieces={**CHATML, "strip": True}, messages=[user("\n Hi you\t")])
    assert "user\nHi you<|im_end|>" in stripped


@pytest.mark.parametrize(
    ("pieces", "messages", "words"),
    [
        ({**CHATML, "system": None}, [{"role": "system", "content": "x"}], "no system message"),
        (CHATML, [user("x"), {"role": "system", "content": "x"}], "not the first"),
        (CHATML, [{"role": "tool", "content": "x"}], "no role 'tool'"),
        ({**CHATML, "user": ["only one"]}, [user("x")], "'user' is not a pair"),
        ({"bos": ""}, [user("x")], "has not the pieces"),
    ],
)
def test_chat_refuses(probe: Probe, pieces: Any, messages: Any, words: str) -> None:
    error = probe("chat", pieces=pieces, messages=messages)["error"]
    assert words in error and "deploy/chat.json" in error


@pytest.mark.parametrize("ids", [[1, 5, 6], [1], [], [5, 1, 6], [1, 5, 1], [5] * 9, [5] * 10, [1, *[5] * 10]])
def test_prompts_are_those_of_the_python_runtime(probe: Probe, tmp_path: Path, ids: list[int]) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    config = json.loads((bundle / "pq_config.json").read_text())

    def tokenizer(_: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": list(ids)}

    answer = probe("bundle", directory=str(bundle), ids=ids)
    try:
        expected = prompt_ids(SimpleNamespace(config=config), tokenizer, "text", chat=False)
    except PqExportError as error:
        assert answer["error"] == str(error)
    else:
        assert answer["ids"] == expected


def test_a_bos_that_the_prefix_lacks_stays(probe: Probe, tmp_path: Path) -> None:
    prefix = {"token_ids": [], "tokens": [], "length": 0, "key": ""}
    bundle = write_bundle(tmp_path / "bundle", prefix=prefix)
    assert probe("bundle", directory=str(bundle), ids=[1, 5])["ids"] == [1, 5]
    assert probe("bundle", directory=str(write_bundle(bundle, bos_token_id=None)), ids=[1, 5])["bos"] == -1


@pytest.mark.parametrize("eos", [None, 3, [3, 4]])
@pytest.mark.parametrize("named", ["</s>", {"content": "</s>"}, None])
def test_stop_tokens_are_those_of_the_python_runtime(probe: Probe, tmp_path: Path, eos: Any, named: Any) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    (bundle / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    (bundle / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
    added = [{"id": 2, "content": "</s>", "special": True}, {"id": 5, "content": "<tool>", "special": False}]
    (bundle / "tokenizer.json").write_text(json.dumps({"added_tokens": added, "model": {"vocab": {"a": 0}}}))
    answer = probe("bundle", directory=str(bundle))
    tokenizer = SimpleNamespace(eos_token_id=2 if named else None)
    assert set(answer["stop"]) == stop_tokens(SimpleNamespace(directory=bundle), tokenizer)
    assert answer["special"] == [2]


def test_an_end_token_that_is_an_ordinary_one_is_found(probe: Probe, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    (bundle / "tokenizer_config.json").write_text('{"eos_token": "stop"}')
    (bundle / "tokenizer.json").write_text('{"added_tokens": [], "model": {"vocab": {"a": 0, "stop": 9}}}')
    assert probe("bundle", directory=str(bundle))["stop"] == [9]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "other"}, "not a pq-export bundle"),
        ({"schema_version": 2}, "schema version 2; this pq-run reads up to 1"),
        ({"schema_version": None}, "schema version null"),
        ({"prefix": {}}, "has not the expected contents"),
        ({"engines": [{"sha256": "x"}]}, "has not the expected contents"),
    ],
)
def test_bundles_that_are_refused(probe: Probe, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    bundle = write_bundle(tmp_path / "bundle", **changes)
    error = probe("bundle", directory=str(bundle))["error"]
    assert words in error and str(bundle / "pq_config.json") in error and "\n" not in error


def test_a_directory_that_is_no_bundle(probe: Probe, tmp_path: Path) -> None:
    assert "it has no pq_config.json" in probe("bundle", directory=str(tmp_path))["error"]
    (tmp_path / "pq_config.json").write_text("{")
    assert "is not JSON" in probe("bundle", directory=str(tmp_path))["error"]


def test_an_altered_file_is_refused(probe: Probe, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    record = {"bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    bundle = write_bundle(tmp_path, files={"tokenizer.json": record, "model.onnx": {"bytes": 1, "sha256": "0"}})
    assert "error" not in probe("bundle", directory=str(bundle))  # a file that the runner does not read may be absent
    (tmp_path / "tokenizer.json").write_text("{} ")
    assert "was altered" in probe("bundle", directory=str(bundle))["error"]


def chunked(data: bytes, rng: np.random.Generator) -> list[list[int]]:
    cuts = sorted(rng.integers(0, len(data) + 1, 5).tolist())
    return [list(data[a:b]) for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def test_streams_of_bytes_become_text_as_python_does_it(probe: Probe) -> None:
    rng = np.random.default_rng(0)
    texts = [
        "naïve 日本語 🙂👩‍👩‍👧 \U0010ffff\ud7ff\ue000".encode(),
        b"\xed\xa0\x80\xf4\x90\x80\x80\xc0\xaf\xf8a\xe2\x82",
        b"",
    ]
    # Bytes that begin, continue or break characters, far more often than chance has them.
    pool = np.array([0x41, 0x80, 0x9F, 0xA0, 0xBF, 0xC2, 0xDF, 0xE0, 0xE2, 0xED, 0xEF, 0xF0, 0xF3, 0xF4, 0xF5, 0xFF])
    texts += [bytes(rng.choice(pool, 40).tolist()) for _ in range(40)]
    for number, data in enumerate(texts):
        chunks = chunked(data, rng)
        pieces = probe("utf8", chunks=chunks)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        expected = [decoder.decode(bytes(chunk)) for chunk in chunks] + [decoder.decode(b"", final=True)]
        assert "".join(pieces) == "".join(expected) == data.decode("utf-8", "replace"), data
        if number == 0:  # as soon as Python has it; broken bytes Python holds back a little longer
            assert pieces == expected


def test_the_tokenizer_is_compared_with_the_export(probe: Probe) -> None:
    right = {"text": "ab", "ids": [97, 98]}
    assert probe("tokenizer", checks=[right]) == "ok"
    error = probe("tokenizer", checks=[right, {"text": "b\n", "ids": [98]}])["error"]
    assert 'gives other ids than Hugging Face\'s for "b\\n": [98,10]' in error and "--prompt-ids" in error
    assert "the tokenizer's checks cannot be read" in probe("tokenizer", checks=[{}])["error"]


def test_without_a_tokenizer_the_cure_is_named(probe: Probe) -> None:
    error = probe("load tokenizer", directory="somewhere")["error"]
    assert "was built without a tokenizer" in error and "PQ_RUNNER_TOKENIZER=ON" in error
