"""Context binaries for Qualcomm's Hexagon NPUs with ``onnxruntime-qnn``, on any x86 machine.

Every SoC is compiled for by a process of its own (:mod:`pq_export.targets.qnn_worker`), so that a crash or a hang of
the compiler is one line here and the peak of its memory is known. ``engines/`` in the bundle then holds, for each SoC::

    sm8650.bin            the context binary: all graphs, one copy of the weights
    sm8650.prefill.onnx   what onnxruntime loads: a node that names the binary and the graph in it
    sm8650.decode.onnx
    sm8650.layers.json    QNN's own list of layers: name, type, types read and written
    sm8650.log            what the compiler said, kept also when it failed
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx

from pq_export.errors import PqExportError
from pq_export.files import errors_of
from pq_export.targets.profile import Soc
from pq_export.targets.qnn_layers import check_layers, linears_of, read_layers, refuse
from pq_export.targets.worker_process import Worker, new_log

INSTALL = "pip install onnxruntime-qnn==2.7.0"
LICENCE = "its QNN libraries are under Qualcomm's AI Stack License"
PACKAGES = ("onnxruntime", "onnxruntime_qnn")
ENGINES = "engines"
WORKER = Path(__file__).with_name("qnn_worker.py")
TIMEOUT = 3600.0  # seconds for one SoC


@dataclass(frozen=True)
class ContextRecord:
    """One context binary, as ``pq_config.json`` holds it.

    ``contexts``: graph -> file that onnxruntime loads; all files are paths inside the bundle. ``weight_bytes`` of
    constants as QNN holds them, ``bytes`` of the whole binary. ``seconds`` and ``peak_rss`` (bytes) are of the process
    that compiled. ``qnn``: version of QNN that made it. ``counts``: graph -> type of layer -> how many.
    """

    soc: str
    soc_model: int
    file: str
    sha256: str
    bytes: int
    contexts: dict[str, str]
    layers: str
    qnn: str
    package: str
    seconds: float
    peak_rss: int
    graph_seconds: dict[str, float] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_qnn() -> str:
    """Version of ``onnxruntime-qnn`` that is installed (it is not imported); an error with pip's line otherwise."""
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise PqExportError(
                f"Qualcomm's compiler is not installed: no module {name}",
                cure=f"Install it: {INSTALL} ({LICENCE}, which you accept by installing it).",
            )
    return metadata.version("onnxruntime-qnn")


def compile_context(
    graphs: Mapping[str, Path],
    directory: Path,
    soc: Soc,
    *,
    floats: bool = False,
    progress: Callable[[str], None] = lambda text: None,
    failed_logs: Path | None = None,
    timeout: float = TIMEOUT,
) -> ContextRecord:
    """Compile ``graphs`` (name -> ONNX file inside the bundle ``directory``) into one context binary for ``soc``.

    Every node has to be on the accelerator, and every linear an integer product with the bits of its weight; without
    ``floats`` no tensor may be floating point. The log of a failure goes to ``failed_logs``.
    """
    package = find_qnn()
    linears = {name: linears_of(onnx.load(path, load_external_data=False)) for name, path in graphs.items()}
    engines = directory / ENGINES
    with errors_of(directory):
        engines.mkdir(parents=True, exist_ok=True)
        log = engines / f"{soc.name}.log" if failed_logs is None else new_log(failed_logs, f"{soc.name}.log")
        progress(f"context binary for {soc.name}")
        with tempfile.TemporaryDirectory(prefix=f".{soc.name}.", dir=engines) as folder:
            part = Path(folder)
            worker = Worker("QNN", (sys.executable, str(WORKER)), timeout)
            answer = worker.run(request(graphs, part, soc), part, log, f"context binary for {soc.name}")
            listings = {name: read_layers(part / f"dump.{name}") for name in graphs}
            for name, layers in listings.items():
                refuse(f"{name} graph for {soc.name}", check_layers(layers, linears[name], floats))
            binary, version = _collect(part, engines, soc, list(graphs))
            (engines / f"{soc.name}.layers.json").write_text(listing(part, list(graphs)), encoding="utf-8")
            if log.parent != engines:
                shutil.move(log, engines / f"{soc.name}.log")
    return ContextRecord(
        soc=soc.name,
        soc_model=soc.number,
        file=f"{ENGINES}/{binary.name}",
        sha256=sha256_of(binary),
        bytes=binary.stat().st_size,
        contexts={name: f"{ENGINES}/{soc.name}.{name}.onnx" for name in graphs},
        layers=f"{ENGINES}/{soc.name}.layers.json",
        qnn=version,
        package=package,
        counts={name: _counts([layer.type for layer in layers]) for name, layers in listings.items()},
        **answer,
    )


def request(graphs: Mapping[str, Path], folder: Path, soc: Soc, serve: bool = False) -> dict[str, Any]:
    """What a worker is asked for that compiles ``graphs``, files of one directory, and writes into ``folder``.

    It works in the graphs' directory with relative paths, so that the binary's bytes do not depend on where that is.
    (A copy would cost time, and ONNX refuses external data that has a second hard link.)
    """
    source = {path.resolve().parent for path in graphs.values()}
    assert len(source) == 1
    home = source.pop()
    there = Path(os.path.relpath(folder.resolve(), home))
    return {
        "serve": serve,
        "soc_model": soc.number,
        "folder": str(home),
        "graphs": {name: path.name for name, path in graphs.items()},
        "contexts": {name: str(there / f"{soc.name}.{name}.onnx") for name in graphs},
        "dumps": {name: str(there / f"dump.{name}") for name in graphs},
    }


def listing(folder: Path, graphs: Sequence[str]) -> str:
    """The layers of all ``graphs`` that a worker compiled in ``folder``, as ``layers.json`` holds them."""
    layers = {name: [layer.to_dict() for layer in read_layers(folder / f"dump.{name}")] for name in graphs}
    return json.dumps(layers, indent=1) + "\n"


def binary_of(folder: Path) -> Path:
    """The one context binary that QNN wrote into ``folder``."""
    written = sorted(folder.glob("*_qnn.bin"))
    if len(written) != 1:
        raise PqExportError(f"QNN wrote {len(written)} binaries, not one: its graphs share no weights")
    return written[0]


def _counts(types: Sequence[str]) -> dict[str, int]:
    return {kind: types.count(kind) for kind in sorted(set(types))}


def _collect(part: Path, engines: Path, soc: Soc, graphs: list[str]) -> tuple[Path, str]:
    """Move the binary and its graphs from ``part`` under their names; the binary, and the QNN that made it."""
    binary, version = engines / f"{soc.name}.bin", ""
    for name in graphs:
        model = onnx.load(part / f"{soc.name}.{name}.onnx")
        nodes = [node for node in model.graph.node if node.op_type == "EPContext"]
        if len(nodes) != 1 or len(model.graph.node) != 1:
            raise PqExportError("is not one graph of QNN", where=f"{name} for {soc.name}")
        for attribute in nodes[0].attribute:
            if attribute.name == "ep_cache_context":
                attribute.s = binary.name.encode()
            elif attribute.name == "ep_sdk_version":
                version = attribute.s.decode()
        onnx.save(model, engines / f"{soc.name}.{name}.onnx")
    binary_of(part).replace(binary)
    return binary, version


def sha256_of(path: Path) -> str:
    """Of a file's content, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
