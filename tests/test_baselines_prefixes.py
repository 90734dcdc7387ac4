"""The prefix rules of QFeP and CushionCache on a model with one planted outlier token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pq_export.calib.baselines.cushioncache import CushionOptions, cushion_prefix, quantization_error
from pq_export.calib.baselines.qfep import QFePOptions, frequent_ids, qfep_prefix
from pq_export.calib.baselines.spikes import token_peaks
from pq_export.decoder import Decoder
from tests.conftest import BOS, PLANTED_CHANNEL, PLANTED_LAYER, PLANTED_TOKEN, VOCAB


@pytest.fixture(scope="module")
def crops() -> Tensor:
    generator = torch.Generator().manual_seed(9)
    ids = torch.randint(3, VOCAB, (5, 24), generator=generator)
    ids[ids == PLANTED_TOKEN] += 1
    ids[::2, 10] = PLANTED_TOKEN
    return ids


def test_peaks_are_those_of_the_mlp(tiny_decoder: Decoder, crops: Tensor) -> None:
    peaks = token_peaks(tiny_decoder, crops, batch=2)
    assert peaks.shape == (len(tiny_decoder.layers), *crops.shape)
    spiking = peaks[PLANTED_LAYER] > 64 * peaks[PLANTED_LAYER].median()
    assert torch.equal(spiking, crops == PLANTED_TOKEN)


def test_frequent_ids() -> None:
    crops = torch.tensor([[5, 5, 5, 9, 9, 4, 4, 1, 1, 1, 1]])
    assert frequent_ids(crops, 1, 3) == [5, 4, 9]  # of equals the smaller id
    assert frequent_ids(crops, None, 1) == [1]


def test_qfep_finds_the_planted_token_behind_bos(tiny_decoder: Decoder, crops: Tensor) -> None:
    options = QFePOptions(candidates=1, contexts=6)
    prefix = qfep_prefix(tiny_decoder, crops, BOS, options)
    assert len(prefix) == 3
    assert (prefix[0], prefix[2]) == (BOS, PLANTED_TOKEN)
    assert prefix[1] in frequent_ids(crops, BOS, 6)
    assert qfep_prefix(tiny_decoder, crops, None, options)[1] == PLANTED_TOKEN


def test_qfep_prefers_what_spikes_only_once(tiny_decoder: Decoder, crops: Tensor) -> None:
    """The chosen row has the largest ratio of first to second spike among all that could be chosen."""
    options = QFePOptions(candidates=2, contexts=8)
    _, context, candidate = qfep_prefix(tiny_decoder, crops, BOS, options)
    peaks = token_peaks(tiny_decoder, crops)
    layer = int((peaks.amax(-1) / peaks.median(-1).values).mean(1).argmax())

    def once(context: int, candidate: int) -> float:
        row = token_peaks(tiny_decoder, torch.tensor([[BOS, context, candidate, context, candidate]]))[layer, 0]
        return float(row[2] / row[4])

    chosen = once(context, candidate)
    assert all(once(other, candidate) <= chosen * (1 + 1e-5) for other in frequent_ids(crops, BOS, 8))


def test_quantization_error_leaves_the_prefix_out(tiny_decoder: Decoder, crops: Tensor) -> None:
    """A spike in the text widens the scale of all; the same token in the prefix is not measured."""
    quiet = crops[1:2, :10]
    loud = torch.cat((quiet, torch.tensor([[PLANTED_TOKEN]])), 1)
    base = quantization_error(tiny_decoder, (), quiet, 4)
    spiked = quantization_error(tiny_decoder, (), loud, 4)
    assert spiked > 1.5 * base
    assert quantization_error(tiny_decoder, (PLANTED_TOKEN,), quiet, 4) < (base + spiked) / 2
    assert quantization_error(tiny_decoder, (), quiet, 8) < 0.1 * base


def test_cushion_takes_what_lowers_the_error_most(tiny_decoder: Decoder, crops: Tensor) -> None:
    options = CushionOptions(candidates=6, max_tokens=1, samples=2, length=16, stop=2.0)
    (token,) = cushion_prefix(tiny_decoder, crops, BOS, 4, options)
    pool = [BOS, *frequent_ids(crops, BOS, 6)]
    errors = {t: quantization_error(tiny_decoder, (t,), crops[:2, :16], 4) for t in pool}
    assert token == min(pool, key=errors.__getitem__)


def test_cushion_stops_when_nothing_helps(tiny_decoder: Decoder, crops: Tensor) -> None:
    steps: list[int] = []
    options = CushionOptions(candidates=3, max_tokens=4, samples=1, length=8, stop=0.0)
    assert cushion_prefix(tiny_decoder, crops, BOS, 4, options, steps.append) == ()
    assert steps == [1]
    options = CushionOptions(candidates=3, max_tokens=2, samples=1, length=8, stop=2.0)
    assert len(cushion_prefix(tiny_decoder, crops, BOS, 4, options)) == 2


def test_planted_channel_is_where_the_spike_is(tiny_decoder: Decoder, crops: Tensor) -> None:
    seen: list[Tensor] = []
    module = tiny_decoder.layers[PLANTED_LAYER].mlp.down_rotation
    with module.register_forward_pre_hook(lambda m, args: seen.append(args[0])):
        peaks = token_peaks(tiny_decoder, crops[:1])
    assert seen[0][0, 10].abs().argmax() == PLANTED_CHANNEL
    assert peaks[PLANTED_LAYER, 0, 10] == seen[0][0, 10].abs().max()
