"""What every entry point of ``csrc/pq_kernels.h`` computes, in NumPy: what tests compare the kernels with.

Accumulators are exact, and the epilogue rounds where the kernels round, in fp32 and in their order: products are
reproduced bit for bit. Means, exponentials and Hadamard sums are taken in fp64 and rounded once, where a kernel's
own fp32 order gives the last bits another value: compare those values to rounding, and codes up to ties.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import torch

from pq_export import quantizer
from pq_export.errors import PqExportError
from pq_export.hadamard import hadamard_factors
from pq_export.plugins.abi import Type
from pq_export.plugins.layouts import pack_rows

SMALLEST_RIGHT, LARGEST_RIGHT, LARGEST_ORDER = 4, 16384, 32768  # kMinRight, kMaxRight, kMaxOrder of silu_hadamard.cu

NUMPY_TYPES = {
    Type.F16: np.dtype(np.float16),
    Type.BF16: np.dtype(ml_dtypes.bfloat16),
    Type.F32: np.dtype(np.float32),
    Type.S8: np.dtype(np.int8),
    Type.S4: np.dtype(np.uint8),  # packed
    Type.S32: np.dtype(np.int32),
}


def accumulate(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Codes int8 [M, K] and [N, K] -> int32 [M, N]. fp64 holds every partial sum exactly, and has a BLAS."""
    return (x.astype(np.float64) @ w.astype(np.float64).T).astype(np.int32)


def gemm(
    x: np.ndarray,
    w: np.ndarray,
    scale: np.ndarray,
    y_type: Type = Type.F16,
    *,
    row_scale: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    residual: np.ndarray | None = None,
    y_scale: float = 1.0,
    y_bits: int = 8,
) -> np.ndarray:
    """``pq_gemm``: codes x int8 [M, K], w int8 [N, K], scale [N] -> y [M, N] ([M, N / 2] for ``S4``)."""
    return epilogue(
        accumulate(x, w),
        scale,
        y_type,
        row_scale=row_scale,
        bias=bias,
        residual=residual,
        y_scale=y_scale,
        y_bits=y_bits,
    )


def epilogue(
    accumulator: np.ndarray,
    scale: np.ndarray,
    y_type: Type,
    *,
    row_scale: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    residual: np.ndarray | None = None,
    y_scale: float = 1.0,
    y_bits: int = 8,
) -> np.ndarray:
    """int32 [M, N] -> y: scale, row scale, bias, residual, one fp32 rounding each, then y's type."""
    if y_type is Type.S32:
        return accumulator
    y = accumulator.astype(np.float32) * scale.astype(np.float32)
    if row_scale is not None:
        y = y * row_scale.astype(np.float32)[:, None]
    if bias is not None:
        y = y + bias.astype(np.float32)
    if residual is not None:
        y = y + residual.astype(np.float32)
    if y_type in (Type.S8, Type.S4):
        return _stored(_codes(y, y_scale, y_bits), y_type)
    with np.errstate(over="ignore"):  # beyond fp16 is infinity, on the GPU too
        return y.astype(NUMPY_TYPES[y_type])


def quantize(
    x: np.ndarray, scale: float, bits: int, codes_type: Type = Type.S8, *, shift: np.ndarray | None = None
) -> np.ndarray:
    """``pq_quantize``: x [M, K] of a floating type -> codes [M, K] ([M, K / 2] for ``S4``). shift [K]."""
    v = x.astype(np.float32)
    if shift is not None:
        v = v - shift.astype(np.float32)
    return _stored(_codes(v, scale, bits), codes_type)


