"""Sensitivity fallback: the linears that low bits hurt most keep 8 (QFeM: Yang et al., arXiv 2405.14428).

The unit is a site with the linears it feeds: one activation scale serves q, k and v, or gate and up. Sites
are ranked by the max/median ratio of their tokens, as QFeM does, or by the error that quantizing the site
alone makes in its block's output, per parameter it would cost, and taken until the budget is spent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pq_export.calib.block import StagedBlock, get_linear
from pq_export.calib.clip_search import search_weight
from pq_export.calib.fake_quant import StaticQuantizer, set_site_quantizer, site_quantizer
from pq_export.calib.outliers import hidden_states
from pq_export.calibration import SITE_OF_LINEAR, SITES
from pq_export.decoder import Decoder
from pq_export.errors import PqExportError
from pq_export.precision import Precision
from pq_export.quantizer import fake_quantize, scale_from_max

FALLBACK_BITS = 8
START_FACTOR = 0.7  # of the range: about where a search of 4-bit scales ends


@dataclass(frozen=True)
class Keep8BitOptions:
    """``budget``: largest share of the quantized parameters that keeps 8 bits. ``threshold``: of the ratio, when
    ranked by it. ``linears``: names such as ``layers.1.mlp.down_proj``, instead of a ranking.
    """

    by: Literal["ratio", "error"] = "error"
    budget: float = 0.05
    threshold: float = 16.0
    linears: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 <= self.budget <= 1.0:
            raise ValueError(f"budget must be between 0 and 1, not {self.budget}")
        if not self.threshold >= 0.0:
            raise ValueError(f"threshold must be at least 0, not {self.threshold}")


def linears_of(site: str) -> list[str]:
    """Linears that a site feeds."""
    return [name for name, of in SITE_OF_LINEAR.items() if of == site]


@torch.no_grad()
def keep_8bit(
    decoder: Decoder,
    crops: Tensor,
    ranges: dict[str, Tensor],
    precision: Precision,
    options: Keep8BitOptions,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[dict[str, int], dict[str, float]]:
    """Overrides (``layers.N.<linear or site>`` -> 8) and the score of every site.

    ``decoder`` in floating point with its prefix; ``crops`` [N, S]; ``ranges``: site -> max |x|.
    """
    if options.linears:
        return _overrides(_sites_of(decoder, options.linears), precision), {}
    if options.by == "ratio":
        scores = token_ratios(decoder, crops, progress)
        chosen = {site: score for site, score in scores.items() if score > options.threshold}
    else:
        scores = site_errors(decoder, crops, ranges, precision, progress)
        chosen = {site: score / _parameters(decoder, site) for site, score in scores.items()}
    left = options.budget * sum(_parameters(decoder, site) for site in scores)
    kept = []
    for site in sorted(chosen, key=lambda s: (-chosen[s], s)):
        if (cost := _parameters(decoder, site)) <= left:
            kept.append(site)
            left -= cost
    return _overrides(kept, precision), scores


def _sites_of(decoder: Decoder, linears: tuple[str, ...]) -> list[str]:
    known = {
        f"layers.{i}.{name}": f"layers.{i}.{s}"
        for i in range(len(decoder.layers))
        for name, s in SITE_OF_LINEAR.items()
    }
    for name in linears:
        if name not in known:
            raise PqExportError(f"no linear '{name}'", where="keep_8bit", cure="Names are like layers.1.mlp.down_proj.")
    return list(dict.fromkeys(known[name] for name in linears))


def _overrides(sites: list[str], precision: Precision) -> dict[str, int]:
    overrides: dict[str, int] = {}
    for site in sites:
        _, index, own = site.split(".", 2)
        if precision.activation_bits < FALLBACK_BITS:
            overrides[site] = FALLBACK_BITS
        if precision.weight_bits < FALLBACK_BITS:
            overrides |= {f"layers.{index}.{name}": FALLBACK_BITS for name in linears_of(own)}
    return overrides


def _parameters(decoder: Decoder, site: str) -> int:
    _, index, own = site.split(".", 2)
    return sum(get_linear(decoder.layers[int(index)], name).weight.numel() for name in linears_of(own))


def token_ratios(
    decoder: Decoder, crops: Tensor, progress: Callable[[int], None] = lambda done: None
) -> dict[str, float]:
    """``layers.N.<site>`` -> the largest token maximum over the median token maximum (QFeM, section 4.2)."""
    largest: dict[str, list[Tensor]] = {}
    handles = [
        site_quantizer(layer, site).register_forward_pre_hook(
            lambda module, args, name=f"layers.{index}.{site}": largest.setdefault(name, []).append(
                args[0].abs().amax(-1).flatten()
            )
        )
        for index, layer in enumerate(decoder.layers)
        for site in SITES
    ]
    try:
        _run(decoder, crops, progress)
    finally:
        for handle in handles:
            handle.remove()
    ratios = {name: torch.cat(parts) for name, parts in largest.items()}
    return {name: (r.max() / r.median().clamp_min(1e-12)).item() for name, r in ratios.items()}


def _run(decoder: Decoder, crops: Tensor, progress: Callable[[int], None]) -> None:
    for part in crops.split(4):
        hidden_states(decoder, part.to(decoder.embed_tokens.weight.device))
        progress(len(part))


def site_errors(
    decoder: Decoder,
    crops: Tensor,
    ranges: dict[str, Tensor],
    precision: Precision,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, float]:
    """``layers.N.<site>`` -> error of the block's output when only this site and its linears have low bits.

    Error energy over the energy of the stream that leaves the block: comparable between blocks.
    """
    ids = crops.to(decoder.embed_tokens.weight.device)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    rope, mask = decoder.context(positions, torch.ones_like(positions), 0)
    x, scores = decoder.embed(ids), {}
    for index, layer in enumerate(decoder.layers):
        staged = StagedBlock(layer, rope, mask)
        target, inputs = _inputs_of_sites(staged, x)
        for site in SITES:
            name = f"layers.{index}.{site}"
            scores[name] = _error_of_site(staged, x, target, site, inputs[site], ranges[name], precision)
        x = target
        progress(1)
    return scores


def _inputs_of_sites(staged: StagedBlock, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The block's output, and the inputs of its four sites."""
    context = staged.context(x)
    h = staged.residual(x, context)
    inner = staged.inner(h)
    norms = staged.layer.input_layernorm(x), staged.layer.post_attention_layernorm(h)
    return staged.output(h, inner), dict(zip(SITES, (norms[0], context, norms[1], inner), strict=True))


def _error_of_site(
    staged: StagedBlock, x: Tensor, target: Tensor, site: str, inputs: Tensor, peak: Tensor, precision: Precision
) -> float:
    layer, kept = staged.layer, {}
    flat = inputs.flatten(0, -2)
    gram = flat.T @ flat
    for name in linears_of(site):
        linear = get_linear(layer, name)
        kept[name] = linear.weight.data
        scale, _ = search_weight(linear.weight, gram, precision.weight_bits)
        linear.weight.data = fake_quantize(linear.weight, scale[:, None], precision.weight_bits)
    if precision.activation_bits < 16:
        scale = scale_from_max(peak.to(x.device), precision.activation_bits) * START_FACTOR
        set_site_quantizer(layer, site, StaticQuantizer(scale, precision.activation_bits))
    error = (staged.run(x) - target).square().mean() / target.square().mean()
    set_site_quantizer(layer, site, None)
    for name, weight in kept.items():
        get_linear(layer, name).weight.data = weight
    return error.item()
