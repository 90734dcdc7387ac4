"""N-grams that calibration and evaluation share, and texts that must share none."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest

from pq_export.calib.text import SHARED_CHARACTERS, builtin_text, read_text
from pq_export.errors import PqExportError, UsageError
from pq_export.validate.contamination import NGRAM, assert_uncontaminated, overlap

EVALUATION = os.environ.get("PQ_EXPORT_EVAL_TEXT", "")
CALIBRATION = [p for p in os.environ.get("PQ_EXPORT_CALIB_TEXTS", "").split(os.pathsep) if p]


def pieces(*texts: str) -> list[np.ndarray]:
    """Token ids of texts, one for each word and each run of punctuation: no model's tokenizer needed."""
    ids: dict[str, int] = {}
    return [np.array([ids.setdefault(w, len(ids)) for w in re.findall(r"\w+|[^\w\s]+", text)]) for text in texts]


def by_hand(calibration: np.ndarray, evaluation: np.ndarray, n: int) -> list[tuple[int, ...]]:
    seen = {tuple(calibration[i : i + n].tolist()) for i in range(len(calibration) - n + 1)}
    grams = (tuple(evaluation[i : i + n].tolist()) for i in range(len(evaluation) - n + 1))
    return [gram for gram in grams if gram in seen]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 13])
@pytest.mark.parametrize("vocabulary", [2, 3, 50_000])
def test_overlap_counts_what_a_set_of_tuples_counts(n: int, vocabulary: int) -> None:
    rng = np.random.default_rng(n)
    calibration, evaluation = rng.integers(0, vocabulary, 400), rng.integers(0, vocabulary, 300)
    evaluation[50:80] = calibration[10:40]  # 30 in a row
    expected = by_hand(calibration, evaluation, n)
    found = overlap(calibration, evaluation, n)
    assert (found.shared, found.ngrams) == (len(expected), 300 - n + 1)
    assert found.shared >= 30 - n + 1
    assert found.example == expected[0]
    assert found.share == len(expected) / (300 - n + 1)


@pytest.mark.parametrize("length, shared", [(12, 0), (13, 1), (14, 2)])
def test_thirteen_tokens_in_a_row_are_one_ngram(length: int, shared: int) -> None:
    calibration, evaluation = np.arange(0, 100), np.arange(1000, 1100)
    evaluation[40 : 40 + length] = calibration[7 : 7 + length]
    found = overlap(calibration, evaluation)
    assert (found.shared, found.ngrams) == (shared, 88)
    assert found.example == (tuple(range(7, 20)) if shared else ())


def test_order_of_tokens_counts() -> None:
    assert overlap(np.arange(100), np.arange(100)[::-1]).shared == 0


def test_equal_hashes_of_other_tokens_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from pq_export.validate import contamination

    def colliding(tokens: np.ndarray, n: int) -> np.ndarray:
        return np.zeros(len(tokens) - n + 1, dtype=np.uint64)

    monkeypatch.setattr(contamination, "_hashes", colliding)
    assert overlap(np.arange(100), np.arange(1000, 1100)).shared == 0


def test_short_texts() -> None:
    assert overlap(np.arange(12), np.arange(100)).shared == 0
    with pytest.raises(PqExportError, match="has 12 tokens, too few to look for 13"):
        overlap(np.arange(100), np.arange(12))


def checked(calibration: np.ndarray, evaluation: np.ndarray) -> list[str]:
    notes: list[str] = []
    assert_uncontaminated(
        calibration,
        evaluation,
        calibration="a.txt",
        evaluation="b.txt",
        note=notes.append,
        decode=lambda ids: "-".join(map(str, ids)),
    )
    return notes


def test_the_same_text_is_refused_however_short() -> None:
    for length in (5, 5000):
        with pytest.raises(UsageError, match=r"b\.txt: is the calibration text itself \(a\.txt\)"):
            checked(np.arange(length), np.arange(length))


def test_more_than_one_percent_is_refused_and_less_is_noted() -> None:
    calibration = np.arange(10_000)
    evaluation = np.arange(20_000, 20_000 + 1000 + NGRAM - 1)  # 1000 n-grams
    assert checked(calibration, evaluation) == []
    evaluation[100 : 100 + NGRAM - 1 + 10] = calibration[50 : 50 + NGRAM - 1 + 10]
    (note,) = checked(calibration, evaluation)
    assert note.startswith(
        "b.txt: 10 of its 1,000 13-grams (1.00%) occur in the calibration text a.txt, such as '50-51-"
    )
    evaluation[100 : 100 + NGRAM - 1 + 11] = calibration[50 : 50 + NGRAM - 1 + 11]
    with pytest.raises(UsageError, match=r"11 of its 1,000 13-grams \(1\.10%\)") as refused:
        checked(calibration, evaluation)
    assert refused.value.exit_code == 2


def test_builtin_texts_share_nothing() -> None:
    calibration, held_out = builtin_text(), builtin_text(held_out=True)
    found = overlap(*pieces(calibration, held_out))
    assert found.shared == 0 and found.ngrams > 8000
    paragraphs = calibration.split("\n")
    runs = {held_out[i : i + SHARED_CHARACTERS] for i in range(len(held_out) - SHARED_CHARACTERS + 1)}
    assert not [p for p in paragraphs if any(p[i : i + SHARED_CHARACTERS] in runs for i in range(len(p)))]
    assert len(calibration) > 200_000 and len(held_out) > 40_000  # what is left suffices


@pytest.mark.skipif(
    not (EVALUATION and CALIBRATION), reason="PQ_EXPORT_EVAL_TEXT and PQ_EXPORT_CALIB_TEXTS are not set"
)
def test_named_texts_share_no_paragraph() -> None:
    """A short paragraph is 25 n-grams; a few of a quarter of a million are turns of phrase and markup."""
    evaluation = read_text(EVALUATION)
    for path in CALIBRATION:
        found = overlap(*pieces(read_text(path), evaluation))
        assert found.shared < min(25, 1e-3 * found.ngrams), f"{Path(path).name}: {found}"
