"""Qualcomm's simulator of Hexagon on x86: a bundle's context binary, run by a process of its own.

QNN 2.51 crashes on x86 when it loads a binary whose graphs share weights. So the process compiles the bundle's graphs
again and runs what it made, which has to consist of the layers that the bundle lists. Binaries of another QNN or SoC
are refused: nothing else would tell. A bundle for several SoCs is simulated for the first unless one is named.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

import numpy as np
import onnx

from pq_export.errors import IntegrityError, PqExportError, UsageError
from pq_export.static_runtime import static_paths
from pq_export.targets.profile import Soc, find_profile
from pq_export.targets.qnn_compile import WORKER, find_qnn, listing, request, sha256_of
from pq_export.targets.qnn_worker import read_message, write_message
from pq_export.targets.worker_process import last_line, signal_name

TARGET = "qnn-htp"
RUN_TIMEOUT = 600.0  # seconds for one run of a graph, or for loading the binary


class SimulatedGraph:
    """One graph of a context binary, with ``run`` as onnxruntime's sessions have it."""

    def __init__(self, simulator: Simulator, name: str):
        self._simulator, self._name = simulator, name

    def run(self, names: list[str], feeds: dict[str, np.ndarray], /) -> list[np.ndarray]:
        """Outputs ``names`` for ``feeds``."""
        tensors = self._simulator.ask({"graph": self._name, "outputs": names}, feeds)
        return [tensors[name] for name in names]


class Simulator:
    """The simulator with ``graphs`` (name -> ONNX file) compiled for ``soc``.

    Use it in a ``with`` block. ``layers``: listing of the layers that it has to have, None for any. ``timeout``:
    seconds after which a run counts as hung; compiling may take ten times as long. A crash or a hang is a
    :class:`PqExportError`, and the ``log`` is kept. ``seconds`` that graphs ran in all.
    """

    def __init__(
        self, graphs: Mapping[str, Path], soc: Soc, layers: Path | None = None, *, timeout: float = RUN_TIMEOUT
    ):
        self.timeout, self.seconds = timeout, 0.0
        self._failed = False
        self._folder = Path(tempfile.mkdtemp(prefix="pq-export-simulator-"))
        self.log = self._folder.with_suffix(".log")
        path = self._folder / "request.json"
        path.write_text(json.dumps(request(graphs, self._folder, soc, serve=True)), encoding="utf-8")
        with self.log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(WORKER), str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        try:
            self._answer(10 * timeout)
            if layers is not None and listing(self._folder, list(graphs)) != layers.read_text(encoding="utf-8"):
                raise IntegrityError(
                    f"the simulator made other layers for {soc.name} than the context binary has",
                    where=layers,
                    cure="Build the bundle again.",
                )
        except BaseException:
            self.close()
            raise

    def graphs(self, names: list[str]) -> dict[str, SimulatedGraph]:
        """The graphs ``names`` as sessions."""
        return {name: SimulatedGraph(self, name) for name in names}

    def ask(self, question: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One message and the tensors of its answer."""
        try:
            write_message(cast(BinaryIO, self._process.stdin), question, tensors)
        except BrokenPipeError:
            raise self._ended() from None
        header, answer = self._answer(self.timeout)
        self.seconds += header["seconds"]
        return answer

    def _answer(self, timeout: float) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        hung = threading.Event()

        def stop() -> None:
            hung.set()
            self._process.kill()

        timer = threading.Timer(timeout, stop)
        timer.start()
        try:
            message = read_message(cast(BinaryIO, self._process.stdout))
        finally:
            timer.cancel()
        if hung.is_set():
            self._failed = True
            raise PqExportError(f"QNN's simulator gave no answer within {timeout:g} s", cure=self._see)
        if message is None:
            raise self._ended()
        header, tensors = message
        if "error" in header:
            self._failed = True
            raise PqExportError(
                f"QNN's simulator failed: {header['error'].rstrip('. ')}", where=header.get("where", ""), cure=self._see
            )
        return header, tensors

    @property
    def _see(self) -> str:
        return f"The log: {self.log}."

    def _ended(self) -> PqExportError:
        self._failed = True
        code = self._process.wait()
        why = f"by {signal_name(-code)}" if code < 0 else f"({last_line(self.log, code)})"
        return PqExportError(f"QNN's simulator ended {why}", cure=self._see)

    def close(self) -> None:
        """End the process; its log stays if something failed."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):  # it may be gone already
                self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        if not self._failed:
            self.log.unlink(missing_ok=True)

    def __enter__(self) -> Simulator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_simulator(
    directory: Path, config: Mapping[str, Any], soc: str | None = None, *, timeout: float = RUN_TIMEOUT
) -> Simulator:
    """The simulator with the context binary of the bundle in ``directory`` for ``soc``, else for its first."""
    find_qnn()
    records = {record["soc"]: record for record in config.get("engines", ()) if "soc" in record}
    if not records:
        raise PqExportError("has no context binary", where=directory, cure="Build it with --target qnn-htp.")
    name = next(iter(records)) if soc is None else soc.lower()
    if name not in records:
        raise UsageError(f"--soc {soc} is not in this bundle", cure=f"It has {', '.join(records)}.")
    record = records[name]
    graphs = {graph: directory / path for graph, path in static_paths(directory, config).items()}
    check_context(directory, config, record)
    return Simulator(graphs, find_profile(TARGET).socs[name], directory / record["layers"], timeout=timeout)


def check_context(directory: Path, config: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Refuse a binary or graphs that are not the recorded ones, of another SoC, or of another QNN than is installed."""
    binary, cure = directory / record["file"], "Build the bundle again."
    if not binary.is_file() or sha256_of(binary) != record["sha256"]:
        raise IntegrityError("is not the context binary that pq_config.json records", where=binary, cure=cure)
    static = {name for name in config["files"] if name.startswith("static/")}  # weights, too
    for name in sorted({*static, *static_paths(directory, config).values(), record["layers"]}):
        if sha256_of(directory / name) != config["files"].get(name, {}).get("sha256"):
            raise IntegrityError("is not the file that pq_config.json records", where=directory / name, cure=cure)
    soc = find_profile(TARGET).socs.get(record["soc"])
    if soc is None or soc.number != record["soc_model"]:
        raise IntegrityError(f"records soc_model {record['soc_model']} for {record['soc']}", where=directory, cure=cure)
    if record["package"] != (installed := find_qnn()):
        raise PqExportError(
            f"was compiled by onnxruntime-qnn {record['package']}, and {installed} is installed",
            where=binary,
            cure=f"Build the bundle again, or pip install onnxruntime-qnn=={record['package']}.",
        )
    for graph, path in record["contexts"].items():
        model = onnx.load(directory / path)
        attributes = {a.name: a.s.decode() for node in model.graph.node for a in node.attribute if a.s}
        if attributes.get("ep_cache_context") != binary.name or attributes.get("ep_sdk_version") != record["qnn"]:
            raise IntegrityError(f"({graph}) belongs to another context binary", where=directory / path, cure=cure)
