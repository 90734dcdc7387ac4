"""Engines with TensorRT for RTX: real ones where the package can be had, and every way in which none comes to be."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pq_export.errors import PqExportError, UsageError
from pq_export.targets import rtx_engines, rtx_worker
from pq_export.targets.rtx_engines import EngineRecord, Rtx, build_engines, check_sms, find_rtx
from pq_export.targets.tensorrt_options import Profile
from tests.plugins.conftest import plugin_library, rtx_environment, tensorrt_include  # noqa: F401
from tests.plugins.test_tensorrt import linears

INNER, OUT = 64, 32


def sizes(*tokens: int, inner: int = INNER) -> tuple[tuple[int, ...], ...]:
    return tuple((1, n, inner) for n in tokens)


PREFILL = Profile("prefill", {"x": sizes(1, 16, 64)})
DECODE = Profile("decode", {"x": sizes(1, 1, 1)})


def write_linear(path: Path) -> Path:
    """x [batch, sequence, 64] -> int8 codes -> MatMul with int8 weights [64, 32]: w8a8 as TensorRT reads it."""
    codes = np.random.default_rng(0).integers(-128, 128, (INNER, OUT)).astype(np.int8)
    constants = {
        "w": codes,
        "w_scale": np.full(OUT, 0.01, np.float32),
        "x_scale": np.asarray(0.1, np.float32),
        "zero": np.zeros((), np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "zero"], ["codes"], name="codes"),
        helper.make_node("DequantizeLinear", ["codes", "x_scale", "zero"], ["x_wide"], name="x_wide"),
        helper.make_node("DequantizeLinear", ["w", "w_scale"], ["w_wide"], name="w_wide", axis=1),
        helper.make_node("MatMul", ["x_wide", "w_wide"], ["y"], name="product"),
    ]
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "sequence", size])
        for name, size in (("x", INNER), ("y", OUT))
    )
    tensors = [numpy_helper.from_array(values, name) for name, values in constants.items()]
    graph = helper.make_graph(nodes, "linear", [x], [y], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


# With the real package.


@pytest.fixture
def package(rtx_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """TensorRT for RTX, importable, and no help with its loader."""
    site = Path(rtx_environment["PYTHONPATH"])
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    return site


def test_engines_of_two_profiles_for_two_gpus(package: Path, tmp_path: Path) -> None:
    rtx, notes = find_rtx(), list[str]()
    assert rtx.site == package and rtx.version[0].isdigit()
    model = write_linear(tmp_path / "model.onnx")
    records = build_engines(
        model, tmp_path / "bundle", [86, 120], [PREFILL, DECODE], progress=notes.append, failed_logs=tmp_path
    )
    assert [r.sm for r in records] == [86, 120] and notes == ["engine for SM86", "engine for SM120"]
    assert records[0].sha256 != records[1].sha256
    for record in records:
        assert record.tensorrt == rtx.version and record.plugin is record.plugin_sha256 is None
        assert not record.plugin_layers and record.comparison is None
        assert record.bytes == (tmp_path / "bundle" / record.file).stat().st_size > INNER * OUT
        assert INNER * OUT <= record.weight_bytes < record.bytes
        assert record.peak_rss > 2**20 and record.seconds > 0
        layers = json.loads((tmp_path / "bundle" / record.layers).read_text())
        assert len(layers) == sum(record.counts.values()) and record.counts["gemm"] == 2, "one a profile"
        assert all("Int8" in layer["reads"] for layer in layers if layer["type"] == "gemm")
        assert "product" in (tmp_path / f"bundle/engines/sm{record.sm}.log").read_text()
        assert EngineRecord(**json.loads(json.dumps(record.to_dict()))) == record
    names = {path.name for path in (tmp_path / "bundle/engines").iterdir()}
    assert names == {f"sm{sm}.{end}" for sm in (86, 120) for end in ("engine", "layers.json", "log")}


def test_an_engine_with_the_plugin(package: Path, plugin_library: Path, tmp_path: Path) -> None:  # noqa: F811
    onnx.save(linears(86), tmp_path / "model.onnx")
    profile = Profile("all", {"x": sizes(1, 4, 8, inner=96), "z": sizes(1, 4, 8)})
    (tmp_path / "deploy").mkdir()
    library = tmp_path / "deploy/libpq.so"
    library.symlink_to(plugin_library)
    (record,) = build_engines(tmp_path / "model.onnx", tmp_path, [86], [profile], library)
    assert record.plugin_layers == 4 and record.plugin_sha256 is not None and len(record.plugin_sha256) == 64
    assert record.plugin == "deploy/libpq.so"
    layers = json.loads((tmp_path / record.layers).read_text())
    assert {n for layer in layers if layer["type"] == "custom_layer" for n in layer["onnx"]} == {
        "q",
        "k",
        "up",
        "down",
    }


def test_what_tensorrt_refuses_is_one_line(package: Path, tmp_path: Path) -> None:
    write_linear(tmp_path / "model.onnx")
    onnx.save(linears(86), tmp_path / "plugin.onnx")
    wide = Profile("prefill", {"x": sizes(1, 4, 8, inner=65)})
    for name, profile, said in (
        ("plugin.onnx", PREFILL, "Plugin not found"),
        ("model.onnx", wide, r"SM86, profile prefill, x: is \[1, 1, 65\], but the model has \[-1, -1, 64\]"),
    ):
        with pytest.raises(PqExportError, match=said) as caught:
            build_engines(tmp_path / name, tmp_path, [86], [profile])
        assert "\n" not in str(caught.value) and "sm86.log" in str(caught.value), caught.value
        assert [path.name for path in (tmp_path / "engines").iterdir()] == ["sm86.log"]


# Without it.


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rtx:
    """Packages of the right names, with a library that is no library."""
    for name in rtx_engines.PACKAGES:
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").touch()
        monkeypatch.delitem(sys.modules, name, raising=False)
    library = tmp_path / "site/tensorrt_rtx_libs/libtensorrt_rtx.so.1"
    library.touch()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return Rtx(tmp_path / "site", library, "unknown")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_linear(tmp_path / "model.onnx")


def worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *lines: str) -> None:
    """A worker of these lines; ``request`` is its request."""
    head = ["import json, os, signal, sys, time", "request = json.load(open(sys.argv[1]))", "print('last words')"]
    (tmp_path / "worker.py").write_text("\n".join([*head, "sys.stdout.flush()", *lines]) + "\n")
    monkeypatch.setattr(rtx_engines, "WORKER", tmp_path / "worker.py")


def test_the_package_is_found_or_named(installed: Rtx, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_rtx() == installed
    installed.library.unlink()
    with pytest.raises(PqExportError, match="without its library"):
        find_rtx()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PqExportError, match=r"pip install tensorrt-rtx-cu13 .*NVIDIA's licence"):
        find_rtx()


@pytest.mark.parametrize(
    "sm, said",
    [(87, "Jetson Orin"), (90, "Hopper"), (100, "Black"), (110, "Thor"), (70, "75, 80, 86")],
)
def test_gpus_that_it_does_not_know_are_refused(sm: int, said: str) -> None:
    check_sms([75, 80, 86, 89, 120, 121])
    with pytest.raises(UsageError, match=f"--sm {sm} .*{said}"):
        check_sms([86, sm])


def test_a_build_needs_a_gpu_and_a_profile_and_a_model(installed: Rtx, model: Path, tmp_path: Path) -> None:
    (tmp_path / "damaged.onnx").write_bytes(model.read_bytes()[: model.stat().st_size // 2])
    for path, sms, profiles, said in (
        (model, [], [PREFILL], "no GPU"),
        (model, [86], [], "profile"),
        (tmp_path / "none.onnx", [86], [PREFILL], "none.onnx: is not a file"),
        (tmp_path / "damaged.onnx", [86], [PREFILL], "damaged.onnx: is not an ONNX model"),
    ):
        with pytest.raises(PqExportError, match=said):
            build_engines(path, tmp_path, sms, profiles)


@pytest.mark.parametrize(
    "line, said",
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "ended by SIGSEGV. The log"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL, which the kernel sends when memory runs out"),
        ("sys.exit(3)", "failed: last words"),
        ("", "failed: last words"),
        ("time.sleep(60)", "was not built within 2 s"),
    ],
)
def test_a_worker_that_ends_badly_is_one_line(
    installed: Rtx, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, said: str
) -> None:
    """The log stays, and so does an engine that was there."""
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines/sm86.engine").write_text("older")
    worker(monkeypatch, tmp_path, line)
    with pytest.raises(PqExportError, match=said) as caught:
        build_engines(model, tmp_path, [86], [PREFILL], timeout=2)
    assert "\n" not in str(caught.value) and "sm86.log" in str(caught.value)
    assert (tmp_path / "engines/sm86.log").read_text() == "last words\n"
    assert (tmp_path / "engines/sm86.engine").read_text() == "older"
    assert {path.name for path in (tmp_path / "engines").iterdir()} == {"sm86.log", "sm86.engine"}


def test_a_worker_finds_the_name_that_the_parser_opens(
    installed: Rtx, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First on the loader's path, a folder with ``libtensorrt_rtx.so``; what the user had there follows."""
    logs = tmp_path / "logs"
    logs.mkdir()
    monkeypatch.setenv("LD_LIBRARY_PATH", "/users")
    worker(
        monkeypatch,
        tmp_path,
        "links, users = os.environ['LD_LIBRARY_PATH'].split(':')",
        "answer = {'error': os.path.realpath(links + '/libtensorrt_rtx.so'), 'where': users, 'cure': ''}",
        "json.dump(answer, open(request['result'], 'w'))",
    )
    with pytest.raises(PqExportError, match=f"engine for SM86, /users: {installed.library.resolve()}"):
        build_engines(model, tmp_path, [86], [PREFILL], failed_logs=logs)
    assert [path.name for path in logs.iterdir()] == ["sm86.log"] and not list((tmp_path / "engines").iterdir())


