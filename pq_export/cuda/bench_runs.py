"""The measurements of :mod:`pq_export.cuda.bench`: peak memory of each variant alone, times by turns, kernels."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pq_export.cuda.decoder import CudaDecoder
from pq_export.cuda.dynamic import DynamicDecoder
from pq_export.cuda.float_decoder import FloatDecoder, FloatWeights
from pq_export.cuda.random_weights import random_weights, without_input_scales
from pq_export.cuda.source import Sizes
from pq_export.cuda.weights import DecoderWeights
from pq_export.plugins.library import Library
from pq_export.plugins.timing import CANNOT, first_line

Note = Callable[[str], None]
Call = Callable[[], object]
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
ROOM = 64  # tokens of a cache behind the context
# A turn: calls until clocks are those that this variant's own power leaves it, then those that are timed.
SETTLE_MS, TURN_MS = 300.0, 100.0
EAGER, GRAPH, COMPILED = "fp16 eager", "fp16 graph", "fp16 compiled + graph"
STATIC, APART, DYNAMIC = "w4a4 static", "w4a4 static, no overlap", "w4a4 dynamic"
FLOATS, OURS = (EAGER, GRAPH, COMPILED), (STATIC, APART, DYNAMIC)


@dataclass(frozen=True)
class Workload:
    """``prefill`` of ``length`` tokens, or a ``decode`` step behind ``length`` tokens, for ``batch`` sequences."""

    kind: str
    batch: int
    length: int

    @property
    def capacity(self) -> int:
        return self.length if self.kind == "prefill" else self.length + ROOM

    @property
    def positions(self) -> int:
        return self.length + ROOM

    def __str__(self) -> str:
        return f"prefill {self.length}" if self.kind == "prefill" else f"decode at {self.length}, batch {self.batch}"


@functools.cache
def _compile_settings() -> None:
    """One compilation for each workload: more than Dynamo's own limit allows."""
    torch._dynamo.config.recompile_limit = 64


# ---- Calls ----------------------------------------------------------------------------------------------------


def float_call(weights: FloatWeights, work: Workload, compiled: bool) -> Call:
    """One prefill or one step of the FP16 decoder."""
    _compile_settings()
    context = work.length if work.kind == "decode" else 0
    decoder = FloatDecoder(weights, capacity=work.capacity, batch=work.batch, context=context, compiled=compiled)
    return _call(decoder, work, weights.sizes)


def our_call(
    weights: DecoderWeights, library: Library, work: Workload, kind: type[CudaDecoder] = CudaDecoder, **options: Any
) -> Call:
    """One prefill or one step of ours, on a cache of random codes. ``options``: the decoder's."""
    decoder = kind(weights, library, capacity=work.capacity, batch=work.batch, **options)
    if work.kind == "decode":
        for tensor in (*decoder.cache.keys, *decoder.cache.values):
            tensor.random_(0, 256) if tensor.dtype == torch.uint8 else tensor.random_(-8, 8)
        decoder.cache.length.fill_(work.length)
    return _call(decoder, work, weights.sizes)


def _call(decoder: FloatDecoder | CudaDecoder, work: Workload, sizes: Sizes) -> Call:
    shape = (work.batch, work.length) if work.kind == "prefill" else (work.batch,)
    ids = torch.randint(0, sizes.vocab_size, shape, device="cuda")
    return functools.partial(decoder.prefill if work.kind == "prefill" else decoder.step, ids)


