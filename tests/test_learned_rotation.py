"""Learned rotations lower the quantization loss, stay orthogonal, fold without a trace and depend on the seed alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pq_export.calib import learned_rotation
from pq_export.calib.checkpoint import full_logits, load_checkpoint
from pq_export.calib.fake_quant import StaticQuantizer, quantizers, set_site_quantizer
from pq_export.calib.learned_rotation import (
    CayleyRotations,
    RotatedLinear,
    RotatedQuantizer,
    RotationOptions,
    Rotations,
    find_rotations,
    fold_rotations,
    rotate,
    spread,
)
from pq_export.calib.outliers import compute_prefix_kv
from pq_export.calib.ranges import Ranges, collect_ranges
from pq_export.calib.rewrites import rewrite
from pq_export.calib.training import twin
from pq_export.decoder import Decoder
from pq_export.errors import PqExportError
from pq_export.hadamard import random_hadamard
from pq_export.precision import Precision
from pq_export.quantizer import fake_quantize, scale_from_max
from tests.conftest import FAMILIES, VOCAB

CROPS = torch.randint(3, VOCAB, (16, 24), generator=torch.Generator().manual_seed(5))
MANY, HELD_OUT = (
    torch.randint(3, VOCAB, (n, 24), generator=torch.Generator().manual_seed(seed)) for n, seed in ((480, 6), (96, 7))
)
PREFIX = (77, 8)
W4A4, W8A8, W4A16 = (Precision.named(name) for name in ("w4a4", "w8a8", "w4a16"))


def learn_rotations(decoder: Decoder, *arguments: Any, **named: Any) -> list[float]:
    """Find rotations and fold them, as the recipe's step does; the loss of each step."""
    matrices, losses = find_rotations(decoder, *arguments, **named)
    fold_rotations(decoder, matrices)
    return losses


def plant_outlier_channel(decoder: Decoder, channel: int = 7, factor: float = 8.0) -> None:
    """Make one channel of the residual stream large; the linears that read it take the factor back."""
    for write in (decoder.embed_tokens.weight.T, *(m.weight for m in writers(decoder))):
        write.data[channel] *= factor
    for writer in writers(decoder):
        if writer.bias is not None:
            writer.bias.data[channel] *= factor
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for reader in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            reader.weight.data[:, channel] /= factor
    decoder.lm_head.weight.data[:, channel] /= factor


def plant_outlier_values(decoder: Decoder, channel: int = 3, factor: float = 5.0) -> None:
    """Make one channel of every value head large; o_proj takes the factor back."""
    for layer in decoder.layers:
        attention, d = layer.self_attn, layer.self_attn.head_dim
        attention.v_proj.weight.data.view(-1, d, attention.v_proj.in_features)[:, channel] *= factor
        attention.o_proj.weight.data.view(attention.o_proj.out_features, -1, d)[:, :, channel] /= factor


def writers(decoder: Decoder) -> list[torch.nn.Linear]:
    return [linear for layer in decoder.layers for linear in (layer.self_attn.o_proj, layer.mlp.down_proj)]


@pytest.fixture
def prepare(checkpoint_dir: Callable[[str], Path]) -> Callable[..., tuple[Decoder, Ranges]]:
    """``prepare(family, rotation)``: planted, rewritten, with a prefix, and its ranges."""

    def make(family: str = "llama", rotation: str = "none") -> tuple[Decoder, Ranges]:
        decoder = load_checkpoint(str(checkpoint_dir(family))).decoder
        plant_outlier_channel(decoder)
        rewrite(decoder, rotation, 3)
        decoder.set_prefix(compute_prefix_kv(decoder, PREFIX))
        return decoder, collect_ranges(decoder, CROPS)[0]

    return make


def quantized_loss(decoder: Decoder, precision: Precision) -> float:
    """KL on unseen crops of the decoder as it is folded, with the scales that training would start from."""
    decoder.set_prefix(compute_prefix_kv(decoder, PREFIX))
    model, ranges = twin(decoder), collect_ranges(decoder, MANY[:64])[0]
    learned_rotation._insert(model, Rotations(decoder, ()), ranges, precision, RotationOptions())
    with torch.no_grad():
        return learned_rotation._loss(decoder, model, HELD_OUT, "kl").item()


def mean(losses: list[float]) -> float:
    return sum(losses) / len(losses)


# --- parts -----------------------------------------------------------------------------------------


