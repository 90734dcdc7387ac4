"""What a long run tells about itself: progress, time and peak memory of each stage."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

SAMPLE_SECONDS = 0.05


class Progress(Protocol):
    """Where a stage reports to. The command line draws it; tests and libraries use :class:`Silent`.

    ``note`` is for who wants to know more, ``warn`` for everybody: the result is not what was asked for.
    """

    def start(self, title: str, total: int | None) -> None: ...
    def advance(self, steps: int = 1) -> None: ...
    def note(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...


class Silent:
    """Progress that goes nowhere."""

    def start(self, title: str, total: int | None) -> None: ...
    def advance(self, steps: int = 1) -> None: ...
    def note(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...


@dataclass(frozen=True)
class StageRecord:
    """``seconds`` of wall time; ``peak_rss`` in bytes while the stage ran, ``peak_device`` the same of CUDA tensors;
    ``reused`` from an earlier run.
    """

    name: str
    seconds: float
    peak_rss: int
    reused: bool = False
    peak_device: int = 0


class Stages:
    """Runs stages in order: announces them, times them and samples the process's memory."""

    def __init__(self, progress: Progress | None = None):
        self.progress: Progress = progress or Silent()
        self.records: list[StageRecord] = []

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None, reused: bool = False) -> Iterator[Callable[..., None]]:
        """``with stages.stage("ranges", 32) as advance: ... advance(4)``."""
        self.progress.start(name + (" (kept from an earlier run)" if reused else ""), total)
        started, stop, peak = time.perf_counter(), threading.Event(), [_rss()]

        def sample() -> None:
            while not stop.wait(SAMPLE_SECONDS):
                peak[0] = max(peak[0], _rss())

        if (cuda := _cuda()) is not None:
            cuda.reset_peak_memory_stats()
        sampler = threading.Thread(target=sample, daemon=True)
        sampler.start()
        try:
            yield self.progress.advance
        finally:
            stop.set()
            sampler.join()
            peak[0] = max(peak[0], _rss())
            device = 0 if (cuda := _cuda()) is None else int(cuda.max_memory_allocated())
            self.records.append(StageRecord(name, time.perf_counter() - started, peak[0], reused, device))

    def to_list(self) -> list[dict[str, Any]]:
        return [asdict(record) for record in self.records]


def _cuda() -> Any:
    """``torch.cuda`` where the process uses it already; this module itself must not load PyTorch."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def _rss() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)
