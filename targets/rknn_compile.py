"""``.rknn`` files for Rockchip's NPUs with rknn-toolkit2, which lives in a Python environment of its own.

The toolkit wants older packages than pq-export, so the user points to the Python that has it (``PQ_RKNN_PYTHON``), and
every graph is compiled by a process of that Python (:mod:`pq_export.targets.rknn_worker`): its compiler is known to
crash and to hang. ``engines/`` in the bundle then holds, for each chip::

    rk3588.prefill.rknn, rk3588.decode.rknn     what the board loads, weights inside each
    rk3588.layers.json                          the compiler's own table of layers: name, type, arithmetic, unit
    rk3588.prefill.log, rk3588.decode.log       what the toolkit said, kept also when it failed
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from pq_export.errors import PqExportError
from pq_export.files import errors_of
from pq_export.targets.worker_process import Worker, new_log

PYTHON_VARIABLE = "PQ_RKNN_PYTHON"
PACKAGE, TESTED_VERSION = "rknn-toolkit2", "2.5.0"
INSTALL = (
    f"pip install --no-deps {PACKAGE}=={TESTED_VERSION} numpy==1.26.4 onnx==1.18.0 onnxruntime==1.23.2 "
    "protobuf==4.25.4 psutil ruamel.yaml scipy==1.13.1 tqdm opencv-python-headless==4.10.0.84 fast-histogram "
    "flatbuffers packaging coloredlogs humanfriendly sympy mpmath ml_dtypes==0.5.3 "
    "&& pip install torch setuptools==75.8.0"
)
LICENCE = "proprietary, Rockchip's: the package states no licence"
ENGINES = "engines"
WORKER = Path(__file__).with_name("rknn_worker.py")
TIMEOUT = 3600.0  # seconds for one graph
PROBE_TIMEOUT = 60.0
DISABLED_RULES = ("adjust_element_rs",)  # crashes on the Reshape of grouped queries
OPTIMIZATION_LEVEL = 3
PRODUCTS = ("Conv", "MatMul", "exMatMul")  # what the compiler makes of a MatMul
WANTED = "INT8 on NPU"

# One line of the table that the compiler prints: number, type, arithmetic, unit, shapes, cycles, bytes, name.
LAYER = re.compile(r"\] (\d+) +(\w+) +(\w+) +(CPU|NPU|GPU) .* (\S+)\s*$")


@dataclass(frozen=True)
class Rknn:
    """An environment with rknn-toolkit2: its Python, and the version of the toolkit."""

    python: Path
    version: str


@dataclass(frozen=True)
class Simulated:
    """The toolkit's simulator beside onnxruntime, same graph, same inputs: cosine and largest error of the logits."""

    cosine: float
    max_error: float
    max_logit: float


