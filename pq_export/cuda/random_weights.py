"""Decoders of real sizes with random weights, made on the GPU in packed form: what the benchmark runs.

Scales are such that activations keep their size from layer to layer and that the codes of activations and weights are
those of normal values: a GPU that is short of power multiplies zeros faster than numbers, and few bits that change
faster than many, so the codes must be as real ones are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pq_export.cuda.source import Sizes
from pq_export.cuda.weights import CacheQuantizer, DecoderWeights, Kernels, Layer, Linear, Norm, Site, hadamard_signs
from pq_export.plugins.layouts import packed_bytes
from pq_export.plugins.library import PackedWeights
from pq_export.plugins.reference import online_hadamard

SHAPES = {
    "llama-3-8b": Sizes(128256, 4096, 14336, 32, 32, 8, 128, 1e-5),
    "llama-3.2-1b": Sizes(128256, 2048, 8192, 16, 32, 8, 64, 1e-5),
    "llama-2-7b": Sizes(32000, 4096, 11008, 32, 32, 32, 128, 1e-5),
    "smollm2-135m": Sizes(49152, 576, 1536, 30, 9, 3, 64, 1e-5),
}
ROPE_THETA = 500000.0
BRANCH = 0.2  # size of what a layer adds to the residual stream of size 1
SPREAD = 3.0  # what the largest code stands for, in standard deviations
ATTENTION_DEVIATION, SILU_DEVIATION = 0.12, 0.6  # of attention over 2048 tokens, and of silu(gate) * up


@dataclass(frozen=True)
class Bits:
    """Of weights, activations and the KV cache."""

    weight: int = 4
    activation: int = 4
    kv: int = 4


def random_weights(
    sizes: Sizes,
    kernels: Kernels,
    *,
    bits: Bits | None = None,
    positions: int = 16384,
    prefix: int = 4,
    dtype: torch.dtype = torch.float16,
    device: str = "cuda",
) -> DecoderWeights:
    """Random packed weights of ``sizes``, with R3, R4 and a prefix of ``prefix`` tokens."""
    b, s = bits or Bits(), sizes
    layout = kernels.preferred_layout(b.weight, b.activation)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, deviation: float = 1.0) -> Tensor:
        values = torch.empty(shape, dtype=dtype, device=device)
        return values.normal_(0, deviation, generator=generator)

    def codes(size: int, deviation: float) -> Tensor:
        """``size`` bytes of weights, in any layout: all of them hold two's complement."""
        bound = 2 ** (b.weight - 1)
        values = normal(size * 8 // b.weight, deviation=deviation).round_().clamp_(-bound, bound - 1).to(torch.int8)
        if b.weight == 8:
            return values.view(torch.uint8)
        low, high = values.view(torch.uint8).view(2, -1)
        return (low & 15) | (high << 4)

    def linear(K: int, N: int, x_deviation: float, y_deviation: float) -> Linear:
        x_scale = SPREAD * x_deviation / 2 ** (b.activation - 1)
        w_deviation = 2 ** (b.weight - 1) / SPREAD
        w_scale = y_deviation / (x_deviation * w_deviation * math.sqrt(K))
        data = codes(packed_bytes(layout, N, K), w_deviation)
        scale = torch.full((N,), x_scale * w_scale, dtype=torch.float32, device=device)
        return Linear(Site(x_scale, b.activation, layout.x_type), PackedWeights(data, scale, None, layout, N, K))

    def cache() -> CacheQuantizer:
        return CacheQuantizer(b.kv, torch.full((s.num_kv_heads,), SPREAD / 2 ** (b.kv - 1), device=device))

    q, kv = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
    norm = Norm(None, None)
    layers = [
        Layer(
            input_norm=norm,
            qkv=linear(s.hidden_size, q + 2 * kv, 1.0, 1.0),
            q_norm=None,
            k_norm=None,
            key_offset=None,
            key=cache(),
            value=cache(),
            prefix_key=normal(s.num_kv_heads, prefix, s.head_dim),
            prefix_value=normal(s.num_kv_heads, prefix, s.head_dim),
            o=linear(q, s.hidden_size, ATTENTION_DEVIATION, BRANCH),
            post_norm=norm,
            gate_up=linear(s.hidden_size, 2 * s.intermediate_size, 1.0, 1.0),
            down=linear(s.intermediate_size, s.hidden_size, SILU_DEVIATION, BRANCH),
        )
        for _ in range(s.num_layers)
    ]
    signs, factor = hadamard_signs(s.head_dim)
    cos, sin = rotary_tables(s.head_dim, positions + prefix, device)
    return DecoderWeights(
        sizes=s,
        layers=layers,
        embed=normal(s.vocab_size, s.hidden_size),
        final_norm=torch.ones(s.hidden_size, device=device),
        lm_head=normal(s.vocab_size, s.hidden_size, deviation=s.hidden_size**-0.5),
        cos=cos,
        sin=sin,
        r3=torch.from_numpy(signs).to(device=device, dtype=dtype),
        r3_factor=factor,
        r4_left=torch.from_numpy(online_hadamard(s.intermediate_size).left).to(device),
        prefix_length=prefix,
    )


def rotary_tables(head_dim: int, positions: int, device: str) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [positions, D / 2]."""
    inv_freq = ROPE_THETA ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    angle = torch.outer(torch.arange(positions, dtype=torch.float64, device=device), inv_freq)
    return angle.cos().float(), angle.sin().float()


def without_input_scales(weights: DecoderWeights) -> DecoderWeights:
    """The same packed bytes with scales s_w instead of s_x * s_w, for a decoder that measures s_x for each row."""

    def bare(linear: Linear) -> Linear:
        return replace(linear, weights=replace(linear.weights, scale=linear.weights.scale / linear.site.scale))

    layers = [
        replace(x, qkv=bare(x.qkv), o=bare(x.o), gate_up=bare(x.gate_up), down=bare(x.down)) for x in weights.layers
    ]
    return replace(weights, layers=layers)
