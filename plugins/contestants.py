"""Who takes part in the benchmark: PyTorch's products in fp16, int8, fp8 and int4 weight-only, and our kernels.

A contestant is a function from a linear and M to calls, one for each copy of its weights. What cannot run on this
GPU, with this PyTorch or for this M raises, and the table says so.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from pq_export.errors import PqExportError
from pq_export.plugins.abi import Layout, Type
from pq_export.plugins.layouts import packed_bytes
from pq_export.plugins.library import Library, PackedWeights
from pq_export.plugins.shapes import Shape
from pq_export.plugins.timing import CANNOT, Call, Work, first_line

GROUP, INNER_TILES = 128, 8  # PyTorch's int4 weight-only kernel
INT_MM_MIN_ROWS = 17
WEIGHT_ONLY_MAX_ROWS = 256  # it unpacks for every 16 rows anew
SPREAD = 3.0  # what the largest code stands for, in standard deviations of x
WEIGHT_STEP = 1e-4
PEAK_BYTES_PER_US, PEAK_OPS_PER_US = 4e6, 2e9  # generous: they only decide how many calls make a graph


@functools.cache
def generator() -> torch.Generator:
    """Of all random data. Not PyTorch's default one: a capture that fails leaves that one unusable."""
    return torch.Generator("cuda").manual_seed(0)


