"""nlohmann/json for the runner's tests, from PyPI, and the programs that they drive."""

from __future__ import annotations

import json
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.plugins.conftest import cached, pip, tensorrt_include  # noqa: F401
from tests.runner.compiling import CORE, FAKE, SOURCES, program

JSON_PACKAGE = "nlohmann-json==3.12.0"
Probe = Callable[..., Any]


@pytest.fixture(scope="session")
def json_include() -> Path:
    """A directory with nlohmann/json.hpp."""

    def make(directory: Path) -> None:
        pip("download", JSON_PACKAGE, "--dest", str(directory))
        (wheel,) = directory.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(directory)
        wheel.unlink()

    return cached("nlohmann-json-3.12.0", make) / "nlohmann_json" / "include"


@pytest.fixture(scope="session")
def probe_program(json_include: Path) -> Path:
    sources = [*CORE, SOURCES / "tokenizer_none.cpp", Path(__file__).with_name("probe.cpp")]
    return program("probe", sources, json_include, ["-lcrypto", "-ldl"])


@pytest.fixture
def probe(probe_program: Path) -> Probe:
    """``probe("name", key=value, ...)``: what the runner's function answers, or {"error": its line}."""

    def ask(name: str, **arguments: Any) -> Any:
        request = json.dumps({"do": name, **arguments})
        done = subprocess.run([str(probe_program)], input=request, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return ask


@pytest.fixture(scope="session")
def fake_libraries(json_include: Path) -> dict[str, Path]:
    """A TensorRT that runs a toy on the CPU, and a plugin library."""
    return {
        "tensorrt": program("libnvinfer.so", [FAKE / "fake_tensorrt.cpp"], json_include),
        "plugin": program("libpq.so", [FAKE / "fake_libpq.cpp"], json_include),
    }


@pytest.fixture(scope="session")
def runner_program(json_include: Path) -> Path:
    """pq-run as it is, with CUDA, TensorRT and the tokenizer in ``fake`` in place of the real ones."""
    names = ("main", "engine", "tensorrt_library")
    sources = [*CORE, *(SOURCES / f"{name}.cpp" for name in names)]
    sources += [FAKE / "fake_cuda.cpp", FAKE / "fake_tokenizer.cpp"]
    return program("pq-run", sources, json_include, ["-lcrypto", "-ldl"])
