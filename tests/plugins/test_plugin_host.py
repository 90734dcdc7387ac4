"""What the plugin asks of the kernels: scenarios in C++, with a host in TensorRT's place and kernels that only record.

TensorRT itself needs a GPU for all of this: choosing tactics, loading an engine, enqueue.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from pq_export.errors import PqExportError
from pq_export.plugins.abi import SOURCE_DIRECTORY
from pq_export.plugins.toolchain import find_nvcc

HOST = Path(__file__).with_name("host")
SCENARIOS = re.findall(r'^    \{"(.+)", \w+\},$', (HOST / "scenarios.cpp").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture(scope="module")
def program(tensorrt_include: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        nvcc = find_nvcc()  # for its include directory: nothing here is device code
    except PqExportError as error:
        pytest.skip(str(error))
    path = tmp_path_factory.mktemp("host") / "scenarios"
    csrc = SOURCE_DIRECTORY / "csrc"
    sources = [*csrc.glob("plugin*.cpp"), *HOST.glob("*.cpp")]
    warnings = "-Wall,-Wextra,-Wno-deprecated-declarations"
    done = subprocess.run(
        [
            *(str(nvcc.path), "-std=c++17", "-Xcompiler", warnings, "-isystem", str(tensorrt_include)),
            *(f"-I{csrc}", *map(str, sources), "-o", str(path)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return path


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(program: Path, scenario: str) -> None:
    done = subprocess.run([str(program), scenario], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_scenario_is_listed(program: Path) -> None:
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and sorted(done.stdout.splitlines()) == sorted(SCENARIOS)
