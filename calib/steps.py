"""The steps that a recipe can name: in which phase each runs, what it needs, and what does the work.

The algorithms are in modules of their own; this is the list of them and the glue to a :class:`Run`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from pq_export.calib.block import Block
from pq_export.calib.center import CenterOptions, center, find_means
from pq_export.calib.clip_search import ClipSearchOptions, clip_search
from pq_export.calib.gptq import GptqOptions, gptq_block
from pq_export.calib.key_bits import KeyBitsOptions, choose_key_bits
from pq_export.calib.learned_rotation import RotationOptions, find_rotations, fold_rotations
from pq_export.calib.learned_rounding import LearnedRoundingOptions, learned_rounding
from pq_export.calib.observe import channel_peaks
from pq_export.calib.ranges import collect_ranges
from pq_export.calib.run import Run
from pq_export.calib.sensitivity import Keep8BitOptions, keep_8bit
from pq_export.calib.smooth import DOWN_SITE, SmoothOptions, find_smoothing, fold_smoothing
from pq_export.calib.smooth_attention import key_maxima, smooth_attention
from pq_export.calib.split_channels import SplitOptions, split_channels
from pq_export.calib.tune_blocks import TuneBlocksOptions, tune_blocks
from pq_export.calib.tune_model import TuneModelOptions, tune_model
from pq_export.calib.tune_prefix import PrefixTuningOptions, tune_prefix
from pq_export.calibration import SITE_OF_LINEAR
from pq_export.decoder import DecoderConfig
from pq_export.plan import Plan


class Phase(enum.IntEnum):
    """When a step runs. A recipe's steps stand in this order."""

    WEIGHTS = 1  # rewrites of the floating-point model, before the prefix KV is computed
    CENTER = 2  # offsets of the rewritten weights' activations
    PRECISION = 3  # choices of bits, once ranges are known
    BLOCKS = 4  # block after block, all of the recipe's block steps on one before the next
    MODEL = 5  # on the whole quantized model


@dataclass(frozen=True)
class StepKind:
    """One kind of step.

    ``run`` takes (run, options) or, in the BLOCKS phase, (run, recent blocks, options), the block to quantize being
    the last; ``window`` is how many blocks it wants to see. ``after``: a step of one of these names must stand before
    it in the recipe. ``crops(options, plan)``: how many it works on. ``teacher``: it needs the floating-point model at
    the end. ``tokens(options, plan)``: how many it runs through all blocks, a backward pass counting twice.
    ``trouble(options, plan, config)``: why it cannot work with the rest of the plan, or nothing.
    """

    name: str
    phase: Phase
    options: type
    run: Callable[..., None]
    after: tuple[str, ...] = ()
    crops: Callable[[Any, Any], int] = lambda options, plan: plan.calib_samples
    teacher: bool = False
    window: Callable[[Any], int] = lambda options: 1
    trouble: Callable[[Any, Plan, DecoderConfig], str] = lambda options, plan, config: ""
    tokens: Callable[[Any, Any], float] = lambda options, plan: plan.calib_samples * plan.seq_len


@dataclass(frozen=True)
class SmoothAttentionOptions:
    """``alpha``: 0 leaves keys as they are, 1 gives all channel pairs of a head the same maximum."""

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha must be between 0 and 1, not {self.alpha}")


