"""SmoothQuant (Xiao et al., arXiv 2211.10438): move the range of activations into the weights.

Each channel j of a norm's output is divided by ``s_j = max|X_j|^α / max|W_j|^(1-α)`` (eq. 4) and the columns
of the linears that read it are multiplied by it. The division folds into the norm's gain, so nothing is left
to execute. As in the paper only the linears behind a norm are smoothed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pq_export.calib.baselines.channels import NORM_SITES, ChannelRange, norm_and_linears
from pq_export.calib.checkpoint import full_logits, probe_ids
from pq_export.calib.rewrites import assert_unchanged
from pq_export.decoder import Decoder
from pq_export.precision import Precision
from pq_export.quantizer import fake_quantize, scale_from_max

ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.9)  # the paper: 0.5 for OPT and BLOOM, up to 0.9 for others, found by a grid search
SMALLEST = 1e-5  # a channel or column that is never used must not divide by zero


def smoothing(peak: Tensor, weights: list[Tensor], alpha: float) -> Tensor:
    """``s`` [C] from max |X_j| ``peak`` [C] and the weights [out, C] that read the channels (eq. 4)."""
    columns = torch.stack([w.abs().amax(0) for w in weights]).amax(0).clamp_min(SMALLEST)
    return (peak.clamp_min(SMALLEST) ** alpha / columns ** (1.0 - alpha)).clamp_min(SMALLEST)


@torch.no_grad()
def choose_alpha(decoder: Decoder, ranges: dict[str, ChannelRange], precision: Precision) -> float:
    """The α of :data:`ALPHAS` with the least relative error of the smoothed linears, summed over layers.

    Errors are those of per-tensor activations and per-channel weights rounded to nearest, on sampled tokens.
    """
    losses = dict.fromkeys(ALPHAS, 0.0)
    for index, layer in enumerate(decoder.layers):
        for site in NORM_SITES:
            found, (_, linears) = ranges[f"layers.{index}.{site}"], norm_and_linears(layer, site)
            weights = [linear.weight for linear in linears]
            target = found.tokens @ torch.cat(weights).T
            for alpha in ALPHAS:
                s = smoothing(found.peak, weights, alpha)
                x_scale = scale_from_max((found.peak / s).max(), precision.activation_bits)
                x = fake_quantize(found.tokens / s, x_scale, precision.activation_bits)
                smoothed = torch.cat(weights) * s
                w_scale = scale_from_max(smoothed.abs().amax(1, keepdim=True), precision.weight_bits)
                w = fake_quantize(smoothed, w_scale, precision.weight_bits)
                error = (x @ w.T - target).square().sum() / target.square().sum().clamp_min(1e-30)
                losses[alpha] += error.item()
    return min(ALPHAS, key=lambda alpha: losses[alpha])


@torch.no_grad()
def smooth(decoder: Decoder, ranges: dict[str, ChannelRange], alpha: float) -> None:
    """Smooth every linear behind a norm, in place. Raises :class:`PqExportError` if the logits change."""
    ids = probe_ids(decoder.config.vocab_size).to(decoder.embed_tokens.weight.device)
    reference = full_logits(decoder, ids)
    for index, layer in enumerate(decoder.layers):
        for site in NORM_SITES:
            norm, linears = norm_and_linears(layer, site)
            s = smoothing(ranges[f"layers.{index}.{site}"].peak, [linear.weight for linear in linears], alpha)
            scale_channels(norm.weight, linears, s)
    assert_unchanged(full_logits(decoder, ids), reference, "SmoothQuant")


def scale_channels(gain: nn.Parameter, linears: list[nn.Linear], s: Tensor) -> None:
    """Divide a norm's gain [C] by ``s`` [C] and multiply the columns of its readers by it, in fp64."""
    gain.data = (gain.double() / s.double()).to(gain.dtype)
    for linear in linears:
        linear.weight.data = (linear.weight.double() * s.double()).to(linear.weight.dtype)
