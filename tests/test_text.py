"""Calibration text: sources that take turns, and crops cut from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pq_export.calib.text import builtin_text, mixed_crops, random_crops, read_texts, windows
from pq_export.errors import PqExportError, UsageError

LENGTH = 16
SOURCES = {name: np.arange(i * 10_000, i * 10_000 + 4000) for i, name in enumerate("abc", 1)}  # told by their ids


def sources_of(crops: torch.Tensor) -> list[int]:
    """Number of the source of each crop; a crop never mixes two."""
    numbers = crops // 10_000
    assert (numbers == numbers[:, :1]).all()
    return [int(n) for n in numbers[:, 0]]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 12])
@pytest.mark.parametrize("names", ["ab", "abc"])
def test_sources_take_turns(names: str, count: int) -> None:
    crops = mixed_crops({name: SOURCES[name] for name in names}, count, LENGTH, seed=3)
    assert crops.shape == (count, LENGTH) and crops.dtype == torch.int64
    found = sources_of(crops)
    assert found == [i % len(names) + 1 for i in range(count)]
    shares = [found.count(i + 1) for i in range(len(names))]
    assert max(shares) - min(shares) <= 1
    assert (crops.diff(dim=1) == 1).all()  # each is a stretch of its text


@pytest.mark.parametrize("count", [1, 5, 300])
def test_one_source_is_cut_as_ever(count: int) -> None:
    assert torch.equal(mixed_crops({"a": SOURCES["a"]}, count, LENGTH, 7), random_crops(SOURCES["a"], count, LENGTH, 7))


def test_crops_of_one_source_do_not_overlap_while_the_text_lasts() -> None:
    crops = mixed_crops({name: SOURCES[name] for name in "ab"}, 400, LENGTH, 0)
    assert len(crops.unique()) == 400 * LENGTH


def test_crops_are_repeatable_and_follow_the_seed() -> None:
    first, again, other = (mixed_crops(SOURCES, 9, LENGTH, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_equal_texts_are_not_cut_at_equal_places() -> None:
    crops = mixed_crops({"a": SOURCES["a"], "b": SOURCES["a"]}, 20, LENGTH, 0)
    assert not torch.equal(crops[0::2], crops[1::2])


def test_a_source_that_is_too_short_is_named() -> None:
    with pytest.raises(PqExportError, match=r"short\.txt: has 31 tokens, too few for crops of 16"):
        mixed_crops({"a": SOURCES["a"], "short.txt": np.arange(31)}, 4, LENGTH, 0)
    assert mixed_crops({"a": SOURCES["a"], "short.txt": np.arange(31)}, 1, LENGTH, 0).shape == (1, LENGTH)  # not asked


def test_windows_follow_each_other() -> None:
    tokens = np.arange(50)
    assert torch.equal(windows(tokens, 16), torch.arange(48).view(3, 16))
    assert torch.equal(windows(tokens, 16, limit=2), torch.arange(32).view(2, 16))


def test_several_sources_are_read_by_name(tmp_path: Path) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("first text", encoding="utf-8")
    two.write_text("second täxt", encoding="utf-8")
    assert read_texts(str(one)) == {str(one): "first text"}
    assert read_texts(f"{one}, {two},builtin") == {
        str(one): "first text",
        str(two): "second täxt",
        "builtin": builtin_text(),
    }


def test_a_path_with_a_comma_is_one_source_if_it_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a,b.txt"
    path.write_text("with a comma", encoding="utf-8")
    assert read_texts(str(path)) == {str(path): "with a comma"}


@pytest.mark.parametrize("sources", ["", ",", "builtin,", ",builtin", "builtin,,builtin"])
def test_an_empty_source_is_refused(sources: str) -> None:
    with pytest.raises(UsageError, match="names an empty source"):
        read_texts(sources)


def test_a_missing_source_among_others_is_named(tmp_path: Path) -> None:
    with pytest.raises(PqExportError) as caught:
        read_texts(f"builtin,{tmp_path / 'no.txt'}")
    assert str(caught.value).startswith(f"{tmp_path / 'no.txt'}: cannot be read")
