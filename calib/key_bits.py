"""Bits of the keys, layer by layer: 4 where attention survives it, 8 where it does not.

Biases of Qwen2's k_proj make the keys of some layers so uneven that 4 bits leave nothing of them (PrefixQuant
issue 30: perplexity 2e5, and 8.07 with 16-bit keys). What counts is what attention does with the keys, so
that is measured: the total variation between attention weights with and without 4-bit keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pq_export.calib.clip_search import KV_FACTORS
from pq_export.decoder import Decoder, DecoderLayer, KVPair
from pq_export.quantizer import fake_quantize, scale_from_max

KEY_SITE = "self_attn.key"


@dataclass(frozen=True)
class KeyBitsOptions:
    """A layer's keys get 8 bits if attention of some head moves by more than ``threshold`` of its mass, mean over
    queries. 0.5 is half of what attention looks at.
    """

    threshold: float = 0.25

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold <= 1.0:
            raise ValueError(f"threshold must be between 0 and 1, not {self.threshold}")


@torch.no_grad()
def choose_key_bits(
    decoder: Decoder,
    crops: Tensor,
    ranges: dict[str, Tensor],
    options: KeyBitsOptions,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[dict[str, int], list[float]]:
    """Overrides ``layers.N.self_attn.key`` -> 8, and the total variation of every layer's worst KV head.

    ``decoder`` in floating point with its prefix, ``crops`` [N, S], for a precision with a 4-bit cache.
    """
    ids = crops.to(decoder.embed_tokens.weight.device)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    rope, mask = decoder.context(positions, torch.ones_like(positions), 0)
    x, past, moved = decoder.embed(ids), decoder.empty_past(len(ids)), []
    for index, layer in enumerate(decoder.layers):
        moved.append(attention_moved(layer, x, rope, mask, ranges[f"layers.{index}.{KEY_SITE}"]).max().item())
        x = layer(x, rope, mask, past[index])[0]
        progress(1)
    names = [f"layers.{i}.{KEY_SITE}" for i, tv in enumerate(moved) if not tv <= options.threshold]
    return dict.fromkeys(names, 8), moved


def attention_moved(layer: DecoderLayer, x: Tensor, rope: KVPair, mask: Tensor, peak: Tensor) -> Tensor:
    """Total variation [G] of attention under 4-bit keys at each head's best clipping factor; ``x`` [N, S, hidden]."""
    attention = layer.self_attn
    q, k, v = attention.qkv(layer.input_layernorm(x), rope)
    keys, _ = attention.with_prefix(k, v)
    prefix = keys[:, :, : keys.shape[2] - k.shape[2]]
    reference = attention.attention_weights(q, keys, mask)
    base = scale_from_max(peak.to(x.device), 4)
    best = torch.full_like(base, torch.inf)
    for factor in KV_FACTORS:
        quantized = fake_quantize(k, (base * factor)[:, None, None], 4)
        weights = attention.attention_weights(q, torch.cat((prefix, quantized), 2), mask)
        best = torch.minimum(best, 0.5 * (weights - reference).abs().sum(-1).mean((0, 2)))
    return best
