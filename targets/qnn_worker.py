"""Qualcomm's compiler and simulator in a process of their own, where a crash or a hang is one line for the parent.

``python qnn_worker.py REQUEST``, a JSON file with what :func:`pq_export.targets.qnn_compile.request` says; ``folder``
is the graphs' directory, which other paths are relative to::

    {"serve": false, "soc_model": 57, "folder": path, "graphs": {"prefill": onnx, ...},
     "contexts": {"prefill": onnx, ...}, "dumps": {"prefill": folder, ...}, "result": path}

It puts all graphs, which share weights, into one context binary, every node on the accelerator, and writes what it has
to say of it to ``result``, as JSON, or ``{"error": line, "where": graph, "cure": line}``. With ``serve`` that is a
message on standard output, and it goes on to answer messages on standard input, one run of a graph each, until it
closes: the simulator of QNN 2.51 crashes when it loads a binary with shared weights, and runs the one it just made. It
is run by its path and imports nothing of this package, whose own imports take time and memory.

The binary's bytes depend on the paths of graphs, which are relative for that reason, and on the addresses of QNN's
objects: where the system allows it, the process runs without randomized ones, and two compilations write the same.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import struct
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

PROVIDER = "QNNExecutionProvider"
ERROR_CHARACTERS = 400
SHOWN_NODES = 3
KEPT_VARIABLES = ("HOME", "LD_LIBRARY_PATH", "PATH", "PYTHONPATH", "TMPDIR", "VIRTUAL_ENV")
CURRENT_PERSONALITY, ADDR_NO_RANDOMIZE = 0xFFFFFFFF, 0x0040000  # sys/personality.h


class RefusedError(Exception):
    """What the parent tells the user: ``what``, ``where``, ``cure``."""

    def __init__(self, what: str, where: str = "", cure: str = ""):
        super().__init__(what)
        self.answer = {"error": " ".join(what.split())[:ERROR_CHARACTERS], "where": where, "cure": cure}


def write_message(stream: BinaryIO, header: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    """A JSON header with types and shapes of ``tensors``, and then their bytes in that order."""
    listed = [{"name": n, "dtype": t.dtype.name, "shape": t.shape} for n, t in tensors.items()]
    text = json.dumps({**header, "tensors": listed}).encode()
    stream.write(struct.pack("<Q", len(text)) + text)
    for tensor in tensors.values():
        stream.write(np.ascontiguousarray(tensor).tobytes())
    stream.flush()


def read_message(stream: BinaryIO) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """What :func:`write_message` wrote; None where the other side is gone."""
    head = _read(stream, 8)
    if head is None or (text := _read(stream, struct.unpack("<Q", head)[0])) is None:
        return None
    header = json.loads(text)
    tensors = {}
    for entry in header.pop("tensors"):
        dtype, shape = np.dtype(entry["dtype"]), tuple(entry["shape"])
        if (content := _read(stream, dtype.itemsize * int(np.prod(shape)))) is None:
            return None
        tensors[entry["name"]] = np.frombuffer(content, dtype).reshape(shape)
    return header, tensors


def _read(stream: BinaryIO, count: int) -> bytes | None:
    content = stream.read(count) if count else b""
    return content if len(content) == count else None


def new_session(model: str, soc_model: int, config: dict[str, str], strict: bool = True, **options: str) -> Any:
    """``model`` in a session of which every node is on the accelerator (``strict``); ``config`` is of the session."""
    ort, qnn = importlib.import_module("onnxruntime"), importlib.import_module("onnxruntime_qnn")
    if not any(device.ep_name == PROVIDER for device in ort.get_ep_devices()):
        ort.register_execution_provider_library(PROVIDER, qnn.get_library_path())
    devices = [device for device in ort.get_ep_devices() if device.ep_name == PROVIDER][:1]
    if not devices:
        raise RefusedError("onnxruntime-qnn offers no device here", cure="Install it again.")
    settings = ort.SessionOptions()
    settings.log_severity_level = 2
    # The graph as it is written, and as the reference runs it. (The layout pass for QNN runs all the same.)
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    for key, value in {**config, **({"session.disable_cpu_ep_fallback": "1"} if strict else {})}.items():
        settings.add_session_config_entry(key, value)
    settings.add_provider_for_devices(
        devices, {"backend_path": qnn.get_qnn_htp_path(), "soc_model": str(soc_model), **options}
    )
    session = ort.InferenceSession(model, settings)
    session.disable_fallback()
    return session


def compile_graphs(request: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contexts of ``request``, written: what to record of them, and the sessions by graph."""
    started, seconds = time.perf_counter(), {}
    graphs = list(request["graphs"])
    for name, path in request["contexts"].items():
        for stale in (Path(path), Path(path).with_name(f"{Path(path).stem}_qnn.bin")):
            stale.unlink(missing_ok=True)
        Path(request["dumps"][name]).mkdir(parents=True, exist_ok=True)
    sessions = {}  # all stay until the last has written the weights that they share
    for name, path in request["graphs"].items():
        began = time.perf_counter()
        config = {
            "ep.context_enable": "1",
            "ep.context_file_path": request["contexts"][name],
            "ep.context_embed_mode": "0",
            "ep.share_ep_contexts": "1",
            **({"ep.stop_share_ep_contexts": "1"} if name == graphs[-1] else {}),
        }
        options = {
            "enable_htp_weight_sharing": "1",
            "dump_json_qnn_graph": "1",
            "json_qnn_graph_dir": request["dumps"][name],
        }
        try:
            sessions[name] = new_session(path, request["soc_model"], config, **options)
        except RefusedError:
            raise
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise _refusal(name, path, request["soc_model"], error) from None
        seconds[name] = round(time.perf_counter() - began, 1)
        print(f"{name}: {seconds[name]} s", file=sys.stderr, flush=True)
    answer = {
        "seconds": round(time.perf_counter() - started, 1),
        "graph_seconds": seconds,
        "peak_rss": peak_rss(),
    }
    return answer, sessions


