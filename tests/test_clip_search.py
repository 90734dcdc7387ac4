"""The search of clipping factors: its line search, its losses, and what it leaves in a block."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pq_export.calib.block import Block, LayerBits, LayerScales, install
from pq_export.calib.clip_search import (
    COARSE_FACTORS,
    KV_FACTORS,
    WEIGHT_FACTORS,
    ClipSearchOptions,
    clip_search,
    line_search,
    search_weight,
)
from pq_export.calib.fake_quant import StaticQuantizer, site_quantizer
from pq_export.calib.outliers import compute_prefix_kv
from pq_export.calib.ranges import collect_ranges
from pq_export.calib.rewrites import rewrite
from pq_export.calibration import KV_SITES, SITE_OF_LINEAR, SITES
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
class Subject:
    """Layer 0 of the tiny model in floating point, and what a search of it needs."""

    layer: DecoderLayer
    x: Tensor
    rope: KVPair
    mask: Tensor
    ranges: dict[str, Tensor]
    decoder: Decoder
    overrides: dict[str, int] = field(default_factory=dict)

    def block(self, precision: Precision, samples: int = 4, length: int = 20) -> Block:
        """Of a copy of the layer, on the first ``samples`` crops of ``length`` tokens."""
        positions = torch.arange(length)[None]
        context = self.decoder.context(positions, torch.ones_like(positions), 0)
        x, bits = self.x[:samples, :length], LayerBits.of(precision, self.overrides)
        return Block.of(0, copy.deepcopy(self.layer), context, x, x, bits, self.ranges)

    def search(
        self, precision: Precision, options: ClipSearchOptions | None = None
    ) -> tuple[LayerScales, Tensor, Block]:
        """On a copy of the layer: what was found, the quantized block's output and the block."""
        block = self.block(precision)
        clip_search(block, options or ClipSearchOptions(), 4, 20)
        block.found.error = block.measure_error()
        return block.found, block.staged().run(self.x), block

    def plain(self, layer: DecoderLayer) -> tuple[Tensor, KVPair]:
        """The forward pass of ``layer`` itself, and its keys and values."""
        with torch.no_grad():
            return layer(self.x, self.rope, self.mask, self.decoder.empty_past(4)[0])


@pytest.fixture(params=["with prefix", "without prefix"])
def subject(request: pytest.FixtureRequest, tiny_decoder: Decoder) -> Subject:
    """Layer 0 of the rewritten tiny model on 4 crops of 20 tokens."""
    decoder = tiny_decoder
    rewrite(decoder, "online", 0)
    if request.param == "with prefix":
        decoder.set_prefix(compute_prefix_kv(decoder, (77, 1)))
    ids = torch.randint(3, VOCAB, (4, 20), generator=torch.Generator().manual_seed(0))
    ranges, _ = collect_ranges(decoder, ids)
    own = {name.removeprefix("layers.0."): r for name, r in ranges.items() if name.startswith("layers.0.")}
    rope, mask = decoder.context(torch.arange(20).expand(4, -1), torch.ones_like(ids), 0)
    return Subject(decoder.layers[0], decoder.embed(ids).detach(), rope, mask, own, decoder)


@torch.no_grad()
def test_ranges_are_the_maxima_of_what_quantizers_see(subject: Subject) -> None:
    seen: dict[str, Tensor] = {}
    block = subject.block(Precision(4, 4, 4))
    for site in SITES:
        site_quantizer(block.layer, site).register_forward_pre_hook(lambda m, a, s=site: seen.update({s: a[0]}))
    block.staged().run(subject.x)
    for site in SITES:
        assert subject.ranges[site].item() == pytest.approx(seen[site].abs().max().item(), rel=1e-6)
    _, k, v = subject.layer.self_attn.qkv(subject.layer.input_layernorm(subject.x), subject.rope)
    for site, tensor in zip(KV_SITES, (k, v), strict=True):
        assert subject.ranges[site].shape == (2,)
        assert torch.allclose(subject.ranges[site], tensor.abs().amax((0, 2, 3)), rtol=1e-6)


def test_a_block_without_scales_is_the_layer(subject: Subject) -> None:
    expected, _ = subject.plain(subject.layer)
    block = subject.block(Precision(4, 4, 4))
    with torch.no_grad():
        assert torch.equal(block.staged().run(subject.x), expected)
        assert torch.equal(block.staged_reference().run(subject.x), expected)
    assert torch.equal(block.reference_y, expected)
    assert block.measure_error() == 0.0


