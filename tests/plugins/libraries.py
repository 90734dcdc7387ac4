"""Real libraries for tests: compiled once, kept in the checkout's cache until their sources change."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest

from pq_export.errors import PqExportError
from pq_export.plugins.build import Built, build
from pq_export.plugins.toolchain import find_cmake, find_nvcc

CACHE = Path(__file__).resolve().parents[2] / ".cache"
HEADERS = CACHE / "tensorrt-headers-10.14"  # filled by the fixture tensorrt_include
INT4_SMS = (80, 86, 87, 89)  # whose tensor cores multiply int4
LATER_SMS = (90, 100, 110, 120)  # which emulate it
BUILT_SMS = (*INT4_SMS, *LATER_SMS)


def built_library(sm: int) -> Built:
    """With the TensorRT plugin where TENSORRT_INCLUDE names its headers, or a test before has downloaded them.

    Skips the test where there is no nvcc or no CMake; a build that fails fails the test.
    """
    try:
        find_nvcc()
        find_cmake()
    except PqExportError as error:
        pytest.skip(str(error))
    downloaded = HEADERS / "kernel_lens" / "include" / "tensorrt"
    outcome = _build(sm, os.environ.get("TENSORRT_INCLUDE") or (str(downloaded) if downloaded.is_dir() else None))
    if isinstance(outcome, PqExportError):
        raise outcome
    return outcome


@functools.cache
def _build(sm: int, tensorrt_include: str | None) -> Built | PqExportError:
    """Once a process, also when it fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(CACHE))
        try:
            return build([sm], tensorrt_include=Path(tensorrt_include) if tensorrt_include else None)
        except PqExportError as error:
            return error
