"""Batches, the forward pass with gradients, chunked losses and the guards of training."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pq_export.calib.checkpoint import full_logits
from pq_export.calib.outliers import compute_prefix_kv, hidden_states
from pq_export.calib.training import (
    BestKeeper,
    Diverged,
    DivergenceGuard,
    autocast,
    batches,
    cosine,
    kl_divergence,
    next_token_loss,
    run_layers,
    twin,
)
from pq_export.decoder import Decoder
from tests.conftest import VOCAB

IDS = torch.randint(0, VOCAB, (3, 17), generator=torch.Generator().manual_seed(5))


def test_batches_go_through_all_crops_before_any_returns() -> None:
    seen = torch.cat(list(batches(10, 4, 5, seed=0)))
    assert len(seen) == 20
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != list(range(10))


def test_batches_depend_on_the_seed_alone() -> None:
    one, same, other = (torch.cat(list(batches(50, 8, 6, seed))) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_a_batch_is_no_larger_than_what_there_is() -> None:
    assert [sorted(b.tolist()) for b in batches(3, 8, 2, 0)] == [[0, 1, 2]] * 2


def test_cosine() -> None:
    factor = cosine(100, floor=0.1)
    assert factor(0) == 1 and factor(50) == pytest.approx(0.55) and factor(100) == factor(200) == pytest.approx(0.1)


def test_autocast_leaves_a_cpu_alone() -> None:
    assert isinstance(autocast(torch.device("cpu")), contextlib.nullcontext)


@pytest.mark.parametrize("prefix", [(), (77, 3)])
@pytest.mark.parametrize("checkpoint", [True, False])
def test_run_layers(tiny_decoder: Decoder, checkpoint: bool, prefix: tuple[int, ...]) -> None:
    """The same numbers as without gradients, and the gradients of the plain forward pass."""
    decoder = tiny_decoder
    if prefix:
        with torch.no_grad():
            decoder.set_prefix(compute_prefix_kv(decoder, prefix))
    weight = decoder.layers[0].self_attn.k_proj.weight.requires_grad_(True)
    hidden = run_layers(decoder, IDS, checkpoint)
    assert torch.equal(hidden, hidden_states(decoder, IDS))
    (ours,) = torch.autograd.grad(decoder.logits(hidden).square().sum(), weight)
    positions = torch.arange(17).expand_as(IDS)
    logits = decoder(IDS, torch.ones_like(IDS), positions, decoder.empty_past(3))[0]
    (theirs,) = torch.autograd.grad(logits.square().sum(), weight)
    assert theirs.abs().max() > 1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_run_layers_takes_other_layers_and_embeddings(tiny_decoder: Decoder) -> None:
    start, seen = torch.ones(3, 17, 48, requires_grad=True), []

    def run(index: int, x: Tensor, rope: object, mask: Tensor) -> Tensor:
        seen.append(index)
        return x * (index + 2)

    hidden = run_layers(tiny_decoder, IDS, hidden=start, run=run)
    assert (hidden == 24).all() and seen == [0, 1, 2]
    hidden.sum().backward()
    assert start.grad is not None and (start.grad == 24).all()


@pytest.mark.parametrize("chunk", [7, 2048])
def test_kl_divergence_is_that_of_whole_logits(tiny_decoder: Decoder, chunk: int) -> None:
    decoder, generator = tiny_decoder, torch.Generator().manual_seed(0)
    reference = hidden_states(decoder, IDS)
    hidden = (reference + 0.3 * torch.randn(reference.shape, generator=generator)).requires_grad_(True)
    decoder.lm_head.weight.requires_grad_(True)
    head = decoder.logits
    p, q = head(reference).detach().flatten(0, 1).log_softmax(-1), head(hidden).flatten(0, 1).log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1).mean()
    ours = kl_divergence(reference, hidden, head, head, chunk)
    assert expected > 1e-3
    assert ours.item() == pytest.approx(expected.item(), rel=1e-4)
    tensors = (hidden, decoder.lm_head.weight)  # the reference's head is the same module, and must add nothing
    for a, b in zip(torch.autograd.grad(ours, tensors), torch.autograd.grad(expected, tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-7)
    assert kl_divergence(reference, reference, head, head).item() == pytest.approx(0, abs=1e-6)


def test_next_token_loss_is_that_of_whole_logits(tiny_decoder: Decoder) -> None:
    hidden = hidden_states(tiny_decoder, IDS).requires_grad_(True)
    logits = tiny_decoder.logits(hidden)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    ours = next_token_loss(hidden, IDS, tiny_decoder.logits, chunk=10)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(torch.autograd.grad(ours, hidden)[0], torch.autograd.grad(expected, hidden)[0])
    assert torch.equal(logits, full_logits(tiny_decoder, IDS))


def test_best_keeper_restores_the_best() -> None:
    keeper, parameter = BestKeeper(), torch.tensor([1.0], requires_grad=True)
    keeper.restore()
    assert parameter.item() == 1
    kept = []
    for loss, value in ((3.0, 10.0), (1.0, 20.0), (2.0, 30.0), (math.nan, 40.0), (1.0, 50.0)):
        parameter.data.fill_(value)
        kept.append(keeper.offer(loss, [parameter]))
    assert kept == [True, True, False, False, False] and keeper.loss == 1
    keeper.restore()
    assert parameter.item() == 20


def test_guard_stops_at_nan_and_at_a_lasting_rise() -> None:
    guard = DivergenceGuard(limit=4, patience=3)
    for loss in (1.0, 4.0, 5.0, 5.0, 1.0, 5.0, 5.0):  # never three in a row
        guard.check(loss)
    with pytest.raises(Diverged, match="at step 8 is over 4 times"):
        guard.check(5.0)
    for bad in (math.nan, math.inf):
        with pytest.raises(Diverged, match="at step 1"):
            DivergenceGuard().check(bad)


def test_a_twin_shares_tensors_and_nothing_else(tiny_decoder: Decoder) -> None:
    tiny_decoder.set_prefix(compute_prefix_kv(tiny_decoder, (77, 3)))
    copied = twin(tiny_decoder)
    for ours, theirs in zip(copied.parameters(), tiny_decoder.parameters(), strict=True):
        assert ours is theirs
    assert copied.layers[1].self_attn.prefix_key is tiny_decoder.layers[1].self_attn.prefix_key
    before = hidden_states(tiny_decoder, IDS)
    copied.layers[1].self_attn.o_proj = torch.nn.Linear(64, 48)
    copied.set_prefix(None)
    assert torch.equal(hidden_states(tiny_decoder, IDS), before)
    assert not torch.equal(hidden_states(copied, IDS), before)
