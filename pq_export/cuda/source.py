"""What a GPU needs of a quantized decoder, whatever file it came from (:mod:`pq_export.cuda.readers`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder, as in :class:`pq_export.decoder.DecoderConfig`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float


@dataclass(frozen=True)
class Source:
    """One decoder's integers and constants on the host.

    ``floats``: parameters that are not quantized, by name: norms fp32 [hidden] or [D], embeddings fp16
    [vocab, hidden], key offsets fp32 [G, 1, D], prefix KV fp16 [G, p, D]. ``codes(linear)``: int8 [out, in];
    ``scale(linear)``: fp32 [out], s_x * s_w; ``bias(linear)``: fp32 [out] or None. ``weight_bits``, ``activation_bits``
    and ``kv_bits`` take ``layers.N.<linear>``, ``layers.N.<site>`` and ``layers.N.self_attn.key|value``.
    ``cos``, ``sin``: fp32 [positions, D / 2].
    """

    where: str
    sizes: Sizes
    floats: Mapping[str, np.ndarray]
    codes: Callable[[str], np.ndarray]
    scale: Callable[[str], np.ndarray]
    bias: Callable[[str], np.ndarray | None]
    weight_bits: Callable[[str], int]
    activation_bits: Callable[[str], int]
    kv_bits: Callable[[str], int]
    activation_scales: Mapping[str, float]
    kv_scales: Mapping[str, tuple[float, ...]]
    cos: np.ndarray
    sin: np.ndarray
    online: tuple[str, ...]
    prefix_length: int