@torch.no_grad()
def test_more_crops_than_run_at_once_give_the_same_output(subject: Subject) -> None:
    staged = subject.block(Precision(4, 4, 4)).staged()
    many = subject.x.repeat(5, 1, 1)  # 20 crops: two and a half times what runs at once
    assert torch.allclose(staged.run(many), staged.run(subject.x).repeat(5, 1, 1), atol=1e-5)


@torch.no_grad()
def test_a_block_uses_the_prefix(subject: Subject) -> None:
    with_prefix = subject.block(Precision(4, 4, 4)).staged().run(subject.x)
    had = subject.layer.self_attn.prefix_key is not None
    subject.decoder.set_prefix(None)
    without = subject.block(Precision(4, 4, 4)).staged().run(subject.x)
    assert torch.allclose(with_prefix, without, atol=1e-4) != had


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 7, 20])
def test_context_of_shorter_crops_is_that_of_the_decoder(subject: Subject, length: int) -> None:
    (cos, sin), mask = subject.block(Precision(4, 4, 4)).context(length)
    positions = torch.arange(length)[None]
    rope, expected = subject.decoder.context(positions, torch.ones_like(positions), 0)
    assert torch.equal(mask, expected)
    assert torch.equal(cos, rope[0]) and torch.equal(sin, rope[1])


@torch.no_grad()
@pytest.mark.parametrize("site", SITES)
def test_a_scale_quantizes_its_site_alone(subject: Subject, site: str) -> None:
    """Against hooks on the linears of a plain layer."""
    scale = scale_from_max(subject.ranges[site], 4) * 0.7
    block = subject.block(Precision(4, 4, 4))
    block.set_activation(site, scale)
    assert block.found.activation == {site: scale}
    hooks = [
        subject.layer.get_submodule(name).register_forward_pre_hook(lambda m, a: (fake_quantize(a[0], scale, 4),))
        for name, own in SITE_OF_LINEAR.items()
        if own == site
    ]
    expected, _ = subject.plain(subject.layer)
    for hook in hooks:
        hook.remove()
    plain, _ = subject.plain(subject.layer)
    assert torch.equal(block.staged().run(subject.x), expected)
    assert not torch.allclose(plain, expected, atol=1e-3)


PRECISIONS = [Precision(4, 4, 4), Precision(4, 8, 4), Precision(8, 8, 8), Precision(4, 16, 16), Precision(4, 16, 8)]


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_what_a_search_finds(subject: Subject, precision: Precision) -> None:
    found, output, block = subject.search(precision)
    assert np.isfinite(found.error) and 0 < found.error < 1
    assert torch.isfinite(output).all() and output.shape == subject.x.shape

    quantized = precision.activation_bits < 16
    assert set(found.activation) == (set(SITES) if quantized else set())
    for site, scale in found.activation.items():
        assert scale.ndim == 0 and scale > 0 and torch.isfinite(scale)
        base = scale_from_max(subject.ranges[site], precision.activation_bits)
        assert (scale / base).item() == pytest.approx(found.factors[site], rel=1e-6)
        assert 0 < found.factors[site] <= 1

    heads = {4: 2, 8: 1}.get(precision.kv_bits)
    assert set(found.kv) == ({"self_attn.key", "self_attn.value"} if heads else set())
    for site, scale in found.kv.items():
        assert scale.shape == (heads,)
        peak = subject.ranges[site] if heads == 2 else subject.ranges[site].max()[None]
        factors = scale / scale_from_max(peak, precision.kv_bits)
        assert (factors[:, None] - torch.tensor(KV_FACTORS)).abs().amin(1).max() < 1e-6

    assert set(found.weight) == set(found.codes) == set(SITE_OF_LINEAR)
    low, high = code_range(precision.weight_bits)
    for name, codes in found.codes.items():
        original = subject.layer.get_submodule(name).weight
        assert codes.dtype == torch.int8 and codes.shape == original.shape
        assert low <= codes.min() and codes.max() <= high
        scale = found.weight[name]
        base = scale_from_max(original.abs().amax(1), precision.weight_bits)
        assert ((scale / base)[:, None] - torch.tensor(WEIGHT_FACTORS)).abs().amin(1).max() < 1e-6
        assert torch.equal(codes.float(), quantize(original, scale[:, None], precision.weight_bits))
        assert torch.equal(block.layer.get_submodule(name).weight, codes.float() * scale[:, None])