def captured(call: Call) -> Call:
    """A CUDA graph of ``call``."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    replay = functools.partial(_replay, graph, result, call)
    replay()
    torch.cuda.synchronize()
    return replay


def _replay(graph: torch.cuda.CUDAGraph, result: object, call: Call) -> object:
    """``result`` and what ``call`` holds, tokens and cache, are kept: the graph writes and reads them."""
    graph.replay()
    return result


# ---- SDPA -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def fastest_sdpa(sizes: Sizes, work: Workload, extra: int = 0) -> Iterator[str]:
    """SDPA's fastest backend for this workload is the one in use; yields its name. ``extra``: a prefix's tokens."""
    s = sizes
    keys = work.length + extra
    queries = keys if work.kind == "prefill" else 1
    q = torch.randn(work.batch, s.num_heads, queries, s.head_dim, dtype=torch.float16, device="cuda")
    k, v = (
        torch.randn(work.batch, s.num_kv_heads, keys, s.head_dim, dtype=torch.float16, device="cuda") for _ in range(2)
    )
    grouped, causal = s.num_heads != s.num_kv_heads, work.kind == "prefill"
    attend = functools.partial(F.scaled_dot_product_attention, q, k, v, is_causal=causal, enable_gqa=grouped)
    times: dict[SDPBackend, float] = {}
    for backend in BACKENDS:
        try:
            with sdpa_kernel(backend):
                times[backend] = _seconds(captured(attend))
        except CANNOT:
            torch.cuda.synchronize()
    del q, k, v, attend
    if not times:
        yield "default"
        return
    best = min(times, key=times.__getitem__)
    with sdpa_kernel(best):
        yield best.name.lower().removesuffix("_attention")


def _seconds(call: Call, repeats: int = 10, warm: int = 2) -> float:
    """Of one call, on the GPU's clock."""
    for _ in range(warm):
        call()
    start, end = _event(), _event()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


# ---- Memory ---------------------------------------------------------------------------------------------------


def measure_memory(
    sizes: Sizes, library: Library, workloads: list[Workload], compiled: bool, note: Note
) -> list[dict[str, Any]]:
    """Peak bytes of PyTorch's allocator, weights and cache included, each variant alone and without CUDA graphs."""
    name = COMPILED if compiled else EAGER
    positions = max(work.positions for work in workloads)
    note("peak memory, w4a4")
    ours = _peaks(
        workloads,
        functools.partial(random_weights, sizes, library, positions=positions),
        lambda weights, work: our_call(weights, library, work),
        sizes,
    )
    note("peak memory, fp16")
    floats = _peaks(
        workloads,
        functools.partial(FloatWeights.random, sizes, positions),
        lambda weights, work: float_call(weights, work, compiled),
        sizes,
    )
    return [
        {
            **asdict(work),
            "workload": str(work),
            "fp16": peak,
            "w4a4": our_peak,
            "fp16_variant": name.removesuffix(" + graph"),
            "ratio": our_peak / peak if isinstance(peak, int) and isinstance(our_peak, int) else None,
        }
        for work, peak, our_peak in zip(workloads, floats, ours, strict=True)
    ]


def _peaks(
    workloads: list[Workload], make: Callable[[], Any], call_of: Callable[[Any, Workload], Call], sizes: Sizes
) -> list[int | str]:
    """Bytes for each workload, or why it could not run."""
    _free()
    weights, peaks = make(), []
    call: Call | None = None
    for work in workloads:
        result: int | str
        try:
            with fastest_sdpa(sizes, work):
                _free()
                call = call_of(weights, work)
                call()  # compilation may try things that take memory
                _free()
                torch.cuda.reset_peak_memory_stats()
                call()
                torch.cuda.synchronize()
                result = torch.cuda.max_memory_allocated()
        except CANNOT as error:
            result = first_line(error)
        call = None  # its cache goes with it
        peaks.append(result)
    del weights
    _free()
    return peaks


def _free() -> None:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


# ---- Time -----------------------------------------------------------------------------------------------------


