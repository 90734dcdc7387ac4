"""Packed weights: round trips, and the tensor-core instructions' own fragment maps, emulated lane by lane.

The maps are those of the PTX ISA manual, "Matrix Fragments for mma.m16n8k64 / mma.m16n8k32" and "Register Fragments
for wgmma.mma_async.m64k32". A lane's operand is what the kernels give it: the 16 bytes at lane * 16 of a tile.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pq_export.errors import PqExportError
from pq_export.plugins.abi import Layout
from pq_export.plugins.layouts import TILE_BYTES, pack, pack_rows, packed_bytes, padded_shape, unpack, unpack_rows
from pq_export.quantizer import code_range

LANES, TOKENS = 32, 8
SHAPES = st.tuples(st.integers(1, 70), st.integers(1, 200))


def codes_of(shape: tuple[int, int], bits: int, seed: int = 0) -> np.ndarray:
    low, high = code_range(bits)
    return np.random.default_rng(seed).integers(low, high + 1, shape).astype(np.int8)


@given(layout=st.sampled_from(Layout), shape=SHAPES, seed=st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_round_trip(layout: Layout, shape: tuple[int, int], seed: int) -> None:
    codes = codes_of(shape, layout.weight_bits, seed)
    packed = pack(codes, layout)
    assert packed.dtype == np.uint8 and packed.shape == (packed_bytes(layout, *shape),)
    back = unpack(packed, layout, *shape)
    assert back.dtype == np.int8 and back.flags.c_contiguous and (back == codes).all()


@given(layout=st.sampled_from(Layout), shape=SHAPES)
@settings(max_examples=60, deadline=None)
def test_padding_is_zeros(layout: Layout, shape: tuple[int, int]) -> None:
    """Every padded channel and column must add nothing, whatever activations are there."""
    whole = unpack(pack(codes_of(shape, layout.weight_bits), layout), layout, *padded_shape(*shape))
    assert not whole[shape[0] :].any() and not whole[:, shape[1] :].any()


@pytest.mark.parametrize("layout", Layout)
def test_input_need_not_be_contiguous_and_stays(layout: Layout) -> None:
    codes = codes_of((50, 90), layout.weight_bits)
    before = codes.copy()
    assert (pack(codes.T, layout) == pack(np.ascontiguousarray(codes.T), layout)).all()
    assert (codes == before).all()


def test_bytes_by_hand() -> None:
    """Code 1 at channel 9, column 43: lane g = 1, word r = 1 or 3, and each layout's own place of the column."""
    codes = np.zeros((16, 64), np.int8)
    codes[9, 43] = 1
    by_hand = {
        Layout.S4: ((1 * 4 + 1) * 16 + 3 * 4 + 1, 0x10),  # 43 = 32 + 8 * 1 + 3: lane t = 1, word 3, nibble 3
        Layout.S8: ((1 * 4 + 2) * 16 + 1 * 4 + 3, 0x10),  # 43 - 32 = 4 * 2 + 3: lane t = 2, word 1, byte 3, high
        Layout.W8: (TILE_BYTES + (1 * 4 + 2) * 16 + 1 * 4 + 3, 0x01),  # the second tile of 32 columns
    }
    for layout, (place, value) in by_hand.items():
        packed = pack(codes, layout)
        assert np.flatnonzero(packed).tolist() == [place] and packed[place] == value


@pytest.mark.parametrize("layout", Layout)
def test_codes_that_do_not_fit_are_refused(layout: Layout) -> None:
    for codes in (np.zeros((4, 4), np.int32), np.zeros(4, np.int8), np.zeros((0, 4), np.int8)):
        with pytest.raises(PqExportError, match="codes are int8"):
            pack(codes, layout)
    if layout.weight_bits == 4:
        with pytest.raises(PqExportError, match="do not fit 4 bits"):
            pack(np.full((4, 4), 8, np.int8), layout)
    with pytest.raises(PqExportError, match="bytes, not 17"):
        unpack(np.zeros(17, np.uint8), layout, 4, 4)


