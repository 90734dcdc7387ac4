"""The decoder: one floating-point definition that calibration, simulation and export share.

Llama-family transformers (RMSNorm, rotary embedding, grouped-query attention, SwiGLU) written out in
the order they run. It differs from Hugging Face's class in one way only: every place where the method
acts is a submodule that can be replaced.

====================================  =======================================================
submodule                             what replaces it
====================================  =======================================================
``*_proj`` (``nn.Linear``)            :class:`pq_export.simulate.QuantLinear`
``self_attn.{q,k}_rotation``          R3: Hadamard over head_dim, after RoPE
``mlp.down_rotation``                 R4: Hadamard over the intermediate size
``self_attn.{key,value}_quantizer``   static quantizer of the KV cache
``*_input_quantizer``                 quantizer of the input of qkv, o, gate/up or down, in calibration
====================================  =======================================================

A quantizer's name is its site's (:data:`pq_export.calibration.SITES`) with ``_quantizer`` behind it.

Shapes in comments: ``B`` batch, ``S`` new tokens, ``P`` past tokens, ``T = P + S``, ``p`` prefix tokens,
``H`` query heads, ``G`` KV heads, ``R = H / G``, ``D`` head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

KVPair = tuple[Tensor, Tensor]

# The exported graph carries this instead of -inf: a row that is masked everywhere must not become NaN.
MASKED = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and constants of one decoder, all that is needed to build it without its checkpoint.

    ``inv_freq`` holds the rotary inverse frequencies [D/2] after any context-extension scaling and
    ``rope_scaling`` the factor that YaRN-like schemes put on cos and sin. ``norm_bias`` (norms of the layers) and
    ``key_offset`` no checkpoint has: centering makes them (:mod:`pq_export.calib.center`).
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    inv_freq: tuple[float, ...]
    rope_scaling: float = 1.0
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_bias: bool = False
    key_offset: bool = False

    @property
    def centered(self) -> bool:
        """Whether there are offsets that no checkpoint has."""
        return self.norm_bias or self.key_offset

    def to_dict(self) -> dict[str, Any]:
        """All fields; those of centering only where it was done, for readers that know none."""
        fields = asdict(self)
        return fields if self.centered else {k: v for k, v in fields.items() if k not in ("norm_bias", "key_offset")}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> DecoderConfig:
        return cls(**{**fields, "inv_freq": tuple(fields["inv_freq"])})


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight [+ bias]`` over the last axis, in fp32."""

    def __init__(self, size: int, eps: float, bias: bool = False):
        super().__init__()
        self.eps = float(np.float32(eps))  # the number that a fp32 graph holds
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        x = x / torch.sqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight
        return x if self.bias is None else x + self.bias


class RotaryTable(nn.Module):
    """Rows of the cos and sin tables at ``position_ids`` [B, S] -> two of [B, 1, S, D/2].

    Tables, not Cos and Sin nodes: a table lookup is the same number on every runtime.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: DecoderConfig):
        super().__init__()
        inv_freq = torch.tensor(config.inv_freq, dtype=torch.float64)
        angle = torch.outer(torch.arange(config.max_position_embeddings, dtype=torch.float64), inv_freq)
        scaling = config.rope_scaling
        self.register_buffer("cos", (angle.cos() * scaling).float(), persistent=False)
        self.register_buffer("sin", (angle.sin() * scaling).float(), persistent=False)

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return F.embedding(position_ids, self.cos)[:, None], F.embedding(position_ids, self.sin)[:, None]


class Rotary(nn.Module):
    """Rotate the two halves of the last axis of ``x`` [B, heads, S, D] (the Hugging Face layout)."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class CacheAppend(nn.Module):
    """``past`` [B, G, P, D] followed by ``new`` [B, G, S, D] -> [B, G, T, D]."""

    def forward(self, past: Tensor, new: Tensor) -> Tensor:
        return torch.cat((past, new), dim=2)


