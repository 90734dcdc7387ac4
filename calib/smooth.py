"""Per-channel smoothing in front of linears: flatten activations, let the weights carry their range.

SmoothQuant (Xiao et al., arXiv 2211.10438) divides channel j of a linear's input by ``s_j`` and multiplies its
column by it; OmniQuant (arXiv 2308.13137) adds the pair up_proj and down_proj. Here it works beside rotations,
in the basis that they leave, and α is chosen site by site, with "no smoothing" among the candidates::

    q/k/v_proj, gate/up_proj     input_layernorm, post_attention_layernorm gain / s
    o_proj                       v_proj rows (and bias) / s           (the query heads of a KV head share its s)
    down_proj                    up_proj rows (and bias) / s          (not with R4, which mixes the channels)

Nothing is executed online. It is what an accelerator that cannot afford R4 has against the outlier channels of
down_proj's input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pq_export.calib.block import StagedBlock, get_linear
from pq_export.calib.checkpoint import full_logits, probe_ids
from pq_export.calib.rewrites import assert_unchanged
from pq_export.calibration import SITE_OF_LINEAR
from pq_export.decoder import Attention, Decoder, DecoderLayer
from pq_export.errors import PqExportError
from pq_export.precision import Precision
from pq_export.quantizer import fake_quantize, scale_from_max

NORM_OF_SITE = {"self_attn.qkv_input": "input_layernorm", "mlp.gate_up_input": "post_attention_layernorm"}
O_SITE, DOWN_SITE = "self_attn.o_input", "mlp.down_input"
SMOOTHABLE = (*NORM_OF_SITE, O_SITE, DOWN_SITE)
ALPHAS = tuple(0.1 * i for i in range(11))
CLIP_FACTORS = (1.0, 0.8, 0.6, 0.45)  # of the range: a search of scales will clip too
SMALLEST = 1e-5  # of the largest: a channel that is never used must not divide by zero


@dataclass(frozen=True)
class SmoothOptions:
    """``sites`` to smooth. ``alphas``: how much of a channel's range may move into the weights; tried in turn on
    ``tokens`` of the search's crops. The range itself is of the other calibration crops, or of all where these are
    fewer than the search's.
    """

    sites: tuple[str, ...] = SMOOTHABLE
    alphas: tuple[float, ...] = ALPHAS
    tokens: int = 4096

    def __post_init__(self) -> None:
        if len(set(self.sites)) < len(self.sites):
            raise ValueError("a site stands twice in 'sites'")
        for site in self.sites:
            if site not in SMOOTHABLE:
                raise ValueError(f"site '{site}' cannot be smoothed; there are {', '.join(SMOOTHABLE)}")
        if not all(0.0 <= alpha <= 1.0 for alpha in self.alphas):
            raise ValueError(f"alphas must be between 0 and 1, not {list(self.alphas)}")
        if self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, not {self.tokens}")


@torch.no_grad()
def find_smoothing(
    decoder: Decoder,
    crops: Tensor,
    precision: Precision,
    peaks: dict[str, Tensor],
    options: SmoothOptions | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Tensor]:
    """``layers.N.<site>`` -> s [in] for the sites of ``decoder`` (floating point, prefix set) that gain from it.

    ``crops`` int64 [N, S] judge; ``peaks``: of :func:`pq_export.calib.observe.channel_peaks`, on as much text as
    there is: a channel whose largest values are not in it is made too large, and clipped later. Raises
    :class:`PqExportError` where R4 mixes the channels.
    """
    options = options or SmoothOptions()
    if DOWN_SITE in options.sites and not isinstance(decoder.layers[0].mlp.down_rotation, nn.Identity):
        raise PqExportError(
            "R4 mixes the channels of down_proj's input, which cannot be smoothed then",
            where="smooth",
            cure="Use --rotate offline or none, or leave mlp.down_input out of its sites.",
        )
    ids = crops.to(decoder.embed_tokens.weight.device)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    context = decoder.context(positions, torch.ones_like(positions), 0)
    x, found = decoder.embed(ids), dict[str, Tensor]()
    for index, layer in enumerate(decoder.layers):
        staged = StagedBlock(layer, *context)
        attended = staged.context(x)
        h = staged.residual(x, attended)
        inner = staged.inner(h)
        inputs = {
            "self_attn.qkv_input": layer.input_layernorm(x),
            "mlp.gate_up_input": layer.post_attention_layernorm(h),
            O_SITE: attended,
            DOWN_SITE: inner,
        }
        x = staged.output(h, inner)
        for site in options.sites:
            weights = [linear.weight for linear in _linears(layer, site)]
            tie = _of_kv_heads(layer.self_attn) if site == O_SITE else _free
            name, x_site = f"layers.{index}.{site}", inputs[site].flatten(0, -2)
            s = _best(x_site, torch.cat(weights), tie(peaks[name].to(x.device)), tie, precision, options)
            if s is not None:
                found[name] = s
        progress(1)
    return found


@torch.no_grad()
def fold_smoothing(decoder: Decoder, factors: dict[str, Tensor]) -> None:
    """Fold what :func:`find_smoothing` found, in place. Raises :class:`PqExportError` if the logits change.

    The prefix's values are divided with all others; compute the prefix KV again afterwards, for they are no longer
    FP16 values.
    """
    probe = probe_ids(decoder.config.vocab_size).to(decoder.embed_tokens.weight.device)
    reference = full_logits(decoder, probe)
    for name, s in factors.items():
        _, index, site = name.split(".", 2)
        _fold(decoder.layers[int(index)], site, s.to(probe.device))
    assert_unchanged(full_logits(decoder, probe), reference, "smooth")


def _linears(layer: DecoderLayer, site: str) -> list[nn.Linear]:
    return [get_linear(layer, name) for name, of in SITE_OF_LINEAR.items() if of == site]


def _free(peaks: Tensor) -> Tensor:
    return peaks


def _of_kv_heads(attention: Attention) -> Callable[[Tensor], Tensor]:
    """Maxima [H·D] over the query heads that read one KV head: their channels are one channel of the values."""
    groups, size = attention.num_kv_heads, attention.head_dim

    def tie(peaks: Tensor) -> Tensor:
        heads = peaks.view(groups, -1, size)
        return heads.amax(1, keepdim=True).expand_as(heads).reshape(-1)

    return tie


def _best(
    x: Tensor,
    weight: Tensor,
    peak: Tensor,
    tie: Callable[[Tensor], Tensor],
    precision: Precision,
    options: SmoothOptions,
) -> Tensor | None:
    """Factors s [in] with the least output error of the quantized linears, or None where nothing gains.

    ``x`` [tokens, in], of which a sample judges; ``weight`` [out, in], all linears of the site; ``peak`` [in]; ``tie``
    makes channels share a maximum.
    """
    columns = tie(weight.abs().amax(0))
    peak = peak.clamp_min(SMALLEST * peak.max())
    columns = columns.clamp_min(SMALLEST * columns.max())
    x = x[:: max(1, len(x) // options.tokens)]
    target = x @ weight.T
    best, least = None, _error(x, weight, target, peak.max(), precision)
    for alpha in options.alphas:
        s = peak**alpha / columns ** (1.0 - alpha)
        s = s / s.log().mean().exp()
        error = _error(x / s, weight * s, target, (peak / s).max(), precision)
        if error < least:
            best, least = s, error
    return best


def _error(x: Tensor, weight: Tensor, target: Tensor, peak: Tensor, precision: Precision) -> float:
    """Squared error of the output, weights rounded to nearest, activations at the best of a few scales of ``peak``."""
    bits = precision.weight_bits
    rounded = fake_quantize(weight, scale_from_max(weight.abs().amax(1, keepdim=True), bits), bits)
    if precision.activation_bits == 16:
        return (x @ rounded.T - target).square().sum().item()
    base = scale_from_max(peak, precision.activation_bits)
    inputs = (fake_quantize(x, base * factor, precision.activation_bits) for factor in CLIP_FACTORS)
    return min((q @ rounded.T - target).square().sum().item() for q in inputs)


def _fold(layer: DecoderLayer, site: str, s: Tensor) -> None:
    """Divide what writes the site's channels by ``s`` and multiply the columns that read them."""
    s = s.double()
    if site in NORM_OF_SITE:
        writers: list[Tensor] = [layer.get_parameter(f"{NORM_OF_SITE[site]}.weight")]
    else:
        writer = layer.mlp.up_proj if site == DOWN_SITE else layer.self_attn.v_proj
        writers = [writer.weight] if writer.bias is None else [writer.weight, writer.bias]
    written = _of_values(layer.self_attn, s) if site == O_SITE else s
    for parameter in writers:
        factor = written[:, None] if parameter.dim() == 2 else written
        parameter.data = (parameter.double() / factor).to(parameter.dtype)
    for linear in _linears(layer, site):
        linear.weight.data = (linear.weight.double() * s).to(linear.weight.dtype)
    if site == O_SITE and layer.self_attn.prefix_value is not None:
        values = layer.self_attn.prefix_value
        per_head = written.view(values.shape[1], 1, -1)
        layer.self_attn.prefix_value = (values.double() / per_head).to(values.dtype)


def _of_values(attention: Attention, s: Tensor) -> Tensor:
    """Factors [G·D] of the values' channels from those of o_proj's inputs [H·D]."""
    return s.view(attention.num_kv_heads, -1, attention.head_dim)[:, 0].flatten()
