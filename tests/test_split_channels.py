"""Splitting channels: the function stays, ranges shrink, nothing is executed online."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pq_export.calib.checkpoint import full_logits, load_checkpoint
from pq_export.calib.observe import channel_peaks
from pq_export.calib.rewrites import rewrite
from pq_export.calib.smooth import DOWN_SITE
from pq_export.calib.split_channels import SplitOptions, count_copies, split_channels
from pq_export.calibration import Calibration
from pq_export.errors import PqExportError, UsageError
from pq_export.simulate import simulated_decoder
from tests.tiny_blocks import random_ids


@given(st.lists(st.floats(1e-3, 1e4), min_size=1, max_size=40), st.integers(0, 60))
def test_no_other_counts_have_a_smaller_peak(peaks: list[float], extra: int) -> None:
    """Any that lay below the largest share would need more copies than there are."""
    counts = count_copies(torch.tensor(peaks, dtype=torch.float64), extra)
    assert counts.min() >= 1 and counts.sum() == len(peaks) + extra
    top = max(peak / count for peak, count in zip(peaks, counts.tolist(), strict=True))
    below = top * (1 - 1e-9)
    assert sum(math.ceil(peak / below) for peak in peaks) > len(peaks) + extra


@pytest.mark.parametrize("family", ["llama", "llama-bias", "qwen3"])
def test_logits_stay_and_ranges_shrink(checkpoint_dir: Callable[[str], Path], family: str) -> None:
    decoder, ids = load_checkpoint(str(checkpoint_dir(family))).decoder, random_ids(6, 24)
    rewrite(decoder, "offline", seed=0)
    before, peaks = full_logits(decoder, ids), channel_peaks(decoder, ids, (DOWN_SITE,))
    split_channels(decoder, peaks, 32)
    assert decoder.config.intermediate_size == 96 + 32
    assert torch.allclose(full_logits(decoder, ids), before, atol=2e-4 * before.abs().max().item())
    for name, after in channel_peaks(decoder, ids, (DOWN_SITE,)).items():
        assert len(after) == 128
        assert after.max() < 0.8 * peaks[name].max()
        expected = (peaks[name] / count_copies(peaks[name], 32)).max()
        assert after.max() == pytest.approx(expected.item(), rel=1e-4)


def test_beside_r4_it_is_refused(
    checkpoint_dir: Callable[[str], Path], calibrations: Callable[..., Calibration]
) -> None:
    decoder = load_checkpoint(str(checkpoint_dir("llama"))).decoder
    rewrite(decoder, "online", seed=0)
    with pytest.raises(PqExportError, match="R4 mixes"):
        split_channels(decoder, channel_peaks(decoder, random_ids(2, 16), (DOWN_SITE,)), 32)
    with pytest.raises(UsageError, match="'split_channels' cannot split channels that R4 mixes"):
        calibrations("w8a8", steps=(("split_channels", {}), ("clip_search", {})))


def test_the_contract_has_the_new_size(calibrations: Callable[..., Calibration]) -> None:
    steps = (("split_channels", {"share": 0.3}), ("smooth", {}), ("clip_search", {}), ("gptq", {}))
    calibration = calibrations("w8a8", rotate="offline", steps=steps)
    assert calibration.decoder.intermediate_size == 128
    assert calibration.weight_codes("layers.1.mlp.down_proj").shape == (48, 128)
    assert simulated_decoder(calibration).layers[1].mlp.up_proj.codes.shape == (128, 48)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5])
def test_shares_that_are_wrong(share: float) -> None:
    with pytest.raises(ValueError, match="share"):
        SplitOptions(share=share)


def test_copies_are_a_multiple_of_32() -> None:
    assert SplitOptions().copies(1536) == 96
    assert SplitOptions().copies(96) == 32
