"""TensorRT for the tests: its headers and TensorRT for RTX from PyPI, downloaded once into the checkout's cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.plugins.libraries import CACHE, HEADERS, built_library
from tests.plugins.rtx import Rtx

# No TensorRT package has the headers; this one, of another project, carries those of 10.14 (Apache-2.0).
HEADERS_PACKAGE = "kernel-lens==2.0.1"
RTX_VERSION = "1.7.1.116"
RTX = [f"tensorrt-rtx-cu13{part}=={RTX_VERSION}" for part in ("", "-bindings", "-libs")]


def pip(*arguments: str) -> None:
    """Skips the test where pip cannot: mostly there is no network, or no wheel for this machine."""
    command = [sys.executable, "-m", "pip", *arguments, "--no-deps", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        pytest.skip(f"pip {arguments[0]}: {' '.join(lines) or done.stderr[-300:]}")


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """``.cache/name``, filled by ``make`` if it is not there; whole or not at all."""
    directory = CACHE / name
    if not directory.exists():
        CACHE.mkdir(exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=CACHE))
        try:
            make(part)
            try:
                part.rename(directory)
            except OSError:
                if not directory.exists():  # otherwise another worker was faster
                    raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return directory


@pytest.fixture(scope="session")
def tensorrt_include() -> Path:
    """A directory with NvInfer.h."""

    def make(directory: Path) -> None:
        pip("download", HEADERS_PACKAGE, "--dest", str(directory))
        (wheel,) = directory.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.startswith("kernel_lens/include/tensorrt/")]
            archive.extractall(directory, members)
        wheel.unlink()

    return cached(HEADERS.name, make) / "kernel_lens" / "include" / "tensorrt"


@pytest.fixture(scope="session")
def rtx_environment() -> dict[str, str]:
    """Environment of a process that can ``import tensorrt_rtx``."""

    def make(directory: Path) -> None:
        pip("install", *RTX, "--target", str(directory / "site"))
        # Its ONNX parser opens libtensorrt_rtx.so, a name that the wheel lacks, when it meets a plugin.
        links = directory / "lib"
        links.mkdir()
        (links / "libtensorrt_rtx.so").symlink_to("../site/tensorrt_rtx_libs/libtensorrt_rtx.so.1")

    directory = cached(f"tensorrt-rtx-{RTX_VERSION}", make)
    libraries = [str(directory / "lib"), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {**os.environ, "LD_LIBRARY_PATH": ":".join(libraries), "PYTHONPATH": str(directory / "site")}


@pytest.fixture(scope="session")
def plugin_library(tensorrt_include: Path) -> Path:
    """libpq.so for sm_86, with the TensorRT plugin."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORRT_INCLUDE", str(tensorrt_include))
        return built_library(86).path


@pytest.fixture(scope="session")
def rtx(plugin_library: Path, rtx_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Rtx:
    return Rtx(plugin_library, rtx_environment, tmp_path_factory.mktemp("rtx"))
