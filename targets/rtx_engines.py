"""Engines for RTX GPUs with TensorRT for RTX, on any machine: neither building nor checking needs a GPU.

Every engine is built by a process of its own (:mod:`pq_export.targets.rtx_worker`), so that a crash of the builder is
one line here and the peak of its memory is known. ``engines/`` in the bundle then holds, for each GPU::

    sm86.engine         the plan
    sm86.layers.json    its layers: name, type, data types, ONNX nodes
    sm86.log            what TensorRT said, kept also when it failed
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
import psutil
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from pq_export.errors import PqExportError, UsageError
from pq_export.files import errors_of
from pq_export.targets.tensorrt_options import Profile
from pq_export.targets.worker_process import new_log

SMS = (75, 80, 86, 89, 120, 121)  # its ComputeCapability enum, 1.7
ELSEWHERE = {
    87: "Jetson Orin: TensorRT builds on the board. Use --target trt.",
    90: "Hopper: TensorRT for RTX does not run there. Use --target trt.",
    100: "Blackwell of data centres: TensorRT for RTX does not run there. Use --target trt.",
    110: "Jetson Thor: TensorRT builds on the board. Use --target trt.",
}
INSTALL = "pip install tensorrt-rtx-cu13"
TESTED_VERSION = "1.7.1.116"
PACKAGES = ("tensorrt_rtx", "tensorrt_rtx_bindings", "tensorrt_rtx_libs")
VERSIONED_LIBRARY, LIBRARY = "libtensorrt_rtx.so.1", "libtensorrt_rtx.so"

ENGINES = "engines"
WORKER = Path(__file__).with_name("rtx_worker.py")
TIMEOUT = 2 * 3600.0  # seconds for one engine
# Peak memory of the worker, from above. Version 1.7 took 0.2 GB for an empty model, 3 bytes for each of weights, and
# 0.2 MB for each node of a decoder with two profiles; FP16 constants that are cast to FP32 count twice.
MEMORY_FIXED = 256 * 2**20
MEMORY_PER_MODEL_BYTE = 4
MEMORY_PER_NODE = 300_000


@dataclass(frozen=True)
class EngineRecord:
    """One engine of a bundle, of either TensorRT, as ``pq_config.json`` holds it.

    ``file``, ``layers`` and ``plugin``, the library that the engine needs, are paths inside the bundle; the latter is
    None for an engine of TensorRT's own layers, and for a library elsewhere. Of its ``bytes``, ``weight_bytes`` are
    constants, most others kernels; None: unknown. ``seconds`` and ``peak_rss`` (bytes) are of the process that built
    it. ``tensorrt``: the version, which has to be that of the machine that runs it. ``counts``: type of layer -> how
    many. ``comparison``: what an engine that was run differed by from onnxruntime.
    """

    sm: int
    file: str
    sha256: str
    bytes: int
    weight_bytes: int | None
    seconds: float
    peak_rss: int
    tensorrt: str
    plugin: str | None
    plugin_sha256: str | None
    layers: str
    counts: dict[str, int] = field(default_factory=dict)
    comparison: dict[str, Any] | None = None

    @property
    def plugin_layers(self) -> int:
        return self.counts.get("custom_layer", 0)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Rtx:
    """An installed TensorRT for RTX. ``site``: the folder that it is imported from; ``library``: its core."""

    site: Path
    library: Path
    version: str


def find_rtx() -> Rtx:
    """TensorRT for RTX as this Python would import it (it is not imported); an error with pip's line otherwise."""
    specs = {name: importlib.util.find_spec(name) for name in PACKAGES}
    missing = [name for name, spec in specs.items() if spec is None or spec.origin is None]
    if missing:
        raise PqExportError(
            f"TensorRT for RTX is not installed: no module {missing[0]}",
            cure=f"Install it: {INSTALL} (made with {TESTED_VERSION}; proprietary, NVIDIA's licence applies).",
        )
    folders = {name: Path(str(spec and spec.origin)).parent for name, spec in specs.items()}
    site, library = folders["tensorrt_rtx"].parent, folders["tensorrt_rtx_libs"] / VERSIONED_LIBRARY
    if not library.is_file():
        raise PqExportError(
            "TensorRT for RTX is installed without its library",
            where=library,
            cure=f"Install it again: {INSTALL} --force-reinstall",
        )
    versions = (d.version for d in metadata.distributions(path=[str(site)]) if _is_rtx(d.metadata["Name"]))
    return Rtx(site, library, next(versions, "unknown"))


def _is_rtx(distribution: str | None) -> bool:
    return (distribution or "").replace("-", "_").startswith("tensorrt_rtx")


def check_sms(sms: Sequence[int]) -> None:
    """Refuse GPUs that TensorRT for RTX does not build for, each with what does."""
    for sm in sms:
        if sm not in SMS:
            known = f"TensorRT for RTX builds for {', '.join(map(str, SMS))}."
            raise UsageError(f"--sm {sm} is no GPU of --target trt-rtx", cure=ELSEWHERE.get(sm, known))
    if not sms:
        raise UsageError("no GPU to build an engine for", cure=f"Give --sm, of {', '.join(map(str, SMS))}.")


def needed_memory(model: Path) -> int:
    """Bytes that building an engine of the ONNX file ``model`` takes at its peak; it is less by up to a third."""
    try:
        nodes = len(onnx.load(model, load_external_data=False).graph.node)
    except DecodeError:
        raise PqExportError("is not an ONNX model", where=model, cure="Build the bundle again.") from None
    data = model.with_name(f"{model.name}.data")
    size = model.stat().st_size + (data.stat().st_size if data.is_file() else 0)
    return MEMORY_FIXED + MEMORY_PER_MODEL_BYTE * size + MEMORY_PER_NODE * nodes


