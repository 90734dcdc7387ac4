"""Graphs in the TOSA reference model, Arm's definition of TOSA in C++: what an NPU has to compute, bit for bit.

It runs in a process of its own, :mod:`pq_export.targets.tosa_worker`: a graph that it does not know ends it.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pq_export.targets.tosa_linears import LoweredLinear, sample_codes, tosa_graph
from pq_export.targets.tosa_tools import tools_environment
from pq_export.targets.worker_process import Worker, new_log

WORKER = Path(__file__).with_name("tosa_worker.py")
TIMEOUT = 1800.0  # seconds for all graphs


def run_reference(
    graphs: Sequence[Path | bytes], inputs: Sequence[np.ndarray], *, failed_logs: Path, timeout: float = TIMEOUT
) -> list[np.ndarray]:
    """The output bytes (uint8 [size]) of each graph, a TOSA file or its content with one input and one output.

    Where it fails, its log is kept in ``failed_logs``.
    """
    with tempfile.TemporaryDirectory(prefix="pq-export-tosa-") as folder:
        part = Path(folder)
        files = []
        for number, graph in enumerate(graphs):
            file = graph if isinstance(graph, Path) else part / f"{number}.tosa"
            if isinstance(graph, bytes):
                file.write_bytes(graph)
            np.save(part / f"{number}.x.npy", inputs[number])
            files.append(str(file.resolve()))
        log = new_log(failed_logs, "tosa-reference-model.log")
        worker = Worker("TOSA's reference model", [sys.executable, str(WORKER)], timeout)
        worker.run({"files": files, "folder": folder}, part, log, "Ethos-U", tools_environment())
        log.unlink()
        return [np.load(part / f"{number}.y.npy") for number in range(len(graphs))]


def count_differences(linears: Sequence[LoweredLinear], tokens: int, *, failed_logs: Path) -> dict[str, int]:
    """Name -> output codes in which the reference model differs from :meth:`LoweredLinear.integer_output`.

    Inputs are :func:`sample_codes` for ``tokens`` tokens: both ends of the range and everything between.
    """
    samples = sample_codes(linears, tokens)
    graphs = [tosa_graph(linear, tokens) for linear in linears]
    found = {}
    for linear, x, y in zip(linears, samples, run_reference(graphs, samples, failed_logs=failed_logs), strict=True):
        expected = linear.integer_output(x)
        found[linear.name] = int(np.sum(y.view(linear.output_type).reshape(expected.shape) != expected))
    return found
