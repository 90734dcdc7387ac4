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
from pq_export.calib.key_bits import KeyBitsOptions, choose_key_bits
from pq_export.calib.learned_rotation import RotationOptions, learn_rotations
from pq_export.calib.learned_rounding import LearnedRoundingOptions, learned_rounding
from pq_export.calib.ranges import collect_ranges
from pq_export.calib.run import Run
from pq_export.calib.sensitivity import Keep8BitOptions, keep_8bit
from pq_export.calib.smooth import SmoothOptions, smooth
from pq_export.calib.smooth_attention import key_maxima, smooth_attention
from pq_export.calib.tune_blocks import TuneBlocksOptions, tune_blocks
from pq_export.calib.tune_model import TuneModelOptions, tune_model
from pq_export.calib.tune_prefix import PrefixTuningOptions, tune_prefix


class Phase(enum.IntEnum):
    """When a step runs. A recipe's steps stand in this order."""

    WEIGHTS = 1  # rewrites of the floating-point model, before the prefix KV is computed
    PRECISION = 2  # choices of bits, once ranges are known
    BLOCKS = 3  # block after block, all of the recipe's block steps on one before the next
    MODEL = 4  # on the whole quantized model


@dataclass(frozen=True)
class StepKind:
    """One kind of step.

    ``run`` takes (run, options) or, in the BLOCKS phase, (run, recent blocks, options), the block to quantize being
    the last; ``window`` is how many blocks it wants to see. ``after``: a step of one of these names must stand before
    it in the recipe. ``crops(options, plan)``: how many it works on. ``teacher``: it needs the floating-point model at
    the end. ``tokens(options, plan)``: how many it runs through all blocks, a backward pass counting twice.
    """

    name: str
    phase: Phase
    options: type
    run: Callable[..., None]
    after: tuple[str, ...] = ()
    crops: Callable[[Any, Any], int] = lambda options, plan: plan.calib_samples
    teacher: bool = False
    window: Callable[[Any], int] = lambda options: 1
    tokens: Callable[[Any, Any], float] = lambda options, plan: plan.calib_samples * plan.seq_len


@dataclass(frozen=True)
class SmoothAttentionOptions:
    """``alpha``: 0 leaves keys as they are, 1 gives all channel pairs of a head the same maximum."""

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha must be between 0 and 1, not {self.alpha}")


def _smooth_attention(run: Run, options: SmoothAttentionOptions) -> None:
    with run.stages.stage("smooth attention", len(run.calibration_crops)) as advance:
        smooth_attention(run.decoder, key_maxima(run.decoder, run.calibration_crops, progress=advance), options.alpha)
        run.set_prefix()


def _smooth(run: Run, options: SmoothOptions) -> None:
    crops = run.calibration_crops[: run.plan.search_samples]
    with run.stages.stage("smooth", len(run.decoder.layers)) as advance:
        run.statistics["smooth"] = {"alpha": smooth(run.decoder, crops, run.plan.precision, options, advance)}


def _learn_rotations(run: Run, options: RotationOptions) -> None:
    crops = run.calibration_crops
    with run.stages.stage("learn rotations", options.steps) as advance:
        ranges, _ = collect_ranges(run.decoder, crops)
        note = run.stages.progress.note
        losses = learn_rotations(run.decoder, crops, ranges, run.plan.precision, options, advance, note)
        run.set_prefix()
    run.statistics["learn_rotations"] = {"loss": losses}


def _keep_8bit(run: Run, options: Keep8BitOptions) -> None:
    crops, decoder = run.calibration_crops[: run.plan.search_samples], run.decoder
    if run.plan.precision.weight_bits == 8:
        return
    with run.stages.stage("sensitivity", len(decoder.layers)) as advance:
        overrides, scores = keep_8bit(decoder, crops, run.ranges, run.plan.precision, options, advance)
    run.overrides |= overrides
    run.statistics["sensitivity"] = {"by": options.by, "scores": scores}


