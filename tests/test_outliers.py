"""Outlier tokens, the prefix they make, and its keys and values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pq_export.calib.checkpoint import full_logits, load_checkpoint
from pq_export.calib.outliers import (
    OUTLIER_RATIO,
    OutlierStatistics,
    choose_prefix,
    compute_prefix_kv,
    hidden_states,
    observe_outliers,
    prefix_bos,
)
from pq_export.calib.rewrites import rewrite
from pq_export.decoder import Decoder
from pq_export.errors import PqExportError
from tests.conftest import BOS, PLANTED_LAYER, PLANTED_TOKEN, VOCAB, byte_tokenizer, word_tokenizer


def statistics(mean_counts: list[list[float]], tokens: dict[int, int]) -> OutlierStatistics:
    layers = len(mean_counts[0])
    return OutlierStatistics(torch.tensor(mean_counts), torch.zeros(layers), torch.zeros(layers), Counter(tokens))


# --- choose_prefix ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "outliers"),
    [
        ([[0.0, 1.0], [0.0, 1.0]], 1),
        ([[0.0, 1.0], [0.0, 2.0]], 2),  # mean 1.5 in layer 1
        ([[4.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]], 1),  # means 1 and 0.75: the max of means, not of counts
        ([[2.0, 2.0], [2.0, 3.0]], 3),
        ([[0.0, 0.0], [0.0, 1.0], [0.0, 0.0]], 1),  # mean 1/3 rounds up
    ],
)
def test_number_of_tokens_is_the_largest_mean_rounded_up(counts: list[list[float]], outliers: int) -> None:
    tokens = {10: 50, 11: 40, 12: 30, 13: 20, 14: 10}
    assert choose_prefix(statistics(counts, tokens), 1) == (*[10, 11, 12, 13, 14][:outliers], 1)


def test_most_frequent_first_and_ties_by_id() -> None:
    counts = [[4.0]]
    for order in ([30, 7, 22, 5], [5, 22, 7, 30], [22, 5, 30, 7]):
        tokens = {token: {30: 9, 7: 3, 22: 3, 5: 3}[token] for token in order}
        assert choose_prefix(statistics(counts, tokens), 1) == (30, 5, 7, 22, 1)
        assert choose_prefix(statistics([[2.0]], tokens), 1) == (30, 5, 1)


def test_bos_is_last_and_never_twice() -> None:
    assert choose_prefix(statistics([[2.0]], {1: 90, 10: 5, 11: 4}), 1) == (10, 11, 1)
    assert choose_prefix(statistics([[1.0]], {1: 90}), 1) == (1,)
    assert choose_prefix(statistics([[1.0]], {0: 90}), 0) == (0,)  # id 0 is a token like others


def test_no_outliers_leave_bos_alone() -> None:
    assert choose_prefix(statistics([[0.0, 0.0]] * 3, {}), 1) == (1,)


def test_outliers_at_position_0_alone_leave_bos_alone() -> None:
    assert choose_prefix(statistics([[1.0, 1.0]] * 3, {}), 1) == (1,)


def test_fewer_candidates_than_outliers() -> None:
    assert choose_prefix(statistics([[5.0]] * 2, {10: 8, 11: 8}), 1) == (10, 11, 1)


@pytest.mark.parametrize(("seen", "prefix"), [(1, (1,)), (2, (1,)), (3, (10, 1)), (30, (10, 1))])
def test_a_single_rare_candidate_is_noise(seen: int, prefix: tuple[int, ...]) -> None:
    """Rare: in less than a tenth of 30 samples."""
    assert choose_prefix(statistics([[1.0]] * 30, {10: seen}), 1) == prefix


def test_rare_candidates_in_company_are_kept() -> None:
    assert choose_prefix(statistics([[2.0]] * 30, {10: 1, 11: 1}), 1) == (10, 11, 1)


def test_without_bos_the_tokens_stand_alone() -> None:
    assert choose_prefix(statistics([[2.0]], {10: 5, 11: 4, 12: 3}), None) == (10, 11)
    assert choose_prefix(statistics([[0.0]], {}), None) == ()


def test_no_samples() -> None:
    assert choose_prefix(OutlierStatistics(torch.zeros(0, 2), torch.zeros(2), torch.zeros(2)), 1) == (1,)


# --- observe_outliers ------------------------------------------------------------------------------


def crops(planted: list[tuple[int, int]], count: int = 6, length: int = 32) -> torch.Tensor:
    """Random tokens with the planted one at the given (row, position)s and nowhere else."""
    ids = torch.randint(3, VOCAB, (count, length), generator=torch.Generator().manual_seed(0))
    ids[ids == PLANTED_TOKEN] += 1
    for row, position in planted:
        ids[row, position] = PLANTED_TOKEN
    return ids


def by_hand(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    """[N, layers, S] ratio of each token's largest down_proj input to the median, one crop at a time."""
    rows = []
    for crop in ids:
        seen: list[torch.Tensor] = []
        hooks = [
            layer.mlp.down_proj.register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0][0].abs().amax(-1)))
            for layer in decoder.layers
        ]
        full_logits(decoder, crop[None])
        for hook in hooks:
            hook.remove()
        rows.append(torch.stack([peak / peak.sort().values[(len(peak) - 1) // 2] for peak in seen]))
    return torch.stack(rows)


def test_finds_exactly_the_planted_token(tiny_decoder: Decoder) -> None:
    places = [(0, 5), (0, 9), (2, 31), (3, 1)]
    found = observe_outliers(tiny_decoder, crops(places), batch=4)
    assert found.token_counts == {PLANTED_TOKEN: 4}
    expected = torch.zeros(6, 3)
    for row, _ in places:
        expected[row, PLANTED_LAYER] += 1
    assert torch.equal(found.counts, expected)
    assert choose_prefix(found, BOS) == (PLANTED_TOKEN, BOS)


def test_position_0_counts_but_names_no_token(tiny_decoder: Decoder) -> None:
    found = observe_outliers(tiny_decoder, crops([(0, 0), (1, 0), (1, 4)]))
    assert found.counts[:, PLANTED_LAYER].tolist() == [1, 2, 0, 0, 0, 0]
    assert found.token_counts == {PLANTED_TOKEN: 1}
    alone = observe_outliers(tiny_decoder, crops([(row, 0) for row in range(6)]))
    assert alone.counts[:, PLANTED_LAYER].tolist() == [1] * 6 and not alone.token_counts
    assert choose_prefix(alone, BOS) == (BOS,)


def test_statistics_equal_a_plain_computation(tiny_decoder: Decoder) -> None:
    ids = crops([(0, 5), (4, 0), (5, 30)])
    ratios = by_hand(tiny_decoder, ids)
    found = observe_outliers(tiny_decoder, ids, batch=4)
    assert torch.equal(found.counts, (ratios > OUTLIER_RATIO).sum(-1).float())
    assert torch.allclose(found.max_ratio, ratios.amax((0, 2)), rtol=1e-4)
    assert found.max_ratio[PLANTED_LAYER] > 64 > found.max_ratio[0]
    row, layer, _ = (int(i[0]) for i in torch.where(ratios == ratios.max()))
    assert found.example["layer"] == layer == PLANTED_LAYER
    assert found.example["token_ids"] == ids[row].tolist()
    assert torch.allclose(torch.tensor(found.example["ratio"]), ratios[row, layer], rtol=1e-4)


def test_does_not_depend_on_the_batch_size(tiny_decoder: Decoder) -> None:
    ids = crops([(0, 5), (4, 0), (5, 30)])
    one, all_ = observe_outliers(tiny_decoder, ids, batch=1), observe_outliers(tiny_decoder, ids, batch=6)
    assert torch.equal(one.counts, all_.counts) and one.token_counts == all_.token_counts
    assert torch.allclose(one.max_ratio, all_.max_ratio, rtol=1e-4)


def test_progress_counts_samples_and_hooks_are_removed(tiny_decoder: Decoder) -> None:
    done: list[int] = []
    observe_outliers(tiny_decoder, crops([]), batch=4, progress=done.append)
    assert done == [4, 2]
    assert all(not layer.mlp.down_rotation._forward_pre_hooks for layer in tiny_decoder.layers)


def test_is_measured_before_the_online_hadamard(tiny_decoder: Decoder) -> None:
    """After R4 the outlier is spread over the channels; the definition looks before."""
    places = [(0, 5), (2, 9)]
    plain = observe_outliers(tiny_decoder, crops(places))
    rewrite(tiny_decoder, "online", seed=0)
    rotated = observe_outliers(tiny_decoder, crops(places))
    assert rotated.token_counts == {PLANTED_TOKEN: 2}
    assert torch.allclose(rotated.max_ratio, plain.max_ratio, rtol=1e-2)
    assert torch.allclose(rotated.max_value, plain.max_value, rtol=1e-2)


# --- prefix_bos ------------------------------------------------------------------------------------


def test_bos_of_a_tokenizer_that_has_one() -> None:
    assert prefix_bos(word_tokenizer()) == BOS
    assert prefix_bos(word_tokenizer(extra=("<|endoftext|>",))) == BOS


def test_bos_of_tokenizers_without_one() -> None:
    assert prefix_bos(word_tokenizer(bos=False, extra=("<|endoftext|>",))) == VOCAB - 1
    assert prefix_bos(word_tokenizer(bos=False)) == 2  # eos
    assert prefix_bos(word_tokenizer(bos=False, eos_token=None, pad_token="w9")) == 9
    assert prefix_bos(word_tokenizer(bos=False, eos_token=None)) is None


def test_bos_with_id_0_is_a_bos() -> None:
    assert prefix_bos(word_tokenizer(bos_token="<unk>")) == 0
    assert prefix_bos(byte_tokenizer()) == 0


# --- compute_prefix_kv -----------------------------------------------------------------------------


@pytest.mark.parametrize("rotated", [False, True])
def test_prefix_kv_is_the_cache_of_a_plain_forward(tiny_decoder: Decoder, rotated: bool) -> None:
    if rotated:
        rewrite(tiny_decoder, "online", seed=0)
    ids = (PLANTED_TOKEN, 17, BOS)
    pairs = compute_prefix_kv(tiny_decoder, ids)
    tokens = torch.tensor([ids])
    _, cache = tiny_decoder(tokens, torch.ones_like(tokens), torch.arange(3)[None], tiny_decoder.empty_past(1))
    assert len(pairs) == len(cache) == 3
    for pair, expected in zip(pairs, cache, strict=True):
        for tensor, plain in zip(pair, expected, strict=True):
            assert tensor.shape == (1, 2, 3, 16) and tensor.dtype == torch.float32
            assert torch.equal(tensor, tensor.half().float())  # FP16 holds it
            assert torch.equal(tensor, plain.half().float())


def test_prefix_kv_ignores_the_prefix_that_is_set(tiny_decoder: Decoder) -> None:
    first = compute_prefix_kv(tiny_decoder, (PLANTED_TOKEN, BOS))
    tiny_decoder.set_prefix(compute_prefix_kv(tiny_decoder, (5, 6, 7)))
    again = compute_prefix_kv(tiny_decoder, (PLANTED_TOKEN, BOS))
    assert all(torch.equal(a, b) for one, two in zip(first, again, strict=True) for a, b in zip(one, two, strict=True))


def test_prefix_kv_that_does_not_fit_fp16(tiny_decoder: Decoder) -> None:
    tiny_decoder.layers[1].self_attn.v_proj.weight.data *= 1e6
    with pytest.raises(PqExportError, match=r"layer 1.*FP16"):
        compute_prefix_kv(tiny_decoder, (PLANTED_TOKEN, BOS))


def test_hidden_states_are_those_of_the_whole_model(checkpoint_dir: Callable[[str], Path]) -> None:
    decoder = load_checkpoint(str(checkpoint_dir("qwen3"))).decoder
    ids = crops([], count=2, length=9)
    assert torch.allclose(decoder.logits(hidden_states(decoder, ids)), full_logits(decoder, ids), atol=1e-5)
