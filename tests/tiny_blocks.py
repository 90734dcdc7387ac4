"""Blocks of a tiny decoder as calibration stages them, for tests of block-wise steps."""

from __future__ import annotations

import torch
from torch import Tensor

from pq_export.calib.block import Block, LayerBits
from pq_export.calib.clip_search import ClipSearchOptions, clip_search
from pq_export.calib.ranges import collect_ranges
from pq_export.decoder import Decoder
from pq_export.precision import Precision
from tests.conftest import PLANTED_TOKEN, VOCAB

W4A4 = Precision(4, 4, 4)


def random_ids(count: int, length: int, seed: int = 0) -> Tensor:
    """Token ids [count, length] without special tokens and without the one that makes outliers."""
    ids = torch.randint(3, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))
    return torch.where(ids == PLANTED_TOKEN, PLANTED_TOKEN + 1, ids)


@torch.no_grad()
def searched_blocks(
    decoder: Decoder,
    ids: Tensor,
    precision: Precision = W4A4,
    count: int = 1,
    overrides: dict[str, int] | None = None,
    options: ClipSearchOptions | None = None,
) -> list[Block]:
    """The first ``count`` layers of ``decoder`` (rewritten, prefix set), scales searched, weights rounded to nearest.

    ``ids`` [N, S]. Each block reads what the quantized ones before it leave, as in a calibration.
    """
    ranges, _ = collect_ranges(decoder, ids)
    positions = torch.arange(ids.shape[1])[None]
    context = decoder.context(positions, torch.ones_like(positions), 0)
    x = reference_x = decoder.embed(ids).detach()
    blocks = []
    for index, layer in enumerate(decoder.layers[:count]):
        start = f"layers.{index}."
        own = {name.removeprefix(start): r for name, r in ranges.items() if name.startswith(start)}
        block = Block.of(index, layer, context, x, reference_x, LayerBits.of(precision, overrides, index), own)
        clip_search(block, options or ClipSearchOptions(), len(ids), ids.shape[1])
        blocks.append(block)
        x, reference_x = block.staged().run(x), block.reference_y
    return blocks


@torch.no_grad()
def output_error(block: Block, rows: slice = slice(None)) -> float:
    """Of the quantized block on the quantized stream against the floating-point stream: what tuning lowers."""
    target = block.reference_y[rows]
    return ((block.staged().run(block.x[rows]) - target).square().mean() / target.square().mean()).item()
