"""Smoothing: what is folded leaves the function as it is, values and their prefix included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pq_export.calib.checkpoint import full_logits, load_checkpoint
from pq_export.calib.observe import channel_peaks
from pq_export.calib.outliers import compute_prefix_kv
from pq_export.calib.rewrites import rewrite
from pq_export.calib.smooth import O_SITE, SMOOTHABLE, SmoothOptions, find_smoothing, fold_smoothing
from pq_export.precision import Precision
from tests.tiny_blocks import random_ids

PREFIX = (77, 8)


@pytest.mark.parametrize("family", ["llama", "llama-bias", "qwen2", "qwen3"])
def test_logits_stay_and_the_prefix_moves_with_the_values(checkpoint_dir: Callable[[str], Path], family: str) -> None:
    decoder, ids = load_checkpoint(str(checkpoint_dir(family))).decoder, random_ids(6, 24)
    rewrite(decoder, "offline", seed=0)
    with torch.no_grad():
        decoder.set_prefix(compute_prefix_kv(decoder, PREFIX))
    before = full_logits(decoder, ids)
    old = [layer.self_attn.prefix_value for layer in decoder.layers]
    peaks = channel_peaks(decoder, ids, SMOOTHABLE)
    factors = find_smoothing(decoder, ids, Precision(8, 8, 8), peaks, SmoothOptions(alphas=(0.5, 1.0)))
    assert {name.split(".", 2)[2] for name in factors} == set(SMOOTHABLE)
    fold_smoothing(decoder, factors)
    assert torch.allclose(full_logits(decoder, ids), before, atol=2e-4 * before.abs().max().item())
    moved = [layer.self_attn.prefix_value for layer in decoder.layers]
    assert any(not torch.allclose(a, b, atol=0.01) for a, b in zip(old, moved, strict=True))
    with torch.no_grad():
        anew = compute_prefix_kv(decoder, PREFIX)
    for value, (_, other) in zip(moved, anew, strict=True):
        assert torch.allclose(value, other, rtol=2e-3, atol=2e-3)  # FP16


def test_query_heads_of_a_kv_head_share_their_factors(checkpoint_dir: Callable[[str], Path]) -> None:
    decoder = load_checkpoint(str(checkpoint_dir("llama"))).decoder
    options = SmoothOptions(sites=(O_SITE,), alphas=(0.7,))
    ids = random_ids(6, 24)
    factors = find_smoothing(decoder, ids, Precision(8, 8, 8), channel_peaks(decoder, ids, (O_SITE,)), options)
    assert factors
    for s in factors.values():
        heads = s.view(decoder.config.num_kv_heads, -1, decoder.config.head_dim)
        assert heads.shape[1] == 2 and torch.equal(heads[:, 0], heads[:, 1])
        assert not torch.allclose(heads[0, 0], heads[1, 0], rtol=1e-2)


def test_a_peak_beyond_what_is_judged_counts(checkpoint_dir: Callable[[str], Path]) -> None:
    """With all of its range in the activations' scale, each channel's factor is its peak, wherever it was seen."""
    decoder, ids = load_checkpoint(str(checkpoint_dir("llama"))).decoder, random_ids(6, 24)
    site, name = "mlp.gate_up_input", "layers.1.mlp.gate_up_input"
    peaks = channel_peaks(decoder, ids, (site,))
    options = SmoothOptions(sites=(site,), alphas=(1.0,))
    plain = find_smoothing(decoder, ids, Precision(8, 8, 8), peaks, options)[name]
    peaks[name][3] *= 4
    raised = find_smoothing(decoder, ids, Precision(8, 8, 8), peaks, options)[name]
    ratio = raised / plain
    assert ratio[3] / ratio[0] == pytest.approx(4.0, rel=1e-5) and torch.allclose(ratio[4:], ratio[:1], rtol=1e-5)


def test_options_that_are_wrong() -> None:
    with pytest.raises(ValueError, match="cannot be smoothed"):
        SmoothOptions(sites=("self_attn.key",))
    with pytest.raises(ValueError, match="tokens"):
        SmoothOptions(tokens=0)