def rmsnorm(
    x: np.ndarray, eps: float, *, residual: np.ndarray | None = None, gain: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """What ``pq_rmsnorm_quantize`` quantizes, fp32 [M, K], and the sum that it writes, of x's type."""
    h = x if residual is None else (x.astype(np.float32) + residual.astype(np.float32)).astype(x.dtype)
    wide = h.astype(np.float64)
    v = wide / np.sqrt((wide * wide).mean(1, keepdims=True) + eps)
    return (v if gain is None else v * gain).astype(np.float32), h


def silu_mul(gate: np.ndarray, up: np.ndarray, left: np.ndarray | None = None) -> np.ndarray:
    """What ``pq_silu_mul_quantize`` quantizes, fp32 [M, K]; with ``left`` after the online Hadamard."""
    wide = gate.astype(np.float64)
    with np.errstate(over="ignore"):  # exp of a large negative gate: silu is 0 there
        v = wide / (1.0 + np.exp(-wide)) * up.astype(np.float64)
    if left is not None:
        rows, order = v.shape
        tiles = _sylvester(v.reshape(rows, len(left), -1)) / np.sqrt(order)
        v = (left.astype(np.float64) @ tiles).reshape(rows, order)
    return v.astype(np.float32)


def _sylvester(v: np.ndarray) -> np.ndarray:
    """``v @ sylvester(n)`` over the last axis [..., n], by halves."""
    shape, half = v.shape, 1
    while half < shape[-1]:
        pairs = v.reshape(*shape[:-1], -1, 2, half)
        v = np.stack((pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]), axis=-2)
        half *= 2
    return v.reshape(shape)


def quantize_dynamic(x: np.ndarray, bits: int, codes_type: Type = Type.S8) -> tuple[np.ndarray, np.ndarray]:
    """``pq_quantize_dynamic``: x [M, K] -> codes and row_scale fp32 [M]; a row of zeros has scale 1."""
    wide = x.astype(np.float32)
    scale = np.abs(wide).max(1) / np.float32(quantizer.code_range(bits)[1])
    scale = np.where(scale > 0, scale, np.float32(1))
    codes = quantizer.quantize(torch.from_numpy(wide), torch.from_numpy(scale)[:, None], bits)
    return _stored(codes.numpy().astype(np.int8), codes_type), scale


def ties(v: np.ndarray, scale: float, bits: int) -> np.ndarray:
    """Distance in steps of v / scale from the nearest value where the code changes."""
    low, high = quantizer.code_range(bits)
    steps = v.astype(np.float64) / np.float64(np.float32(scale))
    return np.abs(steps - (np.clip(np.floor(steps), low, high - 1) + 0.5))


@dataclass(frozen=True)
class OnlineHadamard:
    """The arguments with which ``pq_silu_mul_quantize`` does what ``pq_export.hadamard`` does."""

    left_order: int
    right_order: int
    left: np.ndarray  # fp32 [left_order, left_order]


def online_hadamard(order: int) -> OnlineHadamard:
    """R4 for an intermediate size.

    All powers of two go to the right, where the kernel's transform is a fast one. The kernel divides by sqrt(order)
    always; where the construction is 'block', whose norm is smaller, ``left`` takes that back. Raises
    :class:`PqExportError` where that power of two, or ``order``, is beyond the kernel's limits.
    """
    if order > LARGEST_ORDER:
        raise PqExportError(
            f"R4 of size {order} is larger than the kernel's {LARGEST_ORDER}", cure="Use --rotate offline."
        )
    factors = hadamard_factors(order)
    factors = replace(factors, left_order=factors.core)
    if not SMALLEST_RIGHT <= factors.right_order <= LARGEST_RIGHT:
        raise PqExportError(
            f"R4 of size {order} is {factors.left_order} x {factors.right_order}, and the "
            f"kernel needs a power of two from {SMALLEST_RIGHT} to {LARGEST_RIGHT} on the right",
            cure="Use --rotate offline.",
        )
    left = np.ascontiguousarray(factors.left().T, dtype=np.float32)
    if factors.construction == "block":
        left *= np.float32(np.sqrt(factors.core))
    return OnlineHadamard(factors.left_order, factors.right_order, left)


def _codes(v: np.ndarray, scale: float, bits: int) -> np.ndarray:
    step = torch.tensor(scale, dtype=torch.float32)
    return quantizer.quantize(torch.from_numpy(np.ascontiguousarray(v)), step, bits).numpy().astype(np.int8)


def _stored(codes: np.ndarray, codes_type: Type) -> np.ndarray:
    return pack_rows(codes) if codes_type is Type.S4 else codes
