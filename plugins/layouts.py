"""Packing: integer codes to the bytes that the kernels read, and back.

Weights lie in tiles of 16 output channels, in the order in which the lanes of a warp hold the A operand of the
tensor-core instruction (``csrc/pq_kernels.h``). In all three layouts a 32-bit word holds codes of one channel, and
its number inside a channel's row is ``(tile, half, t)``, t = lane % 4. So packing is two steps: codes into words,
then one transposition of words that all layouts share::

    rows      [N/16, r, g, tiles, half, t]   r = channel >= 8, g = channel % 8
    packed    [N/16, tiles, g, t, half, r]   16 bytes a lane (g, t), 512 bytes a tile
"""

from __future__ import annotations

import numpy as np

from pq_export.errors import PqExportError
from pq_export.plugins.abi import Layout
from pq_export.quantizer import code_range, pack_int4, unpack_int4

TILE_CHANNELS = 16
TILE_BYTES = 512
K_MULTIPLE = 64


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def padded_shape(channels: int, inner: int) -> tuple[int, int]:
    """(N, K) as packed: the next multiples of 16 and 64."""
    return round_up(channels, TILE_CHANNELS), round_up(inner, K_MULTIPLE)


def packed_bytes(layout: Layout, channels: int, inner: int) -> int:
    """Size of packed weights [channels, inner]."""
    n, k = padded_shape(channels, inner)
    return n * k * layout.weight_bits // 8


def pack(codes: np.ndarray, layout: Layout) -> np.ndarray:
    """Weight codes, int8 [N, K], any N and K -> uint8 [:func:`packed_bytes`]; the padding is zeros."""
    _check(codes, layout.weight_bits)
    channels, inner = codes.shape
    n, k = padded_shape(channels, inner)
    if (n, k) != codes.shape:
        codes = np.pad(codes, ((0, n - channels), (0, k - inner)))
    words = _to_bytes(np.ascontiguousarray(codes), layout).view(np.uint32).reshape(n // 16, 2, 8, -1, 2, 4)
    return words.transpose(0, 3, 2, 5, 4, 1).reshape(-1).view(np.uint8)


def unpack(packed: np.ndarray, layout: Layout, channels: int, inner: int) -> np.ndarray:
    """Inverse of :func:`pack` -> int8 [channels, inner]."""
    size = packed_bytes(layout, channels, inner)
    if packed.dtype.itemsize != 1 or packed.size != size:
        raise PqExportError(
            f"packed weights [{channels}, {inner}] in layout {layout.name} are {size} bytes, not {packed.nbytes}",
            cure="Give the shape that was packed.",
        )
    n, k = padded_shape(channels, inner)
    words = np.ascontiguousarray(packed).view(np.uint32).reshape(n // 16, -1, 8, 4, 2, 2)
    rows = np.ascontiguousarray(words.transpose(0, 5, 2, 1, 4, 3)).reshape(n, -1).view(np.uint8)
    return np.ascontiguousarray(_from_bytes(rows, layout, k)[:channels, :inner])


def _to_bytes(codes: np.ndarray, layout: Layout) -> np.ndarray:
    """int8 [N, K], contiguous -> uint8 [N, bytes of a row], still row by row."""
    rows = len(codes)
    if layout is Layout.W8:
        return codes.view(np.uint8)
    if layout is Layout.S4:
        return pack_rows(codes)
    # A byte holds what one lane needs for both k-steps of 32: column c low, column c + 32 high.
    steps = codes.view(np.uint8).reshape(rows, -1, 2, 32)
    return ((steps[:, :, 0] & 0xF) | (steps[:, :, 1] << 4)).reshape(rows, -1)


def _from_bytes(rows: np.ndarray, layout: Layout, inner: int) -> np.ndarray:
    """Inverse of :func:`_to_bytes` -> int8 [N, inner]."""
    if layout is Layout.W8:
        return rows.view(np.int8)
    if layout is Layout.S4:
        return unpack_rows(rows, inner)
    nibbles = np.stack((rows & 0xF, rows >> 4), axis=1).reshape(len(rows), 2, -1, 32)  # [N, step, tile, 32]
    return ((nibbles.view(np.int8) ^ 8) - 8).transpose(0, 2, 1, 3).reshape(len(rows), -1)


def pack_rows(codes: np.ndarray) -> np.ndarray:
    """Activation codes in -8..7, int8 [M, K] with K even -> uint8 [M, K / 2], the lower k in the low nibble."""
    _check(codes, 4)
    if codes.shape[1] % 2:
        raise PqExportError(f"rows of {codes.shape[1]} codes do not end at a byte", cure="Give an even K.")
    return pack_int4(codes).reshape(len(codes), -1)


def unpack_rows(packed: np.ndarray, inner: int) -> np.ndarray:
    """Inverse of :func:`pack_rows` -> int8 [M, inner]."""
    return unpack_int4(packed.view(np.uint8).reshape(-1), (len(packed), inner))


def _check(codes: np.ndarray, bits: int) -> None:
    if codes.dtype != np.int8 or codes.ndim != 2 or not codes.size:
        raise PqExportError(
            f"codes are int8 [rows, columns], not {codes.dtype} {list(codes.shape)}", cure="Give a filled 2-d array."
        )
    low, high = code_range(bits)
    if bits < 8 and (codes.min() < low or codes.max() > high):
        raise PqExportError(
            f"codes from {codes.min()} to {codes.max()} do not fit {bits} bits ({low}..{high})",
            cure="Quantize to these bits, or choose a layout of 8-bit weights.",
        )