@dataclass(frozen=True)
class RknnGraph:
    """One graph compiled for one chip, as ``pq_config.json`` holds it.

    ``linears`` of them ran as INT8 on the NPU, all or the build fails; ``counts``: "unit arithmetic" -> layers.
    Seconds and ``peak_rss`` (bytes) are of the process that compiled.
    """

    platform: str
    graph: str
    file: str
    layers: str
    sha256: str
    bytes: int
    rknn_toolkit: str
    seconds: float
    peak_rss: int
    linears: int
    counts: dict[str, int]
    simulated: Simulated

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_rknn() -> Rknn:
    """The environment with rknn-toolkit2: where PQ_RKNN_PYTHON points, else this one; the toolkit is not imported.

    Raises :class:`PqExportError` with pip's line.
    """
    named = os.environ.get(PYTHON_VARIABLE)
    if not named and importlib.util.find_spec("rknn") is None:
        raise PqExportError(
            f"{PACKAGE} is not installed",
            cure=f"Make an environment of its own (Python 3.11; licence: {LICENCE}): {INSTALL}; then set "
            f"{PYTHON_VARIABLE} to its python.",
        )
    python = Path(named).absolute() if named else Path(sys.executable)  # not resolved: a venv's python is a link
    probe = f"import importlib.metadata as m; print(m.version('{PACKAGE}'))"
    try:
        done = subprocess.run(
            [str(python), "-c", probe],
            env=environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        why = error.strerror if isinstance(error, OSError) else f"no answer within {PROBE_TIMEOUT:g} s"
        raise PqExportError(
            f"{PYTHON_VARIABLE} is no Python that runs: {why}", where=python, cure="Set it to bin/python of a venv."
        ) from None
    if done.returncode:
        raise PqExportError(
            f"has no {PACKAGE}", where=python, cure=f"Install it there (licence: {LICENCE}): {INSTALL}."
        )
    return Rknn(python, done.stdout.strip())


def environment() -> dict[str, str]:
    """The environment of a process of another Python: without what would lead it to this one's packages."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def linears_of(model: onnx.ModelProto) -> list[str]:
    """Names of the products with int8 weights."""
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    made = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    return [
        node.output[0]
        for node in model.graph.node
        if node.op_type == "MatMul" and node.input[1] in made and made[node.input[1]].input[0] in types
    ]


def compile_graph(
    name: str,
    model: Path,
    directory: Path,
    platform: str,
    feeds: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
    *,
    rknn: Rknn | None = None,
    failed_logs: Path | None = None,
    timeout: float = TIMEOUT,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[RknnGraph, list[dict[str, str]]]:
    """Compile the ONNX file ``model`` for ``platform`` into ``directory/engines``; the record, and the table of layers.

    ``feeds``: one value for each input; ``expected``: what onnxruntime computes of them, for all outputs.
    A linear that does not run in INT8 on the NPU is an error. The log of a failure goes to ``failed_logs``.
    """
    rknn = rknn or find_rknn()
    where = f"{name} for {platform}"
    progress(where)
    proto = onnx.load(model, load_external_data=False)
    engines = directory / ENGINES
    with errors_of(directory):
        engines.mkdir(parents=True, exist_ok=True)
        stem = f"{platform}.{name}"
        log = engines / f"{stem}.log" if failed_logs is None else new_log(failed_logs, f"{stem}.log")
        with tempfile.TemporaryDirectory(prefix=f".{stem}.", dir=engines) as folder:
            part = Path(folder).resolve()
            arrays: dict[str, Any] = dict(feeds)
            np.savez(part / "feeds.npz", **arrays)
            request = {
                "onnx": str(model.resolve()),
                "rknn": str(part / "model.rknn"),
                "platform": platform,
                "disable_rules": DISABLED_RULES,
                "optimization_level": OPTIMIZATION_LEVEL,
                "feeds": str(part / "feeds.npz"),
                "inputs": [value.name for value in proto.graph.input],
                "outputs": str(part / "outputs.npz"),
                "results": [value.name for value in proto.graph.output],
            }
            worker = Worker(PACKAGE, [str(rknn.python), str(WORKER)], timeout)
            answer = worker.run(request, part, log, where, environment(), inside=True)
            layers = read_layers(log.read_text(encoding="utf-8", errors="replace"))
            linears = linears_of(proto)
            check_layers(layers, linears, where, log)
            with np.load(part / "outputs.npz", allow_pickle=False) as outputs:
                simulated = compare(outputs["logits"], expected["logits"])
            (part / "model.rknn").replace(engines / f"{stem}.rknn")
        if log.parent != engines:
            shutil.move(log, engines / f"{stem}.log")
    content = (engines / f"{stem}.rknn").read_bytes()
    record = RknnGraph(
        platform=platform,
        graph=name,
        file=f"{ENGINES}/{stem}.rknn",
        layers=f"{ENGINES}/{platform}.layers.json",
        sha256=hashlib.sha256(content).hexdigest(),
        bytes=len(content),
        rknn_toolkit=answer["version"],
        seconds=answer["seconds"],
        peak_rss=answer["peak_rss"],
        linears=len(linears),
        counts=counts(layers),
        simulated=simulated,
    )
    return record, layers


def save_layers(directory: Path, platform: str, layers: Mapping[str, list[dict[str, str]]]) -> None:
    """``engines/PLATFORM.layers.json``: graph -> its table."""
    path = directory / ENGINES / f"{platform}.layers.json"
    path.write_text(json.dumps(layers, indent=1) + "\n", encoding="utf-8")


def read_layers(log: str) -> list[dict[str, str]]:
    """The compiler's table of layers, from its verbose log. Names longer than its column are cut there."""
    layers = []
    for line in log.replace("\r", "\n").splitlines():
        if found := LAYER.search(line):
            _, kind, precision, unit, name = found.groups()
            layers.append({"name": name, "type": kind, "precision": precision, "unit": unit})
    return layers


def check_layers(layers: list[dict[str, str]], linears: list[str], where: str, log: Path) -> None:
    """Refuse a graph with a linear that is no INT8 product on the NPU: the compiler makes it FP16 without a word."""
    runs: dict[str, set[str]] = {}
    for layer in layers:
        if layer["type"] in PRODUCTS:
            name = layer["name"].partition(":")[2].partition("#")[0]
            runs.setdefault(name, set()).add(f"{layer['precision']} on {layer['unit']}")
    for linear in linears:
        if (found := runs.get(linear, {"no unit"})) != {WANTED}:
            raise PqExportError(
                f"{linear} runs as {' and '.join(sorted(found))}, not as {WANTED}",
                where=where,
                cure=f"This was made with {PACKAGE}=={TESTED_VERSION}. The log: {log}.",
            )


def counts(layers: list[dict[str, str]]) -> dict[str, int]:
    """Layers by unit and arithmetic: "NPU INT8" -> 210."""
    kinds = [f"{layer['unit']} {layer['precision']}" for layer in layers if not layer["type"].endswith("Operator")]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def compare(found: np.ndarray, expected: np.ndarray) -> Simulated:
    """Logits of the simulator beside those of onnxruntime."""
    a, b = expected.astype(np.float64).ravel(), found.astype(np.float64).ravel()
    if a.shape != b.shape or not np.isfinite(b).all():
        raise PqExportError("the simulator's logits are not finite, or of another shape", where="RKNN simulator")
    return Simulated(
        cosine=float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))),
        max_error=float(np.abs(a - b).max()),
        max_logit=float(np.abs(a).max()),
    )
