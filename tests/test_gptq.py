"""GPTQ, its refinement and its targets: against definitions written out here, on synthetic Hessians and blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import pq_export.calib.gptq as module
from pq_export.calib.block import Block, get_linear
from pq_export.calib.clip_search import search_weight
from pq_export.calib.fake_quant import set_site_quantizer
from pq_export.calib.gptq import GptqOptions, coordinate_descent, gptq, gptq_block, refit_scale, round_weight
from pq_export.calib.outliers import compute_prefix_kv
from pq_export.calib.rewrites import rewrite
from pq_export.calibration import KV_SITES, SITE_OF_LINEAR, SITES
from pq_export.decoder import Decoder
from pq_export.errors import PqExportError
from pq_export.precision import Precision
from pq_export.quantizer import code_range, quantize, scale_from_max
from tests.tiny_blocks import W4A4, output_error, random_ids, searched_blocks

ROWS, COLUMNS = 12, 24


def problem(seed: int = 0, tokens: int = 96, rank: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Weight [12, 24], scale [12] and Gram [24, 24] of correlated inputs of very different sizes, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    common = torch.randn(tokens, rank, generator=generator, dtype=torch.float64)
    mixing = torch.randn(rank, COLUMNS, generator=generator, dtype=torch.float64)
    own = torch.randn(tokens, COLUMNS, generator=generator, dtype=torch.float64)
    size = torch.rand(COLUMNS, generator=generator, dtype=torch.float64) * 3 + 0.1
    inputs = (common @ mixing + 0.3 * own) * size
    scale = scale_from_max(weight.abs().amax(1), 4).double() * 0.8
    return weight, scale, inputs.T @ inputs


def loss(weight: Tensor, codes: Tensor, scale: Tensor, gram: Tensor) -> Tensor:
    """``(W - Ŵ) G (W - Ŵ)ᵀ`` of each row [out], in fp64."""
    difference = weight.double() - codes.double() * scale.double()[:, None]
    return torch.einsum("oi,ij,oj->o", difference, gram.double(), difference)


def naive_gptq(weight: Tensor, scale: Tensor, gram: Tensor, bits: int, damping: float, act_order: bool) -> Tensor:
    """Optimal brain quantization in a fixed order, by elimination from the inverse Hessian; no Cholesky, no blocks."""
    low, high = code_range(bits)
    hessian = gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    order = sorted(range(len(gram)), key=lambda j: -gram[j, j].item()) if act_order else list(range(len(gram)))
    inverse, left, codes = torch.linalg.inv(hessian), weight.clone(), torch.zeros_like(weight)
    for j in order:
        codes[:, j] = torch.round(left[:, j] / scale).clamp(low, high)
        error = (left[:, j] - codes[:, j] * scale) / inverse[j, j]
        left -= error[:, None] * inverse[j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


# --- the pass --------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 5, 128])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_with_an_identity_hessian_it_rounds_to_nearest(bits: int, act_order: bool, block: int) -> None:
    weight, scale, _ = problem()
    codes = gptq(weight, scale, torch.eye(COLUMNS).double(), bits, GptqOptions(act_order=act_order, block=block))
    assert torch.equal(codes, quantize(weight, scale[:, None], bits))


@pytest.mark.parametrize("block", [1, 7, 8, 24, 128])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_those_of_the_definition(bits: int, act_order: bool, block: int) -> None:
    """Blocks and the order of columns change nothing but the order itself, which is undone."""
    weight, scale, gram = problem(seed=bits)
    scale = scale * 15 / (2**bits - 1)
    codes = gptq(weight, scale, gram, bits, GptqOptions(damping=0.02, act_order=act_order, block=block))
    assert torch.equal(codes, naive_gptq(weight, scale, gram, bits, 0.02, act_order))
    assert not torch.equal(codes, quantize(weight, scale[:, None], bits))


def test_act_order_makes_a_difference() -> None:
    weight, scale, gram = problem()
    ordered, plain = (gptq(weight, scale, gram, 4, GptqOptions(act_order=order)) for order in (True, False))
    assert not torch.equal(ordered, plain)


@pytest.mark.parametrize("seed", range(4))
def test_each_stage_lowers_the_loss_and_none_raises_it(seed: int) -> None:
    weight, scale, gram = problem(seed)
    nearest = loss(weight, quantize(weight, scale[:, None], 4), scale, gram)
    codes = gptq(weight, scale, gram, 4, GptqOptions())
    before = loss(weight, codes, scale, gram)
    assert before.sum() < 0.7 * nearest.sum()
    start = before.sum()
    for _ in range(4):
        scale = refit_scale(weight, codes, scale, gram)
        after = loss(weight, codes, scale, gram)
        assert (after <= before * (1 + 1e-9)).all()  # every row by itself
        before = after
        codes = coordinate_descent(weight, codes, scale, gram, 4, block=8)
        after = loss(weight, codes, scale, gram)
        assert (after <= before * (1 + 1e-9)).all()
        before = after
    assert before.sum() < 0.95 * start


def test_round_weight_is_those_stages_in_a_row() -> None:
    weight, scale, gram = problem()
    options = GptqOptions(refine=2, block=8)
    codes, found = round_weight(weight, scale, gram, 4, options)
    expected, own = gptq(weight, scale, gram, 4, options), scale
    for _ in range(2):
        own = refit_scale(weight, expected, own, gram)
        expected = coordinate_descent(weight, expected, own, gram, 4, 8)
    assert torch.equal(codes, expected) and torch.equal(found, own)
    codes, found = round_weight(weight, scale, gram, 4, GptqOptions(refine=0))
    assert torch.equal(codes, gptq(weight, scale, gram, 4, GptqOptions())) and found is scale


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_scale_and_codes_are_usable_in_fp32(seed: int, bits: int) -> None:
    weight, scale, gram = (t.float() for t in problem(seed))
    codes, scale = round_weight(weight, scale * 15 / (2**bits - 1), gram, bits, GptqOptions())
    low, high = code_range(bits)
    assert codes.dtype == scale.dtype == torch.float32
    assert torch.equal(codes, codes.round()) and low <= codes.min() and codes.max() <= high
    assert (scale > 0).all() and torch.isfinite(scale).all()


# --- refinement ------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 7, 128])
def test_coordinate_descent_ends_where_no_single_change_helps(block: int) -> None:
    weight, scale, gram = problem(seed=3)
    codes = quantize(weight, scale[:, None], 4)
    start = loss(weight, codes, scale, gram)
    for _ in range(100):
        swept = coordinate_descent(weight, codes, scale, gram, 4, block)
        if torch.equal(swept, codes):
            break
        codes = swept
    else:
        pytest.fail("it does not converge")
    best = loss(weight, codes, scale, gram)
    assert best.sum() < 0.7 * start.sum()
    for column in range(COLUMNS):
        for code in range(-8, 8):
            other = codes.clone()
            other[:, column] = code
            assert (loss(weight, other, scale, gram) >= best * (1 - 1e-9)).all(), (column, code)


def test_sweeps_do_not_depend_on_the_block() -> None:
    weight, scale, gram = problem(seed=5)
    codes = quantize(weight, scale[:, None], 4)
    one, *others = (coordinate_descent(weight, codes, scale, gram, 4, block) for block in (1, 5, 24, 128))
    assert all(torch.equal(one, other) for other in others) and not torch.equal(one, codes)


@pytest.mark.parametrize("seed", range(3))
def test_refit_scale_is_the_least_squares_optimum(seed: int) -> None:
    weight, scale, gram = problem(seed)
    codes = quantize(weight, scale[:, None], 4)
    best = refit_scale(weight, codes, scale, gram)
    smallest = loss(weight, codes, best, gram)
    for factor in (0.5, 0.9, 0.99, 0.999, 1.001, 1.01, 1.1, 2.0):
        assert (loss(weight, codes, best * factor, gram) > smallest).all()
    for row in range(ROWS):  # and by the definition: the output of the codes fitted to the output of the weights
        upper = torch.linalg.cholesky(gram).T  # rows that stand for the inputs: GᵀG = upperᵀ upper
        fit = torch.linalg.lstsq((upper @ codes[row])[:, None], (upper @ weight[row])[:, None]).solution.item()
        assert best[row].item() == pytest.approx(fit, rel=1e-9)


def test_refit_keeps_a_scale_where_the_best_is_not_positive() -> None:
    weight, scale, gram = problem()
    codes = quantize(weight, scale[:, None], 4)
    codes[2], codes[5] = 0.0, -codes[5]
    best = refit_scale(weight, codes, scale, gram)
    assert best[2] == scale[2] and best[5] == scale[5]
    assert (best[[0, 1, 3, 4]] != scale[[0, 1, 3, 4]]).all() and (best > 0).all()


# --- degenerate Hessians ---------------------------------------------------------------------------


def test_a_dead_input_is_rounded_to_nearest_and_leaves_the_others_alone() -> None:
    weight, scale, gram = (t.float() for t in problem())
    gram[9], gram[:, 9] = 0.0, 0.0
    codes, found = round_weight(weight, scale, gram, 4, GptqOptions(damping=1e-4))
    assert torch.equal(codes[:, 9], quantize(weight, scale[:, None], 4)[:, 9])
    others = [i for i in range(COLUMNS) if i != 9]
    # Damping is relative to the mean diagonal, in which a dead input counts.
    alone = GptqOptions(damping=1e-4 * (COLUMNS - 1) / COLUMNS)
    expected, scales = round_weight(weight[:, others], scale, gram[others][:, others], 4, alone)
    assert torch.equal(codes[:, others], expected) and torch.allclose(found, scales, rtol=1e-5)


def test_a_dead_input_of_a_channel_of_tiny_weights_gives_no_nan() -> None:
    weight, scale, gram = (t.float() for t in problem())
    gram[9], gram[:, 9] = 0.0, 0.0
    weight[4] *= 1e-12
    scale[4] *= 1e-12
    codes, found = round_weight(weight, scale, gram, 4, GptqOptions())
    assert torch.isfinite(codes).all() and torch.isfinite(found).all()
    assert codes[4].abs().max() > 1


@pytest.mark.parametrize("damping", [0.0, 1e-6, 0.01])
@pytest.mark.parametrize("tokens", [1, 5])
def test_fewer_tokens_than_inputs(tokens: int, damping: float) -> None:
    weight, scale, gram = (t.float() for t in problem(tokens=tokens))
    assert torch.linalg.matrix_rank(gram) <= tokens
    codes, found = round_weight(weight, scale, gram, 4, GptqOptions(damping=damping))
    assert torch.isfinite(found).all() and (found > 0).all() and codes.abs().max() <= 8
    nearest = loss(weight, quantize(weight, scale[:, None], 4), scale, gram)
    assert loss(weight, codes, found, gram).sum() < 0.1 * nearest.sum()


def test_inputs_that_are_all_zero_round_to_nearest() -> None:
    weight, scale, _ = (t.float() for t in problem())
    codes, found = round_weight(weight, scale, torch.zeros(COLUMNS, COLUMNS), 4, GptqOptions())
    assert torch.equal(codes, quantize(weight, scale[:, None], 4)) and torch.equal(found, scale)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_hessian_that_is_not_finite_is_refused(value: float) -> None:
    weight, scale, gram = problem()
    gram[3, 3] = value
    with pytest.raises(PqExportError, match="calibration inputs are not finite") as caught:
        gptq(weight, scale, gram, 4, GptqOptions())
    assert caught.value.cure and caught.value.where == "gptq"


# --- blocks ----------------------------------------------------------------------------------------


@pytest.fixture(params=["with prefix", "without prefix"])
def make(request: pytest.FixtureRequest, tiny_decoder: Decoder) -> Callable[..., Block]:
    """``make(precision)`` -> block 1, searched, whose quantized stream has passed block 0."""
    rewrite(tiny_decoder, "online", 0)
    if request.param == "with prefix":
        tiny_decoder.set_prefix(compute_prefix_kv(tiny_decoder, (77, 1)))
    layers = [layer.state_dict() for layer in tiny_decoder.layers]
    layers = [{name: tensor.clone() for name, tensor in state.items()} for state in layers]

    def block(precision: Precision = W4A4, overrides: dict[str, int] | None = None, seed: int = 0) -> Block:
        for layer, state in zip(tiny_decoder.layers, layers, strict=True):
            for site in (*SITES, *KV_SITES):
                set_site_quantizer(layer, site, None)
            layer.load_state_dict(state)
        return searched_blocks(tiny_decoder, random_ids(8, 24, seed), precision, 2, overrides)[1]

    return block


@pytest.fixture
def grams(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every Gram that round_weight is given, in order."""
    seen: list[Tensor] = []
    real = module.round_weight

    def spy(weight: Tensor, scale: Tensor, gram: Tensor, bits: int, options: GptqOptions) -> tuple[Tensor, Tensor]:
        seen.append(gram)
        return real(weight, scale, gram, bits, options)

    monkeypatch.setattr(module, "round_weight", spy)
    return seen


