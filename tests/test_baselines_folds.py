"""SmoothQuant and OutlierTune: what they fold, and that the function stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pq_export.calib.baselines import smoothquant
from pq_export.calib.baselines.channels import NORM_SITES, norm_and_linears, observe_channels
from pq_export.calib.baselines.outliertune import fold_channel_scales
from pq_export.calib.baselines.smoothquant import choose_alpha, smooth, smoothing
from pq_export.calib.checkpoint import full_logits, load_checkpoint
from pq_export.calib.fake_quant import site_quantizer
from pq_export.calib.outliers import hidden_states
from pq_export.decoder import Decoder
from pq_export.errors import PqExportError
from pq_export.precision import Precision
from pq_export.quantizer import fake_quantize
from tests.conftest import VOCAB


@pytest.fixture(scope="module")
def crops() -> Tensor:
    return torch.randint(3, VOCAB, (6, 32), generator=torch.Generator().manual_seed(3))


def site_inputs(decoder: Decoder, crops: Tensor) -> dict[str, Tensor]:
    """``layers.N.<site>`` -> what the quantizer behind each norm reads [N, S, C]."""
    seen: dict[str, Tensor] = {}
    handles = [
        site_quantizer(layer, site).register_forward_pre_hook(
            lambda m, args, name=f"layers.{i}.{site}": seen.__setitem__(name, args[0])
        )
        for i, layer in enumerate(decoder.layers)
        for site in NORM_SITES
    ]
    hidden_states(decoder, crops)
    for handle in handles:
        handle.remove()
    return seen


def test_channel_ranges_are_the_true_ones(tiny_decoder: Decoder, crops: Tensor) -> None:
    ranges, inputs = observe_channels(tiny_decoder, crops, batch=4), site_inputs(tiny_decoder, crops)
    assert set(ranges) == set(inputs)
    assert len(ranges) == 2 * len(tiny_decoder.layers)
    for name, x in inputs.items():
        found = ranges[name]
        torch.testing.assert_close(found.low, x.amin((0, 1)))
        torch.testing.assert_close(found.high, x.amax((0, 1)))
        torch.testing.assert_close(found.peak, x.abs().amax((0, 1)))
        torch.testing.assert_close(found.center, ((x.amin(1) + x.amax(1)) / 2).mean(0))
        rows = {tuple(row.tolist()) for row in x.flatten(0, 1)}
        assert len(found.tokens) and all(tuple(row.tolist()) in rows for row in found.tokens)


def test_observing_leaves_no_hook_behind(tiny_decoder: Decoder, crops: Tensor) -> None:
    observe_channels(tiny_decoder, crops)
    assert not any(module._forward_pre_hooks for module in tiny_decoder.modules())


def test_smoothing_is_equation_4() -> None:
    peak, weights = torch.tensor([16.0, 1.0]), [torch.tensor([[0.5, 4.0]]), torch.tensor([[-1.0, 2.0]])]
    torch.testing.assert_close(smoothing(peak, weights, 0.5), torch.tensor([4.0, 0.5]))
    torch.testing.assert_close(smoothing(peak, weights, 1.0), peak)
    torch.testing.assert_close(smoothing(peak, weights, 0.0), 1 / torch.tensor([1.0, 4.0]))


def test_channels_that_are_never_used_stay_finite() -> None:
    s = smoothing(torch.tensor([0.0, 1.0]), [torch.zeros(2, 2)], 0.5)
    assert torch.isfinite(s).all() and (s > 0).all()


@pytest.mark.parametrize("family", ["llama", "llama-bias", "qwen3", "mistral"])
def test_smoothing_moves_range_into_weights_and_keeps_the_function(
    checkpoint_dir: Callable[[str], Path], crops: Tensor, family: str
) -> None:
    decoder = load_checkpoint(str(checkpoint_dir(family))).decoder
    before, reference = observe_channels(decoder, crops), full_logits(decoder, crops)
    columns = norm_and_linears(decoder.layers[0], "mlp.gate_up_input")[1][0].weight.abs().amax(0)
    smooth(decoder, before, 1.0)
    torch.testing.assert_close(full_logits(decoder, crops), reference, rtol=1e-3, atol=1e-4)
    after = observe_channels(decoder, crops)
    for name in before:  # at α = 1 every channel has range 1
        torch.testing.assert_close(after[name].peak, torch.ones_like(after[name].peak), rtol=1e-4, atol=1e-4)
    moved = norm_and_linears(decoder.layers[0], "mlp.gate_up_input")[1][0].weight.abs().amax(0)
    torch.testing.assert_close(moved / columns, before["layers.0.mlp.gate_up_input"].peak, rtol=1e-4, atol=1e-5)


def test_a_fold_that_forgets_the_norm_is_caught(
    tiny_decoder: Decoder, crops: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def only_weights(gain: torch.nn.Parameter, linears: list[torch.nn.Linear], s: Tensor) -> None:
        for linear in linears:
            linear.weight.data = linear.weight * s

    monkeypatch.setattr(smoothquant, "scale_channels", only_weights)
    with pytest.raises(PqExportError, match="SmoothQuant"):
        smooth(tiny_decoder, observe_channels(tiny_decoder, crops), 0.5)


def test_alpha_weighs_activations_against_weights(tiny_decoder: Decoder, crops: Tensor) -> None:
    """The side with fewer bits is the one whose range shrinks."""
    generator = torch.Generator().manual_seed(8)
    for layer in tiny_decoder.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data = torch.randn(norm.weight.shape, generator=generator).mul(1.5).exp()
    ranges = observe_channels(tiny_decoder, crops)
    few_for_activations, few_for_weights = Precision(8, 4, 8), Precision(4, 8, 8)
    assert choose_alpha(tiny_decoder, ranges, few_for_activations) > choose_alpha(tiny_decoder, ranges, few_for_weights)


@pytest.mark.parametrize("family", ["llama", "llama-bias", "qwen3"])
def test_outliertune_keeps_the_function(checkpoint_dir: Callable[[str], Path], crops: Tensor, family: str) -> None:
    decoder = load_checkpoint(str(checkpoint_dir(family))).decoder
    reference, ranges = full_logits(decoder, crops), observe_channels(decoder, crops)
    fold_channel_scales(decoder, ranges, 8)
    torch.testing.assert_close(full_logits(decoder, crops), reference, rtol=1e-3, atol=1e-4)
    assert decoder.layers[0].input_layernorm.bias is not None
    assert all(linear.bias is not None for linear in norm_and_linears(decoder.layers[0], "mlp.gate_up_input")[1])


def test_outliertune_is_a_per_channel_quantizer_with_scale_one(
    checkpoint_dir: Callable[[str], Path], crops: Tensor
) -> None:
    """Integers behind the shifted norm are those of ``(x - z) / s`` per channel, and each channel fills its range."""
    decoder = load_checkpoint(str(checkpoint_dir("llama"))).decoder
    plain, ranges = site_inputs(decoder, crops), observe_channels(decoder, crops)
    fold_channel_scales(decoder, ranges, 8)
    for name, x in site_inputs(decoder, crops).items():
        found = ranges[name]
        s = torch.maximum(found.high - found.center, found.center - found.low) / 127
        torch.testing.assert_close(x, (plain[name] - found.center) / s, rtol=1e-3, atol=2e-3)
        torch.testing.assert_close(x.abs().amax((0, 1)), torch.full_like(s, 127.0), rtol=1e-4, atol=1e-2)
        assert (fake_quantize(x, torch.tensor(1.0), 8) - x).abs().max() <= 0.51  # nothing is clipped