class Linear:
    """One linear's weights in every form, random, in enough copies to outgrow the L2 cache twice."""

    def __init__(self, shape: Shape, library: Library):
        self.shape, self.library = shape, library
        self._packed: dict[Layout, list[PackedWeights]] = {}
        self._cache = 2 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size

    def _copies(self, size: int, make: Callable[[], Any]) -> list[Any]:
        return [make() for _ in range(math.ceil((self._cache + 1) / size))]

    @functools.cached_property
    def fp16(self) -> list[torch.Tensor]:
        """[K, N], column-major as a checkpoint's [N, K] is."""
        N, K = self.shape.N, self.shape.K
        return self._copies(
            2 * N * K, lambda: torch.randn(N, K, device="cuda", dtype=torch.float16, generator=generator()).t()
        )

    @functools.cached_property
    def int8(self) -> list[torch.Tensor]:
        N, K = self.shape.N, self.shape.K
        return self._copies(N * K, lambda: _random_codes((N, K), 8).t())

    @functools.cached_property
    def fp8(self) -> list[torch.Tensor]:
        N, K = self.shape.N, self.shape.K
        make = functools.partial(torch.randn, N, K, device="cuda", dtype=torch.float16, generator=generator())
        return self._copies(N * K, lambda: make().to(torch.float8_e4m3fn).t())

    @functools.cached_property
    def int4_weight_only(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Packed nibbles, and bf16 [K / 128, N, 2] scales and zeros."""
        N, K = self.shape.N, self.shape.K

        def make() -> tuple[torch.Tensor, torch.Tensor]:
            nibbles = torch.randint(0, 256, (N, K // 2), device="cuda", dtype=torch.uint8, generator=generator())
            scales = 0.01 * torch.rand(K // GROUP, N, 2, device="cuda", dtype=torch.bfloat16, generator=generator())
            return torch._convert_weight_to_int4pack(nibbles, INNER_TILES), scales

        return self._copies(N * K // 2, make)

    def packed(self, layout: Layout) -> list[PackedWeights]:
        """Every byte is a pair of codes, so random bytes are random weights."""
        if layout in self._packed:
            return self._packed[layout]
        N, K = self.shape.N, self.shape.K
        size, scale = packed_bytes(layout, N, K), torch.full((N,), WEIGHT_STEP, device="cuda")
        bytes_of = functools.partial(torch.randint, device="cuda", dtype=torch.uint8, generator=generator())
        make = functools.partial(bytes_of, 0, 256, (size,))
        self._packed[layout] = self._copies(size, lambda: PackedWeights(make(), scale, None, layout, N, K))
        return self._packed[layout]


def _random_codes(shape: tuple[int, int], bits: int) -> torch.Tensor:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    return torch.randint(low, high, shape, device="cuda", dtype=torch.int8, generator=generator())


def activations(M: int, K: int) -> torch.Tensor:
    return torch.randn(M, K, device="cuda", dtype=torch.float16, generator=generator())


def fp16(linear: Linear, M: int) -> list[Call]:
    """cuBLAS."""
    x = activations(M, linear.shape.K)
    y = torch.empty(M, linear.shape.N, device="cuda", dtype=torch.float16)
    return [functools.partial(torch.mm, x, w, out=y) for w in linear.fp16]


def int8(linear: Linear, M: int) -> list[Call]:
    """cuBLASLt, int32 out: its scales would be one more pass."""
    if M < INT_MM_MIN_ROWS:
        raise RuntimeError(f"torch._int_mm needs M >= {INT_MM_MIN_ROWS}")
    x = _random_codes((M, linear.shape.K), 8)
    return [functools.partial(torch._int_mm, x, w) for w in linear.int8]


def fp8(linear: Linear, M: int) -> list[Call]:
    """cuBLASLt e4m3, one scale a tensor, fp16 out."""
    x = activations(M, linear.shape.K).to(torch.float8_e4m3fn)
    one = torch.ones((), device="cuda")
    call = functools.partial(torch._scaled_mm, scale_a=one, scale_b=one, out_dtype=torch.float16, use_fast_accum=True)
    return [functools.partial(call, x, w) for w in linear.fp8]


def int4_weight_only(linear: Linear, M: int) -> list[Call]:
    """tinygemm: bf16 activations, groups of 128."""
    if M > WEIGHT_ONLY_MAX_ROWS:
        raise RuntimeError(f"a kernel for small M, not timed above {WEIGHT_ONLY_MAX_ROWS}")
    x = activations(M, linear.shape.K).bfloat16()
    return [functools.partial(torch._weight_int4pack_mm, x, w, GROUP, scales) for w, scales in linear.int4_weight_only]


def ours(
    linear: Linear, M: int, activation_bits: int, weight_bits: int = 4, quantize: str = "", variant: int = -1
) -> list[Call]:
    """Our GEMM with fp16 out. ``quantize``: nothing, or a pass over fp16 x before it, 'static' or 'dynamic'."""
    library, (N, K) = linear.library, (linear.shape.N, linear.shape.K)
    layout = library.preferred_layout(weight_bits, activation_bits)
    x, packed = activations(M, K), layout.x_type is Type.S4
    x_scale = SPREAD / 2 ** (activation_bits - 1)
    codes = library.quantize(x, x_scale, activation_bits, layout.x_type)
    if not quantize:  # uniform codes, as the other integer products have
        codes = _random_codes((M, K // 2 if packed else K), 8 if packed else activation_bits).view(codes.dtype)
    y = torch.empty(M, N, device="cuda", dtype=torch.float16)
    chosen = variant if variant >= 0 else next(iter(library.variants(layout, M, N, K)), None)
    if chosen is None:
        raise PqExportError(f"no kernel for layout {layout.name}")
    workspace = torch.empty(library.workspace(chosen, layout, M, N, K), device="cuda", dtype=torch.uint8)

    def call(weights: PackedWeights) -> object:
        row_scale = None
        if quantize == "static":
            library.quantize(x, x_scale, activation_bits, layout.x_type, out=codes)
        elif quantize == "dynamic":
            _, row_scale = library.quantize_dynamic(x, activation_bits, layout.x_type, out=codes)
        return library.gemm(codes, weights, variant=chosen, row_scale=row_scale, out=y, workspace=workspace)

    return [functools.partial(call, weights) for weights in linear.packed(layout)]


Contestant = Callable[[Linear, int], list[Call]]
BASELINES: dict[str, Contestant] = {"fp16": fp16, "int8": int8, "fp8": fp8, "w4a16": int4_weight_only}
OURS: dict[str, Contestant] = {
    "w4a4": functools.partial(ours, activation_bits=4),
    "w4a8": functools.partial(ours, activation_bits=8),
    "w8a8": functools.partial(ours, activation_bits=8, weight_bits=8),
    "w4a4 static": functools.partial(ours, activation_bits=4, quantize="static"),
    "w4a4 dynamic": functools.partial(ours, activation_bits=4, quantize="dynamic"),
    "w4a8 static": functools.partial(ours, activation_bits=8, quantize="static"),
    "w4a8 dynamic": functools.partial(ours, activation_bits=8, quantize="dynamic"),
}
WEIGHT_BYTES = {"fp16": 2.0, "int8": 1.0, "fp8": 1.0, "w8a8": 1.0}  # a weight; the others have half a byte
X_BYTES = {"int8": 1.0, "fp8": 1.0, "w4a8": 1.0, "w8a8": 1.0}  # a value read; the others read two bytes of fp16


def traffic(name: str, shape: Shape, M: int, packed_x: bool) -> float:
    """The fewest bytes that a call moves: weights and x once, y once (int32 for ``int8``)."""
    x_bytes = X_BYTES.get(name, 2.0)
    if name == "w4a4":
        x_bytes = 0.5 if packed_x else 1.0
    y_bytes = 4.0 if name == "int8" else 2.0
    return WEIGHT_BYTES.get(name, 0.5) * shape.weights + x_bytes * M * shape.K + y_bytes * M * shape.N


def works(linear: Linear, M: int, contestants: dict[str, Contestant]) -> tuple[dict[str, Work], dict[str, str]]:
    """What to time for one linear and M, and who cannot take part and why."""
    result, absent = {}, {}
    for name, contestant in contestants.items():
        floor = max(
            traffic(name, linear.shape, M, True) / PEAK_BYTES_PER_US,
            2 * M * linear.shape.weights / PEAK_OPS_PER_US,
        )
        try:
            result[name] = Work(contestant(linear, M), floor + 1.0)
        except CANNOT as error:
            absent[name] = first_line(error)
    return result, absent