def _refusal(name: str, path: str, soc_model: int, error: Exception) -> RefusedError:
    """Which nodes the accelerator does not take, where that is why; else the compiler's own words."""
    message = " ".join(str(error).split())
    if "fallback" not in message:
        return RefusedError(f"QNN does not compile it: {message}", name)
    nodes = cpu_nodes(path, soc_model)
    shown = ", ".join(nodes[:SHOWN_NODES]) or "which, it does not say"
    more = f" and {len(nodes) - SHOWN_NODES} more" if len(nodes) > SHOWN_NODES else ""
    return RefusedError(f"nodes would run on a CPU and not on the accelerator: {shown}{more}", name)


def cpu_nodes(path: str, soc_model: int) -> list[str]:
    """Nodes of a graph that the accelerator leaves to a CPU, as ``name (operator)``."""
    session = new_session(path, soc_model, {"session.record_ep_graph_assignment_info": "1"}, strict=False)
    return [
        f"{node.name or 'without name'} ({node.op_type})"
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != PROVIDER
        for node in part.get_nodes()
    ]


def serve(sessions: dict[str, Any], questions: BinaryIO, answers: BinaryIO) -> None:
    """Answer ``{"graph": name, "outputs": [name, ...]}`` with its tensors until ``questions`` ends."""
    while (message := read_message(questions)) is not None:
        header, feeds = message
        started = time.perf_counter()
        try:
            values = sessions[header["graph"]].run(header["outputs"], feeds)
        except Exception as error:  # onnxruntime's exceptions share no base class
            write_message(answers, {"error": " ".join(str(error).split())[:ERROR_CHARACTERS]}, {})
            continue
        seconds = time.perf_counter() - started
        write_message(answers, {"seconds": seconds}, dict(zip(header["outputs"], values, strict=True)))


def fix_addresses() -> None:
    """Start this process again without randomized addresses, and without variables that would move them.

    Nothing happens where that is not possible.
    """
    if not sys.platform.startswith("linux"):
        return
    personality = ctypes.CDLL(None).personality
    now = personality(ctypes.c_ulong(CURRENT_PERSONALITY))
    if now == -1 or now & ADDR_NO_RANDOMIZE:
        return
    if personality(ctypes.c_ulong(now | ADDR_NO_RANDOMIZE)) != -1:  # a container may forbid it
        environment = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def peak_rss() -> int:
    """Bytes. ru_maxrss would be that of the process that started this one, where it was larger."""
    return int(Path("/proc/self/status").read_text(encoding="ascii").partition("VmHWM:")[2].split()[0]) * 1024


def main(request_path: str) -> None:
    """The request at ``request_path``."""
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    os.chdir(request["folder"])
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # QNN writes to standard output, too
    sessions: dict[str, Any] = {}
    try:
        answer, sessions = compile_graphs(request)
    except RefusedError as refusal:
        answer = refusal.answer
    if request["serve"]:
        write_message(answers, answer, {})
        serve(sessions, sys.stdin.buffer, answers)
    else:
        Path(request["result"]).write_text(json.dumps(answer), encoding="utf-8")
    sys.stderr.flush()
    os._exit(0)  # at a regular end, libraries of QNN abort the process where a session failed


if __name__ == "__main__":
    fix_addresses()
    sys.path.pop(0)  # this folder: its modules are no top-level ones
    main(sys.argv[1])
