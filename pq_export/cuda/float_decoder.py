"""The FP16 decoder that the benchmark compares with, as good as PyTorch makes it.

qkv and gate/up are one product each, the KV cache is static, attention is PyTorch's SDPA with whichever backend is
fastest here. The layer is one function, so that ``torch.compile`` compiles it once for all layers; it takes the sum of
the MLP before it as ``branch``, so that a compiled norm absorbs that addition too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pq_export.cuda.random_weights import ATTENTION_DEVIATION, BRANCH, SILU_DEVIATION, rotary_tables
from pq_export.cuda.source import Sizes


@dataclass(frozen=True)
class FloatLayer:
    """[N, K] each; gains [hidden]."""

    input_gain: Tensor
    qkv: Tensor
    o: Tensor
    post_gain: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True)
class FloatWeights:
    """Random weights of a decoder. ``cos``, ``sin``: [positions, D / 2]."""

    sizes: Sizes
    layers: list[FloatLayer]
    embed: Tensor
    final_gain: Tensor
    lm_head: Tensor
    cos: Tensor
    sin: Tensor

    @classmethod
    def random(
        cls, sizes: Sizes, positions: int = 16384, dtype: torch.dtype = torch.float16, device: str = "cuda"
    ) -> FloatWeights:
        s = sizes
        generator = torch.Generator(device).manual_seed(0)

        def normal(N: int, K: int, y_deviation: float = 1.0, x_deviation: float = 1.0) -> Tensor:
            values = torch.empty(N, K, dtype=dtype, device=device)
            return values.normal_(0, y_deviation / (x_deviation * math.sqrt(K)), generator=generator)

        ones = torch.ones(s.hidden_size, dtype=dtype, device=device)
        q, kv = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
        layers = [
            FloatLayer(
                ones,
                normal(q + 2 * kv, s.hidden_size),
                normal(s.hidden_size, q, BRANCH, ATTENTION_DEVIATION),
                ones,
                normal(2 * s.intermediate_size, s.hidden_size),
                normal(s.hidden_size, s.intermediate_size, BRANCH, SILU_DEVIATION),
            )
            for _ in range(s.num_layers)
        ]
        cos, sin = rotary_tables(s.head_dim, positions, device)
        embed, head = normal(s.vocab_size, s.hidden_size, math.sqrt(s.hidden_size)), normal(s.vocab_size, s.hidden_size)
        return cls(s, layers, embed, ones, head, cos.to(dtype), sin.to(dtype))


LayerFunction = Callable[..., tuple[Tensor, Tensor]]


class FloatDecoder:
    """``weights`` with a static cache. ``context``: tokens that a step finds in it.

    ``compiled``: layers and the logits through ``torch.compile``, full graph, static shapes.
    """

    def __init__(
        self, weights: FloatWeights, *, capacity: int, batch: int = 1, context: int = 0, compiled: bool = False
    ):
        s = weights.sizes
        self.weights, self.context = weights, context
        shape = (batch, s.num_kv_heads, capacity, s.head_dim)
        # Not zeros: a step of the benchmark reads a cache that no prefill filled.
        self.keys, self.values = (
            [torch.randn(shape, dtype=weights.embed.dtype, device=weights.embed.device) for _ in weights.layers]
            for _ in range(2)
        )
        self.position = torch.full((1,), context, dtype=torch.int64, device=weights.embed.device)
        self._layer: LayerFunction = _layer
        self._head: Callable[..., Tensor] = _head
        if compiled:
            self._layer = torch.compile(_layer, fullgraph=True, dynamic=False)
            self._head = torch.compile(_head, fullgraph=True, dynamic=False)

    def prefill(self, input_ids: Tensor) -> Tensor:
        """int64 [B, S] -> logits [B, vocab] of the last token."""
        new = input_ids.shape[1]
        return self._run(input_ids, slice(0, new), 0)

    def step(self, input_ids: Tensor) -> Tensor:
        """int64 [B] -> logits [B, vocab]; the token is the one behind ``context``."""
        return self._run(input_ids[:, None], slice(self.context, self.context + 1), self.context + 1)

    def _run(self, input_ids: Tensor, rows: slice, seen: int) -> Tensor:
        w = self.weights
        x, cos, sin = F.embedding(input_ids, w.embed), w.cos[rows], w.sin[rows]
        branch = torch.zeros_like(x)
        for layer, keys, values in zip(w.layers, self.keys, self.values, strict=True):
            x, branch = self._layer(
                x,
                branch,
                cos,
                sin,
                self.position,
                keys,
                values,
                layer.input_gain,
                layer.qkv,
                layer.o,
                layer.post_gain,
                layer.gate_up,
                layer.down,
                w.sizes.num_heads,
                w.sizes.num_kv_heads,
                w.sizes.rms_norm_eps,
                seen,
            )
        return self._head(x[:, -1], branch[:, -1], w.final_gain, w.lm_head, w.sizes.rms_norm_eps)


def _layer(
    x: Tensor,
    branch: Tensor,
    cos: Tensor,
    sin: Tensor,
    position: Tensor,
    keys: Tensor,
    values: Tensor,
    input_gain: Tensor,
    qkv_weight: Tensor,
    o_weight: Tensor,
    post_gain: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
    seen: int,
) -> tuple[Tensor, Tensor]:
    """x, branch [B, S, hidden] -> the residual stream and this layer's MLP, not yet added.

    ``seen`` 0: prefill, the cache's first S rows are written. Else one token, written to row ``position`` and
    attending to the first ``seen`` rows.
    """
    x = x + branch
    qkv = F.linear(F.rms_norm(x, (x.shape[-1],), input_gain, eps), qkv_weight)
    heads = qkv.view(*qkv.shape[:2], num_heads + 2 * num_kv_heads, -1).transpose(1, 2)
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    q, k = _rotary(q, cos, sin), _rotary(k, cos, sin)
    grouped = num_heads != num_kv_heads
    if seen:
        keys[:, :, position] = k
        values[:, :, position] = v
        mixed = F.scaled_dot_product_attention(q, keys[:, :, :seen], values[:, :, :seen], enable_gqa=grouped)
    else:
        keys[:, :, : k.shape[2]] = k
        values[:, :, : k.shape[2]] = v
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    x = x + F.linear(mixed.transpose(1, 2).flatten(2), o_weight)
    gate, up = F.linear(F.rms_norm(x, (x.shape[-1],), post_gain, eps), gate_up_weight).chunk(2, dim=-1)
    return x, F.linear(F.silu(gate) * up, down_weight)


def _head(x: Tensor, branch: Tensor, gain: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.linear(F.rms_norm(x + branch, (x.shape[-1],), gain, eps), weight).float()


def _rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