def test_cayley_matrices_start_at_the_identity_and_stay_orthogonal() -> None:
    rotations = CayleyRotations(3, 24, torch.device("cpu"))
    assert torch.equal(rotations(), torch.eye(24).expand(3, -1, -1))
    rotations.raw.data = 20 * torch.randn(3, 24, 24, generator=torch.Generator().manual_seed(0))
    q = rotations(torch.float64)
    assert (q @ q.mT - torch.eye(24)).abs().max() < 1e-12
    assert (q - torch.eye(24)).abs().max() > 0.5 and not torch.allclose(q[0], q[1])
    torch.testing.assert_close(rotations(), q.float(), rtol=0, atol=1e-5)


def test_a_step_turns_rows_by_the_learning_rate_at_every_order() -> None:
    for order in (16, 256):
        rotations = CayleyRotations(1, order, torch.device("cpu"))
        signs = torch.sign(torch.randn(order, order, generator=torch.Generator().manual_seed(0))).triu(1)
        rotations.raw.data[0] = 0.01 * (signs - signs.T)  # what a first step of Adam with lr 0.01 does
        angle = torch.arccos(torch.diagonal(rotations(torch.float64)[0]))
        assert 0.01 < angle.mean() < 0.03


def test_rotate_goes_head_by_head() -> None:
    x, q = torch.randn(2, 5, 12), random_hadamard(4, 0).float()
    expected = torch.cat([x[..., i : i + 4] @ q for i in (0, 4, 8)], -1)
    assert torch.allclose(rotate(x, q), expected) and rotate(x, None) is x
    assert torch.allclose(rotate(rotate(x, q), q.T), x, atol=1e-6)


def test_rounded_weight_is_that_of_the_folded_linear() -> None:
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(24, 12)
    inner, outer = random_hadamard(24, 0).float(), random_hadamard(4, 1).float()
    folded = torch.block_diag(*[outer] * 3).T @ linear.weight.detach() @ inner
    rounded = fake_quantize(folded, scale_from_max(folded.abs().amax(1), 4)[:, None] * 0.8, 4)
    module, x = RotatedLinear(linear, 4, lambda: inner, lambda: outer), torch.randn(5, 24, generator=generator)
    expected = (x @ inner) @ rounded.T @ torch.block_diag(*[outer] * 3).T + linear.bias
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)


# --- the model in training is the folded model -----------------------------------------------------


class SmoothQuantizer(StaticQuantizer):
    """Bends instead of rounding: it depends on the basis as a quantizer does, and round-off flips no code."""

    def forward(self, x: Tensor) -> Tensor:
        peak = self.scale * 2 ** (self.bits - 1)
        return torch.tanh(x / peak) * peak


