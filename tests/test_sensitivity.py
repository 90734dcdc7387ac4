"""What keeps 8 bits: the sites that low bits hurt, under a budget, and keys that attention does not survive."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor

from pq_export.calib.checkpoint import load_checkpoint
from pq_export.calib.key_bits import KeyBitsOptions, attention_moved, choose_key_bits
from pq_export.calib.outliers import compute_prefix_kv, hidden_states
from pq_export.calib.pipeline import calibrate
from pq_export.calib.ranges import collect_ranges
from pq_export.calib.rewrites import rewrite
from pq_export.calib.sensitivity import Keep8BitOptions, keep_8bit, linears_of, site_errors, token_ratios
from pq_export.calibration import SITE_OF_LINEAR, SITES, load_calibration
from pq_export.decoder import Decoder
from pq_export.errors import PqExportError
from pq_export.export.fp_graph import export_fp_graph
from pq_export.plan import Plan
from pq_export.precision import Precision
from pq_export.quantizer import fake_quantize, scale_from_max
from pq_export.rewrite.lint import lint
from pq_export.rewrite.pipeline import quantized_model
from pq_export.rewrite.qlinear import Form
from pq_export.stages import Stages
from tests.conftest import PLANTED_LAYER, PLANTED_TOKEN
from tests.tiny_blocks import W4A4, random_ids

PLANTED_SITE = f"layers.{PLANTED_LAYER}.mlp.down_input"
HIDDEN, INNER = 48, 96
# Parameters behind each site of one tiny layer: q 64x48, k and v 32x48; o 48x64; gate, up and down 96x48.
COSTS = dict(zip(SITES, (128 * HIDDEN, 64 * HIDDEN, 2 * INNER * HIDDEN, INNER * HIDDEN), strict=True))
TOTAL = 3 * sum(COSTS.values())

Ranked = tuple[Decoder, Tensor, dict[str, Tensor]]


@pytest.fixture
def planted(tiny_decoder: Decoder) -> Ranked:
    """Three layers, no rotation and no prefix: one token drives one channel of one down_proj's input."""
    rewrite(tiny_decoder, "none", 0)
    crops = random_ids(4, 24)
    crops[:, 11] = PLANTED_TOKEN
    ranges, _ = collect_ranges(tiny_decoder, crops)
    return tiny_decoder, crops, ranges


def chosen(planted: Ranked, precision: Precision = W4A4, **options: object) -> dict[str, int]:
    decoder, crops, ranges = planted
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    overrides, scores = keep_8bit(decoder, crops, ranges, precision, Keep8BitOptions(**options))  # type: ignore[arg-type]
    after = decoder.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())  # it only looked
    assert after.keys() == before.keys() and (len(scores) == 12 or options.get("linears"))
    return overrides


# --- keep_8bit -------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["ratio", "error"])
def test_the_planted_site_is_the_first_that_is_kept(planted: Ranked, by: str) -> None:
    budget = COSTS["mlp.down_input"] / TOTAL + 1e-9  # for one such site
    assert chosen(planted, by=by, budget=budget) == {PLANTED_SITE: 8, f"layers.{PLANTED_LAYER}.mlp.down_proj": 8}


def test_ratios_are_those_of_the_inputs(planted: Ranked) -> None:
    decoder, crops, _ = planted
    seen: dict[str, Tensor] = {}
    for index, layer in enumerate(decoder.layers):
        for linear, site in SITE_OF_LINEAR.items():
            name = f"layers.{index}.{site}"
            layer.get_submodule(linear).register_forward_pre_hook(lambda m, a, n=name: seen.update({n: a[0]}))
    hidden_states(decoder, crops)
    ratios = token_ratios(decoder, crops)
    assert ratios.keys() == seen.keys()
    for name, x in seen.items():
        largest = x.abs().amax(-1).flatten()
        assert ratios[name] == pytest.approx((largest.max() / largest.median()).item(), rel=1e-5)
    assert max(ratios, key=lambda n: ratios[n]) == PLANTED_SITE and ratios[PLANTED_SITE] > 64


@torch.no_grad()
@pytest.mark.parametrize("precision", [W4A4, Precision(4, 8, 8), Precision(4, 16, 16)], ids=str)
def test_errors_are_those_of_one_site_alone(planted: Ranked, precision: Precision) -> None:
    """Layer 0 by hand: hooks on its linears, and weights rounded to the best of the search's scales."""
    from pq_export.calib.clip_search import search_weight

    decoder, crops, ranges = planted
    errors, layer = site_errors(decoder, crops, ranges, precision), decoder.layers[0]
    positions = torch.arange(24).expand_as(crops)
    context, past = decoder.context(positions, torch.ones_like(crops), 0), decoder.empty_past(4)[0]
    x = decoder.embed(crops)
    target = layer(x, *context, past)[0]
    for site in SITES:
        inputs: list[Tensor] = []
        linears = [layer.get_submodule(name) for name in linears_of(site)]
        handle = linears[0].register_forward_pre_hook(lambda m, a: inputs.append(a[0].flatten(0, -2)))  # noqa: B023
        layer(x, *context, past)
        handle.remove()
        kept, handles = [linear.weight.data for linear in linears], []
        for linear in linears:
            scale, _ = search_weight(linear.weight, inputs[0].T @ inputs[0], 4)
            linear.weight.data = fake_quantize(linear.weight, scale[:, None], 4)
            if (bits := precision.activation_bits) < 16:
                own = scale_from_max(ranges[f"layers.0.{site}"], bits) * 0.7
                handles.append(
                    linear.register_forward_pre_hook(lambda m, a, s=own, b=bits: (fake_quantize(a[0], s, b),))
                )
        error = (layer(x, *context, past)[0] - target).square().mean() / target.square().mean()
        assert errors[f"layers.0.{site}"] == pytest.approx(error.item(), rel=1e-3), site
        for linear, weight in zip(linears, kept, strict=True):
            linear.weight.data = weight
        for one in handles:
            one.remove()


