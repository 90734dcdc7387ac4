"""Attention with the Triton kernels: :class:`pq_export.cuda.eager.EagerAttention`, three launches a decode step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pq_export.cuda.cache import KVCache
from pq_export.cuda.eager import causal_attention
from pq_export.cuda.triton_kernels import CAN_OVERLAP, attend, combine, rope_store
from pq_export.cuda.weights import DecoderWeights, Site

MIN_DOT = 16  # the smallest side of a tensor-core product
BLOCK = 64  # tokens of the cache that a program takes at once
MAX_SPLITS = 32
PROGRAMS_PER_SM = 4


class FusedAttention:
    """The same methods; the results differ from eager ones by rounding.

    ``overlap``: start kernels before those ahead of them have ended (default: from sm_90 on, where Triton can).
    """

    def __init__(self, weights: DecoderWeights, cache: KVCache, overlap: bool | None = None):
        self.weights, self.cache = weights, cache
        able = (
            CAN_OVERLAP and weights.device.type == "cuda" and torch.cuda.get_device_capability(weights.device)[0] >= 9
        )
        overlap = able if overlap is None else overlap and able
        self._options: dict[str, Any] = {"OVERLAP": overlap, **({"launch_pdl": True} if overlap else {})}
        s = weights.sizes
        self._half = max(_power_of_two(s.head_dim // 2), MIN_DOT)
        self._splits = _splits(cache.batch * s.num_kv_heads, cache.capacity, weights.device)
        shape = (cache.batch, s.num_heads, self._splits)
        self._tops, self._totals = (torch.empty(shape, device=weights.device) for _ in range(2))
        self._sums = torch.empty(*shape, s.head_dim, device=weights.device)

    def prefill(self, index: int, qkv: Tensor) -> Tensor:
        """As :meth:`EagerAttention.prefill`."""
        w, s = self.weights, self.weights.sizes
        batch, new, p = *qkv.shape[:2], w.prefix_length
        q = qkv.new_empty(batch, p + new, s.num_heads, s.head_dim)  # SDPA's result lies as q does: a row a token
        k, v = (qkv.new_empty(batch, s.num_kv_heads, p + new, s.head_dim) for _ in range(2))
        self._rope_store(index, qkv, q, k, v)
        return causal_attention(q.transpose(1, 2), k, v, p)

    def step(self, index: int, qkv: Tensor, site: Site | None = None) -> Tensor:
        """As :meth:`EagerAttention.step`."""
        w, cache, s, layer = self.weights, self.cache, self.weights.sizes, self.weights.layers[index]
        batch = len(qkv)
        q = qkv.new_empty(batch, 1, s.num_heads, s.head_dim)
        self._rope_store(index, qkv[:, None], q, None, None)
        attend[(batch * s.num_kv_heads, self._splits)](
            q,
            cache.keys[index],
            cache.values[index],
            layer.prefix_key,
            layer.prefix_value,
            layer.key.scale,
            layer.value.scale,
            cache.length,
            self._sums,
            self._tops,
            self._totals,
            cache.capacity,
            s.head_dim**-0.5,
            H=s.num_heads,
            G=s.num_kv_heads,
            D=s.head_dim,
            HALF=self._half,
            ROWS=max(_power_of_two(s.num_heads // s.num_kv_heads), MIN_DOT),
            BLOCK=BLOCK,
            SPLITS=self._splits,
            PREFIX=w.prefix_length,
            PREFIX_BLOCK=max(_power_of_two(w.prefix_length), MIN_DOT),
            K_FORM=int(cache.key_formats[index]),
            V_FORM=int(cache.value_formats[index]),
            **self._options,
        )
        out = qkv.new_empty(batch, s.num_heads * s.head_dim, dtype=qkv.dtype if site is None else torch.int8)
        combine[(batch * s.num_heads,)](
            self._sums,
            self._tops,
            self._totals,
            out,
            1.0 if site is None else site.scale,
            D=s.head_dim,
            WIDTH=_power_of_two(s.head_dim),
            SPLITS=self._splits,
            BITS=0 if site is None else site.bits,
            **self._options,
        )
        return out

    def _rope_store(self, index: int, qkv: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None) -> None:
        """q [B, p + S or 1, H, D]; k and v [B, G, p + S, D] where their values are wanted, and then all p + S."""
        w, cache, s, layer = self.weights, self.cache, self.weights.sizes, self.weights.layers[index]
        batch, new = qkv.shape[:2]
        block = MIN_DOT if new == 1 else BLOCK
        unused: Any = q  # a pointer that no kernel follows
        rope_store[(s.num_heads + 2 * s.num_kv_heads, max(-(-batch * new // block), batch))](
            qkv,
            q,
            unused if k is None else k,
            unused if v is None else v,
            cache.keys[index],
            cache.values[index],
            layer.prefix_key,
            layer.prefix_value,
            w.cos,
            w.sin,
            cache.length,
            unused if w.r3 is None else w.r3,
            unused if layer.q_norm is None else layer.q_norm,
            unused if layer.k_norm is None else layer.k_norm,
            unused if layer.key_offset is None else layer.key_offset,
            layer.key.scale,
            layer.value.scale,
            batch * new,
            new,
            q.shape[1],
            q.shape[1] - new,
            cache.capacity,
            s.rms_norm_eps,
            w.r3_factor,
            H=s.num_heads,
            G=s.num_kv_heads,
            D=s.head_dim,
            HALF=self._half,
            BLOCK=block,
            PREFIX=w.prefix_length,
            R3=w.r3 is not None,
            QK_NORM=layer.q_norm is not None,
            OFFSET=layer.key_offset is not None,
            K_BITS=layer.key.bits,
            V_BITS=layer.value.bits,
            K_FORM=int(cache.key_formats[index]),
            V_FORM=int(cache.value_formats[index]),
            KEEP=k is not None,
            PREFIX_BLOCK=max(_power_of_two(w.prefix_length), MIN_DOT),
            **self._options,
        )


def _power_of_two(value: int) -> int:
    """The next power of two, at least 1."""
    return 1 << max(value - 1, 0).bit_length()


def _splits(groups: int, capacity: int, device: torch.device) -> int:
    """Shares of the context: enough programs for every SM to have some, none with less than a block."""
    sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    wanted = min(max(PROGRAMS_PER_SM * sms // groups, 1), MAX_SPLITS, max(capacity // BLOCK, 1))
    return 1 << (wanted.bit_length() - 1)