def inputs_of_linears(block: Block) -> dict[str, Tensor]:
    """Site -> what its linears read in the quantized block [tokens, in], by hooks, behind their quantizers."""
    seen: dict[str, Tensor] = {}
    handles = [
        get_linear(block.layer, name).register_forward_pre_hook(
            lambda m, a, site=site: seen.update({site: a[0].flatten(0, -2)})
        )
        for name, site in SITE_OF_LINEAR.items()
    ]
    with torch.no_grad():
        block.staged().run(block.x)
    for handle in handles:
        handle.remove()
    return seen


def test_grams_are_of_what_the_linears_read(make: Callable[..., Block], grams: list[Tensor]) -> None:
    """After quantization of their input and of all linears before, prefix in front."""
    block = make()
    gptq_block(block, GptqOptions(), samples=8)
    inputs = inputs_of_linears(block)
    for site, gram in zip(SITES, grams, strict=True):
        x = inputs[site].double()
        steps = x / block.found.activation[site]
        assert torch.allclose(steps, steps.round(), atol=1e-3)  # it is quantized
        expected = x.T @ x
        assert torch.allclose(gram.double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max()), site


def test_another_prefix_gives_another_gram_behind_attention(
    make: Callable[..., Block], grams: list[Tensor], request: pytest.FixtureRequest
) -> None:
    block = make()
    attention = block.layer.self_attn
    if attention.prefix_key is None:
        pytest.skip("there is no prefix")
    gptq_block(block, GptqOptions(), samples=8)
    attention.prefix_value = attention.prefix_value + 1.0
    gptq_block(block, GptqOptions(), samples=8)
    first, second = grams[: len(SITES)], grams[len(SITES) :]
    assert torch.equal(first[0], second[0])  # qkv's inputs precede attention
    assert all((a - b).norm() > 0.01 * a.norm() for a, b in zip(first[1:], second[1:], strict=True))


