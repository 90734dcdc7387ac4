"""Whether the evaluation text was seen in calibration: shared n-grams of tokens.

A model tuned on its own test text looks better than it is. 13 tokens in a row are seldom equal by chance,
and are the length that language-model papers use (GPT-3, arXiv 2005.14165, appendix C).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pq_export.errors import PqExportError, UsageError

NGRAM = 13
MAX_SHARE = 0.01  # of the evaluation text's n-grams: quotations and headings stay below it

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying loses nothing modulo 2^64


@dataclass(frozen=True)
class Overlap:
    """``shared`` of the evaluation text's ``ngrams`` (counted at every position) occur in the calibration text.

    ``example``: token ids of the first one; empty without overlap.
    """

    shared: int
    ngrams: int
    example: tuple[int, ...] = ()

    @property
    def share(self) -> float:
        return self.shared / self.ngrams


def overlap(
    calibration_tokens: np.ndarray, evaluation_tokens: np.ndarray, n: int = NGRAM, name: str = "the evaluation text"
) -> Overlap:
    """N-grams of ``evaluation_tokens`` [E] that occur in ``calibration_tokens`` [C]; token ids, any integer dtype.

    Candidates are found by 64-bit hashes and counted only if the tokens are equal. Raises
    :class:`PqExportError` where the evaluation text, called ``name`` there, is shorter than one n-gram.
    """
    if len(evaluation_tokens) < n:
        raise PqExportError(
            f"has {len(evaluation_tokens)} tokens, too few to look for {n} in a row",
            where=name,
            cure="Give a longer text.",
        )
    ngrams = len(evaluation_tokens) - n + 1
    if len(calibration_tokens) < n:
        return Overlap(0, ngrams)
    seen, wanted = _hashes(calibration_tokens, n), _hashes(evaluation_tokens, n)
    order = np.argsort(seen, kind="stable")
    places = np.flatnonzero(np.isin(wanted, seen))
    partners = order[np.searchsorted(seen, wanted[places], sorter=order)]
    equal = np.ones(len(places), dtype=bool)
    for offset in range(n):
        equal &= evaluation_tokens[places + offset] == calibration_tokens[partners + offset]
    places = places[equal]
    example = tuple(int(t) for t in evaluation_tokens[places[0] : places[0] + n]) if len(places) else ()
    return Overlap(len(places), ngrams, example)


def _hashes(tokens: np.ndarray, n: int) -> np.ndarray:
    """Hash of the n-gram that starts at each token, uint64 [len - n + 1]: a polynomial modulo 2^64."""
    # Token ids are small: mixed first, or their low bits alone would decide the polynomial's low bits.
    mixed = (tokens.astype(np.uint64) + np.uint64(1)) * _MULTIPLIER
    mixed ^= mixed >> np.uint64(32)
    count = len(tokens) - n + 1
    result = np.zeros(count, dtype=np.uint64)
    for offset in range(n):
        result = result * _MULTIPLIER + mixed[offset : offset + count]
    return result


def assert_uncontaminated(
    calibration_tokens: np.ndarray,
    evaluation_tokens: np.ndarray,
    *,
    calibration: str,
    evaluation: str,
    note: Callable[[str], None],
    decode: Callable[[list[int]], str] | None = None,
) -> Overlap:
    """Refuse an evaluation text that was calibrated on, and ``note`` any smaller overlap.

    ``calibration`` and ``evaluation`` name the texts in messages; ``decode`` shows the example as text.
    Raises :class:`UsageError` where the texts are the same or share more than ``MAX_SHARE`` of the
    evaluation text's n-grams.
    """
    cure = "Evaluate on another text, or calibrate on one without it."
    if np.array_equal(calibration_tokens, evaluation_tokens):
        raise UsageError(f"is the calibration text itself ({calibration})", where=evaluation, cure=cure)
    found = overlap(calibration_tokens, evaluation_tokens, name=evaluation)
    if not found.shared:
        return found
    example = " ".join(map(str, found.example)) if decode is None else repr(decode(list(found.example)))
    message = (
        f"{found.shared:,} of its {found.ngrams:,} {NGRAM}-grams ({found.share:.2%}) occur in the calibration "
        f"text {calibration}, such as {example}"
    )
    if found.share > MAX_SHARE:
        raise UsageError(message, where=evaluation, cure=cure)
    note(f"{evaluation}: {message}")
    return found
