"""The steps that a recipe can name: in which phase each runs, what it needs, and what does the work.

The algorithms are in modules of their own; this is the list of them and the glue to a :class:`Run`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pq_export.calib.block import Block
from pq_export.calib.clip_search import ClipSearchOptions, clip_search
from pq_export.calib.gptq import GptqOptions, gptq_block
from pq_export.calib.run import Run
from pq_export.calib.tune_blocks import TuneBlocksOptions, tune_blocks
from pq_export.calib.tune_model import TuneModelOptions, tune_model


class Phase(enum.IntEnum):
    """When a step runs. A recipe's steps stand in this order."""

    WEIGHTS = 1  # rewrites of the floating-point model, before the prefix KV is computed
    PRECISION = 2  # choices of bits, once ranges are known
    BLOCKS = 3  # block after block, all of the recipe's block steps on one before the next
    MODEL = 4  # on the whole quantized model


@dataclass(frozen=True)
class StepKind:
    """One kind of step. ``after``: a step of one of these names must stand before it in the recipe.

    ``crops(options, plan)``: how many crops it works on. ``teacher``: it needs the floating-point model at
    the end. ``run`` takes (run, options) or, in the BLOCKS phase, (run, recent blocks, options), the block to
    quantize being the last.
    """

    name: str
    phase: Phase
    options: type
    run: Callable[..., None]
    after: tuple[str, ...] = ()
    crops: Callable[[Any, Any], int] = lambda options, plan: plan.calib_samples
    teacher: bool = False
    window: Callable[[Any], int] = lambda options: 1


def _clip_search(run: Run, blocks: list[Block], options: ClipSearchOptions) -> None:
    clip_search(blocks[-1], options, run.plan.search_samples, run.plan.search_length)


def _gptq(run: Run, blocks: list[Block], options: GptqOptions) -> None:
    gptq_block(blocks[-1], options, options.samples or run.plan.calib_samples)


def _tune_blocks(run: Run, blocks: list[Block], options: TuneBlocksOptions) -> None:
    tune_blocks(blocks[-options.window :], options, run.plan.seed, run.stages.progress.note)


def _tune_model(run: Run, options: TuneModelOptions) -> None:
    tune_model(run, options)


STEPS = {
    kind.name: kind
    for kind in (
        StepKind(
            "clip_search", Phase.BLOCKS, ClipSearchOptions, _clip_search, crops=lambda o, plan: plan.search_samples
        ),
        StepKind(
            "gptq",
            Phase.BLOCKS,
            GptqOptions,
            _gptq,
            after=("clip_search",),
            crops=lambda o, plan: o.samples or plan.calib_samples,
        ),
        StepKind(
            "tune_blocks",
            Phase.BLOCKS,
            TuneBlocksOptions,
            _tune_blocks,
            after=("clip_search",),
            crops=lambda o, plan: o.samples,
            window=lambda o: o.window,
        ),
        StepKind(
            "tune_model",
            Phase.MODEL,
            TuneModelOptions,
            _tune_model,
            after=("clip_search",),
            crops=lambda o, plan: o.samples,
            teacher=True,
        ),
    )
}
