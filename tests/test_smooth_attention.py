"""SmoothAttention leaves the function as it is, balances key channels and survives RoPE, groups, biases and norms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pq_export.calib.checkpoint import full_logits, load_checkpoint
from pq_export.calib.outliers import compute_prefix_kv
from pq_export.calib.smooth_attention import key_maxima, smooth_attention, smoothing_factors
from pq_export.decoder import Decoder
from pq_export.errors import PqExportError
from pq_export.quantizer import fake_quantize, scale_from_max
from pq_export.simulate import insert_online_rotations
from tests.conftest import FAMILIES, VOCAB

CROPS = torch.randint(0, VOCAB, (6, 40), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def load(checkpoint_dir: Callable[[str], Path]) -> Callable[[str], Decoder]:
    return lambda family: load_checkpoint(str(checkpoint_dir(family))).decoder


@torch.no_grad()
def keys_and_queries(decoder: Decoder, layer: int = 0) -> tuple[Tensor, Tensor]:
    """Of the embeddings of CROPS in one layer; the prefix only moves positions."""
    block = decoder.layers[layer]
    positions = torch.arange(CROPS.shape[1]).expand_as(CROPS)
    rope, _ = decoder.context(positions, torch.ones_like(CROPS), 0)
    q, k, _ = block.self_attn.qkv(block.input_layernorm(decoder.embed(CROPS)), rope)
    return k, q


def enlarge_key_pair(decoder: Decoder, channel: int = 3, factor: float = 30.0) -> None:
    """Give one RoPE pair of KV head 1 large keys and its two query heads small ones, in layer 0: products stay."""
    attention = decoder.layers[0].self_attn
    pair = [channel, channel + attention.head_dim // 2]
    keys = attention.k_proj.weight.data.view(2, attention.head_dim, -1)
    queries = attention.q_proj.weight.data.view(4, attention.head_dim, -1)
    keys[1, pair] *= factor
    queries[2:, pair] /= factor


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay(load: Callable[[str], Decoder], family: str, alpha: float) -> None:
    decoder = load(family)
    decoder.set_prefix(compute_prefix_kv(decoder, (77, 8)))
    before, maxima, keys = full_logits(decoder, CROPS), key_maxima(decoder, CROPS), keys_and_queries(decoder)[0]
    smooth_attention(decoder, maxima, alpha)
    after = full_logits(decoder, CROPS)
    assert (after - before).abs().max() < 1e-4 * before.abs().max()
    assert (keys_and_queries(decoder)[0] / keys - 1).abs().amax(-1).median() > 0.05  # yet something was done


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_prefix_computed_again_is_the_divided_one(load: Callable[[str], Decoder], family: str) -> None:
    decoder = load(family)
    decoder.set_prefix(compute_prefix_kv(decoder, (77, 8)))
    smooth_attention(decoder, key_maxima(decoder, CROPS))
    divided = [layer.self_attn.prefix_key for layer in decoder.layers]
    for ours, (again, _) in zip(divided, compute_prefix_kv(decoder, (77, 8)), strict=True):
        torch.testing.assert_close(ours, again, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_keys_are_divided_and_queries_multiplied_by_the_factors(load: Callable[[str], Decoder], family: str) -> None:
    decoder = load(family)
    enlarge_key_pair(decoder)
    k, q = keys_and_queries(decoder)
    maxima = key_maxima(decoder, CROPS)
    assert maxima[0].shape == (2, decoder.config.head_dim)
    torch.testing.assert_close(maxima[0], k.abs().amax((0, 2)))
    smooth_attention(decoder, maxima)
    factors = smoothing_factors(maxima[0].double(), 0.5).float()
    smoothed_k, smoothed_q = keys_and_queries(decoder)
    torch.testing.assert_close(smoothed_k * factors[:, None], k, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(smoothed_q, q * factors.repeat_interleave(2, 0)[:, None], rtol=1e-4, atol=1e-4)


def test_one_factor_a_channel_where_keys_are_normed(load: Callable[[str], Decoder]) -> None:
    decoder = load("qwen3")
    gain = decoder.layers[0].self_attn.k_norm.weight.clone()
    k, _ = keys_and_queries(decoder)
    maxima = key_maxima(decoder, CROPS)
    smooth_attention(decoder, maxima)
    factors = smoothing_factors(maxima[0].amax(0, keepdim=True).double(), 0.5).float()
    torch.testing.assert_close(decoder.layers[0].self_attn.k_norm.weight, gain / factors[0])
    torch.testing.assert_close(keys_and_queries(decoder)[0] * factors[:, None], k, rtol=1e-4, atol=1e-4)


def test_factors() -> None:
    maxima = torch.tensor([[4.0, 1.0, 1.0, 16.0], [1.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    factors = smoothing_factors(maxima, 0.5)
    assert torch.equal(factors[:, :2], factors[:, 2:])  # pair-equal
    assert factors.log().mean().item() == pytest.approx(0, abs=1e-12)
    assert (factors[0, 1] / factors[0, 0]).item() == pytest.approx(2)  # sqrt(16 / 4)
    assert torch.isfinite(1 / factors).all()  # the dead pair too
    assert torch.equal(smoothing_factors(maxima, 0.0), torch.ones_like(maxima))
    torch.testing.assert_close(smoothing_factors(torch.zeros(2, 4), 0.5), torch.ones(2, 4))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_attention_survives_four_bit_keys_better(load: Callable[[str], Decoder], family: str) -> None:
    """What it is for: attention weights under 4-bit keys, in the head whose one pair is 30 times the others."""
    plain = load(family)
    enlarge_key_pair(plain)

    def error(decoder: Decoder) -> float:
        k, q = keys_and_queries(decoder)
        rounded = fake_quantize(k, scale_from_max(k.abs().amax((0, 2, 3)), 4)[:, None, None], 4)
        attention = decoder.layers[0].self_attn
        mask = torch.zeros(1, 1, q.shape[2] * 2, k.shape[2])
        weights = [attention.attention_weights(q, keys, mask) for keys in (rounded, k)]
        return (weights[0] - weights[1])[:, 1].square().mean().item()

    errors = [error(plain)]
    for alpha in (0.5, 1.0):
        smoothed = copy.deepcopy(plain)
        smooth_attention(smoothed, key_maxima(smoothed, CROPS), alpha)
        errors.append(error(smoothed))
    assert errors[1] < 0.7 * errors[0] and errors[2] < 0.05 * errors[0]


def test_r3_is_refused(load: Callable[[str], Decoder]) -> None:
    decoder = load("llama")
    maxima = key_maxima(decoder, CROPS)
    insert_online_rotations(decoder, ("R3",))
    with pytest.raises(PqExportError, match="layer 0: R3 rotates"):
        smooth_attention(decoder, maxima)


def test_bad_input_is_refused(load: Callable[[str], Decoder]) -> None:
    decoder = load("llama")
    maxima = key_maxima(decoder, CROPS)
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(PqExportError, match="not between 0 and 1"):
            smooth_attention(decoder, maxima, alpha)
    maxima[1][0, 0] = float("nan")
    with pytest.raises(PqExportError, match="layer 1: the keys are not finite"):
        smooth_attention(decoder, maxima)