def test_memory_is_estimated_before(
    installed: Rtx, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = rtx_engines.needed_memory(model)
    (tmp_path / "model.onnx.data").write_bytes(bytes(1 << 20))
    assert rtx_engines.needed_memory(model) - small == rtx_engines.MEMORY_PER_MODEL_BYTE * (1 << 20)
    worker(monkeypatch, tmp_path, "sys.exit(3)")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**28))
    with pytest.raises(PqExportError, match=r"about 0\.\d GiB of memory, 0\.2 are free\. "):
        build_engines(model, tmp_path, [86], [PREFILL])
    monkeypatch.setattr(rtx_engines, "needed_memory", lambda model: 2**28)  # as much as is free
    with pytest.raises(PqExportError, match="last words"):
        build_engines(model, tmp_path, [86], [PREFILL])


SHAPES = {"x": (-1, -1, 64), "fixed": (1, 2)}


@pytest.mark.parametrize(
    "shapes, said",
    [
        ({"x": sizes(1, 2, 3), "y": sizes(1, 1, 1)}, "no input y"),
        ({}, r"no sizes for dynamic \[-1, -1, 64\]"),
        ({"x": sizes(1, 2, 3, inner=63)}, r"is \[1, 1, 63\], but the model has \[-1, -1, 64\]"),
        ({"x": ((1, 64),) * 3}, r"is \[1, 64\], but the model has"),
        ({"x": sizes(1, 4, 3)}, "do not increase"),
        ({"x": sizes(-1, 1, 3)}, "do not increase"),
    ],
)
def test_profiles_are_checked_against_the_inputs(shapes: dict[str, tuple[tuple[int, ...], ...]], said: str) -> None:
    rtx_worker.check_profile({"name": "p", "shapes": {"x": sizes(0, 2, 3)}}, SHAPES)
    with pytest.raises(rtx_worker.RefusedError, match=said):
        rtx_worker.check_profile({"name": "p", "shapes": shapes}, SHAPES)


def test_layers_are_read_from_the_listing() -> None:
    listing = (
        "Layers:\nName: [Copy 0], LayerType: kgen, Inputs: [ { Name: a, Dimensions: [1], Datatype: Half, Format: f }], "
        "Constants: [ { Name: c, Datatype: Int4, Format: f }], Outputs: [ { Name: b, Datatype: Int8, Format: f }], "
        "TacticName: t, StreamId: 0, Metadata: [ONNX Layer: q][ONNX Layer: k]\nBindings:\n Name: x\n"
    )
    (layer,) = rtx_worker.parse_layers(listing)
    assert layer == {
        "name": "[Copy 0]",
        "type": "kgen",
        "reads": ["Half", "Int4"],
        "writes": ["Int8"],
        "onnx": ["q", "k"],
    }
