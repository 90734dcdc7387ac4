"""What a build for Hexagon compares before it ships: the simulator's logits with onnxruntime's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pq_export.errors import PqExportError, UsageError
from pq_export.static_runtime import StaticFacts
from pq_export.targets import find_target, qnn_compare
from pq_export.targets.base import TargetOptions
from pq_export.targets.profile import find_profile
from pq_export.targets.qnn_compare import compare_simulated

PREFILL, VOCABULARY = 8, 64
SOC = find_profile("qnn-htp").socs["sm8650"]
FACTS = {
    "prefill_len": PREFILL,
    "cache_len": 16,
    "prefix_len": 2,
    "logits": {"dtype": "uint16", "scale": 1e-3, "zero_point": 32768},
    "attention_bias": {"dtype": "uint16", "visible": 65535, "hidden": 0},
    "cache": {"past_key_values.0.key": {"dtype": "uint8", "zero_point": 128}},
}
CONFIG = {"static": {"graphs": {"prefill": "prefill.onnx", "decode": "decode.onnx"}}}
Change = Callable[[np.ndarray, str], None]


class Graph:
    """Logits that are the tokens' own; ``change`` spoils them in place."""

    def __init__(self, name: str, change: Change):
        self.name, self.change = name, change

    def run(self, names: list[str], feeds: dict[str, np.ndarray], /) -> list[np.ndarray]:
        table = np.random.default_rng(0).integers(0, 65536, (100, VOCABULARY))
        logits = table[feeds["input_ids"]].astype(np.uint16)
        self.change(logits[0], self.name)
        return [logits, np.full((1, 1, logits.shape[1], 4), 128, np.uint8)]


class Simulated:
    seconds = 2.0

    def __init__(self, change: Change):
        self.change = change

    def __enter__(self) -> Simulated:
        return self

    def __exit__(self, *raised: object) -> None: ...

    def graphs(self, names: list[str]) -> dict[str, Graph]:
        return {name: Graph(name, self.change) for name in names}


def keep(logits: np.ndarray, name: str) -> None: ...


def second_half(logits: np.ndarray, name: str) -> None:
    logits[PREFILL // 2 :] = logits[PREFILL // 2 :, ::-1]


def first_half(logits: np.ndarray, name: str) -> None:
    logits[: PREFILL // 2] = logits[: PREFILL // 2, ::-1] if name == "prefill" else logits[: PREFILL // 2]


def decode(logits: np.ndarray, name: str) -> None:
    if name == "decode":
        logits[:] = logits[:, ::-1]


def one_token(logits: np.ndarray, name: str) -> None:
    if name == "prefill":
        logits[5] = logits[5, ::-1]


def not_a_number(logits: np.ndarray, name: str) -> None:
    logits[:] = 32768


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Callable[[Change], qnn_compare.Compared]:
    def make(change: Change) -> qnn_compare.Compared:
        monkeypatch.setattr(StaticFacts, "read", lambda *_: StaticFacts.from_dict(FACTS, 1, 4))
        monkeypatch.setattr(
            qnn_compare, "onnxruntime_sessions", lambda *_: Simulated(keep).graphs(["prefill", "decode"])
        )
        monkeypatch.setattr(qnn_compare, "Simulator", lambda *_, **__: Simulated(change))
        return compare_simulated(Path("bundle"), CONFIG, SOC, np.arange(20).reshape(4, 5))

    return make


@pytest.mark.parametrize("change", [keep, one_token])
def test_rounding_passes(compare: Callable[[Change], qnn_compare.Compared], change: Change) -> None:
    compared = compare(change)
    assert compared.least == pytest.approx(1, abs=1e-6)
    assert compared.to_dict() == {"prefill": compared.prefill, "decode": compared.decode, "seconds": 2.0}


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (second_half, "a prefill of 8 tokens"),
        (first_half, "a prefill of 8 tokens"),
        (decode, "in decode"),
        (not_a_number, "cosine to onnxruntime's is 0.00"),
    ],
)
def test_wrong_numbers_do_not_ship(
    compare: Callable[[Change], qnn_compare.Compared], change: Change, where: str
) -> None:
    with pytest.raises(PqExportError, match="computes wrong numbers") as caught:
        compare(change)
    assert where in str(caught.value) and SOC.name in str(caught.value) and "--prefill-len" in str(caught.value)


def test_only_hexagon_has_the_flag() -> None:
    options: Any = TargetOptions(simulation=False)
    with pytest.raises(UsageError, match=r"--no-simulation is not for this target.*--target qnn-htp"):
        find_target("ort").resolved(options, None)
    assert "--no-simulation" in find_target("qnn-htp").takes
