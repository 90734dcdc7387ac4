"""Building the kernels' library: errors of the command, reuse of the cache, and a real build."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pq_export.errors import PqExportError
from pq_export.plugins import build as building
from pq_export.plugins.build import LIBRARY_NAME, build, built, find_library
from pq_export.plugins.library import Library
from pq_export.plugins.toolchain import ARCHITECTURES, find_nvcc, find_tensorrt, parse_sm
from tests.cli_runner import Runner
from tests.plugins.libraries import BUILT_SMS, built_library

FAKE_NVCC = """#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release 12.6, V${FAKE_CUDA:-12.6.85}" ;;
--list-gpu-code) echo sm_80 sm_86 sm_87 sm_89 sm_90 ;;
esac
"""
# Writes what it was called with, and a library; FAKE_FAILURE is what its compiler says.
FAKE_CMAKE = """#!/bin/sh
echo "$@" >> "$FAKE_CALLS"
case "$1" in
-S) ;;
--build)
    if [ -n "$FAKE_FAILURE" ]; then echo "building"; echo "$FAKE_FAILURE"; echo "make: stopped"; exit 2; fi
    mkdir -p "$2/lib" && echo library > "$2/lib/libpq.so" ;;
esac
"""


@pytest.fixture
def pq(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(monkeypatch, capsys)


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A fake nvcc and a fake cmake, an empty cache, no TensorRT -> the file that lists cmake's calls."""
    for name, text in (("nvcc", FAKE_NVCC), ("cmake", FAKE_CMAKE)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("FAKE_CALLS", str(tmp_path / "calls"))
    monkeypatch.setattr("pq_export.plugins.toolchain.TENSORRT_PLACES", ())
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "TENSORRT_INCLUDE", "FAKE_FAILURE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "calls"


def calls(tools: Path) -> list[str]:
    return tools.read_text().splitlines() if tools.exists() else []


def tensorrt_headers(directory: Path, version: str) -> Path:
    directory.mkdir()
    (directory / "NvInfer.h").write_text("")
    (directory / "NvInferVersion.h").write_text(version)
    return directory


def test_a_second_build_reuses_the_first(tools: Path, pq: Runner, tmp_path: Path) -> None:
    first = pq("plugin", "build", "--sm", "86", "--sm", "sm_90")
    assert first.code == 0, first
    configure, compile_ = calls(tools)
    assert "-DCMAKE_CUDA_ARCHITECTURES=86-real;90a-real" in configure and compile_.startswith("--build")
    line = first.out.splitlines()[-1]
    path = Path(line.split()[0])
    assert path.name == LIBRARY_NAME and path.read_text() == "library\n"
    assert "sm_86, sm_90, without the TensorRT plugin" in line
    assert "note: no NvInfer.h found" in first.out
    assert path.parent.parent == tmp_path / "cache" / "pq-export" / "plugins"
    assert sorted(p.name for p in path.parent.iterdir()) == ["build.json", "build.log", LIBRARY_NAME]

    again = pq("plugin", "build", "--sm", "9.0", "--sm", "86", "--json")
    assert json.loads(again.out)["path"] == str(path) and len(calls(tools)) == 2
    assert pq("plugin", "build", "--sm", "80").code == 0 and len(calls(tools)) == 4
    listed = json.loads(pq("plugin", "list", "--json").out)
    assert sorted(entry["sms"] for entry in listed) == [[80], [86, 90]] and all(entry["current"] for entry in listed)
    assert find_library(90) == find_library(86, 90) == path
    with pytest.raises(PqExportError, match=r"for sm_80, sm_90.*plugin build --sm 80 --sm 90"):
        find_library(80, 90)
    with pytest.raises(PqExportError, match=r"with the TensorRT plugin is built for sm_90.*--tensorrt-include DIR"):
        find_library(90, plugin=True)
    table = pq("plugin", "list").out
    assert str(path) in table and "sm_86, sm_90" in table


def test_what_a_library_depends_on_makes_a_new_one(
    tools: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another compiler, other sources, TensorRT's headers."""
    paths = [build([86]).path]
    monkeypatch.setenv("FAKE_CUDA", "12.9.1")
    paths.append(build([86]).path)
    headers = tensorrt_headers(
        tmp_path / "trt",
        "#define NV_TENSORRT_MAJOR 10 //!< x\n#define NV_TENSORRT_MINOR 3\n#define NV_TENSORRT_PATCH 0\n",
    )
    with_plugin = build([86], tensorrt_include=headers)
    assert with_plugin.tensorrt == "10.3.0" and find_library(86, plugin=True) == with_plugin.path
    paths.append(with_plugin.path)
    assert f"-DPQ_TENSORRT_INCLUDE={headers}" in calls(tools)[-2]
    copy = tmp_path / "sources"
    (copy / "csrc").mkdir(parents=True)
    (copy / "csrc" / "a.cu").write_text("other")
    monkeypatch.setattr(building, "SOURCE_DIRECTORY", copy)
    assert not any(entry.current for entry in built())
    with pytest.raises(PqExportError, match="no library is built for sm_86"):
        find_library(86)
    paths.append(build([86]).path)
    assert len(set(paths)) == 4 and find_library(86) == paths[-1]


def test_output_gets_a_copy(tools: Path, pq: Runner, tmp_path: Path) -> None:
    result = pq("plugin", "build", "--sm", 87, "-o", tmp_path / "out")
    assert result.out.splitlines()[-1].startswith(str(tmp_path / "out" / LIBRARY_NAME))
    assert (tmp_path / "out" / LIBRARY_NAME).read_text() == "library\n"
    assert pq("plugin", "build", "--sm", 87, "-o", tmp_path / "out").code == 0  # an old copy is replaced
    (tmp_path / "file").write_text("")
    pq.refuses("plugin", "build", "--sm", 87, "-o", tmp_path / "file", says=("file", "cannot be written"))


def test_trtexec_line_and_jetson_note(tools: Path, pq: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    headers = tensorrt_headers(tmp_path / "trt", "#define TRT_MAJOR_ENTERPRISE 11\n")
    monkeypatch.setenv("TENSORRT_INCLUDE", str(headers))
    monkeypatch.setattr(building, "machine", lambda: "x86_64")
    result = pq("plugin", "build", "--sm", "87")
    assert "--dynamicPlugins=" in result.out and "with the TensorRT 11.?.? plugin" in result.out
    assert len([line for line in result.out.splitlines() if "JetPack 6" in line and "CUDA 12.x" in line]) == 1
    monkeypatch.setattr(building, "machine", lambda: "aarch64")  # on the device, with CUDA 12
    assert "JetPack" not in pq("plugin", "build", "--sm", "87").out
    monkeypatch.setenv("FAKE_CUDA", "13.0.88")
    assert "JetPack 6" in pq("plugin", "build", "--sm", "87").out


def test_a_compile_error_is_one_line_and_keeps_the_log(
    tools: Path, pq: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FAKE_FAILURE", "decode.cu(3): error: identifier is undefined")
    line = pq.refuses("plugin", "build", "--sm", "86", says=("decode.cu(3): error: identifier", "whole log"))
    log = Path(line.split("whole log is ")[1])
    assert "make: stopped" in log.read_text() and "-DCMAKE_CUDA_ARCHITECTURES=86-real" in log.read_text()
    assert [p.name for p in (tmp_path / "cache" / "pq-export" / "plugins").iterdir()] == [log.name]
    monkeypatch.setenv("FAKE_FAILURE", "ninja: stopped")
    assert "ninja: stopped | make: stopped" in pq.refuses("plugin", "build", "--sm", "86")
    monkeypatch.delenv("FAKE_FAILURE")
    assert pq("plugin", "build", "--sm", "86").code == 0


def test_sources_that_change_meanwhile_are_not_kept(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library would be found under a hash of what it was not built from."""
    hashes = iter(("before", "after"))
    with monkeypatch.context() as patch:
        patch.setattr(building, "sources_hash", lambda: next(hashes))
        with pytest.raises(PqExportError, match="changed while it was compiled"):
            build([86])
    assert built() == []


def test_a_damaged_entry_is_built_again(tools: Path) -> None:
    path = build([86]).path
    path.unlink()
    assert built() == []
    assert build([86]).path == path and path.is_file()


def test_missing_tools_and_wrong_options(
    tools: Path, pq: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pq.refuses("plugin", "build", "--sm", "77", code=2, says=("unknown SM '77'", "SMs: 80, 86, 87"))
    pq.refuses("plugin", "build", "--sm", "120", says=("12.6.85 does not compile for sm_120",))
    pq.refuses(
        "plugin", "build", "--sm", "86", "--tensorrt-include", tmp_path, code=2, says=("NvInfer.h", str(tmp_path))
    )
    monkeypatch.setenv("TENSORRT_INCLUDE", str(tmp_path / "nowhere"))
    pq.refuses("plugin", "build", "--sm", "86", code=2, says=("TENSORRT_INCLUDE", "nowhere"))
    monkeypatch.delenv("TENSORRT_INCLUDE")
    monkeypatch.setattr("pq_export.plugins.toolchain.local_sms", list)
    pq.refuses("plugin", "build", code=2, says=("no GPU is here", "--sm"))
    (tmp_path / "bin" / "cmake").unlink()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    pq.refuses("plugin", "build", "--sm", "86", says=("no CMake found",))
    (tmp_path / "bin" / "nvcc").unlink()
    monkeypatch.setattr("pq_export.plugins.toolchain.toolkit_directories", list)
    pq.refuses("plugin", "build", "--sm", "86", says=("no CUDA compiler (nvcc) found",))
    assert calls(tools) == []


def test_default_is_this_machines_gpu(tools: Path, pq: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pq_export.plugins.toolchain.local_sms", lambda: [89])
    assert json.loads(pq("plugin", "build", "--json").out)["sms"] == [89]


def test_an_empty_cache_is_no_error(tools: Path, pq: Runner) -> None:
    assert "nothing is built in" in pq("plugin", "list").out
    assert json.loads(pq("plugin", "list", "--json").out) == []


def test_an_unwritable_cache_says_what_to_do(
    tools: Path, pq: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    pq.refuses("plugin", "build", "--sm", "86", says=("cannot be written", "XDG_CACHE_HOME"))


@pytest.mark.parametrize(
    ("text", "sm"), [("87", 87), ("sm_87", 87), ("8.7", 87), ("90a", 90), ("SM_90", 90), ("12.0", 120)]
)
def test_names_of_gpus(text: str, sm: int) -> None:
    assert parse_sm(text) == sm


def test_presets_name_the_same_gpus() -> None:
    """Whoever builds with CMake alone gets what the command builds."""
    presets = json.loads((building.SOURCE_DIRECTORY / "CMakePresets.json").read_text())["configurePresets"]
    named = {p["name"]: p["cacheVariables"].get("CMAKE_CUDA_ARCHITECTURES") for p in presets if not p.get("hidden")}
    assert named.pop("all") == ";".join(ARCHITECTURES.values())
    assert named == {f"sm_{name.removesuffix('-real')}": name for name in ARCHITECTURES.values()}


def test_tensorrt_is_found_in_the_usual_places(tools: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    headers = tensorrt_headers(tmp_path / "trt", "#define NV_TENSORRT_MAJOR 10\n")
    monkeypatch.setattr("pq_export.plugins.toolchain.TENSORRT_PLACES", (str(tmp_path / "none"), str(headers)))
    found = find_tensorrt(None)
    assert found is not None and found.path == headers


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['pq-export', 'plugin', 'build', '--help']\n"
        "from pq_export.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'rich', 'pq_export.plugins'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--tensorrt-include" in done.stdout


# --- the real compiler -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("sm", BUILT_SMS)
def test_real_build(sm: int) -> None:
    """The whole library compiles, loads on a machine without a GPU, and asks for nothing but the C library."""
    entry = built_library(sm)
    assert entry.sms == (sm,) and entry.current
    assert sm in ARCHITECTURES and entry.nvcc == find_nvcc().version
    needed = subprocess.run(["ldd", str(entry.path)], capture_output=True, text=True, check=True).stdout
    assert not [name for name in ("libcuda.", "libnvinfer", "libcudart", "not found") if name in needed]
    library = Library(entry.path)  # has every function, and the header's version
    assert library.status_string(0) and library.status_string(99)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    code = f"import ctypes; ctypes.CDLL({str(entry.path)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
