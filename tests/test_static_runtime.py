"""The host of graphs with fixed shapes: what it feeds them, what it keeps, and what it drops."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pq_export.errors import IntegrityError, PqExportError
from pq_export.static_runtime import Quantized, StaticDecoder, StaticFacts

PREFILL, CACHE = 4, 6
VISIBLE, HIDDEN = 65535, 0
NAME = "past_key_values.0.key"
FACTS = StaticFacts(
    prefill_len=PREFILL,
    cache_len=CACHE,
    prefix_len=0,
    logits=Quantized(np.dtype(np.uint16), 0.5, 10),
    bias_dtype=np.dtype(np.uint16),
    visible=VISIBLE,
    hidden=HIDDEN,
    cache={NAME: (np.dtype(np.uint8), 128, (1, 1, CACHE, 1))},
)


class Recorder:
    """A graph whose logits say what a token saw: [sum of the ids it saw, how many, its position], as codes.

    The cache holds ids.
    """

    def __init__(self, length: int):
        self.length = length
        self.feeds: list[dict[str, np.ndarray]] = []

    def run(self, names: list[str], feeds: dict[str, np.ndarray], /) -> Sequence[Any]:
        assert names == ["logits", "present.0.key"]
        assert {n: (a.dtype.name, a.shape) for n, a in feeds.items()} == {
            "input_ids": ("int32", (1, self.length)),
            "position_ids": ("int32", (1, self.length)),
            "attention_bias": ("uint16", (1, 1, self.length, CACHE + self.length)),
            NAME: ("uint8", (1, 1, CACHE, 1)),
        }
        self.feeds.append(feeds)
        ids = np.concatenate([feeds[NAME].reshape(-1), feeds["input_ids"][0]])
        assert set(np.unique(feeds["attention_bias"])) <= {VISIBLE, HIDDEN}
        seen = feeds["attention_bias"][0, 0] == VISIBLE
        logits = np.stack([seen @ ids.astype(int), seen.sum(1), feeds["position_ids"][0]], 1)
        return [logits[None].astype(np.uint16), feeds["input_ids"].reshape(1, 1, -1, 1).astype(np.uint8)]


def new_decoder() -> StaticDecoder:
    return StaticDecoder(FACTS, {"prefill": Recorder(PREFILL), "decode": Recorder(1)})


def codes(logits: np.ndarray) -> list[list[int]]:
    return (logits / 0.5 + 10).astype(int).tolist()


@pytest.mark.parametrize("lengths", [[1], [3], [4], [5], [6], [2, 1, 1, 2], [1, 5]])
def test_every_token_sees_itself_and_all_before(lengths: list[int]) -> None:
    ids = np.arange(3, 3 + sum(lengths))
    decoder = new_decoder()
    state, rows, start = decoder.empty(), [], 0
    for length in lengths:
        logits, state, extra = decoder.step(ids[None, start : start + length], state)
        assert extra == []
        assert logits.dtype == np.float32
        rows += codes(logits[0])
        start += length
    assert rows == [[int(ids[: i + 1].sum()), i + 1, i] for i in range(len(ids))]


def test_the_oldest_tokens_leave_a_full_cache_and_positions_go_on() -> None:
    ids = np.arange(1, 21)
    decoder = new_decoder()
    state, rows = decoder.empty(), []
    for start in range(0, 20, 3):
        logits, state, _ = decoder.step(ids[None, start : start + 3], state)
        rows += codes(logits[0])
    for i, row in enumerate(rows):
        first = max(0, i - i % 3 - CACHE)  # the cache in front of this chunk, and the chunk
        assert row == [int(ids[first : i + 1].sum()), i + 1 - first, i]
    logits, state, _ = decoder.step(np.array([[77]]), state)
    assert codes(logits[0]) == [[int(ids[-CACHE:].sum()) + 77, CACHE + 1, 20]]


def test_a_state_can_be_gone_on_from_twice() -> None:
    decoder = new_decoder()
    _, state, _ = decoder.step(np.array([[5, 6]]), decoder.empty())
    first, _, _ = decoder.step(np.array([[7]]), state)
    second, _, _ = decoder.step(np.array([[9]]), state)
    assert codes(first[0]) == [[18, 3, 2]]
    assert codes(second[0]) == [[20, 3, 2]]


def test_the_last_logits_only_and_which_graph_ran() -> None:
    decoder = new_decoder()
    logits, state, _ = decoder.step(np.arange(3, 9)[None], decoder.empty(), last_only=True)
    assert logits.shape == (1, 1, 3)
    decoder.step(np.array([[1]]), state)
    assert decoder.runs == {"prefill": 2, "decode": 1}


def test_masked_tokens_of_a_batch_are_left_out() -> None:
    decoder = new_decoder()
    ids = np.array([[0, 0, 5, 6, 7], [8, 9, 0, 0, 0]])
    logits, state, _ = decoder.step(ids, decoder.empty(2), mask=(ids > 0).astype(int))
    assert codes(logits[0, 2:]) == [[5, 1, 0], [11, 2, 1], [18, 3, 2]]
    assert codes(logits[1, :2]) == [[8, 1, 0], [17, 2, 1]]
    assert not logits[0, :2].any()  # and not -5, the value of code 0
    logits, _, _ = decoder.step(np.array([[1], [2]]), state)
    assert codes(logits[:, 0]) == [[19, 4, 3], [19, 3, 2]]


def test_a_batch_row_without_tokens_is_refused() -> None:
    decoder = new_decoder()
    with pytest.raises(PqExportError, match="no tokens"):
        decoder.step(np.array([[1], [2]]), decoder.empty(2), mask=np.array([[1], [0]]))


def test_padding_is_hidden_from_tokens_and_sees_something() -> None:
    decoder = new_decoder()
    decoder.step(np.array([[5, 6]]), decoder.empty())
    feeds = decoder._sessions["prefill"].feeds[0]  # type: ignore[attr-defined]
    seen = feeds["attention_bias"][0, 0] == VISIBLE
    assert not seen[:2, CACHE + 2 :].any()
    assert seen.any(1).all()  # a softmax over nothing is not a number
    assert (feeds["position_ids"][0] <= 1).all()  # no position that the model may not have


def test_facts_are_read_from_the_bundle(tmp_path: Path) -> None:
    document = {
        "prefill_len": 8,
        "cache_len": 16,
        "prefix_len": 3,
        "logits": {"dtype": "uint16", "scale": 0.25, "zero_point": 7},
        "attention_bias": {"visible": 65535, "hidden": 0, "dtype": "uint16"},
        "cache": {NAME: {"dtype": "uint8", "zero_point": 128}},
        "float_tensors": False,
    }
    config = {"kv_cache": {"heads": 2, "head_dim": 4}}
    (tmp_path / "static").mkdir()
    path = tmp_path / "static" / "static.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    facts = StaticFacts.read(tmp_path, config)
    assert (facts.prefill_len, facts.cache_len, facts.prefix_len) == (8, 16, 3)
    assert facts.logits == Quantized(np.dtype(np.uint16), 0.25, 7)
    assert facts.logits.values(np.array([7, 11], np.uint16)).tolist() == [0.0, 1.0]
    assert facts.cache == {NAME: (np.dtype(np.uint8), 128, (1, 2, 16, 4))}

    path.write_text(json.dumps({**document, "cache": 3}), encoding="utf-8")
    with pytest.raises(IntegrityError, match="cannot be read"):
        StaticFacts.read(tmp_path, config)
    path.unlink()
    with pytest.raises(PqExportError, match="no graphs of fixed shapes"):
        StaticFacts.read(tmp_path, config)
