"""Prefix tuning brings a quantized decoder nearer to the original, ships FP16 values and never makes it worse."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pq_export.calib import tune_prefix as module
from pq_export.calib.checkpoint import full_logits, load_checkpoint
from pq_export.calib.fake_quant import StaticQuantizer, set_kv_quantizer, set_site_quantizer
from pq_export.calib.outliers import compute_prefix_kv
from pq_export.calib.ranges import collect_ranges
from pq_export.calib.training import twin
from pq_export.calib.tune_prefix import PrefixTuningOptions, TrainedPrefix, tune_prefix
from pq_export.calibration import KV_SITES, SITE_OF_LINEAR, SITES
from pq_export.decoder import Decoder
from pq_export.errors import PqExportError
from pq_export.quantizer import fake_quantize, scale_from_max
from tests.conftest import VOCAB

CROPS, UNSEEN = (
    torch.randint(3, VOCAB, (n, 24), generator=torch.Generator().manual_seed(seed)) for n, seed in ((160, 6), (64, 7))
)
Pair = tuple[Decoder, Decoder]


def quantize_decoder(decoder: Decoder, bits: int = 4) -> Decoder:
    """A twin with rounded weights and a static quantizer at every site."""
    ranges, model = collect_ranges(decoder, CROPS[:32])[0], twin(decoder)
    for index, layer in enumerate(model.layers):
        for site in SITES:
            scale = 0.7 * scale_from_max(ranges[f"layers.{index}.{site}"], bits)
            set_site_quantizer(layer, site, StaticQuantizer(scale, bits))
        for site in ("self_attn.key", "self_attn.value"):
            set_kv_quantizer(layer, site, 0.8 * scale_from_max(ranges[f"layers.{index}.{site}"], bits), bits)
        for name in SITE_OF_LINEAR:
            linear = layer.get_submodule(name)
            scale = 0.8 * scale_from_max(linear.weight.abs().amax(1, keepdim=True), bits)
            linear.weight = torch.nn.Parameter(fake_quantize(linear.weight, scale, bits), requires_grad=False)
    return model


@pytest.fixture
def prepare(checkpoint_dir: Callable[[str], Path]) -> Callable[[str], Pair]:
    """``prepare(family)``: the quantized decoder and its reference, each with the prefix."""

    def make(family: str = "llama") -> Pair:
        reference = load_checkpoint(str(checkpoint_dir(family))).decoder
        reference.set_prefix(compute_prefix_kv(reference, (77, 8)))
        return quantize_decoder(reference), reference

    return make


def unseen_loss(pair: Pair) -> float:
    with torch.no_grad():
        return module._loss(*pair, UNSEEN, PrefixTuningOptions()).item()


def prefix_of(decoder: Decoder) -> list[Tensor]:
    return [t for layer in decoder.layers for t in (layer.self_attn.prefix_key, layer.self_attn.prefix_value)]


def disturb_prefix(decoder: Decoder) -> None:
    """Noise as large as the prefix itself: tuning must take it out again."""
    generator = torch.Generator().manual_seed(1)
    noisy = [(t + t.std() * torch.randn(t.shape, generator=generator)).half().float() for t in prefix_of(decoder)]
    decoder.set_prefix(list(zip(noisy[::2], noisy[1::2], strict=True)))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_tuning_lowers_the_loss_on_unseen_text(prepare: Callable[[str], Pair], family: str) -> None:
    """Most of what a disturbed prefix costs comes back; the reference's stays as it is."""
    reference = prepare(family)[1]
    decoder = quantize_decoder(reference, bits=8)
    pair, undisturbed = (decoder, reference), unseen_loss((decoder, reference))
    disturb_prefix(decoder)
    start, kept, before = prefix_of(decoder), copy.deepcopy(prefix_of(reference)), unseen_loss(pair)
    notes: list[str] = []
    done: list[int] = []
    options = PrefixTuningOptions(steps=60, lr=0.1)
    pairs = tune_prefix(decoder, reference, CROPS, options, done.append, notes.append)
    assert unseen_loss(pair) - undisturbed < 0.2 * (before - undisturbed)
    assert sum(done) == 60 and len(notes) == 1 and "held-out loss" in notes[0]
    c = decoder.config
    for (key, value), old_key, old_value in zip(pairs, start[::2], start[1::2], strict=True):
        for new, old in ((key, old_key), (value, old_value)):
            assert new.shape == (1, c.num_kv_heads, 2, c.head_dim) and new.dtype == torch.float32
            assert torch.equal(new, new.half().float()) and not torch.equal(new, old) and not new.requires_grad
    for ours, (key, value) in zip(decoder.layers, pairs, strict=True):
        assert ours.self_attn.prefix_key is key and ours.self_attn.prefix_value is value
    for ours, old in zip(prefix_of(reference), kept, strict=True):
        assert torch.equal(ours, old)