def _kept(run: Run, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of an earlier run, or computed and kept. What is folded must be what later results were found with.

    In the order of their names either way: folding one after the other rounds, so the order is part of the result.
    """
    found = run.work.load_tensors(name)
    if found is None:
        found = {key: tensor.cpu() for key, tensor in compute().items()}
        run.work.save_tensors(name, found)
    return dict(sorted(found.items()))


def _smooth_attention(run: Run, options: SmoothAttentionOptions) -> None:
    crops = run.calibration_crops
    with run.stages.stage("smooth attention", len(crops)) as advance:

        def compute() -> dict[str, Tensor]:
            return {str(i): peak for i, peak in enumerate(key_maxima(run.decoder, crops, progress=advance))}

        maxima = _kept(run, "smooth_attention", compute)
        smooth_attention(run.decoder, [maxima[str(i)] for i in range(len(maxima))], options.alpha)
        run.set_prefix()


def _smooth(run: Run, options: SmoothOptions) -> None:
    crops, decoder = run.calibration_crops, run.decoder
    judging, seen = crops[: run.plan.search_samples], crops[run.plan.search_samples :]
    # Judged on crops that the peaks are not of: what text to come does to them decides.
    seen = crops if len(seen) < len(judging) else seen
    with run.stages.stage("smooth", len(seen) + len(decoder.layers)) as advance:

        def compute() -> dict[str, Tensor]:
            peaks = channel_peaks(decoder, seen, options.sites, progress=advance)
            return find_smoothing(decoder, judging, run.plan.precision, peaks, options, advance)

        factors = _kept(run, "smooth", compute)
        fold_smoothing(run.decoder, factors)
        run.set_prefix()
    run.statistics["smooth"] = {"sites": sorted(factors)}


def _split_channels(run: Run, options: SplitOptions) -> None:
    crops, extra = run.calibration_crops, options.copies(run.decoder.config.intermediate_size)
    with run.stages.stage("split channels", len(crops)) as advance:
        peaks = _kept(run, "split_channels", lambda: channel_peaks(run.decoder, crops, (DOWN_SITE,), progress=advance))
        split_channels(run.decoder, peaks, extra)
        run.set_prefix()
    run.statistics["split_channels"] = {"intermediate_size": run.decoder.config.intermediate_size}


def _learn_rotations(run: Run, options: RotationOptions) -> None:
    crops, losses = run.calibration_crops, list[float]()
    with run.stages.stage("learn rotations", options.steps) as advance:

        def compute() -> dict[str, Tensor]:
            ranges, _ = collect_ranges(run.decoder, crops)
            note = run.stages.progress.warn
            matrices, curve = find_rotations(run.decoder, crops, ranges, run.plan.precision, options, advance, note)
            losses.extend(curve)
            return matrices

        fold_rotations(run.decoder, _kept(run, "learn_rotations", compute))
        run.set_prefix()
    run.rotation = replace(run.rotation, learned=tuple(sorted(options.learn)))
    run.statistics["learn_rotations"] = {"loss": losses}


def _center(run: Run, options: CenterOptions) -> None:
    crops, sites = run.calibration_crops, options.chosen(run.plan.precision)
    if not sites:
        return
    with run.stages.stage("center", len(crops)) as advance:
        center(run.decoder, _kept(run, "center", lambda: find_means(run.decoder, crops, sites, progress=advance)))
        run.set_prefix()


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
    progress = run.stages.progress
    learned_rounding(blocks[-1], options, run.plan.seed, progress.note, progress.warn)


def _clip_search(run: Run, blocks: list[Block], options: ClipSearchOptions) -> None:
    clip_search(blocks[-1], options, run.plan.search_samples, run.plan.search_length)


def _gptq(run: Run, blocks: list[Block], options: GptqOptions) -> None:
    gptq_block(blocks[-1], options, options.samples or run.plan.calib_samples)


def _tune_blocks(run: Run, blocks: list[Block], options: TuneBlocksOptions) -> None:
    progress = run.stages.progress
    tune_blocks(blocks[-options.window :], options, run.plan.seed, progress.note, progress.warn)


def _tune_model(run: Run, options: TuneModelOptions) -> None:
    tune_model(run, options)


def _tune_prefix(run: Run, options: PrefixTuningOptions) -> None:
    if not run.token_ids:
        run.stages.progress.warn("tune_prefix: this model has no prefix, nothing to tune")
        return
    assert run.reference is not None
    with run.stages.stage("tune prefix", options.steps) as advance:
        progress = run.stages.progress
        tune_prefix(run.decoder, run.reference, run.crops, options, advance, progress.note, progress.warn)


def _learning_tokens(passes: float) -> Callable[[Any, Any], float]:
    """``passes`` forward-equivalents of ``steps`` batches."""
    return lambda o, plan: passes * o.steps * o.batch * plan.seq_len


def _smooth_trouble(options: SmoothOptions, plan: Plan, config: DecoderConfig) -> str:
    if DOWN_SITE in options.sites and plan.rotate == "online":
        return f"cannot smooth {DOWN_SITE}, whose channels R4 mixes: use --rotate offline or none, or name other sites"
    return ""


def _split_trouble(options: SplitOptions, plan: Plan, config: DecoderConfig) -> str:
    return "cannot split channels that R4 mixes: use --rotate offline or none" if plan.rotate == "online" else ""


def _rotation_trouble(options: RotationOptions, plan: Plan, config: DecoderConfig) -> str:
    return "has no rotation to start from: use --rotate online or offline" if plan.rotate == "none" else ""


def _keep_trouble(options: Keep8BitOptions, plan: Plan, config: DecoderConfig) -> str:
    layers = plan.num_layers or config.num_layers
    known = {f"layers.{index}.{name}" for index in range(layers) for name in SITE_OF_LINEAR}
    unknown = [name for name in options.linears if name not in known]
    return f"names '{unknown[0]}', which is no linear: names are like layers.1.mlp.down_proj" if unknown else ""


SEARCH_RUNS = 40  # forward passes of a block that one block's scale search costs, measured
KINDS = (
    StepKind("smooth_attention", Phase.WEIGHTS, SmoothAttentionOptions, _smooth_attention),
    StepKind(
        "learn_rotations",
        Phase.WEIGHTS,
        RotationOptions,
        _learn_rotations,
        tokens=_learning_tokens(5),
        trouble=_rotation_trouble,
    ),
    StepKind("split_channels", Phase.WEIGHTS, SplitOptions, _split_channels, trouble=_split_trouble),
    StepKind("smooth", Phase.WEIGHTS, SmoothOptions, _smooth, trouble=_smooth_trouble),
    StepKind("center", Phase.CENTER, CenterOptions, _center),
    StepKind("keep_8bit", Phase.PRECISION, Keep8BitOptions, _keep_8bit, trouble=_keep_trouble),
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