def test_each_linear_gets_its_own_rows(make: Callable[..., Block], grams: list[Tensor]) -> None:
    """Linears of one site are rounded together: rows do not depend on each other."""
    block = make(overrides={"layers.1.mlp.up_proj": 8})
    options = GptqOptions(propagation=0.0)
    gptq_block(block, options, samples=8)
    gram_of = dict(zip([SITES[0], SITES[1], SITES[2], "up", SITES[3]], grams, strict=True))
    assert torch.equal(gram_of["up"], gram_of["mlp.gate_up_input"])
    for name, site in SITE_OF_LINEAR.items():
        bits = 8 if name == "mlp.up_proj" else 4
        weight = get_linear(block.reference, name).weight.detach()
        scale, _ = search_weight(weight, gram_of[site], bits)
        codes, scale = round_weight(weight, scale, gram_of[site], bits, options)
        assert (block.found.codes[name] == codes).float().mean() > 0.998, name
        assert torch.allclose(block.found.weight[name], scale, rtol=1e-3), name
        value = block.found.codes[name].float() * block.found.weight[name][:, None]
        assert torch.equal(get_linear(block.layer, name).weight, value)
    assert block.found.codes["mlp.up_proj"].abs().max() > 50


def test_without_propagation_the_reference_stream_is_not_looked_at(make: Callable[..., Block]) -> None:
    codes = {}
    for name, noise in (("as it is", 0.0), ("another", 1.0)):
        for propagation in (0.0, 0.5):
            block = make()
            generator = torch.Generator().manual_seed(0)
            changed = torch.randn(block.reference_x.shape, generator=generator)
            block.reference_x = block.reference_x + noise * changed
            gptq_block(block, GptqOptions(propagation=propagation), samples=8)
            codes[name, propagation] = dict(block.found.codes)
    for linear in SITE_OF_LINEAR:
        assert torch.equal(codes["as it is", 0.0][linear], codes["another", 0.0][linear])
        assert not torch.equal(codes["as it is", 0.5][linear], codes["another", 0.5][linear])