@pytest.mark.parametrize("quantize_weights", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_sees_the_folded_decoder(
    prepare: Callable[..., tuple[Decoder, Ranges]],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    quantize_weights: bool,
) -> None:
    """The same functions of folded weights, without turning back, give the same logits: every site, every bias."""
    monkeypatch.setattr(learned_rotation, "StaticQuantizer", SmoothQuantizer)
    monkeypatch.setattr(learned_rotation, "round_ste", torch.sin)
    monkeypatch.setattr(learned_rotation, "spread", lambda x, per_head: torch.ones(()))
    decoder, ranges = prepare(family, "online")
    precision, options = Precision(8, 8, 4), RotationOptions(quantize_weights=quantize_weights)
    rotations, model, generator = Rotations(decoder, options.learn), twin(decoder), torch.Generator().manual_seed(0)
    for parameter in rotations.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    rotations.refresh()
    learned_rotation._insert(model, rotations, ranges, precision, options)

    folded = copy.deepcopy(decoder)
    matrices = {name: learned(torch.float64).detach() for name, learned in rotations.learned.items()}
    fold_rotations(folded, matrices)
    plain = full_logits(folded, CROPS)
    learned_rotation._insert(folded, Rotations(decoder, ()), ranges, precision, options)
    ours, theirs = full_logits(model, CROPS), full_logits(folded, CROPS)
    assert (ours - theirs).abs().max() < 3e-4 * theirs.abs().max()
    assert (theirs - plain).abs().max() > 3e-3 * theirs.abs().max()  # the functions did something
    learned_rotation._insert(decoder, Rotations(decoder, ()), ranges, precision, options)
    assert (full_logits(decoder, CROPS) - theirs).abs().max() > 3e-3 * theirs.abs().max()  # and so did the basis


def test_a_scale_follows_the_range_that_the_rotation_leaves() -> None:
    x, q = torch.zeros(2, 2, 6, 8), random_hadamard(8, 0).float()
    x[..., 0] = torch.linspace(1, 2, 6)
    x[:, 1] *= 3
    quantizer = StaticQuantizer(torch.tensor([2.0, 6.0])[:, None, None] / 127, 8)
    assert torch.equal(RotatedQuantizer(quantizer, lambda: None)(x), quantizer(x))
    torch.testing.assert_close(RotatedQuantizer(quantizer, lambda: torch.eye(8))(x), quantizer(x))
    # A one-hot channel is spread over eight: values 1/sqrt(8) of the peak, so that steps may be as much smaller.
    error = (RotatedQuantizer(quantizer, lambda: q)(x) - x).abs().amax((0, 2, 3))
    assert (error < torch.tensor([2.0, 6.0]) / 127 * 0.6).all()
    assert torch.allclose(spread(x @ q, True) / spread(x, True), torch.tensor(8**-0.5 * 8 ** (1 / 8)), atol=1e-4)
    assert spread(x, True).shape == (2, 1, 1) and spread(x, False).shape == ()
    zeros = torch.zeros(2, 2, 6, 8, requires_grad=True)
    assert spread(1e30 * x, False).isfinite() and spread(zeros, False) > 0
    assert torch.autograd.grad(spread(zeros, True).sum(), zeros)[0].isfinite().all()


def test_one_scale_for_all_heads_stays_one() -> None:
    """8-bit caches: heads of different size must not get steps of their own."""
    x, q = torch.randn(2, 2, 6, 8, generator=torch.Generator().manual_seed(0)), random_hadamard(8, 1).float()
    x[:, 1] *= 0.01
    quantized = RotatedQuantizer(StaticQuantizer(torch.full((1, 1, 1), 0.02), 8), lambda: q)(x)
    steps = (rotate(quantized, q) / 0.02)[:, 1]
    follow = (spread(rotate(x, q), False) / spread(x, False)).item()
    assert torch.allclose(steps / follow, (steps / follow).round(), atol=1e-2) and steps.abs().max() > 0.5


def test_the_range_has_a_gradient() -> None:
    """A rotation is told that flatter values could have a smaller step, not only which values are clipped."""
    x, q = torch.eye(8)[:1], torch.eye(8, requires_grad=True)
    (gradient,) = torch.autograd.grad(spread(rotate(x, q), False), q)
    assert gradient[0, 0] > 0 and gradient.isfinite().all()


# --- learning --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "llama-bias"])
@pytest.mark.parametrize("rotation", ["none", "online"])
def test_logits_stay_and_the_prefix_goes_along(
    prepare: Callable[..., tuple[Decoder, Ranges]], family: str, rotation: str
) -> None:
    decoder, ranges = prepare(family, rotation)
    before, weight = full_logits(decoder, CROPS), decoder.layers[1].self_attn.v_proj.weight.clone()
    done: list[int] = []
    losses = learn_rotations(decoder, CROPS, ranges, W4A4, RotationOptions(steps=4, batch=4), done.append)
    assert len(losses) == sum(done) == 4
    after = full_logits(decoder, CROPS)
    assert (after - before).abs().max() < 2e-4 * before.abs().max()
    assert (decoder.layers[1].self_attn.v_proj.weight - weight).abs().max() > 1e-3
    assert not any(p.requires_grad for p in decoder.parameters()) and not list(quantizers(decoder))
    assert all(not isinstance(m, (RotatedQuantizer, RotatedLinear)) for m in decoder.modules())
    moved = [layer.self_attn.prefix_value for layer in decoder.layers]
    for ours, (_, again) in zip(moved, compute_prefix_kv(decoder, PREFIX), strict=True):
        torch.testing.assert_close(ours, again, rtol=2e-3, atol=4e-3)


def test_learning_lowers_the_loss_where_rotation_must_help(checkpoint_dir: Callable[[str], Path]) -> None:
    """One channel of each value head is 5 times the others: rotations beat scales alone, and unseen crops show it."""
    decoder, precision = load_checkpoint(str(checkpoint_dir("llama"))).decoder, Precision(4, 8, 4)
    plant_outlier_values(decoder)
    rewrite(decoder, "none", 3)
    decoder.set_prefix(compute_prefix_kv(decoder, PREFIX))
    ranges, before = collect_ranges(decoder, MANY)[0], quantized_loss(decoder, precision)
    start = copy.deepcopy(decoder)
    losses = learn_rotations(decoder, MANY, ranges, precision, RotationOptions(steps=60, lr=0.05))
    scales_alone = learn_rotations(start, MANY, ranges, precision, RotationOptions(steps=60, lr=1e-9))
    assert losses[0] == pytest.approx(scales_alone[0], rel=1e-5)
    assert mean(losses[-8:]) < 0.8 * mean(scales_alone[-8:])
    assert quantized_loss(decoder, precision) < 0.6 * before


@pytest.mark.parametrize("learn", [("R1",), ("R2",)])
def test_only_what_is_asked_is_learned(prepare: Callable[..., tuple[Decoder, Ranges]], learn: tuple[str, ...]) -> None:
    decoder, ranges = prepare()
    embedding, values = decoder.embed_tokens.weight.clone(), decoder.layers[0].self_attn.prefix_value.clone()
    learn_rotations(decoder, CROPS, ranges, W4A4, RotationOptions(steps=2, learn=learn))
    assert torch.equal(decoder.embed_tokens.weight, embedding) == (learn == ("R2",))
    assert torch.equal(decoder.layers[0].self_attn.prefix_value, values) == (learn == ("R1",))


def test_weights_are_quantized_where_nothing_else_is(prepare: Callable[..., tuple[Decoder, Ranges]]) -> None:
    """W4A16KV16: there would be no loss otherwise."""
    decoder, ranges = prepare()
    losses = learn_rotations(decoder, CROPS, ranges, W4A16, RotationOptions(steps=40))
    assert losses[0] > 1e-3 and mean(losses[-8:]) < 0.9 * mean(losses[:4])


def test_cross_entropy_is_another_loss(prepare: Callable[..., tuple[Decoder, Ranges]]) -> None:
    decoder, ranges = prepare()
    losses = learn_rotations(decoder, CROPS, ranges, W4A4, RotationOptions(steps=12, batch=16, loss="ce"))
    assert losses[0] > math.log(VOCAB) and losses[-1] < losses[0]


def test_learning_depends_on_the_seed_alone(prepare: Callable[..., tuple[Decoder, Ranges]]) -> None:
    decoder, ranges = prepare()
    runs, name = [], "layers.1.self_attn.o_proj.weight"
    for seed in (0, 0, 1):
        copied = copy.deepcopy(decoder)
        losses = learn_rotations(copied, CROPS, ranges, W8A8, RotationOptions(steps=3, batch=4, seed=seed))
        runs.append((losses, copied.get_parameter(name)))
    assert runs[0][0] == runs[1][0] and torch.equal(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0] and not torch.equal(runs[0][1], runs[2][1])


def test_divergence_keeps_the_last_good_rotation(
    prepare: Callable[..., tuple[Decoder, Ranges]], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, ranges = prepare()
    before, compute, calls = full_logits(decoder, CROPS), learned_rotation._loss, []

    def breaking(*arguments: object) -> Tensor:
        calls.append(1)
        return compute(*arguments) * (math.nan if len(calls) == 4 else 1.0)

    monkeypatch.setattr(learned_rotation, "_loss", breaking)
    notes: list[str] = []
    original, options = decoder.embed_tokens.weight.clone(), RotationOptions(steps=50, batch=16, lr=0.002)
    losses = learn_rotations(decoder, CROPS, ranges, W4A4, options, note=notes.append)
    assert len(losses) == 3 and len(notes) == 1 and "nan at step 4" in notes[0]
    assert (full_logits(decoder, CROPS) - before).abs().max() < 2e-4 * before.abs().max()
    assert not torch.equal(decoder.embed_tokens.weight, original)


# --- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0},
        {"batch": 0},
        {"lr": 0.0},
        {"lr": math.nan},
        {"scale_lr": -1.0},
        {"loss": "mse"},
        {"learn": ()},
        {"learn": ("R3",)},
    ],
)
def test_bad_options_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(PqExportError, match=f"learned rotation: {next(iter(bad))} "):
        RotationOptions(**bad)


def test_unsuitable_decoders_are_refused(
    checkpoint_dir: Callable[[str], Path], prepare: Callable[..., tuple[Decoder, Ranges]]
) -> None:
    decoder, ranges = prepare()
    raw = load_checkpoint(str(checkpoint_dir("llama"))).decoder
    with pytest.raises(PqExportError, match="norms without gains"):
        learn_rotations(raw, CROPS, ranges, W4A4)
    quantizer = StaticQuantizer(torch.tensor(1.0), 4)
    set_site_quantizer(decoder.layers[0], "mlp.down_input", quantizer)
    with pytest.raises(PqExportError, match="quantized already"):
        learn_rotations(decoder, CROPS, ranges, W4A4)