def check_memory(model: Path) -> None:
    """Refuse a build that this machine has not the memory for."""
    needed, free = needed_memory(model), psutil.virtual_memory().available
    if needed > free:
        raise PqExportError(
            f"building its engine takes about {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free",
            where=model,
            cure="End other programs, or build on a larger machine.",
        )


def build_engines(
    model: Path,
    directory: Path,
    sms: Sequence[int],
    profiles: Sequence[Profile],
    library: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
    *,
    timeout: float = TIMEOUT,
    failed_logs: Path | None = None,
) -> list[EngineRecord]:
    """One engine for each of ``sms`` in ``directory/engines``, each with all ``profiles``, in their order.

    ``model``: the ONNX file; ``library``: the plugin, for a model in plugin form. ``timeout``: seconds for one engine.
    An engine appears whole; one that fails leaves its log and whatever was there before. ``failed_logs``: where that
    log goes instead, if ``directory`` would not outlive the failure. Raises :class:`PqExportError`.
    """
    check_sms(sms)
    if not profiles:
        raise UsageError("an engine needs an optimization profile", cure="Give at least one.")
    rtx = find_rtx()
    for path in (model, library):
        if path is not None and not path.is_file():
            raise PqExportError("is not a file", where=path)
    check_memory(model)
    facts = _library_facts(library, directory)
    records = []
    with errors_of(directory), _loader_environment(rtx) as environment:
        (directory / ENGINES).mkdir(parents=True, exist_ok=True)
        for sm in dict.fromkeys(sms):
            progress(f"engine for SM{sm}")
            log = directory / ENGINES / f"sm{sm}.log" if failed_logs is None else new_log(failed_logs, f"sm{sm}.log")
            records.append(_build_engine(model, directory, sm, profiles, library, facts, log, environment, timeout))
    return records


def _library_facts(library: Path | None, directory: Path) -> dict[str, Any]:
    """``plugin`` and ``plugin_sha256`` of an :class:`EngineRecord`."""
    inside = library is not None and library.is_relative_to(directory)
    return {
        "plugin": library.relative_to(directory).as_posix() if library is not None and inside else None,
        "plugin_sha256": library and _sha256(library),
    }


def _build_engine(
    model: Path,
    directory: Path,
    sm: int,
    profiles: Sequence[Profile],
    library: Path | None,
    facts: dict[str, Any],
    log: Path,
    environment: dict[str, str],
    timeout: float,
) -> EngineRecord:
    engine, layers = f"{ENGINES}/sm{sm}.engine", f"{ENGINES}/sm{sm}.layers.json"
    with tempfile.TemporaryDirectory(prefix=f".sm{sm}.", dir=directory / ENGINES) as folder:
        part = Path(folder)
        request = {
            "onnx": str(model.resolve()),
            "sm": sm,
            "library": library and str(library.resolve()),
            "profiles": [asdict(profile) for profile in profiles],
            "engine": str(part / "engine"),
            "layers": str(part / "layers"),
            "result": str(part / "result"),
        }
        (part / "request").write_text(json.dumps(request), encoding="utf-8")
        where, title = f"engine for SM{sm}", "TensorRT for RTX"
        answer = run_worker(
            WORKER, part / "request", log, where=where, title=title, environment=environment, timeout=timeout
        )
        record = EngineRecord(sm=sm, file=engine, layers=layers, sha256=_sha256(part / "engine"), **facts, **answer)
        shutil.move(log, directory / ENGINES / f"sm{sm}.log")
        (part / "layers").replace(directory / layers)
        (part / "engine").replace(directory / engine)
    return record


def run_worker(
    worker: Path,
    request: Path,
    log: Path,
    *,
    where: str,
    title: str,
    environment: dict[str, str],
    timeout: float,
) -> dict[str, Any]:
    """What the program ``worker`` writes to the file that its ``request`` calls ``result``; its output goes to ``log``.

    Raises :class:`PqExportError`, one line that names ``where`` and the log, for a process that answers with an error
    or not at all. ``title``: what it runs. ``timeout``: seconds.
    """
    see, result = f"The log: {log}.", Path(json.loads(request.read_text(encoding="utf-8"))["result"])
    with log.open("wb") as output:
        try:
            done = subprocess.run(
                [sys.executable, str(worker), str(request)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise PqExportError(f"was not built within {timeout:g} s", where=where, cure=see) from None
    if done.returncode < 0:
        number = -done.returncode
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        why = ", which the kernel sends when memory runs out" if number == signal.SIGKILL else ""
        raise PqExportError(f"{title} ended by {name}{why}", where=where, cure=see)
    if done.returncode or not result.is_file():
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = lines[-1] if lines else f"exit code {done.returncode}"
        raise PqExportError(f"{title} failed: {last[:300]}", where=where, cure=see)
    answer: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    if "error" in answer:
        named = f"{where}, {answer['where']}" if answer["where"] else where
        raise PqExportError(answer["error"].rstrip(". "), where=named, cure=f"{answer['cure']} {see}")
    return answer


@contextlib.contextmanager
def _loader_environment(rtx: Rtx) -> Iterator[dict[str, str]]:
    """Environment of a process that can use ``rtx``, also with plugins.

    Its ONNX parser opens ``libtensorrt_rtx.so`` when it meets a plugin. The wheels have that file only as ``.so.1``,
    and without it the process aborts.
    """
    with tempfile.TemporaryDirectory(prefix="pq-export-rtx-") as links:
        (Path(links) / LIBRARY).symlink_to(rtx.library.resolve())
        paths = {"LD_LIBRARY_PATH": links, "PYTHONPATH": str(rtx.site)}
        yield os.environ | {
            name: os.pathsep.join(filter(None, [path, os.environ.get(name)])) for name, path in paths.items()
        }


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