def _key_bits(run: Run, options: KeyBitsOptions) -> None:
    if run.plan.precision.kv_bits != 4:
        return
    crops = run.calibration_crops[: run.plan.search_samples]
    with run.stages.stage("key bits", len(run.decoder.layers)) as advance:
        overrides, moved = choose_key_bits(run.decoder, crops, run.ranges, options, advance)
    run.overrides |= overrides
    run.statistics["key_bits"] = {"attention_moved": moved}


def _learned_rounding(run: Run, blocks: list[Block], options: LearnedRoundingOptions) -> None:
    learned_rounding(blocks[-1], options, run.plan.seed, run.stages.progress.note)


def _clip_search(run: Run, blocks: list[Block], options: ClipSearchOptions) -> None:
    clip_search(blocks[-1], options, run.plan.search_samples, run.plan.search_length)


def _gptq(run: Run, blocks: list[Block], options: GptqOptions) -> None:
    gptq_block(blocks[-1], options, options.samples or run.plan.calib_samples)


def _tune_blocks(run: Run, blocks: list[Block], options: TuneBlocksOptions) -> None:
    tune_blocks(blocks[-options.window :], options, run.plan.seed, run.stages.progress.note)


def _tune_model(run: Run, options: TuneModelOptions) -> None:
    tune_model(run, options)


def _tune_prefix(run: Run, options: PrefixTuningOptions) -> None:
    assert run.reference is not None
    with run.stages.stage("tune prefix", options.steps) as advance:
        tune_prefix(run.decoder, run.reference, run.crops, options, advance, run.stages.progress.note)


def _learning_tokens(passes: float) -> Callable[[Any, Any], float]:
    """``passes`` forward-equivalents of ``steps`` batches."""
    return lambda o, plan: passes * o.steps * o.batch * plan.seq_len


SEARCH_RUNS = 40  # forward passes of a block that one block's scale search costs, measured
KINDS = (
    StepKind("smooth_attention", Phase.WEIGHTS, SmoothAttentionOptions, _smooth_attention),
    StepKind("learn_rotations", Phase.WEIGHTS, RotationOptions, _learn_rotations, tokens=_learning_tokens(5)),
    StepKind("smooth", Phase.WEIGHTS, SmoothOptions, _smooth),
    StepKind("keep_8bit", Phase.PRECISION, Keep8BitOptions, _keep_8bit),
    StepKind("key_bits", Phase.PRECISION, KeyBitsOptions, _key_bits),
    StepKind(
        "clip_search",
        Phase.BLOCKS,
        ClipSearchOptions,
        _clip_search,
        crops=lambda o, plan: plan.search_samples,
        tokens=lambda o, plan: SEARCH_RUNS * o.passes * plan.search_samples * plan.search_length,
    ),
    StepKind(
        "gptq",
        Phase.BLOCKS,
        GptqOptions,
        _gptq,
        after=("clip_search",),
        crops=lambda o, plan: o.samples or plan.calib_samples,
        tokens=lambda o, plan: 5 * (o.samples or plan.calib_samples) * plan.seq_len,
    ),
    StepKind(
        "learned_rounding",
        Phase.BLOCKS,
        LearnedRoundingOptions,
        _learned_rounding,
        after=("clip_search",),
        crops=lambda o, plan: o.samples,
        tokens=_learning_tokens(3),
    ),
    StepKind(
        "tune_blocks",
        Phase.BLOCKS,
        TuneBlocksOptions,
        _tune_blocks,
        after=("clip_search",),
        crops=lambda o, plan: o.samples,
        window=lambda o: o.window,
        tokens=lambda o, plan: 3 * o.window * o.epochs * o.samples * plan.seq_len,
    ),
    StepKind(
        "tune_model",
        Phase.MODEL,
        TuneModelOptions,
        _tune_model,
        after=("clip_search",),
        crops=lambda o, plan: o.samples,
        teacher=True,
        tokens=_learning_tokens(4),
    ),
    StepKind(
        "tune_prefix",
        Phase.MODEL,
        PrefixTuningOptions,
        _tune_prefix,
        after=("clip_search",),
        teacher=True,
        tokens=_learning_tokens(4),
    ),
)
STEPS = {kind.name: kind for kind in KINDS}