def test_an_undisturbed_prefix_gains_too(prepare: Callable[[str], Pair]) -> None:
    """The prefix of the original is not the best one for the quantized decoder: what the step is for."""
    decoder, reference = pair = prepare("llama")
    before = unseen_loss(pair)
    tune_prefix(decoder, reference, CROPS, PrefixTuningOptions(steps=60))
    assert unseen_loss(pair) < 0.97 * before


def test_values_are_rounded_where_they_are_used(prepare: Callable[[str], Pair]) -> None:
    """Straight-through: FP16 forward, and the gradient of the unrounded values."""
    prefix = TrainedPrefix(prepare("llama")[0])
    prefix.delta[0].data += 1e-5
    key, _ = prefix.pairs()[0]
    exact = prefix.start[0] + 1e-5 * prefix.unit[0]
    assert torch.equal(key, exact.half().float()) and not torch.equal(key, exact)
    (gradient,) = torch.autograd.grad(key.sum(), prefix.delta[0])
    assert torch.equal(gradient, torch.full_like(gradient, prefix.unit[0].item()))
    prefix.delta[0].data += 1e9
    assert prefix.pairs()[0][0].isfinite().all()


def test_a_prefix_that_only_gets_worse_stays(prepare: Callable[[str], Pair]) -> None:
    """What came in is among the candidates."""
    decoder, reference = prepare("llama")
    before = [t.clone() for t in prefix_of(decoder)]
    tune_prefix(decoder, reference, CROPS[:16], PrefixTuningOptions(steps=6, lr=50.0, validate_every=1))
    assert all(torch.equal(new, old) for new, old in zip(prefix_of(decoder), before, strict=True))


