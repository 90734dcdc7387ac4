"""What fusing the quantizer with its producer saves: RMSNorm, and SiLU·mul with the online Hadamard."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass

import torch
from torch.nn.functional import rms_norm, silu

from pq_export.hadamard import HadamardTransform
from pq_export.plugins.abi import Type
from pq_export.plugins.contestants import SPREAD, activations, generator
from pq_export.plugins.library import Library
from pq_export.plugins.reference import online_hadamard
from pq_export.plugins.shapes import Shape
from pq_export.plugins.timing import Work, time_by_turns

BITS, EPS = 4, 1e-5
SCALE = SPREAD / 2 ** (BITS - 1)


@dataclass(frozen=True)
class Row:
    """One producer before one linear; microseconds, None where it cannot run.

    ``producer``: PyTorch's operations with fp16 out. ``separate``: those, then the quantizer. ``fused``: one kernel.
    ``linear``: what reads the codes, as W4A4; ``gemm``: its time. ``cost``: what the fused quantizer adds, as a share
    of it.
    """

    what: str
    linear: str
    K: int
    M: int
    producer: float | None
    separate: float | None
    fused: float | None
    quantize: float | None
    gemm: float | None

    @property
    def cost(self) -> float | None:
        if self.fused is None or self.producer is None or self.gemm is None:
            return None
        return (self.fused - self.producer) / self.gemm

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "cost": self.cost}


def measure(library: Library, norm: Shape, down: Shape, M: int, gemm_us: dict[Shape, float | None]) -> list[Row]:
    """Before ``norm`` (a linear that reads a norm) and before ``down``; ``gemm_us``: what those linears take."""
    packed = library.preferred_layout(BITS, BITS).x_type
    return [
        _row("RMSNorm", norm, M, _norm(library, norm.K, M, packed), gemm_us[norm]),
        _row("SiLU·mul", down, M, _silu(library, down.K, M, packed, False), gemm_us[down]),
        _row("SiLU·mul, Hadamard", down, M, _silu(library, down.K, M, packed, True), gemm_us[down]),
    ]


def _row(what: str, shape: Shape, M: int, works: dict[str, Work], gemm: float | None) -> Row:
    times, _ = time_by_turns(works)
    parts = {name: times.get(name) for name in ("producer", "separate", "fused", "quantize")}
    return Row(what, str(shape), shape.K, M, **parts, gemm=gemm)


def _norm(library: Library, K: int, M: int, packed: Type) -> dict[str, Work]:
    x, gain = activations(M, K), torch.rand(K, device="cuda", generator=generator())
    half, codes = gain.half(), library.quantize(x, SCALE, BITS, packed)

    def producer() -> torch.Tensor:
        return rms_norm(x, (K,), half, EPS)

    floor = 1.0 + 3 * M * K / 4e6
    return {
        "producer": Work([producer], floor),
        "separate": Work([lambda: library.quantize(producer(), SCALE, BITS, packed, out=codes)], floor),
        "fused": Work([lambda: library.rmsnorm_quantize(x, SCALE, BITS, packed, eps=EPS, gain=gain, out=codes)], floor),
        "quantize": Work([lambda: library.quantize(x, SCALE, BITS, packed, out=codes)], floor),
    }


def _silu(library: Library, K: int, M: int, packed: Type, hadamard: bool) -> dict[str, Work]:
    both = activations(M, 2 * K)
    gate, up = both[:, :K], both[:, K:]
    transform, left = HadamardTransform(K).cuda().half(), None
    if hadamard:
        left = torch.from_numpy(online_hadamard(K).left).cuda()
    codes = library.quantize(gate.contiguous(), SCALE, BITS, packed)
    fused = functools.partial(library.silu_mul_quantize, gate, up, SCALE, BITS, packed, left=left, out=codes)

    def producer() -> torch.Tensor:
        product = silu(gate) * up
        return transform(product) if hadamard else product

    x = producer()
    floor = 1.0 + 5 * M * K / 4e6
    return {
        "producer": Work([producer], floor),
        "separate": Work([lambda: library.quantize(producer(), SCALE, BITS, packed, out=codes)], floor),
        "fused": Work([fused], floor),
        "quantize": Work([lambda: library.quantize(x, SCALE, BITS, packed, out=codes)], floor),
    }
