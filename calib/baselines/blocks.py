"""Quantize a decoder block after block with whatever quantizers a method places, and one weight rounding for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pq_export.calib.block import Block, LayerBits
from pq_export.calib.clip_search import ClipSearchOptions, clip_search
from pq_export.calib.gptq import GptqOptions, gptq_block
from pq_export.calib.ranges import Ranges
from pq_export.calibration import KV_SITES, SITES
from pq_export.decoder import Decoder
from pq_export.precision import Precision
from pq_export.quantizer import scale_from_max

Place = Callable[[Block], None]


@dataclass(frozen=True)
class Rounding:
    """How weights become integers: GPTQ, or to nearest with a search of clipping factors (``gptq`` is None).

    ``samples`` and ``length``: crops and tokens that the search of clipping factors runs on; GPTQ takes all.
    """

    gptq: GptqOptions | None
    samples: int
    length: int


@torch.no_grad()
def quantize_blocks(
    decoder: Decoder,
    crops: Tensor,
    precision: Precision,
    ranges: Ranges,
    place: Place,
    rounding: Rounding,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Quantize ``decoder`` in place; its prefix, if any, stands in front of ``crops`` [N, S] int64.

    ``ranges``: what ``place`` needs of :func:`pq_export.calib.ranges.collect_ranges`; empty for dynamic scales.
    For each block ``place`` puts in the quantizers of inputs, keys and values, then its linears are rounded on
    the quantized inputs. Later blocks see the quantized ones' output.
    """
    if rounding.gptq is None:  # no step looks at more
        crops = crops[: rounding.samples, : rounding.length]
    ids = crops.to(decoder.embed_tokens.weight.device)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    context = decoder.context(positions, torch.ones_like(positions), 0)
    bits = LayerBits.of(precision)
    x = reference_x = decoder.embed(ids)
    for index, layer in enumerate(decoder.layers):
        name = f"layers.{index}."
        own = {key.removeprefix(name): value for key, value in ranges.items() if key.startswith(name)}
        block = Block.of(index, layer, context, x, reference_x, bits, own)
        place(block)
        round_weights(block, rounding)
        x, reference_x = block.staged().run(x), block.reference_y
        progress(1)


def round_weights(block: Block, rounding: Rounding) -> None:
    """Round all linears of a block whose quantizers are in place."""
    if rounding.gptq is not None:
        gptq_block(block, rounding.gptq, len(block.x))
    else:
        clip_search(block, ClipSearchOptions(kv=False, activations=False), rounding.samples, rounding.length)


def place_maxima(block: Block) -> None:
    """Static quantizers that reach the largest value seen: one scale a tensor, for 4-bit keys and values a head."""
    for site in SITES:
        if (bits := block.bits.activation[site]) < 16:
            block.set_activation(site, scale_from_max(block.ranges[site].to(block.x.device), bits))
    for site in KV_SITES:
        if (bits := block.bits.kv[site]) < 16:
            peak = block.ranges[site].to(block.x.device)
            block.set_kv(site, scale_from_max(peak if bits == 4 else peak.max()[None], bits))


def place_searched(samples: int, length: int) -> Place:
    """Static quantizers with the clipping factors of our own search, for rivals that leave clipping open."""
    options = ClipSearchOptions(weights=False)
    return lambda block: clip_search(block, options, samples, length)