@given(
    codes=hnp.arrays(
        np.int8, st.tuples(st.integers(1, 9), st.integers(1, 20).map(lambda k: 2 * k)), elements=st.integers(-8, 7)
    )
)
@settings(max_examples=60, deadline=None)
def test_activation_rows_round_trip(codes: np.ndarray) -> None:
    packed = pack_rows(codes)
    assert packed.shape == (len(codes), codes.shape[1] // 2)
    assert (unpack_rows(packed, codes.shape[1]) == codes).all()
    assert ((packed & 0xF) == (codes[:, 0::2] & 0xF)).all()  # the lower k in the low nibble


def test_odd_activation_rows_are_refused() -> None:
    with pytest.raises(PqExportError, match="do not end at a byte"):
        pack_rows(np.zeros((2, 3), np.int8))


@pytest.mark.parametrize("layout", Layout)
def test_largest_shape_packs_in_seconds(layout: Layout) -> None:
    codes = np.zeros((28672, 8192), np.int8)
    started = time.perf_counter()
    assert pack(codes, layout).size == packed_bytes(layout, *codes.shape)
    assert time.perf_counter() - started < 20


# --- fragment maps ---------------------------------------------------------------------------------


def nibbles(words: np.ndarray) -> np.ndarray:
    """uint32 [...] -> the eight signed 4-bit elements of each [..., 8], lowest first."""
    values = (words[..., None] >> (4 * np.arange(8, dtype=np.uint32))) & 0xF
    return (values.astype(np.int64) ^ 8) - 8


def signed_bytes(words: np.ndarray) -> np.ndarray:
    """uint32 [...] -> the four int8 elements of each [..., 4], lowest first."""
    return np.ascontiguousarray(words[..., None]).view(np.int8).reshape(*words.shape, 4).astype(np.int64)


def mma(a: np.ndarray, b: np.ndarray, lane_columns: int) -> np.ndarray:
    """``mma.m16n8`` of A registers [32, 4, e] and B registers [32, 2, e] -> D [16, 8].

    A: register r of lane (g, t) holds row g + 8 (r % 2), columns t e + half (r / 2) onwards; B: register r holds
    column g, rows t e + half r onwards; half = 4 e. D register c: row g + 8 (c / 2), column 2 t + c % 2.
    """
    half = 4 * lane_columns
    wide_a, wide_b = np.zeros((16, 2 * half), np.int64), np.zeros((2 * half, TOKENS), np.int64)
    for lane in range(LANES):
        g, t = divmod(lane, 4)
        for r in range(4):
            first = t * lane_columns + half * (r // 2)
            wide_a[g + 8 * (r % 2), first : first + lane_columns] = a[lane, r]
        for r in range(2):
            first = t * lane_columns + half * r
            wide_b[first : first + lane_columns, g] = b[lane, r]
    product = wide_a @ wide_b
    d = np.zeros((LANES, 4), np.int64)
    for lane in range(LANES):
        g, t = divmod(lane, 4)
        d[lane] = [product[g + 8 * (c // 2), 2 * t + c % 2] for c in range(4)]
    return d


def written(d: np.ndarray) -> np.ndarray:
    """D registers [32, 4] -> [16 channels, 8 tokens], as a kernel's epilogue places them."""
    y = np.zeros((16, TOKENS), np.int64)
    for lane in range(LANES):
        g, t = divmod(lane, 4)
        for c in range(4):
            y[g + 8 * (c // 2), 2 * t + c % 2] = d[lane, c]
    return y


def lane_words(packed: np.ndarray, tile: int) -> np.ndarray:
    """A tile's 16-byte load a lane, as words [32, 4]."""
    return packed[tile * TILE_BYTES : (tile + 1) * TILE_BYTES].view(np.uint32).reshape(LANES, 4)


def token_words(rows: np.ndarray, first_byte: int) -> np.ndarray:
    """B registers [32, 2] from activation rows of bytes [8, K bytes]: 4 bytes of token g at 4 t, and 16 further."""
    b = np.zeros((LANES, 2), np.uint32)
    for lane in range(LANES):
        g, t = divmod(lane, 4)
        for r in range(2):
            start = first_byte + 4 * t + 16 * r
            b[lane, r] = rows[g, start : start + 4].copy().view(np.uint32)[0]
    return b


CASES = [(16, 64), (48, 192), (7, 96), (33, 32)]


@pytest.mark.parametrize("shape", CASES)
def test_mma_s4(shape: tuple[int, int]) -> None:
    codes, x = codes_of(shape, 4), codes_of((TOKENS, shape[1]), 4, seed=1)
    packed, (n, k) = pack(codes, Layout.S4), padded_shape(*shape)
    rows = pack_rows(np.pad(x, ((0, 0), (0, k - shape[1]))))
    for n0 in range(0, n, 16):
        d = np.zeros((LANES, 4), np.int64)
        for tile in range(k // 64):
            words = lane_words(packed, n0 // 16 * (k // 64) + tile)
            d += mma(nibbles(words), nibbles(token_words(rows, 32 * tile)), 8)
        expected = codes[n0 : n0 + 16].astype(np.int64) @ x.T
        assert (written(d)[: len(expected)] == expected).all()


@pytest.mark.parametrize("shape", CASES)
@pytest.mark.parametrize("activation_bits", [4, 8])
def test_two_mma_s8_of_unpacked_nibbles(shape: tuple[int, int], activation_bits: int) -> None:
    """``x << 4`` and ``x`` under 0xF0F0F0F0 are 16 times the operands of columns 0..31 and 32..63."""
    codes, x = codes_of(shape, 4), codes_of((TOKENS, shape[1]), activation_bits, seed=1)
    packed, (n, k) = pack(codes, Layout.S8), padded_shape(*shape)
    rows = np.pad(x, ((0, 0), (0, k - shape[1]))).view(np.uint8)
    for n0 in range(0, n, 16):
        d = np.zeros((LANES, 4), np.int64)
        for tile in range(k // 64):
            words = lane_words(packed, n0 // 16 * (k // 64) + tile)
            for step, operand in enumerate(((words << 4) & 0xF0F0F0F0, words & 0xF0F0F0F0)):
                d += mma(signed_bytes(operand), signed_bytes(token_words(rows, 64 * tile + 32 * step)), 4)
        assert not (d % 16).any()
        expected = codes[n0 : n0 + 16].astype(np.int64) @ x.T
        assert (written(d)[: len(expected)] >> 4 == expected).all()


@pytest.mark.parametrize("shape", CASES)
def test_mma_s8_of_8_bit_weights(shape: tuple[int, int]) -> None:
    codes, x = codes_of(shape, 8), codes_of((TOKENS, shape[1]), 8, seed=1)
    packed, (n, k) = pack(codes, Layout.W8), padded_shape(*shape)
    rows = np.pad(x, ((0, 0), (0, k - shape[1]))).view(np.uint8)
    for n0 in range(0, n, 16):
        d = np.zeros((LANES, 4), np.int64)
        for tile in range(k // 32):
            words = lane_words(packed, n0 // 16 * (k // 32) + tile)
            d += mma(signed_bytes(words), signed_bytes(token_words(rows, 32 * tile)), 4)
        expected = codes[n0 : n0 + 16].astype(np.int64) @ x.T
        assert (written(d)[: len(expected)] == expected).all()


@pytest.mark.parametrize("layout", [Layout.S8, Layout.W8])
def test_wgmma_register_operand(layout: Layout) -> None:
    """``wgmma.m64k32``: warp w of four holds rows 16 w + g + 8 (r % 2), columns 4 t + 16 (r / 2) + byte."""
    n, k = 128, 192
    codes, x = codes_of((n, k), layout.weight_bits), codes_of((24, k), 8, seed=1)
    packed, tiles = pack(codes, layout), k // (64 if layout is Layout.S8 else 32)
    for n0 in range(0, n, 64):
        y = np.zeros((64, len(x)), np.int64)
        for step in range(k // 32):
            a = np.zeros((64, 32), np.int64)
            for warp in range(4):
                if layout is Layout.S8:
                    words = lane_words(packed, (n0 // 16 + warp) * tiles + step // 2)
                    words = (words << 4 if step % 2 == 0 else words) & 0xF0F0F0F0
                else:
                    words = lane_words(packed, (n0 // 16 + warp) * tiles + step)
                elements = signed_bytes(words)
                for lane in range(LANES):
                    g, t = divmod(lane, 4)
                    for r in range(4):
                        column = 4 * t + 16 * (r // 2)
                        a[16 * warp + g + 8 * (r % 2), column : column + 4] = elements[lane, r]
            y += a @ x[:, 32 * step : 32 * step + 32].astype(np.int64).T
        expected = codes[n0 : n0 + 64].astype(np.int64) @ x.astype(np.int64).T
        assert (y == expected * (16 if layout is Layout.S8 else 1)).all()