class CausalMask(nn.Module):
    """Additive mask [B, 1, R·S, T]: 0 where a query may look, a huge negative number elsewhere.

    A query at index i of the new tokens sees keys 0..P+i whose ``attention_mask`` [B, T] is not 0. The
    S rows are repeated R = H / G times, once for each query head that shares a KV head: that is how
    :meth:`Attention.attend` stacks its queries.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.repeats = config.num_heads // config.num_kv_heads

    def forward(self, attention_mask: Tensor, new_len: int, total_len: int) -> Tensor:
        key = torch.arange(total_len, device=attention_mask.device)
        query = torch.arange(new_len, device=attention_mask.device) + (total_len - new_len)
        causal = key[None, :] <= query[:, None]  # [S, T]
        # index_select ties no symbolic sizes together; a slice would make the exporter specialise T.
        present = attention_mask.index_select(1, key)[:, None, None, :] != 0  # [B, 1, 1, T]
        mask = torch.where(causal & present, 0.0, MASKED)
        return mask.repeat(1, 1, self.repeats, 1) if self.repeats > 1 else mask


class Attention(nn.Module):
    """Grouped-query attention over ``prefix ‖ past ‖ new`` keys.

    The prefix (``set_prefix``) is never part of the returned cache: it belongs to the model, not to
    the sequence.
    """

    prefix_key: Tensor | None
    prefix_value: Tensor | None

    def __init__(self, config: DecoderConfig):
        super().__init__()
        c = config
        self.num_heads, self.num_kv_heads, self.head_dim = c.num_heads, c.num_kv_heads, c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=c.o_bias)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.q_rotary, self.k_rotary = Rotary(), Rotary()
        self.q_rotation: nn.Module = nn.Identity()
        self.k_rotation: nn.Module = nn.Identity()
        self.key_offset = nn.Parameter(torch.zeros(c.num_kv_heads, 1, c.head_dim)) if c.key_offset else None
        self.key_quantizer: nn.Module = nn.Identity()
        self.value_quantizer: nn.Module = nn.Identity()
        self.qkv_input_quantizer: nn.Module = nn.Identity()
        self.o_input_quantizer: nn.Module = nn.Identity()
        self.key_cache, self.value_cache = CacheAppend(), CacheAppend()
        self.scaling = float(np.float32(c.head_dim**-0.5))
        self.register_buffer("prefix_key", None, persistent=False)
        self.register_buffer("prefix_value", None, persistent=False)

    def qkv(self, x: Tensor, rope: KVPair) -> tuple[Tensor, Tensor, Tensor]:
        """Project, rotate and quantize ``x`` [B, S, hidden] -> q [B, H, S, D], k and v [B, G, S, D]."""
        b, x = x.shape[0], self.qkv_input_quantizer(x)
        q = self.q_norm(self.q_proj(x).view(b, -1, self.num_heads, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(b, -1, self.num_kv_heads, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(b, -1, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q = self.q_rotation(self.q_rotary(q, *rope))
        k = self.k_rotation(self.k_rotary(k, *rope))
        if self.key_offset is not None:  # the same for all keys, the prefix's too: softmax does not see it
            k = k + self.key_offset
        return q, self.key_quantizer(k), self.value_quantizer(v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """softmax(q kᵀ / sqrt(D) + mask) v -> [B, S, H·D]; ``mask`` [B, 1, R·S, T].

        The R query heads that share a KV head are stacked along the sequence axis: keys and values are
        used where they lie, nothing is repeated, and no tensor has more than four axes.
        """
        weights = self.attention_weights(q, k, mask)
        b, h, _, d = q.shape
        return (weights @ v).reshape(b, h, -1, d).transpose(1, 2).reshape(b, -1, h * d)

    def attention_weights(self, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        """softmax(q kᵀ / sqrt(D) + mask) [B, G, R·S, T]."""
        stacked = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3]) * self.scaling
        return (stacked @ k.transpose(2, 3) + mask).softmax(-1)

    def with_prefix(self, k: Tensor, v: Tensor) -> KVPair:
        """Keys and values [B, G, T, D] behind the prefix's."""
        if self.prefix_key is None or self.prefix_value is None:
            return k, v
        key, value = (t.expand(len(k), -1, -1, -1) for t in (self.prefix_key, self.prefix_value))
        return torch.cat((key, k), dim=2), torch.cat((value, v), dim=2)

    def forward(self, x: Tensor, rope: KVPair, mask: Tensor, past: KVPair) -> tuple[Tensor, KVPair]:
        q, k, v = self.qkv(x, rope)
        present = self.key_cache(past[0], k), self.value_cache(past[1], v)
        k, v = self.with_prefix(*present)
        return self.o_proj(self.o_input_quantizer(self.attend(q, k, v, mask))), present


