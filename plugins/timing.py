"""Timing of GPU work: CUDA graphs, taken by turns, so that clocks and temperature are the same for all.

A graph holds enough calls to hide its own launch (:data:`GRAPH_US`); calls that read weights come with several
copies of them, used in turn, so that no call finds its weights in the L2 cache.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pq_export.errors import PqExportError

Call = Callable[[], object]
GRAPH_US = 400.0  # beside it, the few us between graphs do not count
ROUNDS = 12
WARM_SECONDS = 2.0
WARM_CALLS, MAX_CALLS = 8, 400
# What a contestant raises that does not exist here: no such kernel, type or function, or too little memory.
CANNOT = (RuntimeError, AttributeError, NotImplementedError, TypeError, PqExportError)


@dataclass(frozen=True)
class Work:
    """Something to time. ``calls``: one for each copy of the weights. ``floor_us``: no call can be faster."""

    calls: list[Call]
    floor_us: float


def time_by_turns(works: dict[str, Work], rounds: int = ROUNDS) -> tuple[dict[str, float], dict[str, str]]:
    """Median microseconds of a call, and why a work could not run. One round replays every graph once."""
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    failed, pool = {}, torch.cuda.graph_pool_handle()  # one for all: nothing reads later what a graph allocates
    for name, work in works.items():
        try:
            graphs[name] = _captured(work, pool)
        except CANNOT as error:
            failed[name] = first_line(error)
            torch.cuda.synchronize()
    events = {name: [_events() for _ in range(rounds)] for name in graphs}
    for graph, _ in graphs.values():
        graph.replay()
    for turn in range(rounds):
        for name, (graph, _) in graphs.items():
            start, end = events[name][turn]
            start.record()
            graph.replay()
            end.record()
    torch.cuda.synchronize()
    times = {
        name: statistics.median(start.elapsed_time(end) for start, end in events[name]) * 1e3 / count
        for name, (_, count) in graphs.items()
    }
    return times, failed


def _captured(work: Work, pool: Any) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of the calls, repeated in turn, and how many there are in it."""
    copies = len(work.calls)
    count = min(math.ceil(GRAPH_US / work.floor_us), MAX_CALLS)
    count = max(math.ceil(count / copies), 1) * copies
    graph, stream = torch.cuda.CUDAGraph(), _stream()
    stream.wait_stream(torch.cuda.current_stream())
    # Not torch.cuda.graph(): it collects Python's garbage before every capture, and there are a thousand.
    with torch.cuda.stream(stream):
        work.calls[0]()  # what a library sets up at its first call
        stream.synchronize()
        graph.capture_begin(pool=pool)
        try:
            for i in range(count):
                work.calls[i % copies]()
        finally:
            graph.capture_end()
    return graph, count


@functools.cache
def _stream() -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream()


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def first_line(error: Exception) -> str:
    """Why something cannot run, in a line of a table."""
    return " ".join(str(error).split("\n")[0].split())[:120]


@dataclass(frozen=True)
class Ceilings:
    """What this GPU reaches, measured: bytes copied (read + written), and products of 8192^3."""

    copy_gbps: float
    fp16_tops: float
    int8_tops: float  # the larger of cuBLASLt's int8 and twice fp16

    @property
    def fp16_crossing(self) -> float:
        """Operations a byte at which fp16 products stop being bound by memory."""
        return self.fp16_tops * 1e3 / self.copy_gbps


def measure_ceilings(size: int = 8192) -> Ceilings:
    """After a warm-up of :data:`WARM_SECONDS`; random data, since zeros run faster."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.float16) for _ in range(2))
    started = time.perf_counter()
    while time.perf_counter() - started < WARM_SECONDS:
        for _ in range(WARM_CALLS):
            torch.mm(a, b)
        torch.cuda.synchronize()
    x, w = (torch.randint(-128, 128, (size, size), device="cuda", dtype=torch.int8) for _ in range(2))
    source = torch.randint(0, 255, (2**30,), device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    operations = 2.0 * size**3
    works = {
        "copy": Work([lambda: target.copy_(source)], 200.0),
        "fp16": Work([lambda: torch.mm(a, b)], operations / 2e9),
        "int8": Work([lambda: torch._int_mm(x, w.t())], operations / 4e9),
    }
    times, _ = time_by_turns(works)
    fp16 = operations / times["fp16"] / 1e6
    int8 = operations / times["int8"] / 1e6 if "int8" in times else 0.0
    return Ceilings(2 * source.numel() / times["copy"] / 1e3, fp16, max(int8, 2 * fp16))