def test_divergence_keeps_the_best(prepare: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, reference = pair = prepare("llama")
    start, before, compute, calls = prefix_of(decoder), unseen_loss(pair), module._loss, []

    def breaking(decoder: Decoder, reference: Decoder, ids: Tensor, error_weight: float) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return compute(decoder, reference, ids, error_weight) * (math.nan if sum(calls) == 31 else 1.0)

    monkeypatch.setattr(module, "_loss", breaking)
    notes: list[str] = []
    options = PrefixTuningOptions(steps=200, lr=0.03, validate_every=10)
    tune_prefix(decoder, reference, CROPS, options, note=notes.append)
    monkeypatch.undo()
    assert sum(calls) == 31 and "nan at step 31" in notes[0]
    assert unseen_loss(pair) < before and not torch.equal(prefix_of(decoder)[0], start[0])


def test_held_out_crops_do_not_train(prepare: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, reference = prepare("llama")
    compute, trained, judged = module._loss, [], []

    def watching(decoder: Decoder, reference: Decoder, ids: Tensor, error_weight: float) -> Tensor:
        (trained if torch.is_grad_enabled() else judged).extend(tuple(row) for row in ids.tolist())
        return compute(decoder, reference, ids, error_weight)

    monkeypatch.setattr(module, "_loss", watching)
    tune_prefix(decoder, reference, CROPS[:32], PrefixTuningOptions(steps=8, batch=7, validate_every=100))
    assert len(set(judged)) == 4 and len(set(trained)) == 28 and not set(judged) & set(trained)
    assert len(judged) == 8  # before and after


def test_quantization_error_can_be_part_of_the_loss(prepare: Callable[[str], Pair]) -> None:
    decoder, reference = prepare("llama")
    weights = [PrefixTuningOptions(error_weight=weight) for weight in (0.0, 10.0)]
    seen: list[Tensor] = []
    site = decoder.layers[1].mlp.down_input_quantizer
    handle = site.register_forward_hook(
        lambda m, args, out: seen.append(((out - args[0]) ** 2).mean() / args[0].square().mean())
    )
    with torch.no_grad():
        plain, weighed = (module._loss(decoder, reference, UNSEEN, options).item() for options in weights)
    handle.remove()
    assert 0.1 * 10 * seen[0].item() / 12 < weighed - plain  # this site's share of the mean over 12 sites, and more
    prefix = TrainedPrefix(decoder)
    gradients = []
    for options in weights:
        decoder.set_prefix(prefix.pairs())
        gradients.append(torch.autograd.grad(module._loss(decoder, reference, UNSEEN, options), prefix.delta))
    assert any((a - b).abs().max() > 1e-3 * a.abs().max() for a, b in zip(*gradients, strict=True))


def test_the_text_can_be_the_target(prepare: Callable[[str], Pair]) -> None:
    """The loss is then cross entropy of the text's tokens, and tuning lowers it on the crops that it holds out."""
    decoder, reference = prepare("llama")
    options, notes = PrefixTuningOptions(steps=12, batch=16, target="text"), list[str]()
    logits = full_logits(decoder, UNSEEN)
    by_hand = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), UNSEEN[:, 1:].flatten()).item()
    with torch.no_grad():
        assert module._loss(decoder, reference, UNSEEN, options).item() == pytest.approx(by_hand, rel=1e-5)
    tune_prefix(decoder, reference, CROPS, options, note=notes.append)
    before, after = (float(text) for text in notes[-1].removeprefix("prefix tuning: held-out loss ").split(" -> "))
    assert after < before


@pytest.mark.parametrize(("bits", "kv_bits", "lowest"), [(8, 4, 8), (4, 8, 4), (None, 4, 16)])
def test_bits_of_the_cache_are_none_of_activations(
    checkpoint_dir: Callable[[str], Path], bits: int | None, kv_bits: int, lowest: int
) -> None:
    """They choose the precision of products, and products read no codes of keys and values."""
    decoder = load_checkpoint(str(checkpoint_dir("llama"))).decoder
    for layer in decoder.layers:
        for site in SITES if bits else ():
            set_site_quantizer(layer, site, StaticQuantizer(torch.tensor(0.1), bits or 0))
        for site in KV_SITES:
            set_kv_quantizer(layer, site, torch.tensor([0.1]), kv_bits)
    assert module.lowest_activation_bits(decoder) == lowest


def test_tuning_depends_on_the_seed_alone(prepare: Callable[[str], Pair]) -> None:
    results = []
    for seed in (0, 0, 1):
        decoder, reference = prepare("llama")
        tune_prefix(decoder, reference, CROPS, PrefixTuningOptions(steps=4, validate_every=1, seed=seed))
        results.append(torch.cat([t.flatten() for t in prefix_of(decoder)]))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_bad_input_is_refused(prepare: Callable[[str], Pair]) -> None:
    decoder, reference = prepare("llama")
    with pytest.raises(PqExportError, match="at least 2 crops"):
        tune_prefix(decoder, reference, CROPS[:1])
    decoder.set_prefix(None)
    with pytest.raises(PqExportError, match="no prefix to tune"):
        tune_prefix(decoder, reference, CROPS)


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0},
        {"batch": 0},
        {"lr": 0.0},
        {"lr": math.inf},
        {"target": "nonsense"},
        {"error_weight": -1.0},
        {"gradient_norm": 0.0},
        {"validate_every": 0},
    ],
)
def test_bad_options_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(PqExportError, match=f"prefix tuning: {next(iter(bad))} "):
        PrefixTuningOptions(**bad)
