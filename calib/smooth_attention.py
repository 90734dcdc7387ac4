"""SmoothAttention: balance key channels before their cache is quantized, folded into Wq and Wk.

QServe (Lin et al., arXiv 2405.04532, section 4.2). Keys have a few channels far larger than the rest, and
one scale a head must span them. ``K Λ⁻¹`` and ``Q Λ`` give the same products; with
``λ_i = λ_{i+D/2} = max(max|K_i|, max|K_{i+D/2}|)^α`` the two channels that RoPE turns into each other
share a factor, so Λ commutes with it and moves in front, into the projections:

    q_proj, k_proj                  q_proj · Λ, k_proj · Λ⁻¹      (rows and biases, query heads by KV head)
    q_norm, k_norm (Qwen3)          q_norm · Λ, k_norm · Λ⁻¹      (one Λ for all heads: the norm has one gain)

Nothing is executed online: it stands in for R3 where that costs too much, and never beside it, for a
Hadamard behind it would mix what it has balanced.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pq_export.calib.checkpoint import full_logits, probe_ids
from pq_export.calib.observe import observe_sites
from pq_export.calib.rewrites import assert_unchanged
from pq_export.decoder import Attention, Decoder, RMSNorm
from pq_export.errors import PqExportError

# A channel counts as at least this share of its layer's largest: a dead one must not get an infinite weight.
MAXIMUM_FLOOR = 1e-4


@torch.no_grad()
def key_maxima(
    decoder: Decoder, crops: Tensor, batch: int = 4, progress: Callable[[int], None] = lambda done: None
) -> list[Tensor]:
    """max |K| [G, D] of every layer over ``crops`` [N, S], after RoPE, before any quantizer.

    The decoder's prefix stands in front, and its own keys do not count: they stay in FP16.
    """
    maxima: dict[str, Tensor] = {}

    def see(name: str, keys: Tensor) -> None:
        peak = keys.abs().amax((0, 2))
        maxima[name] = torch.maximum(maxima[name], peak) if name in maxima else peak

    observe_sites(decoder, crops, ("self_attn.key",), see, batch, progress)
    return [maxima[f"layers.{index}.self_attn.key"].cpu() for index in range(len(decoder.layers))]


@torch.no_grad()
def smooth_attention(decoder: Decoder, maxima: list[Tensor], alpha: float = 0.5) -> None:
    """Fold the factors of ``maxima`` (from :func:`key_maxima`) into the weights in place.

    ``alpha`` in [0, 1]: 0 changes nothing, 1 gives all pairs of a head the same maximum. The prefix's keys are
    divided too, so that the function stays what it was; compute the prefix KV again afterwards, for they
    are no longer FP16 values. Raises :class:`PqExportError` beside R3, for maxima that are not finite and if
    the logits change.
    """
    if not 0.0 <= alpha <= 1.0:
        raise PqExportError(f"alpha {alpha:g} is not between 0 and 1", where="SmoothAttention")
    for index, (layer, peak) in enumerate(zip(decoder.layers, maxima, strict=True)):
        rotations = (layer.self_attn.q_rotation, layer.self_attn.k_rotation)
        if not all(isinstance(rotation, nn.Identity) for rotation in rotations):
            raise PqExportError(
                "R3 rotates queries and keys after RoPE and would mix the channels that SmoothAttention balances",
                where=f"layer {index}",
                cure="Use one or the other.",
            )
        if not torch.isfinite(peak).all():
            raise PqExportError("the keys are not finite", where=f"layer {index}")
    ids = probe_ids(decoder.config.vocab_size).to(decoder.embed_tokens.weight.device)
    reference = full_logits(decoder, ids)
    for layer, peak in zip(decoder.layers, maxima, strict=True):
        _fold(layer.self_attn, peak.to(decoder.embed_tokens.weight.device).double(), alpha)
    assert_unchanged(full_logits(decoder, ids), reference, "SmoothAttention")


def smoothing_factors(maxima: Tensor, alpha: float) -> Tensor:
    """λ [G, D] of one layer's max |K| [G, D]: equal in each RoPE pair, geometric mean 1.

    The mean is the layer's, not the head's: heads are balanced too, which helps where they share one scale.
    """
    pairs = torch.maximum(*maxima.chunk(2, dim=-1))
    pairs = pairs.clamp_min(max(MAXIMUM_FLOOR * pairs.max().item(), torch.finfo(pairs.dtype).tiny)) ** alpha
    return (pairs / pairs.log().mean().exp()).repeat(1, 2)


def _fold(attention: Attention, maxima: Tensor, alpha: float) -> None:
    """Divide keys and multiply queries by the factors of ``maxima`` [G, D]."""
    if isinstance(attention.q_norm, RMSNorm) and isinstance(attention.k_norm, RMSNorm):
        factors = smoothing_factors(maxima.amax(0, keepdim=True), alpha)  # [1, D]
        _scale(attention.q_norm.weight, factors[0])
        _scale(attention.k_norm.weight, 1.0 / factors[0])
    else:
        factors = smoothing_factors(maxima, alpha)  # [G, D]
        repeats = attention.num_heads // attention.num_kv_heads
        of_queries = factors.repeat_interleave(repeats, 0).flatten()
        for linear, rows in ((attention.q_proj, of_queries), (attention.k_proj, 1.0 / factors.flatten())):
            _scale(linear.weight, rows[:, None])
            if linear.bias is not None:
                _scale(linear.bias, rows)
    if attention.prefix_key is not None:
        attention.prefix_key = (attention.prefix_key.double() / factors[:, None]).to(attention.prefix_key.dtype)


def _scale(parameter: Tensor, factors: Tensor) -> None:
    parameter.data = (parameter.double() * factors).to(parameter.dtype)