@pytest.mark.parametrize("budget", [0.0, 0.1, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("by", ["ratio", "error"])
def test_the_budget_is_kept_and_used(planted: Ranked, by: str, budget: float) -> None:
    overrides = chosen(planted, by=by, budget=budget, threshold=0.0)
    decoder = planted[0]
    spent = sum(decoder.get_submodule(n).weight.numel() for n in overrides if n.endswith("_proj"))
    assert spent <= budget * TOTAL + 1e-6
    left = [COSTS[s] for i in range(3) for s in SITES if f"layers.{i}.{s}" not in overrides]
    assert all(cost > budget * TOTAL - spent for cost in left)  # nothing more would fit
    assert (len(overrides) == 0) == (budget == 0.0)


def test_linears_of_a_site_go_together(planted: Ranked) -> None:
    overrides = chosen(planted, budget=0.5, by="error")
    for index in range(3):
        for site in SITES:
            names = [f"layers.{index}.{site}", *(f"layers.{index}.{name}" for name in linears_of(site))]
            assert len({name in overrides for name in names}) == 1, names
    assert set(overrides.values()) == {8}


def test_a_ratio_below_the_threshold_is_not_kept(planted: Ranked) -> None:
    assert set(chosen(planted, by="ratio", budget=1.0, threshold=64.0)) == {
        PLANTED_SITE,
        f"layers.{PLANTED_LAYER}.mlp.down_proj",
    }
    assert chosen(planted, by="ratio", budget=1.0, threshold=1e9) == {}


@pytest.mark.parametrize("linear", ["self_attn.k_proj", "self_attn.q_proj"])
def test_named_linears_bring_their_site_and_need_no_budget(planted: Ranked, linear: str) -> None:
    names = ("layers.2.mlp.down_proj", f"layers.0.{linear}")
    assert chosen(planted, linears=names, budget=0.0) == {
        "layers.2.mlp.down_input": 8,
        "layers.2.mlp.down_proj": 8,
        "layers.0.self_attn.qkv_input": 8,
        **{f"layers.0.self_attn.{p}_proj": 8 for p in "qkv"},
    }


def test_only_what_has_fewer_bits_is_overridden(planted: Ranked) -> None:
    names = ("layers.2.mlp.down_proj",)
    assert chosen(planted, Precision(4, 8, 4), linears=names) == {"layers.2.mlp.down_proj": 8}
    assert chosen(planted, Precision(4, 16, 16), linears=names) == {"layers.2.mlp.down_proj": 8}
    assert chosen(planted, Precision(8, 8, 8), linears=names) == {}


@pytest.mark.parametrize("name", ["layers.3.mlp.down_proj", "mlp.down_proj", "layers.0.mlp.down_input", "lm_head", ""])
def test_a_linear_that_is_not_there(planted: Ranked, name: str) -> None:
    with pytest.raises(PqExportError) as caught:
        chosen(planted, linears=("layers.0.mlp.down_proj", name))
    message = str(caught.value)
    assert f"no linear '{name}'" in message and "layers.1.mlp.down_proj" in message and "\n" not in message


# --- keys ------------------------------------------------------------------------------------------


@pytest.fixture
def qwen(checkpoint_dir: Callable[[str], Path]) -> Callable[[int | None], Ranked]:
    """``qwen(1)``: the tiny Qwen2 with Qwen2's huge key biases in layer 1; ``None``: in no layer.

    As there, they are in channels that RoPE hardly turns: the whole sequence has them alike, and attention ignores
    them, but a scale cannot.
    """

    def make(biased: int | None) -> Ranked:
        decoder = load_checkpoint(str(checkpoint_dir("qwen2"))).decoder
        if biased is not None:
            bias = decoder.layers[biased].self_attn.k_proj.bias
            bias.data.view(2, -1)[:, -1] += 300.0
        rewrite(decoder, "online", 0)
        decoder.set_prefix(compute_prefix_kv(decoder, (77, 8)))
        crops = random_ids(4, 24)
        return decoder, crops, collect_ranges(decoder, crops)[0]

    return make


@pytest.mark.parametrize("biased", [0, 1, None])
def test_huge_key_biases_get_8_bits_and_nothing_else_does(
    qwen: Callable[[int | None], Ranked], biased: int | None
) -> None:
    overrides, moved = choose_key_bits(*qwen(biased), KeyBitsOptions())
    assert overrides == ({} if biased is None else {f"layers.{biased}.self_attn.key": 8})
    assert len(moved) == 2 and all(0 <= m <= 1 for m in moved)


def test_the_threshold_decides(qwen: Callable[[int | None], Ranked]) -> None:
    decoder, crops, ranges = qwen(None)
    _, moved = choose_key_bits(decoder, crops, ranges, KeyBitsOptions())
    low, high = sorted(moved)
    assert 0 < low < high
    between, _ = choose_key_bits(decoder, crops, ranges, KeyBitsOptions((low + high) / 2))
    assert between == {f"layers.{moved.index(high)}.self_attn.key": 8}
    everything, _ = choose_key_bits(decoder, crops, ranges, KeyBitsOptions(0.0))
    assert len(everything) == 2
    assert choose_key_bits(decoder, crops, ranges, KeyBitsOptions(1.0))[0] == {}


@torch.no_grad()
def test_how_far_attention_moves(qwen: Callable[[int | None], Ranked]) -> None:
    """By hand for one layer: softmax over prefix and causal keys, at the best of the clipping factors."""
    decoder, crops, ranges = qwen(None)
    layer, positions = decoder.layers[0], torch.arange(24)[None]
    rope, mask = decoder.context(positions, torch.ones_like(positions), 0)
    x = decoder.embed(crops)
    q, k, _ = layer.self_attn.qkv(layer.input_layernorm(x), rope)
    prefix = layer.self_attn.prefix_key
    assert prefix is not None
    hidden = torch.ones(24, 24, dtype=torch.bool).triu(1)

    def attention(keys: Tensor) -> Tensor:  # [N, heads, S, p + S]
        every = torch.cat((prefix.expand(4, -1, -1, -1), keys), 2).repeat_interleave(2, 1)
        scores = q @ every.transpose(2, 3) / q.shape[-1] ** 0.5
        scores[..., 2:].masked_fill_(hidden, -torch.inf)
        return scores.softmax(-1)

    peak = ranges["layers.0.self_attn.key"]
    candidates = []
    for factor in [1.0 - 0.05 * i for i in range(16)]:
        scale = (scale_from_max(peak, 4) * factor)[:, None, None]
        variation = (attention(fake_quantize(k, scale, 4)) - attention(k)).abs().sum(-1) / 2
        candidates.append(variation.mean((0, 2)).view(2, 2).mean(1))  # two query heads a KV head
    expected = torch.stack(candidates).amin(0)
    assert torch.allclose(attention_moved(layer, x, rope, mask, peak), expected, atol=1e-5)


# --- to the graph ----------------------------------------------------------------------------------


def test_overrides_reach_the_calibration_and_the_graph(
    checkpoint_dir: Callable[[str], Path], small_plan: Callable[..., Plan], tmp_path: Path
) -> None:
    names = ["layers.1.mlp.down_proj"]
    steps = (("keep_8bit", {"linears": names}), ("key_bits", {"threshold": 0.0}), ("clip_search", {}), ("gptq", {}))
    plan = small_plan("w4a4", prefix="w77 w8 w9", steps=steps)
    calibrate(load_checkpoint(str(checkpoint_dir("llama"))), plan, tmp_path / "out", Stages())
    c = load_calibration(tmp_path / "out")
    assert c.overrides == {
        "layers.0.self_attn.key": 8,
        "layers.1.mlp.down_input": 8,
        "layers.1.mlp.down_proj": 8,
        "layers.1.self_attn.key": 8,
    }
    assert abs(c.weight_codes("layers.1.mlp.down_proj").astype(int)).max() > 100
    assert {name: len(scales) for name, scales in c.kv_scales.items()} == {
        f"layers.{i}.self_attn.{which}": n for i in range(2) for which, n in (("key", 1), ("value", 2))
    }
    assert c.statistics["sensitivity"]["scores"] == {} and len(c.statistics["key_bits"]["attention_moved"]) == 2
    model = quantized_model(export_fp_graph(c.decoder), c, Form.INTEGER)
    onnx.checker.check_model(model, full_check=True)
    assert lint(model) == []


@pytest.mark.parametrize("name, kv", [("w8a8", None), ("w4a8", 8)])
def test_nothing_is_overridden_where_bits_are_enough(
    checkpoint_dir: Callable[[str], Path], small_plan: Callable[..., Plan], tmp_path: Path, name: str, kv: int | None
) -> None:
    steps = (("keep_8bit", {"budget": 0.0}), ("key_bits", {"threshold": 0.0}), ("clip_search", {}))
    plan = dataclasses.replace(small_plan(name, kv), steps=steps)
    assert calibrate(load_checkpoint(str(checkpoint_dir("llama"))), plan, tmp_path / "o", Stages()).overrides == {}