@torch.no_grad()
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_output_and_error_are_those_of_the_quantized_block(subject: Subject, precision: Precision) -> None:
    """Against a plain layer with hooks, not the quantizers that searched."""
    found, output, block = subject.search(precision)
    layer = copy.deepcopy(subject.layer)
    for name, site in SITE_OF_LINEAR.items():
        layer.get_submodule(name).weight.data = block.layer.get_submodule(name).weight.data
        if precision.activation_bits < 16:
            layer.get_submodule(name).register_forward_pre_hook(
                lambda m, a, s=found.activation[site]: (fake_quantize(a[0], s, precision.activation_bits),)
            )
    for site in KV_SITES if precision.kv_bits < 16 else ():
        site_quantizer(layer, site).register_forward_hook(
            lambda m, a, out, s=found.kv[site]: fake_quantize(out, s[:, None, None], precision.kv_bits)
        )
    expected, (k, _) = subject.plain(layer)
    assert torch.equal(output, expected)
    if precision.kv_bits < 16:
        steps = k / found.kv["self_attn.key"].view(1, -1, 1, 1)
        assert torch.allclose(steps, steps.round(), atol=1e-4) and steps.round().unique().numel() > 4
    target, _ = subject.plain(subject.layer)
    error = (output - target).square().sum() / (target - subject.x).square().sum()
    assert found.error == pytest.approx(error.item(), rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_are_searched_with_the_inputs_of_their_linear(subject: Subject, bits: int) -> None:
    """Inputs taken by hooks from the floating-point layer; the best factor of each channel by trying all."""
    seen: dict[str, Tensor] = {}
    layer = copy.deepcopy(subject.layer)
    for name in SITE_OF_LINEAR:
        layer.get_submodule(name).register_forward_pre_hook(
            lambda m, a, name=name: seen.update({name: a[0].flatten(0, -2)})
        )
    subject.plain(layer)
    found, _, _ = subject.search(Precision(bits, 16, 16))
    unweighted = []
    for name in SITE_OF_LINEAR:
        weight = subject.layer.get_submodule(name).weight
        base = scale_from_max(weight.abs().amax(1), bits)
        losses = torch.stack([gram_loss(weight, base * f, seen[name], bits) for f in WEIGHT_FACTORS])
        ours = gram_loss(weight, found.weight[name], seen[name], bits)
        assert torch.allclose(ours, losses.amin(0), rtol=1e-3), name
        plain = torch.stack([gram_loss(weight, base * f, torch.eye(weight.shape[1]), bits) for f in WEIGHT_FACTORS])
        unweighted.append((losses.argmin(0) != plain.argmin(0)).float().mean())
    if bits == 4:
        assert max(unweighted) > 0.1  # the inputs do make a difference


@torch.no_grad()
def test_keys_and_values_are_searched_with_the_prefix(subject: Subject) -> None:
    """Per head: the factor with the least error of the attention weights, and of the values."""
    found, _, _ = subject.search(Precision(4, 16, 4))
    attention = subject.layer.self_attn
    q, k, v = attention.qkv(subject.layer.input_layernorm(subject.x), subject.rope)
    key_losses, value_losses = [], []
    for factor in KV_FACTORS:
        scale = {
            site: (scale_from_max(subject.ranges[site], 4) * factor)[:, None, None]
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
        factors = found.kv[site] / scale_from_max(subject.ranges[site], 4)
        chosen = (factors[:, None] - torch.tensor(KV_FACTORS)).abs().argmin(1)
        table = torch.stack(losses)
        ours = table.gather(0, chosen[None])[0]
        assert torch.allclose(ours, table.amin(0), rtol=1e-3), site


def test_more_bits_are_more_exact(subject: Subject) -> None:
    errors = [subject.search(p)[0].error for p in (Precision(4, 4, 4), Precision(4, 8, 4), Precision(8, 8, 8))]
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < errors[0] / 20


@torch.no_grad()
def test_search_is_not_worse_than_no_clipping(subject: Subject) -> None:
    """All factors 1, the same place to put the quantizers."""
    precision = Precision(4, 4, 4)
    _, output, _ = subject.search(precision)
    plain = LayerScales()
    for name in SITE_OF_LINEAR:
        weight = subject.layer.get_submodule(name).weight
        plain.weight[name] = scale_from_max(weight.abs().amax(1), 4)
        plain.codes[name] = quantize(weight, plain.weight[name][:, None], 4).to(torch.int8)
    plain.activation = {site: scale_from_max(subject.ranges[site], 4) for site in SITES}
    plain.kv = {site: scale_from_max(subject.ranges[site], 4) for site in ("self_attn.key", "self_attn.value")}
    unclipped = subject.block(precision)
    install(unclipped.layer, plain, unclipped.bits)
    target, _ = subject.plain(subject.layer)
    y = unclipped.staged().run(subject.x)
    assert (output - target).square().mean() < (y - target).square().mean()


@torch.no_grad()
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_earlier_results_give_the_same_block(subject: Subject, precision: Precision) -> None:
    found, output, searched = subject.search(precision)
    again = subject.block(precision)
    install(again.layer, found, again.bits)
    assert torch.equal(again.staged().run(subject.x), output)
    for (name, ours), theirs in zip(again.layer.named_parameters(), searched.layer.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@torch.no_grad()
def test_the_search_uses_the_crops_it_is_given_and_no_more(subject: Subject) -> None:
    """Like a search on a block that has nothing else."""
    precision = Precision(4, 4, 4)
    longer, shorter = subject.block(precision), subject.block(precision, samples=3, length=12)
    clip_search(longer, ClipSearchOptions(), samples=3, length=12)
    clip_search(shorter, ClipSearchOptions(), samples=3, length=12)
    assert longer.found.factors == shorter.found.factors
    assert longer.found.factors != subject.search(precision)[0].factors


@torch.no_grad()
def test_parts_that_are_switched_off_stay_as_they_are(subject: Subject) -> None:
    """After rounding by other means: weights and cache stay, activation scales are searched anew."""
    found, _, block = subject.search(Precision(4, 4, 4), ClipSearchOptions(activations=False))
    assert not found.activation and set(found.codes) == set(SITE_OF_LINEAR) and set(found.kv) == set(KV_SITES)
    codes = {name: tensor.clone() for name, tensor in found.codes.items()}
    for name, scale in found.weight.items():
        block.set_weight(name, scale, -codes[name])  # nothing that a search would choose
    kv = dict(found.kv)
    clip_search(block, ClipSearchOptions(weights=False, kv=False), 4, 20)
    assert all(torch.equal(found.codes[name], -codes[name]) for name in codes)
    assert all(found.kv[site] is kv[site] for site in KV_SITES)
    assert set(found.activation) == set(SITES)
    assert all(isinstance(site_quantizer(block.layer, site), StaticQuantizer) for site in SITES)


@torch.no_grad()
def test_a_second_pass_judges_each_site_with_all_others_quantized(subject: Subject) -> None:
    """Against the same line search over whole runs of the block, from scales that leave something to find."""
    first, _, block = subject.search(Precision(4, 4, 4))
    spoilt = {site: scale * (0.05 if site == "self_attn.o_input" else 1.0) for site, scale in first.activation.items()}
    target, _ = subject.plain(subject.layer)
    for site, scale in spoilt.items():
        block.set_activation(site, scale)
    expected = {}
    for site in SITES:
        base = scale_from_max(subject.ranges[site], 4)

        def loss(factor: float, site: str = site, base: Tensor = base) -> float:
            block.set_activation(site, base * factor)
            return (block.staged().run(subject.x) - target).square().mean().item()

        expected[site] = line_search(loss)
        block.set_activation(site, base * expected[site])
    for site, scale in spoilt.items():
        block.set_activation(site, scale)
    clip_search(block, ClipSearchOptions(weights=False, kv=False), 4, 20)
    found = {site: block.found.factors[site] for site in SITES}
    assert found == expected
    fresh, _, _ = subject.search(Precision(4, 4, 4))
    assert found != {site: fresh.factors[site] for site in SITES}  # the spoilt site was seen


@torch.no_grad()
def test_two_passes_are_one_after_another(subject: Subject) -> None:
    twice, _, _ = subject.search(Precision(4, 4, 4), ClipSearchOptions(passes=2))
    _, _, block = subject.search(Precision(4, 4, 4))
    clip_search(block, ClipSearchOptions(weights=False, kv=False), 4, 20)
    assert twice.factors == block.found.factors


@torch.no_grad()
def test_overridden_bits_are_searched_with_those_bits(subject: Subject) -> None:
    subject.overrides = {
        "layers.0.mlp.down_proj": 8,
        "layers.0.mlp.down_input": 8,
        "layers.0.self_attn.key": 8,
        "layers.1.mlp.up_proj": 8,  # of another layer
    }
    found, _, block = subject.search(Precision(4, 4, 4))
    largest = {name: codes.abs().max().item() for name, codes in found.codes.items()}
    assert largest.pop("mlp.down_proj") > 100 and max(largest.values()) <= 8
    assert found.kv["self_attn.key"].shape == (1,) and found.kv["self_attn.value"].shape == (2,)
    bits = {site: site_quantizer(block.layer, site).bits for site in (*SITES, *KV_SITES)}
    assert bits == {**dict.fromkeys((*SITES, *KV_SITES), 4), "mlp.down_input": 8, "self_attn.key": 8}
    plain = copy.copy(subject)
    plain.overrides = {}
    assert found.error < plain.search(Precision(4, 4, 4))[0].error
