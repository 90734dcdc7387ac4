"""Steps that learn: what they lower, what they leave alone, and that none ends worse than it began."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pq_export.calib.block import NORMS, Block, LayerScales, install
from pq_export.calib.checkpoint import full_logits, load_checkpoint
from pq_export.calib.fake_quant import CELL_MARGIN, StaticQuantizer, SteppedLinear, site_quantizer
from pq_export.calib.learned_rounding import LearnedRoundingOptions, SoftRoundedLinear, learned_rounding
from pq_export.calib.outliers import compute_prefix_kv
from pq_export.calib.pipeline import begin, quantize_decoder
from pq_export.calib.rewrites import rewrite
from pq_export.calib.run import Run
from pq_export.calib.trainable_layer import make_trainable, settle
from pq_export.calib.tune_blocks import TuneBlocksOptions, tune_blocks
from pq_export.calib.work import WorkDirectory
from pq_export.calibration import KV_SITES, SITE_OF_LINEAR, SITES
from pq_export.decoder import Decoder
from pq_export.plan import Plan
from pq_export.precision import Precision
from pq_export.stages import Silent, Stages
from tests.tiny_blocks import W4A4, output_error, random_ids, searched_blocks

SAMPLES, HELD_OUT = 16, slice(14, 16)
OPTIONS = TuneBlocksOptions(samples=SAMPLES, epochs=10, batch=4, weight_lr=1e-2, scale_lr=5e-3, norm_lr=5e-3)


@pytest.fixture
def make(tiny_decoder: Decoder) -> Callable[..., list[Block]]:
    """``make(count)``: searched blocks of the rewritten tiny model with a prefix; once a test."""
    rewrite(tiny_decoder, "online", 0)
    tiny_decoder.set_prefix(compute_prefix_kv(tiny_decoder, (77, 1)))

    def blocks(
        count: int = 1,
        precision: Precision = W4A4,
        overrides: dict[str, int] | None = None,
        samples: int = SAMPLES,
    ) -> list[Block]:
        return searched_blocks(tiny_decoder, random_ids(samples, 20), precision, count, overrides)

    return blocks


def tensors_of(found: LayerScales) -> dict[str, Tensor]:
    """Copies of everything that was found, by name."""
    groups = ("activation", "kv", "weight", "codes", "parameters")
    return {f"{group}/{name}": t.clone() for group in groups for name, t in getattr(found, group).items()}


def assert_same(found: LayerScales, before: dict[str, Tensor]) -> None:
    """Bit by bit; norms that were not there before have their weights unchanged."""
    after = tensors_of(found)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    for name in after.keys() - before.keys():
        assert name.startswith("parameters/") and bool((after[name] == 1).all()), name


def assert_plain(block: Block) -> None:
    """The layer has plain linears with the found weights, constant quantizers, and nothing that wants a gradient."""
    fresh = copy.deepcopy(block.reference)
    install(fresh, block.found, block.bits)
    for (name, ours), theirs in zip(block.layer.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(ours, theirs) and not ours.requires_grad, name
    assert not any(isinstance(m, (SteppedLinear, SoftRoundedLinear)) for m in block.layer.modules())
    with torch.no_grad():
        staged = block.staged()
        staged.layer = fresh
        assert torch.equal(block.staged().run(block.x), staged.run(block.x))


# --- make_trainable and settle ---------------------------------------------------------------------


@pytest.mark.parametrize("precision", [W4A4, Precision(8, 8, 8), Precision(4, 16, 16)], ids=str)
def test_without_training_nothing_changes(make: Callable[..., list[Block]], precision: Precision) -> None:
    (block,) = make(precision=precision, overrides={"layers.0.mlp.down_proj": 8})
    before, y = tensors_of(block.found), block.staged().run(block.x)
    trainable = make_trainable([(block.layer, block.reference, block.found, block.bits)])
    scales = 7 + (4 if precision.activation_bits < 16 else 0) + (2 if precision.kv_bits < 16 else 0)
    assert (len(trainable.steps), len(trainable.shifts), len(trainable.gains)) == (7, scales, 2)
    with torch.no_grad():
        assert torch.allclose(block.staged().run(block.x), y, atol=1e-6)
    settle(block.layer, block.reference, block.found, block.bits)
    assert_same(block.found, before)
    assert_plain(block)
    with torch.no_grad():
        assert torch.equal(block.staged().run(block.x), y)


def test_every_parameter_gets_a_gradient(make: Callable[..., list[Block]]) -> None:
    (block,) = make()
    trainable = make_trainable([(block.layer, block.reference, block.found, block.bits)])
    trainable.optimizer(1e-3, 1e-3, 1e-3, fused=False)
    assert len(trainable.all()) == 7 + (7 + 4 + 2) + 2
    with torch.enable_grad():
        (block.staged().run(block.x) - block.reference_y).square().mean().backward()
    for parameter in trainable.all():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 0
    others = {id(p) for p in trainable.all()}
    assert all(p.grad is None for p in block.layer.parameters() if id(p) not in others)
    assert all(p.grad is None for p in block.reference.parameters())


def test_settling_takes_what_was_trained(make: Callable[..., list[Block]]) -> None:
    (block,) = make()
    before = tensors_of(block.found)
    make_trainable([(block.layer, block.reference, block.found, block.bits)])
    with torch.no_grad():
        down = block.layer.get_submodule("mlp.down_proj")
        assert isinstance(down, SteppedLinear)
        down.steps += 40.0  # beyond the largest code
        down.shift += 0.5
        for site in ("mlp.down_input", "self_attn.key"):
            quantizer = site_quantizer(block.layer, site)
            assert isinstance(quantizer, StaticQuantizer)
            quantizer.shift -= 0.25
        block.layer.input_layernorm.weight *= 2.0
        y = block.staged().run(block.x)
    settle(block.layer, block.reference, block.found, block.bits)
    found = block.found
    assert found.codes["mlp.down_proj"].dtype == torch.int8 and bool((found.codes["mlp.down_proj"] == 7).all())
    factor = torch.tensor(0.5).exp()
    assert torch.allclose(found.weight["mlp.down_proj"], before["weight/mlp.down_proj"] * factor)
    for group, site in (("activation", "mlp.down_input"), ("kv", "self_attn.key")):
        scale = getattr(found, group)[site]
        assert scale.shape == before[f"{group}/{site}"].shape
        assert torch.allclose(scale, before[f"{group}/{site}"] * torch.tensor(-0.25).exp())
    first, second = (found.parameters[f"{name}.weight"] for name in NORMS)
    assert bool((first == 2).all()) and bool((second == 1).all())
    assert_plain(block)
    with torch.no_grad():
        assert torch.allclose(block.staged().run(block.x), y, atol=1e-5)


# --- tune_blocks -----------------------------------------------------------------------------------


def test_tuning_lowers_the_error_where_it_trains_and_where_it_does_not(make: Callable[..., list[Block]]) -> None:
    (block,) = make(samples=64)  # an eighth is held out
    trained, held_out = slice(0, 56), slice(56, 64)
    before, validated = output_error(block, trained), output_error(block, held_out)
    codes, notes = dict(block.found.codes), list[str]()
    options = TuneBlocksOptions(samples=64, epochs=12, batch=4, weight_lr=1e-2, scale_lr=5e-3, norm_lr=5e-3)
    tune_blocks([block], options, 0, notes.append)
    assert any(not torch.equal(block.found.codes[name], codes[name]) for name in codes)
    assert output_error(block, trained) < 0.85 * before
    assert output_error(block, held_out) < 0.95 * validated
    (note,) = notes
    match = re.fullmatch(r"layers 0\.\.0: validation error (\S+) -> (\S+)", note)
    assert match and float(match[2]) / float(match[1]) == pytest.approx(
        output_error(block, held_out) / validated, rel=0.01
    )
    assert_plain(block)


def test_tuning_is_repeatable_and_follows_the_seed(make: Callable[..., list[Block]]) -> None:
    (block,) = make()
    again, other = copy.deepcopy(block), copy.deepcopy(block)
    tune_blocks([block], OPTIONS, 0, lambda text: None)
    tune_blocks([again], OPTIONS, 0, lambda text: None)
    tune_blocks([other], OPTIONS, 1, lambda text: None)
    assert_same(again.found, tensors_of(block.found))
    assert any(not torch.equal(t, tensors_of(other.found)[name]) for name, t in tensors_of(block.found).items())


@pytest.mark.parametrize("seed", range(3))
def test_a_rate_that_only_spoils_ends_where_it_began(make: Callable[..., list[Block]], seed: int) -> None:
    """Too few steps and too large to diverge: the best validation was the first."""
    (block,) = make()
    before, error = tensors_of(block.found), output_error(block, HELD_OUT)
    options = TuneBlocksOptions(samples=SAMPLES, epochs=2, batch=8, weight_lr=2.0, scale_lr=0.5, norm_lr=0.5)
    tune_blocks([block], options, seed, lambda text: None)
    assert output_error(block, HELD_OUT) <= error
    assert_same(block.found, before)
    assert_plain(block)


@pytest.mark.parametrize(
    ("rates", "says"),
    [
        ({"scale_lr": 1e3}, "the loss is nan"),
        ({"weight_lr": 0.0, "scale_lr": 0.0, "norm_lr": 30.0}, "is over 4 times the first"),
    ],
)
def test_divergence_stops_keeps_the_last_good_block_and_says_so(
    make: Callable[..., list[Block]], rates: dict[str, float], says: str
) -> None:
    (block,) = make()
    before, error = tensors_of(block.found), output_error(block, HELD_OUT)
    notes: list[str] = []
    options = TuneBlocksOptions(samples=SAMPLES, epochs=8, batch=8, **rates)  # type: ignore[arg-type]
    tune_blocks([block], options, 0, notes.append)
    assert len(notes) == 2 and notes[0].startswith("layers 0..0: ") and says in notes[0], notes
    assert "the best state so far is kept" in notes[0]
    assert_same(block.found, before)
    assert_plain(block)
    assert output_error(block, HELD_OUT) == error


def test_without_a_rate_for_weights_codes_stay(make: Callable[..., list[Block]]) -> None:
    (block,) = make()
    before = tensors_of(block.found)
    tune_blocks([block], TuneBlocksOptions(samples=SAMPLES, epochs=3, batch=4, weight_lr=0.0), 0, lambda text: None)
    after = tensors_of(block.found)
    assert all(torch.equal(after[name], t) for name, t in before.items() if name.startswith("codes/"))
    assert not any(torch.equal(after[name], t) for name, t in before.items() if not name.startswith("codes/"))


def test_one_crop_and_batches_larger_than_the_data(make: Callable[..., list[Block]]) -> None:
    (block,) = make()
    error = output_error(block, slice(0, 1))
    tune_blocks([block], TuneBlocksOptions(samples=1, epochs=2, batch=8), 0, lambda text: None)
    assert output_error(block, slice(0, 1)) <= error
    assert_plain(block)


def test_two_blocks_are_trained_together(make: Callable[..., list[Block]]) -> None:
    """Against the output of the last; the later block then reads what the trained earlier one gives."""
    blocks = make(2)
    error, first = output_error(blocks[1], HELD_OUT), tensors_of(blocks[0].found)
    alone = copy.deepcopy(blocks[1])
    notes: list[str] = []
    tune_blocks(blocks, OPTIONS, 0, notes.append)
    tune_blocks([alone], OPTIONS, 0, lambda text: None)
    assert notes[0].startswith("layers 0..1: ")
    together = output_error(blocks[1], HELD_OUT)
    assert together < 0.95 * error and together < output_error(alone, HELD_OUT)
    assert any(not torch.equal(tensors_of(blocks[0].found)[name], t) for name, t in first.items())
    for block in blocks:
        assert_plain(block)
    with torch.no_grad():
        assert torch.equal(blocks[1].x, blocks[0].staged().run(blocks[0].x))


# --- learned rounding ------------------------------------------------------------------------------

ROUNDING = LearnedRoundingOptions(samples=SAMPLES, steps=60, batch=8, lr=3e-2)


def test_rounding_moves_codes_by_one_step_at_most(make: Callable[..., list[Block]]) -> None:
    (block,) = make(overrides={"layers.0.mlp.up_proj": 8})
    before, error = tensors_of(block.found), output_error(block)
    notes: list[str] = []
    learned_rounding(block, ROUNDING, 0, notes.append)
    moved = 0.0
    for name, codes in block.found.codes.items():
        change = codes.int() - before[f"codes/{name}"].int()
        assert change.abs().max() <= 1 and codes.dtype == torch.int8
        moved += change.abs().float().mean().item()
        # Only towards the other side of the original weight, or of the cell's edge nearest to it.
        original = block.reference.get_submodule(name).weight / block.found.weight[name][:, None]
        inside = original.abs() < 7.5
        assert ((codes - original).abs()[inside] <= 1.0 + 1e-5).all()
    assert moved > 0.01
    assert output_error(block) < 0.95 * error
    for name in ("weight", "activation", "kv"):
        assert all(torch.equal(tensors_of(block.found)[k], t) for k, t in before.items() if k.startswith(f"{name}/"))
    assert notes[0].startswith("layer 0: learned rounding: output error ")
    assert_plain(block)


@pytest.mark.parametrize("lr", [100.0, 1e30])
def test_rounding_that_is_not_better_is_not_taken(make: Callable[..., list[Block]], lr: float) -> None:
    (block,) = make()
    before, error = tensors_of(block.found), output_error(block)
    learned_rounding(block, LearnedRoundingOptions(SAMPLES, steps=3, batch=8, lr=lr), 0, lambda text: None)
    assert output_error(block) == error
    assert_same(block.found, before)
    assert_plain(block)


def test_rounding_that_diverges_says_so_and_changes_nothing(make: Callable[..., list[Block]]) -> None:
    (block,) = make()
    before = tensors_of(block.found)
    block.x = block.x.clone()
    block.x[0, 0, 0] = torch.nan  # whatever makes the loss NaN
    notes: list[str] = []
    learned_rounding(block, ROUNDING, 0, notes.append)
    assert "the loss is nan" in notes[0] and "the codes stay as they were" in notes[0]
    assert_same(block.found, before)


def test_a_soft_linear_starts_at_the_codes_and_ends_decided(make: Callable[..., list[Block]]) -> None:
    (block,) = make()
    name = "mlp.gate_proj"
    original, codes = block.reference.get_submodule(name), block.found.codes[name]
    assert isinstance(original, torch.nn.Linear)
    soft = SoftRoundedLinear(original.weight.detach(), codes, block.found.weight[name], None, 4)
    assert torch.equal(soft.codes().to(torch.int8), codes)
    steps = original.weight / block.found.weight[name][:, None]
    inside = (steps - codes).abs() < 0.5 - CELL_MARGIN
    assert torch.allclose((soft.floor + soft.share())[inside], steps[inside], atol=1e-5)
    with torch.no_grad():
        soft.variable.copy_(torch.where(soft.variable > 0, 50.0, -50.0))
    assert torch.equal(soft.share().unique(), torch.tensor([0.0, 1.0])) and soft.penalty(2.0) == 0.0
    x = torch.randn(3, original.in_features, generator=torch.Generator().manual_seed(0))
    weight = soft.codes() * block.found.weight[name][:, None]
    assert torch.allclose(soft(x), torch.nn.functional.linear(x, weight), atol=1e-5)


# --- tune_model ------------------------------------------------------------------------------------


@pytest.fixture
def tuned(
    checkpoint_dir: Callable[[str], Path], small_plan: Callable[..., Plan], tmp_path: Path
) -> Callable[..., tuple[Run, list[str]]]:
    """``tuned(steps)`` -> the run behind its last step, and its notes."""

    class Notes(Silent):
        def __init__(self) -> None:
            self.texts: list[str] = []

        def note(self, text: str) -> None:
            self.texts.append(text)

        def warn(self, text: str) -> None:
            self.texts.append(text)

    def make(options: dict[str, object] | None) -> tuple[Run, list[str]]:
        steps = (("clip_search", {}), *([("tune_model", options)] if options is not None else []))
        plan, notes = small_plan("w4a4", prefix="w77 w8 w9", steps=steps, calib_samples=12), Notes()
        work = WorkDirectory(tmp_path / f"out{len(list(tmp_path.iterdir()))}", "x")
        with torch.no_grad():
            run = begin(load_checkpoint(str(checkpoint_dir("llama"))), plan, work, Stages(notes))
            quantize_decoder(run)
        return run, notes.texts

    return make


@torch.no_grad()
def kl_by_hand(run: Run, original: Decoder, crops: Tensor) -> float:
    """Mean KL(floating point ‖ quantized) of the next-token distributions, both behind the prefix."""
    expected, actual = full_logits(original, crops).log_softmax(-1), full_logits(run.decoder, crops).log_softmax(-1)
    return (expected.exp() * (expected - actual)).sum(-1).mean().item()


@pytest.fixture
def original(checkpoint_dir: Callable[[str], Path]) -> Decoder:
    """The floating-point model, rewritten, with the prefix."""
    decoder = load_checkpoint(str(checkpoint_dir("llama"))).decoder
    rewrite(decoder, "online", 0)
    decoder.set_prefix(compute_prefix_kv(decoder, (77, 8, 9)))
    return decoder


QUICK_MODEL = {"samples": 12, "steps": 20, "batch": 4}


def test_tuning_the_model_lowers_the_divergence_on_crops_it_does_not_train_on(
    tuned: Callable[..., tuple[Run, list[str]]], original: Decoder
) -> None:
    (plain, _), (run, notes) = tuned(None), tuned(QUICK_MODEL)
    history = run.statistics["tune_model"]["validation_kl"]
    held_out = run.crops[11:12]  # a sixteenth of the samples, at least one
    assert len(run.crops) == 12 and len(history) == 11
    assert history[0] == pytest.approx(kl_by_hand(plain, original, held_out), rel=1e-3)
    assert min(history) == pytest.approx(kl_by_hand(run, original, held_out), rel=1e-3)
    assert min(history) < 0.95 * history[0] and not [text for text in notes if "tuning" in text]
    assert kl_by_hand(run, original, run.crops[:11]) < 0.97 * kl_by_hand(plain, original, run.crops[:11])
    assert run.reference is None
    for ours, theirs in zip(run.layers, plain.layers, strict=True):
        assert not any(torch.equal(ours.weight[name], theirs.weight[name]) for name in SITE_OF_LINEAR)


def test_tuning_the_model_without_a_rate_for_weights_keeps_codes(tuned: Callable[..., tuple[Run, list[str]]]) -> None:
    (plain, _), (run, _) = tuned(None), tuned({**QUICK_MODEL, "steps": 6, "weight_lr": 0})
    for ours, theirs in zip(run.layers, plain.layers, strict=True):
        assert all(torch.equal(ours.codes[name], theirs.codes[name]) for name in SITE_OF_LINEAR)
        assert not any(torch.equal(ours.weight[name], theirs.weight[name]) for name in SITE_OF_LINEAR)
        assert not any(torch.equal(ours.activation[site], theirs.activation[site]) for site in SITES)
        assert not any(torch.equal(ours.kv[site], theirs.kv[site]) for site in KV_SITES)


@pytest.mark.parametrize(
    ("rates", "says"),
    [
        ({"scale_lr": 1e3}, "the loss is nan"),
        ({"weight_lr": 0, "scale_lr": 0, "norm_lr": 30}, "over 4 times the first"),
    ],
)
def test_tuning_the_model_that_diverges_says_so_and_changes_nothing(
    tuned: Callable[..., tuple[Run, list[str]]], rates: dict[str, float], says: str
) -> None:
    (plain, _), (run, notes) = tuned(None), tuned({**QUICK_MODEL, "steps": 16, **rates})
    (note,) = [text for text in notes if "tuning" in text]
    assert note.startswith("end-to-end tuning: ") and says in note and "the best state so far is kept" in note
    for ours, theirs in zip(run.layers, plain.layers, strict=True):
        assert_same(ours, tensors_of(theirs))


def test_recomputing_activations_gives_the_same_model(tuned: Callable[..., tuple[Run, list[str]]]) -> None:
    (kept, _), (recomputed, _) = (tuned({**QUICK_MODEL, "steps": 4, "checkpoint": c}) for c in (False, True))
    for ours, theirs in zip(recomputed.layers, kept.layers, strict=True):
        assert_same(ours, tensors_of(theirs))
