"""Three Triton kernels between the qkv product and o_proj. :mod:`pq_export.cuda.fused` launches them.

A head's D values are held as two halves, the pairs that RoPE turns and that a byte of a packed cache holds. Products
take codes themselves (exact in every floating type); their scale multiplies the sum.
"""
# Compiled by Triton, not typed Python.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # an older Triton: kernels start one after the other
    gdc_launch_dependents = gdc_wait = None

PACKED, BYTES, FLOAT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # pq_export.cuda.cache.Format
# Adding and taking away 1.5 * 2^23 rounds an fp32 number below 2^22 to an integer, half to even.
ROUNDER = tl.constexpr(12582912.0)
LOG2_E = tl.constexpr(1.4426950408889634)
NOTHING = tl.constexpr(-1e30)  # below every score, and finite: -inf minus -inf would be NaN


CAN_OVERLAP = gdc_wait is not None


@triton.jit
def _start(OVERLAP: tl.constexpr):
    """Programmatic dependent launch, by the rules of plugins/csrc/overlap.cuh: nothing is read or written before.

    The next kernel may start at once and fetch its weights; every program of this one waits for those ahead of it.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def _codes(x, scale, BITS: tl.constexpr):
    """clamp(round(x / scale)) in fp32; a true division, as everywhere. Clamping first gives the same integers."""
    TOP: tl.constexpr = 2 ** (BITS - 1)
    steps = tl.minimum(tl.maximum(tl.div_rn(x, scale), -1.0 * TOP), TOP - 1.0)
    return (steps + ROUNDER) - ROUNDER


@triton.jit
def _store_new(
    low, high, cache, values, scale, cache_row, value_row, d, mask, D: tl.constexpr, BITS: tl.constexpr,
    FORM: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Both halves of new keys or values into the cache and, for prefill, their values as the cache holds them."""
    DH: tl.constexpr = D // 2
    if FORM == FLOAT:
        low, high = low.to(cache.dtype.element_ty).to(tl.float32), high.to(cache.dtype.element_ty).to(tl.float32)
    else:
        low, high = _codes(low, scale, BITS), _codes(high, scale, BITS)
    if FORM == PACKED:
        both = (low.to(tl.int32) & 15) | ((high.to(tl.int32) & 15) << 4)
        tl.store(cache + cache_row[:, None] * DH + d[None, :], both.to(tl.uint8), mask=mask)
    else:
        at = cache + cache_row[:, None] * D + d[None, :]
        tl.store(at, low.to(cache.dtype.element_ty), mask=mask)
        tl.store(at + DH, high.to(cache.dtype.element_ty), mask=mask)
    if KEEP:
        at = values + value_row[:, None] * D + d[None, :]
        tl.store(at, (low * scale).to(values.dtype.element_ty), mask=mask)
        tl.store(at + DH, (high * scale).to(values.dtype.element_ty), mask=mask)


@triton.jit
def _store_prefix(
    q_out, k_out, v_out, prefix_key, prefix_value, head, d, sequences, out_rows,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, PREFIX: tl.constexpr,
    PREFIX_BLOCK: tl.constexpr,
):  # fmt: skip
    """One head of the prefix in front of sequence program_id(1): keys or values, or zeros for its queries."""
    DH: tl.constexpr = D // 2
    t = tl.arange(0, PREFIX_BLOCK)
    sequence = (tl.program_id(1) + tl.zeros((PREFIX_BLOCK,), tl.int32)).to(tl.int64)
    mask = ((t < PREFIX) & (sequence < sequences))[:, None] & (d < DH)[None, :]
    if head < H:
        at = q_out + ((sequence * out_rows + t) * H + head)[:, None] * D + d[None, :]
        nothing = tl.zeros((PREFIX_BLOCK, HALF), q_out.dtype.element_ty)
        tl.store(at, nothing, mask=mask)
        tl.store(at + DH, nothing, mask=mask)
    elif head < H + G:
        g = head - H
        held = prefix_key + (g * PREFIX + t)[:, None] * D + d[None, :]
        at = k_out + ((sequence * G + g) * out_rows + t)[:, None] * D + d[None, :]
        tl.store(at, tl.load(held, mask=mask, other=0.0), mask=mask)
        tl.store(at + DH, tl.load(held + DH, mask=mask, other=0.0), mask=mask)
    else:
        g = head - H - G
        held = prefix_value + (g * PREFIX + t)[:, None] * D + d[None, :]
        at = v_out + ((sequence * G + g) * out_rows + t)[:, None] * D + d[None, :]
        tl.store(at, tl.load(held, mask=mask, other=0.0), mask=mask)
        tl.store(at + DH, tl.load(held + DH, mask=mask, other=0.0), mask=mask)


