"""Calibration text: where it comes from and how token crops are cut from it.

The built-in corpus is the documentation that Python's standard library carries (``pydoc_data.topics``,
PSF licence): no download, the same on every machine with one Python version. Some of its topics are
held out for validation and never used to calibrate; topics repeat each other, so paragraphs that share
text with a held-out one are left out too. Line wraps and indentation are taken out: what is left reads
as prose.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pq_export.errors import PqExportError, UsageError

HUB_DATASETS = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text"),
    "pile": ("mit-han-lab/pile-val-backup", None, "validation", "text"),
    "c4": ("allenai/c4", "en", "train", "text"),
}
HUB_DOCUMENTS = 4096
HELD_OUT = 7  # every seventh topic, counted from the fifth: 12 % of the text
SHARED_CHARACTERS = 24  # in a row: shorter than 13 tokens of prose


def builtin_text(held_out: bool = False) -> str:
    """The built-in corpus: the topics to calibrate on, or the held-out ones."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    kept_back = [p for i, name in enumerate(names) if i % HELD_OUT == 4 for p in _paragraphs(topics[name])]
    if held_out:
        return "\n".join(kept_back)
    others = [p for i, name in enumerate(names) if i % HELD_OUT != 4 for p in _paragraphs(topics[name])]
    runs = {run for paragraph in kept_back for run in _runs(paragraph)}
    return "\n".join(paragraph for paragraph in others if runs.isdisjoint(_runs(paragraph)))


def _paragraphs(topic: str) -> list[str]:
    return [" ".join(p.split()) for p in re.split(r"\n\s*\n", topic) if p.strip()]


def _runs(paragraph: str) -> Iterator[str]:
    """Every ``SHARED_CHARACTERS`` characters in a row."""
    return (paragraph[i : i + SHARED_CHARACTERS] for i in range(len(paragraph) - SHARED_CHARACTERS + 1))


def read_texts(sources: str) -> dict[str, str]:
    """Texts of comma-separated ``sources`` by name. A path that holds a comma is one source if it is a file."""
    names = [sources] if Path(sources).is_file() else [name.strip() for name in sources.split(",")]
    if not all(names):
        raise UsageError(f"--calib-data {sources!r} names an empty source")
    return {name: read_text(name) for name in names}


def read_text(source: str) -> str:
    """Text of ``builtin``, of a hub dataset by name, or of a UTF-8 file."""
    if source == "builtin":
        return builtin_text()
    if source in HUB_DATASETS:
        return _hub_text(source)
    path = Path(source)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PqExportError(
            f"is not UTF-8 (byte {error.start})", where=path, cure="Convert it to UTF-8 text."
        ) from None
    except OSError as error:
        raise PqExportError(
            f"cannot be read: {error.strerror}",
            where=path,
            cure=f"Give a text file or one of builtin, {', '.join(HUB_DATASETS)}.",
        ) from None


def _hub_text(name: str) -> str:
    try:
        import datasets
    except ImportError:
        raise PqExportError(
            f"--calib-data {name} needs the package 'datasets'",
            cure="pip install 'pq-export[data]', or give a text file.",
        ) from None
    path, subset, split, column = HUB_DATASETS[name]
    try:
        stream = datasets.load_dataset(path, subset, split=split, streaming=True)
        return "\n\n".join(row[column] for _, row in zip(range(HUB_DOCUMENTS), stream, strict=False))
    except Exception as error:  # the library raises its own, fsspec's and requests' kinds
        raise PqExportError(
            f"--calib-data {name} could not be fetched ({type(error).__name__})",
            cure="Check the network, or give a text file.",
        ) from None


def tokenize(tokenizer: Any, text: str) -> np.ndarray:
    """Token ids of ``text`` without special tokens, int64."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return np.asarray(ids, dtype=np.int64)


def random_crops(tokens: np.ndarray, count: int, length: int, seed: int, where: str = "calibration text") -> Tensor:
    """``count`` crops [count, length] at random places, without overlap while the text is long enough.

    Nothing is put in front: position 0 of a crop is an arbitrary token (PrefixQuant, section 4).
    """
    if len(tokens) < 2 * length:
        raise PqExportError(
            f"has {len(tokens)} tokens, too few for crops of {length}",
            where=where,
            cure="Give a longer text or a smaller --seq-len.",
        )
    rng = np.random.default_rng(seed)
    slots = len(tokens) // length
    if slots >= count:
        slack = len(tokens) - slots * length
        starts = np.sort(rng.choice(slots, count, replace=False)) * length + rng.integers(0, slack + 1)
        starts = rng.permutation(starts)
    else:
        starts = rng.integers(0, len(tokens) - length + 1, count)
    return torch.from_numpy(np.stack([tokens[s : s + length] for s in starts]))


def mixed_crops(texts: dict[str, np.ndarray], count: int, length: int, seed: int) -> Tensor:
    """``count`` crops [count, length] that take turns over the token arrays of ``texts``, each equally often.

    Another ``count`` draws other crops.
    """
    parts = []
    for index, (name, tokens) in enumerate(texts.items()):
        share = (count - index + len(texts) - 1) // len(texts)
        parts.append(random_crops(tokens, share, length, seed + index, name) if share else None)
    if len(parts) == 1 and parts[0] is not None:
        return parts[0]
    return torch.stack([parts[i % len(parts)][i // len(parts)] for i in range(count)])  # type: ignore[index]


def windows(tokens: np.ndarray, length: int, limit: int | None = None) -> Tensor:
    """Consecutive non-overlapping windows [n, length]; the remainder is dropped."""
    count = len(tokens) // length if limit is None else min(limit, len(tokens) // length)
    return torch.from_numpy(tokens[: count * length].reshape(count, length).copy())