def measure_times(
    sizes: Sizes, library: Library, workloads: list[Workload], rounds: int, compiled: bool, note: Note
) -> list[dict[str, Any]]:
    """Median milliseconds of every variant of every workload, and ratios to the fastest FP16 one."""
    positions = max(work.positions for work in workloads)
    floats = FloatWeights.random(sizes, positions)
    ours = random_weights(sizes, library, positions=positions)
    bare = without_input_scales(ours)
    rows = []
    for work in workloads:
        note(f"{work}: capture")
        calls: dict[str, Call] = {}
        failed: dict[str, str] = {}
        sdpa: dict[str, str] = {}
        makers: dict[str, Callable[[], Call]] = {
            EAGER: functools.partial(float_call, floats, work, False),
            GRAPH: lambda work=work: captured(float_call(floats, work, False)),  # type: ignore[misc]
            COMPILED: lambda work=work: captured(float_call(floats, work, True)),  # type: ignore[misc]
            STATIC: lambda work=work: captured(our_call(ours, library, work)),  # type: ignore[misc]
            APART: lambda work=work: captured(our_call(ours, library, work, overlap=False)),  # type: ignore[misc]
            DYNAMIC: lambda work=work: captured(our_call(bare, library, work, DynamicDecoder)),  # type: ignore[misc]
        }
        if not compiled:
            del makers[COMPILED]
        if work.kind == "prefill":  # only a step is short enough for it to matter
            del makers[APART]
        for name, make in makers.items():
            extra = ours.prefix_length if name in OURS else 0
            try:
                with fastest_sdpa(sizes, work, extra) as backend:
                    calls[name] = make()
                sdpa[name] = backend
            except CANNOT as error:
                failed[name] = first_line(error)
                torch.cuda.synchronize()
        note(f"{work}: {rounds} rounds of {len(calls)} variants")
        times = by_turns(calls, rounds, functools.partial(fastest_sdpa, sizes, work))
        best = min((times[name] for name in FLOATS if name in times), default=None)
        rows.append(
            {
                **asdict(work),
                "workload": str(work),
                "ms": times,
                "ratios": {name: best / ms for name, ms in times.items()} if best else {},
                "static_over_dynamic": times[DYNAMIC] / times[STATIC] if STATIC in times and DYNAMIC in times else None,
                "tokens_per_second": {
                    name: 1e3 * work.batch * (work.length if work.kind == "prefill" else 1) / ms
                    for name, ms in times.items()
                },
                "sdpa": sdpa,
                "failed": failed,
            }
        )
        del calls, makers, make
        _free()
    return rows


def by_turns(
    calls: dict[str, Call], rounds: int, sdpa: Callable[[], contextlib.AbstractContextManager[Any]]
) -> dict[str, float]:
    """Median milliseconds of each call. A turn is many calls, one behind the other.

    In a prefill a GPU is short of power and lowers its clocks. Right behind another variant's turn it would run at
    the clocks that the other one left. ``sdpa``: what eager calls run under.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    with sdpa():
        once = {name: 1e3 * _seconds(call, 1) for name, call in calls.items()}
        for _ in range(rounds):
            for name, call in calls.items():
                warm, repeats = (math.ceil(ms / once[name]) for ms in (SETTLE_MS, TURN_MS))
                times[name].append(1e3 * _seconds(call, repeats, warm))
    return {name: statistics.median(values) for name, values in times.items()}


# ---- Kernels --------------------------------------------------------------------------------------------------


def profile_kernels(sizes: Sizes, library: Library, workloads: list[Workload], note: Note) -> list[dict[str, Any]]:
    """Microseconds of each kernel of ours, summed over a call, as PyTorch's profiler sees them in a CUDA graph."""
    from torch.profiler import ProfilerActivity, profile

    weights = random_weights(sizes, library, positions=max(work.positions for work in workloads))
    tables = []
    for work in workloads:
        note(f"{work}: kernels")
        with fastest_sdpa(sizes, work, weights.prefix_length):
            call = captured(our_call(weights, library, work))
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            call()
            torch.cuda.synchronize()
        kernels = [
            {"kernel": event.key, "calls": event.count, "us": event.self_device_time_total}
            for event in seen.key_averages()
            if event.self_device_time_total > 0
        ]
        kernels.sort(key=lambda kernel: -kernel["us"])
        tables.append({"workload": str(work), "kernels": kernels})
        del call
    return tables