@torch.no_grad()
def test_propagation_comes_closer_to_the_reference(make: Callable[..., Block]) -> None:
    """q_proj's output, and the stream behind o_proj: the more, the nearer on the data it was fitted to."""
    errors: dict[float, tuple[float, float]] = {}
    for propagation in (0.0, 0.5, 1.0):
        block = make()
        gptq_block(block, GptqOptions(propagation=propagation), samples=8)
        staged, reference = block.staged(), block.staged_reference()
        layers = ((block.layer, block.x), (block.reference, block.reference_x))
        q, expected_q = (
            layer.self_attn.q_proj(layer.self_attn.qkv_input_quantizer(layer.input_layernorm(x))) for layer, x in layers
        )
        h = staged.residual(block.x, staged.context(block.x))
        expected_h = reference.residual(block.reference_x, reference.context(block.reference_x))
        errors[propagation] = (
            (q - expected_q).square().mean().item(),
            (h - expected_h).square().mean().item(),
        )
    for none, half, whole in zip(*errors.values(), strict=True):
        assert whole < half < none
    assert errors[1.0][0] < 0.9 * errors[0.0][0]


@torch.no_grad()
def test_it_beats_rounding_to_nearest_on_the_block(make: Callable[..., Block]) -> None:
    for precision in (Precision(4, 16, 16), Precision(4, 8, 4)):
        block = make(precision)
        nearest = block.measure_error()
        gptq_block(block, GptqOptions(propagation=0.0), samples=8)
        assert block.measure_error() < 0.8 * nearest
    block = make(W4A4)  # whose activations are most of the loss: what counts is the reference
    nearest = output_error(block)
    gptq_block(block, GptqOptions(), samples=8)
    assert output_error(block) < 0.8 * nearest


def test_samples_are_those_asked_for(make: Callable[..., Block]) -> None:
    few, cut = make(), make()
    gptq_block(few, GptqOptions(), samples=3)
    cut = replace(cut, x=cut.x[:3], reference_x=cut.reference_x[:3], reference_y=cut.reference_y[:3])
    gptq_block(cut, GptqOptions(), samples=8)
    whole = make()
    gptq_block(whole, GptqOptions(), samples=8)
    for name in SITE_OF_LINEAR:
        assert torch.equal(few.found.codes[name], cut.found.codes[name])
        assert not torch.equal(few.found.codes[name], whole.found.codes[name])


def test_more_crops_than_a_batch_give_one_gram(
    make: Callable[..., Block], grams: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    gptq_block(make(), GptqOptions(), samples=8)
    monkeypatch.setattr(module, "BATCH", 3)
    gptq_block(make(), GptqOptions(), samples=8)
    first, second = grams[: len(SITES)], grams[len(SITES) :]
    assert torch.allclose(first[0], second[0], rtol=1e-4, atol=1e-2)
