"""The search of clipping factors: its line search, its losses, and what it leaves in a block."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pq_export.calib.clip_search import (
    COARSE_FACTORS,
    KV_FACTORS,
    WEIGHT_FACTORS,
    LayerScales,
    StagedBlock,
    apply_layer,
    line_search,
    run_layer,
    search_layer,
    search_weight,
)
from pq_export.calib.outliers import compute_prefix_kv
from pq_export.calib.ranges import collect_ranges
from pq_export.calib.rewrites import rewrite
from pq_export.calibration import SITE_OF_LINEAR, SITES
from pq_export.decoder import Decoder, DecoderLayer, KVPair
from pq_export.precision import Precision
from pq_export.quantizer import code_range, fake_quantize, quantize, scale_from_max
from tests.conftest import VOCAB

# --- line_search -----------------------------------------------------------------------------------


@pytest.mark.parametrize("optimum", [1.0, 0.97, 0.9, 0.85, 0.675, 0.5, 0.31, 0.1])
def test_finds_the_minimum_of_a_convex_loss(optimum: float) -> None:
    found = line_search(lambda f: (f - optimum) ** 2)
    assert 0 < found <= 1
    assert abs(found - optimum) <= 0.026  # the finest step


def test_flat_loss_keeps_factor_1() -> None:
    assert line_search(lambda f: 3.0) == 1.0
    assert line_search(lambda f: 0.0) == 1.0
    assert line_search(lambda f: float("inf")) == 1.0


def test_loss_that_falls_to_the_end() -> None:
    found = line_search(lambda f: f)
    assert 0 < found <= min(COARSE_FACTORS)


def test_stops_after_two_worse_steps_in_a_row() -> None:
    seen: list[float] = []

    def loss(factor: float) -> float:
        seen.append(factor)
        return abs(factor - 0.8)

    assert line_search(loss) == pytest.approx(0.8)
    assert min(seen) == pytest.approx(0.6)


def test_one_worse_step_does_not_stop_it() -> None:
    bumps = {1.0: 5.0, 0.9: 4.0, 0.8: 4.5, 0.7: 1.0, 0.6: 2.0}
    assert line_search(lambda f: bumps.get(round(f, 3), 9.0)) == pytest.approx(0.7)


@given(levels=st.lists(st.integers(0, 3), min_size=41, max_size=41))
@settings(max_examples=200, deadline=None)
def test_result_is_the_largest_of_the_best_factors_tried(levels: list[int]) -> None:
    """Of equal losses the larger factor wins: ``levels`` is a step function with many ties."""
    tried: dict[float, int] = {}

    def loss(factor: float) -> float:
        tried[factor] = levels[round(factor * 40)]
        return float(tried[factor])

    found = line_search(loss)
    best = min(tried.values())
    assert found == max(f for f, value in tried.items() if value == best)


# --- search_weight ---------------------------------------------------------------------------------


def gram_loss(weight: Tensor, scale: Tensor, inputs: Tensor, bits: int) -> Tensor:
    """Output error per channel, straight from the definition: Σ over tokens of (x·w - x·ŵ)²."""
    difference = fake_quantize(weight, scale[:, None], bits) - weight
    return (inputs.double() @ difference.double().T).square().sum(0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("seed", range(4))
def test_weight_search_finds_the_best_factor_of_each_channel(seed: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(20, 24, generator=generator).sign() * torch.rand(20, 24, generator=generator) ** 4
    inputs = torch.randn(64, 24, generator=generator) * torch.rand(24, generator=generator) * 5
    scale, mean_factor = search_weight(weight, inputs.T @ inputs, bits)
    base = scale_from_max(weight.abs().amax(1), bits)
    grid = torch.stack([gram_loss(weight, base * f, inputs, bits) for f in WEIGHT_FACTORS])
    ours = gram_loss(weight, scale, inputs, bits)
    assert (ours <= grid[0] * (1 + 1e-6)).all()  # never worse than no clipping
    assert torch.allclose(ours, grid.amin(0), rtol=1e-3, atol=1e-8)
    if bits == 4:
        assert (ours < grid[0] * 0.99).any()  # and it does clip

    factors = scale / base
    nearest = (factors[:, None] - torch.tensor(WEIGHT_FACTORS)).abs().amin(1)
    assert nearest.max() < 1e-6  # one grid factor of the original maximum
    assert mean_factor == pytest.approx(factors.mean().item(), rel=1e-5)


def test_a_channel_of_zeros_gets_scale_1() -> None:
    weight = torch.tensor([[7.0, -3.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    scale, _ = search_weight(weight, torch.eye(4), 4)
    assert scale[1] == 1.0 and 0 < scale[0] <= 14 / 15


def test_weight_search_prefers_factor_1_among_equals() -> None:
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    scale, factor = search_weight(weight, torch.zeros(8, 8), 4)
    assert factor == 1.0 and torch.equal(scale, scale_from_max(weight.abs().amax(1), 4))


# --- blocks ----------------------------------------------------------------------------------------


@dataclass
class Block:
    layer: DecoderLayer
    x: Tensor
    rope: KVPair
    mask: Tensor
    ranges: dict[str, Tensor]
    decoder: Decoder

    def search(self, precision: Precision) -> tuple[LayerScales, Tensor, DecoderLayer]:
        """On a copy of the layer."""
        layer = copy.deepcopy(self.layer)
        found, output = search_layer(layer, self.x, self.rope, self.mask, self.ranges, precision)
        return found, output, layer


@pytest.fixture(params=["with prefix", "without prefix"])
def block(request: pytest.FixtureRequest, tiny_decoder: Decoder) -> Block:
    """Layer 0 of the rewritten tiny model on 4 crops of 20 tokens."""
    decoder = tiny_decoder
    rewrite(decoder, "online", 0)
    if request.param == "with prefix":
        decoder.set_prefix(compute_prefix_kv(decoder, (77, 1)))
    ids = torch.randint(3, VOCAB, (4, 20), generator=torch.Generator().manual_seed(0))
    ranges, _ = collect_ranges(decoder, ids)
    own = {name.removeprefix("layers.0."): r for name, r in ranges.items() if name.startswith("layers.0.")}
    rope, mask = decoder.context(torch.arange(20).expand(4, -1), torch.ones_like(ids), 0)
    return Block(decoder.layers[0], decoder.embed(ids), rope, mask, own, decoder)


@torch.no_grad()
def test_ranges_are_the_maxima_of_what_quantizers_see(block: Block) -> None:
    staged = StagedBlock(block.layer, block.rope, block.mask, 8)
    staged.run(block.x)
    for site in SITES:
        assert block.ranges[site].item() == pytest.approx(staged.seen[site].abs().max().item(), rel=1e-6)
    _, k, v = block.layer.self_attn.qkv(block.layer.input_layernorm(block.x), block.rope)
    for site, tensor in (("self_attn.key", k), ("self_attn.value", v)):
        assert block.ranges[site].shape == (2,)
        assert torch.allclose(block.ranges[site], tensor.abs().amax((0, 2, 3)), rtol=1e-6)


@torch.no_grad()
def test_staged_block_without_scales_is_the_layer(block: Block) -> None:
    expected, _ = block.layer(block.x, block.rope, block.mask, block.decoder.empty_past(4)[0])
    assert torch.equal(StagedBlock(block.layer, block.rope, block.mask, 4).run(block.x), expected)


@torch.no_grad()
def test_staged_block_uses_the_prefix(block: Block) -> None:
    staged = StagedBlock(block.layer, block.rope, block.mask, 4)
    with_prefix = staged.run(block.x)
    had = block.layer.self_attn.prefix_key is not None
    block.decoder.set_prefix(None)
    rope, mask = block.decoder.context(torch.arange(20).expand(4, -1), torch.ones(4, 20), 0)
    without = StagedBlock(block.layer, rope, mask, 4).run(block.x)
    assert torch.allclose(with_prefix, without, atol=1e-4) != had


@torch.no_grad()
@pytest.mark.parametrize("site", SITES)
def test_a_scale_quantizes_its_site_alone(block: Block, site: str) -> None:
    """Against hooks on the linears of a plain layer."""
    scale = scale_from_max(block.ranges[site], 4) * 0.7
    staged = StagedBlock(block.layer, block.rope, block.mask, 4)
    staged.scales[site] = scale
    hooks = [
        block.layer.get_submodule(name).register_forward_pre_hook(lambda m, a: (fake_quantize(a[0], scale, 4),))
        for name, own in SITE_OF_LINEAR.items()
        if own == site
    ]
    expected, _ = block.layer(block.x, block.rope, block.mask, block.decoder.empty_past(4)[0])
    for hook in hooks:
        hook.remove()
    plain, _ = block.layer(block.x, block.rope, block.mask, block.decoder.empty_past(4)[0])
    assert torch.equal(staged.run(block.x), expected)
    assert not torch.allclose(plain, expected, atol=1e-3)


PRECISIONS = [Precision(4, 4, 4), Precision(4, 8, 4), Precision(8, 8, 8), Precision(4, 16, 16), Precision(4, 16, 8)]


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_search_layer(block: Block, precision: Precision) -> None:
    found, output, layer = block.search(precision)
    assert np.isfinite(found.error) and 0 < found.error < 1
    assert torch.isfinite(output).all() and output.shape == block.x.shape

    quantized = precision.activation_bits < 16
    assert set(found.activation) == (set(SITES) if quantized else set())
    for site, scale in found.activation.items():
        assert scale.ndim == 0 and scale > 0 and torch.isfinite(scale)
        base = scale_from_max(block.ranges[site], precision.activation_bits)
        assert (scale / base).item() == pytest.approx(found.factors[site], rel=1e-6)
        assert 0 < found.factors[site] <= 1

    heads = {4: 2, 8: 1}.get(precision.kv_bits)
    assert set(found.kv) == ({"self_attn.key", "self_attn.value"} if heads else set())
    for site, scale in found.kv.items():
        assert scale.shape == (heads,)
        peak = block.ranges[site] if heads == 2 else block.ranges[site].max()[None]
        factors = scale / scale_from_max(peak, precision.kv_bits)
        assert (factors[:, None] - torch.tensor(KV_FACTORS)).abs().amin(1).max() < 1e-6

    assert set(found.weight) == set(found.codes) == set(SITE_OF_LINEAR)
    low, high = code_range(precision.weight_bits)
    for name, codes in found.codes.items():
        original = block.layer.get_submodule(name).weight
        assert codes.dtype == torch.int8 and codes.shape == original.shape
        assert low <= codes.min() and codes.max() <= high
        scale = found.weight[name]
        base = scale_from_max(original.abs().amax(1), precision.weight_bits)
        assert ((scale / base)[:, None] - torch.tensor(WEIGHT_FACTORS)).abs().amin(1).max() < 1e-6
        assert torch.equal(codes.float(), quantize(original, scale[:, None], precision.weight_bits))
        assert torch.equal(layer.get_submodule(name).weight, codes.float() * scale[:, None])


@torch.no_grad()
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_output_and_error_are_those_of_the_quantized_block(block: Block, precision: Precision) -> None:
    """Against a plain layer with hooks, not the code that searched."""
    found, output, layer = block.search(precision)
    for name, site in SITE_OF_LINEAR.items():
        if precision.activation_bits < 16:
            layer.get_submodule(name).register_forward_pre_hook(
                lambda m, a, s=found.activation[site]: (fake_quantize(a[0], s, precision.activation_bits),)
            )
    expected, (k, _) = layer(block.x, block.rope, block.mask, block.decoder.empty_past(4)[0])
    assert torch.equal(output, expected)
    if precision.kv_bits < 16:
        steps = k / found.kv["self_attn.key"].view(1, -1, 1, 1)
        assert torch.allclose(steps, steps.round(), atol=1e-4) and steps.round().unique().numel() > 4
    target, _ = block.layer(block.x, block.rope, block.mask, block.decoder.empty_past(4)[0])
    error = (output - target).square().sum() / (target - block.x).square().sum()
    assert found.error == pytest.approx(error.item(), rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_are_searched_with_the_inputs_of_their_linear(block: Block, bits: int) -> None:
    """Inputs taken by hooks from the floating-point layer; the best factor of each channel by trying all."""
    seen: dict[str, Tensor] = {}
    layer = copy.deepcopy(block.layer)
    for name in SITE_OF_LINEAR:
        layer.get_submodule(name).register_forward_pre_hook(
            lambda m, a, name=name: seen.update({name: a[0].flatten(0, -2)})
        )
    layer(block.x, block.rope, block.mask, block.decoder.empty_past(4)[0])
    found, _, _ = block.search(Precision(bits, 16, 16))
    unweighted = []
    for name in SITE_OF_LINEAR:
        weight = block.layer.get_submodule(name).weight
        base = scale_from_max(weight.abs().amax(1), bits)
        losses = torch.stack([gram_loss(weight, base * f, seen[name], bits) for f in WEIGHT_FACTORS])
        ours = gram_loss(weight, found.weight[name], seen[name], bits)
        assert torch.allclose(ours, losses.amin(0), rtol=1e-3), name
        plain = torch.stack([gram_loss(weight, base * f, torch.eye(weight.shape[1]), bits) for f in WEIGHT_FACTORS])
        unweighted.append((losses.argmin(0) != plain.argmin(0)).float().mean())
    if bits == 4:
        assert max(unweighted) > 0.1  # the inputs do make a difference


@torch.no_grad()
def test_keys_and_values_are_searched_with_the_prefix(block: Block) -> None:
    """Per head: the factor with the least error of the attention weights, and of the values."""
    found, _, _ = block.search(Precision(4, 16, 4))
    attention = block.layer.self_attn
    q, k, v = attention.qkv(block.layer.input_layernorm(block.x), block.rope)
    key_losses, value_losses = [], []
    for factor in KV_FACTORS:
        scale = {
            site: (scale_from_max(block.ranges[site], 4) * factor)[:, None, None]
            for site in ("self_attn.key", "self_attn.value")
        }
        weights = []
        for keys in (k, fake_quantize(k, scale["self_attn.key"], 4)):
            if attention.prefix_key is not None:
                keys = torch.cat((attention.prefix_key.expand(4, -1, -1, -1), keys), 2)
            # Query heads 0 and 1 share KV head 0, 2 and 3 share head 1.
            scores = torch.einsum("bhsd,bhtd->bhst", q.double(), keys.double().repeat_interleave(2, 1)) / 4.0
            hidden = torch.ones(20, 20, dtype=torch.bool).triu(1)
            scores[..., keys.shape[2] - 20 :].masked_fill_(hidden, -torch.inf)
            weights.append(scores.softmax(-1))
        error = (weights[1] - weights[0]).square().sum((0, 2, 3))
        key_losses.append(error.view(2, 2).sum(1))
        value_losses.append((fake_quantize(v, scale["self_attn.value"], 4) - v).square().sum((0, 2, 3)))
    for site, losses in (("self_attn.key", key_losses), ("self_attn.value", value_losses)):
        factors = found.kv[site] / scale_from_max(block.ranges[site], 4)
        chosen = (factors[:, None] - torch.tensor(KV_FACTORS)).abs().argmin(1)
        table = torch.stack(losses)
        ours = table.gather(0, chosen[None])[0]
        assert torch.allclose(ours, table.amin(0), rtol=1e-3), site


def test_more_bits_are_more_exact(block: Block) -> None:
    errors = [block.search(p)[0].error for p in (Precision(4, 4, 4), Precision(4, 8, 4), Precision(8, 8, 8))]
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < errors[0] / 20


@torch.no_grad()
def test_search_is_not_worse_than_no_clipping(block: Block) -> None:
    """All factors 1, the same place to put the quantizers."""
    precision = Precision(4, 4, 4)
    _, output, _ = block.search(precision)
    plain = LayerScales()
    for name in SITE_OF_LINEAR:
        weight = block.layer.get_submodule(name).weight
        plain.weight[name] = scale_from_max(weight.abs().amax(1), 4)
        plain.codes[name] = quantize(weight, plain.weight[name][:, None], 4).to(torch.int8)
    plain.activation = {site: scale_from_max(block.ranges[site], 4) for site in SITES}
    plain.kv = {site: scale_from_max(block.ranges[site], 4) for site in ("self_attn.key", "self_attn.value")}
    layer = copy.deepcopy(block.layer)
    apply_layer(layer, plain, precision)
    unclipped = run_layer(layer, block.x, block.rope, block.mask, plain, precision)
    target = StagedBlock(block.layer, block.rope, block.mask, 4).run(block.x)
    assert (output - target).square().mean() < (unclipped - target).square().mean()


@torch.no_grad()
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_earlier_results_give_the_same_block(block: Block, precision: Precision) -> None:
    found, output, searched = block.search(precision)
    layer = copy.deepcopy(block.layer)
    apply_layer(layer, found, precision)
    assert torch.equal(run_layer(layer, block.x, block.rope, block.mask, found, precision), output)
    for (name, ours), theirs in zip(layer.named_parameters(), searched.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
