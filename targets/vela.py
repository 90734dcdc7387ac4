"""Vela, Arm's compiler for Ethos-U: a TOSA graph in, a TensorFlow Lite file with the NPU's command stream out.

What its report says of cycles is Vela's estimate for the memories of one of its own system configurations, its default
for the accelerator. The TOSA file compiles for another one with ``vela --system-config ... --memory-mode ...``.
"""

from __future__ import annotations

import csv
import re
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pq_export.errors import PqExportError, UsageError
from pq_export.targets.tosa_tools import tools_environment
from pq_export.targets.worker_process import Worker, new_log

# --accelerator-config of Vela 5.2
ACCELERATORS = (
    *("ethos-u55-32", "ethos-u55-64", "ethos-u55-128", "ethos-u55-256", "ethos-u65-256", "ethos-u65-512"),
    *("ethos-u85-128", "ethos-u85-256", "ethos-u85-512", "ethos-u85-1024", "ethos-u85-2048"),
)
DEFAULT_ACCELERATOR = "ethos-u85-256"
WORKER = Path(__file__).with_name("vela_worker.py")
TIMEOUT = 600.0  # seconds for one graph; the largest linear of a 1B model takes some


@dataclass(frozen=True)
class VelaRecord:
    """One compiled graph.

    ``bytes`` of the file, of which ``weight_bytes`` are encoded weights. ``npu_operators`` that Vela counts; all are on
    the NPU. ``estimated_cycles`` at ``clock_hz`` with Vela's ``system_config`` and ``memory_mode``; ``sram_bytes`` and
    ``dram_bytes`` (off-chip memories together) used.
    """

    accelerator: str
    bytes: int
    weight_bytes: int
    npu_operators: int
    estimated_cycles: int
    clock_hz: float
    sram_bytes: int
    dram_bytes: int
    system_config: str
    memory_mode: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_accelerators(names: tuple[str, ...]) -> None:
    """Refuse names that Vela does not know."""
    for name in names:
        if name not in ACCELERATORS:
            raise UsageError(f"unknown Ethos-U '{name}'", cure=f"Accelerators: {', '.join(ACCELERATORS)}.")


def compile_tosa(
    tosa: Path, output: Path, accelerator: str, *, failed_logs: Path, where: str = "", timeout: float = TIMEOUT
) -> VelaRecord:
    """Compile the file ``tosa`` for ``accelerator`` into the file ``output``, which appears whole.

    Every operator must be on the NPU. Where Vela fails, its log is kept in ``failed_logs`` and the error, one line,
    names it; ``where``: what the graph is, for that line.
    """
    check_accelerators((accelerator,))
    log = new_log(failed_logs, f"{output.stem}.{accelerator}.log")
    with tempfile.TemporaryDirectory(prefix=f".{output.stem}.", dir=output.parent) as folder:
        part = Path(folder)
        arguments = [str(tosa.resolve()), "--accelerator-config", accelerator, "--output-dir", str(part.resolve())]
        worker = Worker("Vela", [sys.executable, str(WORKER)], timeout)
        worker.run({"arguments": arguments}, part, log, where or tosa.name, tools_environment())
        try:
            record = _record(log.read_text(encoding="utf-8", errors="replace"), part, tosa.stem, accelerator)
        except PqExportError as error:
            raise PqExportError(error.what, where=where or tosa.name, cure=f"The log: {log}.") from None
        (part / f"{tosa.stem}_vela.tflite").replace(output)
    log.unlink()
    return record


def _record(printed: str, folder: Path, stem: str, accelerator: str) -> VelaRecord:
    artefact = folder / f"{stem}_vela.tflite"
    counted = {kind: re.search(rf"^{kind} operators = (\d+)", printed, re.MULTILINE) for kind in ("NPU", "CPU")}
    if not artefact.is_file() or None in counted.values():
        raise PqExportError("Vela ended without a result")
    npu, cpu = (int(match[1]) for match in counted.values() if match)
    if cpu or not npu:  # an empty graph compiles, too
        raise PqExportError(f"Vela put {cpu} operators on the CPU and {npu} on the NPU")
    row = _summary(folder, stem)
    try:
        return VelaRecord(
            accelerator=accelerator,
            bytes=artefact.stat().st_size,
            weight_bytes=int(float(row["total_npu_encoded_weights"])),
            npu_operators=npu,
            estimated_cycles=int(float(row["cycles_total"])),
            clock_hz=float(row["core_clock"]),
            sram_bytes=round(float(row["sram_memory_used"]) * 1024),
            dram_bytes=round(sum(float(row[f"{m}_memory_used"]) for m in _OFF_CHIP) * 1024),
            system_config=row["system_config"],
            memory_mode=row["memory_mode"],
        )
    except (KeyError, ValueError) as error:
        raise PqExportError(f"Vela's summary cannot be read: {error}") from None


_OFF_CHIP = ("dram", "on_chip_flash", "off_chip_flash")


def _summary(folder: Path, stem: str) -> dict[str, str]:
    files = list(folder.glob(f"{stem}_summary_*.csv"))
    rows = list(csv.DictReader(files[0].read_text(encoding="utf-8").splitlines())) if files else []
    if len(rows) != 1:
        raise PqExportError("Vela wrote no summary")
    return rows[0]