class MLP(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)
        self.down_rotation: nn.Module = nn.Identity()
        self.gate_up_input_quantizer: nn.Module = nn.Identity()
        self.down_input_quantizer: nn.Module = nn.Identity()

    def inner(self, x: Tensor) -> Tensor:
        """Input of down_proj, rotated but not quantized."""
        x = self.gate_up_input_quantizer(x)
        return self.down_rotation(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.down_input_quantizer(self.inner(x)))


class DecoderLayer(nn.Module):
    """Pre-norm block: ``x + attention(norm(x))``, then ``+ mlp(norm(·))``."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_bias)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: KVPair, mask: Tensor, past: KVPair) -> tuple[Tensor, KVPair]:
        attention, present = self.self_attn(self.input_layernorm(x), rope, mask, past)
        x = x + attention
        return x + self.mlp(self.post_attention_layernorm(x)), present


class Decoder(nn.Module):
    """The whole model. Parameter names are Hugging Face's without the leading ``model.``."""

    # nn.ModuleList is not generic: typed as one, its items would be bare Modules.
    layers: Sequence[DecoderLayer]

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary = RotaryTable(config)
        self.causal_mask = CausalMask(config)
        layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.layers = cast("Sequence[DecoderLayer]", layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def prefix_length(self) -> int:
        key = self.layers[0].self_attn.prefix_key
        return 0 if key is None else key.shape[2]

    def set_prefix(self, prefix: list[KVPair] | None) -> None:
        """Put a KV pair [1, G, p, D] in front of every layer's keys, or take it away with ``None``."""
        pairs: Sequence[KVPair | tuple[None, None]] = prefix or [(None, None)] * len(self.layers)
        for layer, pair in zip(self.layers, pairs, strict=True):
            layer.self_attn.prefix_key, layer.self_attn.prefix_value = pair

    def empty_past(self, batch: int) -> list[KVPair]:
        """A KV cache of length 0 for ``batch`` sequences."""
        c, like = self.config, self.embed_tokens.weight
        empty = like.new_zeros(batch, c.num_kv_heads, 0, c.head_dim)
        return [(empty, empty)] * len(self.layers)

    def context(self, position_ids: Tensor, attention_mask: Tensor, past_len: int) -> tuple[KVPair, Tensor]:
        """RoPE rows and additive mask for new tokens at ``position_ids`` [B, S] (prefix not counted).

        ``attention_mask`` [B, T] covers past and new tokens. The prefix moves positions by its length
        and adds columns that every query sees.
        """
        new_len, p = position_ids.shape[1], self.prefix_length
        mask = self.causal_mask(attention_mask, new_len, past_len + new_len)
        if p == 0:
            return self.rotary(position_ids), mask
        return self.rotary(position_ids + p), F.pad(mask, (p, 0), value=0.0)

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.embed_tokens(input_ids)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(self.norm(hidden))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[KVPair]
    ) -> tuple[Tensor, list[KVPair]]:
        """Logits [B, S, vocab] and the cache [B, G, T, D] a layer."""
        rope, mask = self.context(position_ids, attention_mask, past[0][0].shape[2])
        hidden, presents = self.embed(input_ids), []
        for layer, pair in zip(self.layers, past, strict=True):
            hidden, present = layer(hidden, rope, mask, pair)
            presents.append(present)
        return self.logits(hidden), presents
