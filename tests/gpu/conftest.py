"""The library for this machine's GPU, and tensors that would show a stray read or write."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pq_export.errors import PqExportError
from pq_export.plugins.library import Library

GUARD = 4096  # bytes before and behind a tensor
GUARD_BYTE = 0x77  # codes of 7, or of 119: a stray read would show in a sum
POISON = 0xD5


class Guarded:
    """A CUDA tensor between two bands of known bytes."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        size = torch.Size(shape).numel() * dtype.itemsize
        self._bytes = torch.full((size + 2 * GUARD,), GUARD_BYTE, dtype=torch.uint8, device="cuda")
        self._middle = self._bytes[GUARD : GUARD + size]
        self.tensor = self._middle.view(dtype).view(shape)

    @classmethod
    def copy(cls, source: torch.Tensor) -> Guarded:
        guarded = cls(tuple(source.shape), source.dtype)
        guarded.tensor.copy_(source)
        return guarded

    def poison(self) -> torch.Tensor:
        self._middle.fill_(POISON)
        return self.tensor

    def assert_intact(self) -> None:
        outside = torch.cat((self._bytes[:GUARD], self._bytes[-GUARD:]))
        assert (outside == GUARD_BYTE).all(), "written outside the tensor"


@pytest.fixture(scope="session")
def library() -> Library:
    """``PQ_LIBRARY``, or what is built here for this GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if path := os.environ.get("PQ_LIBRARY"):
        return Library(Path(path))
    from pq_export.plugins.build import build
    from pq_export.plugins.toolchain import find_cmake, find_nvcc

    try:
        find_nvcc()
        find_cmake()
    except PqExportError as error:
        pytest.skip(str(error))
    major, minor = torch.cuda.get_device_capability()
    return Library(build([10 * major + minor]).path)


@pytest.fixture(autouse=True)
def no_error_left() -> Iterator[None]:
    """A fault inside a kernel belongs to the test that launched it."""
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