@triton.jit
def rope_store(
    qkv, q_out, k_out, v_out, k_cache, v_cache, prefix_key, prefix_value, cos, sin, length, r3, q_gain, k_gain,
    key_offset, k_scale, v_scale, tokens, seq, out_rows, out_start, capacity, eps, r3_factor,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    PREFIX: tl.constexpr, R3: tl.constexpr, QK_NORM: tl.constexpr, OFFSET: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_FORM: tl.constexpr, V_FORM: tl.constexpr, KEEP: tl.constexpr,
    PREFIX_BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One head of BLOCK tokens: norm, RoPE and R3 of a query or key; codes of a key or value into the cache.

    qkv [tokens, (H + 2 G) D], tokens = B * seq. q_out [B, out_rows, H, D] from row out_start on. Caches [B, G,
    capacity, D or D / 2] from row length[0] on. Where KEEP, k_out and v_out [B, G, out_rows, D] likewise, and in the
    rows before all three the prefix [G, p, D], zeros for q.
    """
    _start(OVERLAP)
    DH: tl.constexpr = D // 2
    head = tl.program_id(0)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, HALF)
    mask = (row < tokens)[:, None] & (d < DH)[None, :]
    batch, token = (row // seq).to(tl.int64), row % seq
    start = tl.load(length)
    if KEEP:  # noqa: SIM102  (decided when compiling)
        if PREFIX > 0:
            _store_prefix(
                q_out, k_out, v_out, prefix_key, prefix_value, head, d, tokens // seq, out_rows, H, G, D, HALF, PREFIX,
                PREFIX_BLOCK,
            )  # fmt: skip
    at = qkv + row.to(tl.int64)[:, None] * ((H + 2 * G) * D) + head * D + d[None, :]
    low = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(at + DH, mask=mask, other=0.0).to(tl.float32)
    if head < H + G:
        if QK_NORM:
            gain = q_gain + d
            if head >= H:
                gain = k_gain + d
            root = tl.sqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / D + eps)[:, None]
            low = low / root * tl.load(gain, mask=d < DH, other=0.0)[None, :]
            high = high / root * tl.load(gain + DH, mask=d < DH, other=0.0)[None, :]
        angle = (start + token + PREFIX)[:, None] * DH + d[None, :]
        c = tl.load(cos + angle, mask=mask, other=0.0)
        s = tl.load(sin + angle, mask=mask, other=0.0)
        first = low * c - high * s
        second = high * c + low * s
        if R3:
            kind = r3.dtype.element_ty
            inside = (d < DH)[:, None] & (d < DH)[None, :]
            block = r3 + d[:, None] * D + d[None, :]
            first, second = first.to(kind), second.to(kind)
            upper_left = tl.load(block, mask=inside, other=0.0)
            lower_left = tl.load(block + DH * D, mask=inside, other=0.0)
            low = tl.dot(first, upper_left, input_precision="ieee")
            low = tl.dot(second, lower_left, low, input_precision="ieee") * r3_factor
            upper_right = tl.load(block + DH, mask=inside, other=0.0)
            lower_right = tl.load(block + DH * D + DH, mask=inside, other=0.0)
            high = tl.dot(first, upper_right, input_precision="ieee")
            high = tl.dot(second, lower_right, high, input_precision="ieee") * r3_factor
        else:
            low, high = first, second
    if head < H:
        at = q_out + ((batch * out_rows + out_start + token) * H + head)[:, None] * D + d[None, :]
        tl.store(at, low.to(q_out.dtype.element_ty), mask=mask)
        tl.store(at + DH, high.to(q_out.dtype.element_ty), mask=mask)
    elif head < H + G:
        g = head - H
        if OFFSET:
            low += tl.load(key_offset + g * D + d, mask=d < DH, other=0.0)[None, :]
            high += tl.load(key_offset + g * D + DH + d, mask=d < DH, other=0.0)[None, :]
        held = (batch * G + g) * capacity + start + token
        kept = (batch * G + g) * out_rows + out_start + token
        _store_new(low, high, k_cache, k_out, tl.load(k_scale + g), held, kept, d, mask, D, K_BITS, K_FORM, KEEP)
    else:
        g = head - H - G
        held = (batch * G + g) * capacity + start + token
        kept = (batch * G + g) * out_rows + out_start + token
        _store_new(low, high, v_cache, v_out, tl.load(v_scale + g), held, kept, d, mask, D, V_BITS, V_FORM, KEEP)


@triton.jit
def _load_halves(cache, row, d, mask, kind: tl.constexpr, D: tl.constexpr, FORM: tl.constexpr):
    """Codes [tokens, HALF] of both halves, as numbers of type ``kind``."""
    DH: tl.constexpr = D // 2
    if FORM == PACKED:
        both = tl.load(cache + row[:, None] * DH + d[None, :], mask=mask, other=0).to(tl.int32)
        low = ((both & 15) ^ 8) - 8
        high = ((both >> 4) ^ 8) - 8
        return low.to(kind), high.to(kind)
    at = cache + row[:, None] * D + d[None, :]
    return tl.load(at, mask=mask, other=0).to(kind), tl.load(at + DH, mask=mask, other=0).to(kind)


@triton.jit
def _attended(
    q_low, q_high, k_low, k_high, v_low, v_high, seen, factor, top, total, low, high, kind: tl.constexpr
):  # fmt: skip
    """One step of the online softmax over a block of keys. Scores are in units of log2."""
    scores = tl.dot(q_low, tl.trans(k_low), input_precision="ieee")
    scores = tl.dot(q_high, tl.trans(k_high), scores, input_precision="ieee") * factor
    scores = tl.where(seen[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - new_top[:, None])
    fade = tl.exp2(top - new_top)
    total = total * fade + tl.sum(weights, 1)
    weights = weights.to(kind)
    low = tl.dot(weights, v_low, low * fade[:, None], input_precision="ieee")
    high = tl.dot(weights, v_high, high * fade[:, None], input_precision="ieee")
    return new_top, total, low, high


@triton.jit
def attend(
    q, k_cache, v_cache, prefix_key, prefix_value, k_scale, v_scale, length, sums, tops, totals, capacity, scaling,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, PREFIX: tl.constexpr, PREFIX_BLOCK: tl.constexpr,
    K_FORM: tl.constexpr, V_FORM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One share of the context for the query heads of one KV head: flash decoding, first half.

    q [B, H, D]; tokens 0..length[0] of the cache are seen, and the prefix [G, p, D], which share 0 takes. sums fp32
    [B, H, SPLITS, D], tops and totals fp32 [B, H, SPLITS]: a share without tokens leaves NOTHING, 0 and zeros.
    """
    _start(OVERLAP)
    DH: tl.constexpr = D // 2
    R: tl.constexpr = H // G
    kind = q.dtype.element_ty
    group, split = tl.program_id(0), tl.program_id(1)
    g = group % G
    r, d = tl.arange(0, ROWS), tl.arange(0, HALF)
    rows = (r < R)[:, None] & (d < DH)[None, :]
    query = group * R + r  # b * H + head
    at = q + query[:, None] * D + d[None, :]
    q_low = tl.load(at, mask=rows, other=0.0)
    q_high = tl.load(at + DH, mask=rows, other=0.0)
    key_scale, value_scale = tl.load(k_scale + g), tl.load(v_scale + g)
    count = tl.load(length) + 1
    share = tl.cdiv(tl.cdiv(count, SPLITS), BLOCK) * BLOCK
    begin = split * share
    end = tl.minimum(begin + share, count)

    top = tl.full((ROWS,), NOTHING, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    low = tl.zeros((ROWS, HALF), tl.float32)
    high = tl.zeros((ROWS, HALF), tl.float32)
    if PREFIX > 0:  # noqa: SIM102  (decided when compiling)
        if split == 0:
            t = tl.arange(0, PREFIX_BLOCK)
            mask = (t < PREFIX)[:, None] & (d < DH)[None, :]
            row = g * PREFIX + t
            k_low, k_high = _load_halves(prefix_key, row, d, mask, kind, D, FLOAT)
            v_low, v_high = _load_halves(prefix_value, row, d, mask, kind, D, FLOAT)
            top, total, low, high = _attended(
                q_low, q_high, k_low, k_high, v_low, v_high, t < PREFIX, scaling * LOG2_E, top, total, low, high, kind
            )
            low, high = low / value_scale, high / value_scale  # into the unit of the cache's codes
    first_row = group.to(tl.int64) * capacity
    for block in range(begin, end, BLOCK):
        t = block + tl.arange(0, BLOCK)
        seen = t < end
        mask = seen[:, None] & (d < DH)[None, :]
        k_low, k_high = _load_halves(k_cache, first_row + t, d, mask, kind, D, K_FORM)
        v_low, v_high = _load_halves(v_cache, first_row + t, d, mask, kind, D, V_FORM)
        top, total, low, high = _attended(
            q_low, q_high, k_low, k_high, v_low, v_high, seen, key_scale * scaling * LOG2_E, top, total, low, high, kind
        )
    at = sums + (query * SPLITS + split)[:, None] * D + d[None, :]
    tl.store(at, low * value_scale, mask=rows)
    tl.store(at + DH, high * value_scale, mask=rows)
    tl.store(tops + query * SPLITS + split, top, mask=r < R)
    tl.store(totals + query * SPLITS + split, total, mask=r < R)


@triton.jit
def combine(
    sums, tops, totals, out, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr, BITS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Flash decoding, second half, for one query head: out [B, H, D], its int8 codes where BITS is not 0."""
    _start(OVERLAP)
    query = tl.program_id(0)
    split, d = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    top = tl.load(tops + query * SPLITS + split)
    weight = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(tl.load(totals + query * SPLITS + split) * weight, 0)
    at = sums + (query * SPLITS + split)[:, None] * D + d[None, :]
    parts = tl.load(at, mask=(d < D)[None, :], other=0.0)
    result = tl.sum(parts * weight[:, None], 0) / total
    if BITS > 0:
        result = _codes(result, scale, BITS)
    tl.store(out + query * D + d, result.to(out.dtype.element_ty), mask=d < D)
