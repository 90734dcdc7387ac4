"""One harness for our method and its rivals: the same text, the same weight rounding, the same evaluation.

A method rewrites the weights, chooses a prefix, places quantizers and has the weights rounded; what it leaves
is a decoder in memory, and that is what is evaluated. Only our own recipes can be exported.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from pq_export.calib.baselines.blocks import Place, Rounding, place_maxima, place_searched, quantize_blocks
from pq_export.calib.baselines.channels import observe_channels
from pq_export.calib.baselines.cushioncache import CushionOptions, cushion_prefix
from pq_export.calib.baselines.dynamic import DynamicKVQuantizer, DynamicQuantizer, place_dynamic, search_dynamic
from pq_export.calib.baselines.outliertune import fold_channel_scales
from pq_export.calib.baselines.qfep import qfep_prefix
from pq_export.calib.baselines.smoothquant import choose_alpha, smooth
from pq_export.calib.checkpoint import Checkpoint
from pq_export.calib.gptq import GptqOptions
from pq_export.calib.memory import memory_errors
from pq_export.calib.outliers import choose_prefix, compute_prefix_kv, observe_outliers, prefix_bos
from pq_export.calib.pipeline import begin, quantize_decoder
from pq_export.calib.ranges import Ranges, collect_ranges
from pq_export.calib.rewrites import rewrite
from pq_export.calib.text import mixed_crops, read_texts, tokenize
from pq_export.calib.work import WorkDirectory
from pq_export.decoder import Decoder
from pq_export.errors import PqExportError, UsageError
from pq_export.hadamard import HadamardTransform
from pq_export.plan import Plan
from pq_export.stages import Progress, Stages
from pq_export.validate.agreement import compare_logits
from pq_export.validate.perplexity import LogitsOf, torch_logits

ROUNDINGS = ("gptq", "rtn")
Steps = tuple[tuple[str, dict[str, Any]], ...]  # of our recipes, as a plan holds them
SEARCH: Steps = (("clip_search", {}),)
UNLEARNED = ("smooth_attention", "smooth", "center", "keep_8bit", "key_bits")  # what rivals with our pipeline get too


@dataclass(frozen=True)
class Candidate:
    """What a method leaves: a decoder, the prefix it has, and tokens to run in front where no KV is baked in.

    ``weights``: how they were rounded, or the steps of our recipe. ``overrides``: linears and sites with other bits
    than the precision's.
    """

    decoder: Decoder
    prefix: tuple[int, ...] = ()
    weights: str = ""
    run_prefix: bool = False
    overrides: int = 0

    @property
    def logits(self) -> LogitsOf:
        return torch_logits(self.decoder, self.prefix if self.run_prefix else ())


@dataclass(frozen=True)
class Row:
    """One line of the table. ``static``: None for floating point. ``online``: what is executed besides the model.

    ``ratio``: perplexity over the floating-point model's. ``kl``: nats a token from it; ``top1``: share of
    tokens with the same most likely one. ``seconds``: of calibration. ``tokens_per_second``: of the simulation.
    """

    method: str
    title: str
    paper: str
    precision: str
    static: bool | None
    online: tuple[str, ...]
    prefix: tuple[str, ...]
    weights: str
    perplexity: float
    ratio: float
    kl: float
    top1: float
    seconds: float
    tokens_per_second: float


class Arena:
    """What all methods of one comparison share: the checkpoint, the plan, crops and our own prefix."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, rounding: str):
        self.checkpoint, self.plan = checkpoint, plan
        gptq = next((options for name, options in plan.steps if name == "gptq"), {})
        options = GptqOptions(**gptq) if rounding == "gptq" else None
        self.rounding = Rounding(options, plan.search_samples, plan.search_length)

    @cached_property
    def crops(self) -> Tensor:
        """Calibration crops [N, S] int64."""
        tokenizer, plan = self.checkpoint.tokenizer, self.plan
        texts = {name: tokenize(tokenizer, text) for name, text in read_texts(plan.calib_data).items()}
        return mixed_crops(texts, plan.calib_samples, plan.seq_len, plan.seed)

    @cached_property
    def bos(self) -> int | None:
        return prefix_bos(self.checkpoint.tokenizer)

    def own_prefix(self, stages: Stages) -> tuple[int, ...]:
        """The prefix that the plan's option asks for, found by our rule where that is ``auto``."""
        if self.plan.prefix == "none":
            return ()
        if self.plan.prefix != "auto":
            return tuple(tokenize(self.checkpoint.tokenizer, self.plan.prefix).tolist())
        with stages.stage("find outlier tokens", len(self.crops)) as advance:
            return choose_prefix(observe_outliers(self.checkpoint.decoder, self.crops, progress=advance), self.bos)

    def decoder(self) -> Decoder:
        """A copy of the floating-point model to be quantized."""
        return copy.deepcopy(self.checkpoint.decoder)

    def static_blocks(self, decoder: Decoder, place: Place, rounding: Rounding, stages: Stages) -> Candidate:
        """Quantize ``decoder`` with the static quantizers that ``place`` makes of the ranges of its sites."""
        with stages.stage("collect ranges", len(self.crops)) as advance:
            ranges, _ = collect_ranges(decoder, self.crops, progress=advance)
        return self._blocks(decoder, ranges, place, rounding, stages)

    def dynamic_blocks(self, decoder: Decoder, place: Place, stages: Stages) -> Candidate:
        """Quantize ``decoder`` with the dynamic quantizers of ``place``."""
        return self._blocks(decoder, {}, place, self.rounding, stages)

    def _blocks(self, decoder: Decoder, ranges: Ranges, place: Place, rounding: Rounding, stages: Stages) -> Candidate:
        with stages.stage("quantize blocks", len(decoder.layers)) as advance:
            quantize_blocks(decoder, self.crops, self.plan.precision, ranges, place, rounding, advance)
        return Candidate(decoder, weights="rtn" if rounding.gptq is None else "gptq")

    def with_plan(self, plan: Plan) -> Arena:
        """The same comparison under another plan of ours."""
        return Arena(self.checkpoint, plan, "rtn" if self.rounding.gptq is None else "gptq")

    def recipe(self, stages: Stages, steps: Steps, prefix: tuple[int, ...] | None = None) -> Candidate:
        """Our own static pipeline with ``steps``, in memory; ``prefix`` replaces the one of the plan."""
        plan = replace(self.plan, steps=steps)
        with tempfile.TemporaryDirectory() as scratch:
            work = WorkDirectory(Path(scratch) / "compare", plan.fingerprint(self.checkpoint.source.sha256))
            if prefix is not None:  # what a finished prefix search would have left
                work.open()
                work.save("prefix", {"statistics": {}, "token_ids": list(prefix)})
            run = begin(replace(self.checkpoint, decoder=self.decoder()), plan, work, stages)
            quantize_decoder(run)
        taken = " + ".join(name for name, _ in steps)
        return Candidate(run.decoder, run.token_ids, taken, overrides=len(run.overrides))

    @property
    def common_steps(self) -> Steps:
        """Our recipe with the common weight rounding and without what learns."""
        gptq = next((step for step in self.plan.steps if step[0] == "gptq"), ("gptq", {}))
        before = tuple(step for step in self.plan.steps if step[0] in UNLEARNED)
        rounding = () if self.rounding.gptq is None else (gptq, ("clip_search", {"weights": False, "kv": False}))
        return *before, *SEARCH, *rounding


@dataclass(frozen=True)
class Method:
    """A rival or a control. ``static``: None for floating point. ``activations``: it needs fewer than 16 bits."""

    name: str
    title: str
    paper: str
    static: bool | None
    run: Callable[[Arena, Stages], Candidate]
    activations: bool = False


def _fp(arena: Arena, stages: Stages) -> Candidate:
    return Candidate(arena.checkpoint.decoder)


def _fp_prefix(arena: Arena, stages: Stages) -> Candidate:
    return Candidate(arena.checkpoint.decoder, arena.own_prefix(stages), run_prefix=True)


def _rtn(arena: Arena, stages: Stages) -> Candidate:
    return arena.static_blocks(arena.decoder(), place_maxima, replace(arena.rounding, gptq=None), stages)


def _quarot(arena: Arena, stages: Stages, place: Place) -> Candidate:
    decoder, plan = arena.decoder(), arena.plan
    with stages.stage("rewrite weights"):
        rewrite(decoder, "online", plan.seed, stages.progress.note, r3=plan.precision.kv_bits < 16)
    return arena.dynamic_blocks(decoder, place, stages)


def _quarot_fixed(arena: Arena, stages: Stages) -> Candidate:
    return _quarot(arena, stages, place_dynamic)


def _quarot_searched(arena: Arena, stages: Stages) -> Candidate:
    return _quarot(arena, stages, _searched_dynamic(arena))


def _searched_dynamic(arena: Arena) -> Place:
    return lambda block: search_dynamic(block, arena.plan.search_samples, arena.plan.search_length)


def _prefix_dynamic(arena: Arena, stages: Stages) -> Candidate:
    decoder, plan, prefix = arena.decoder(), arena.plan, arena.own_prefix(stages)
    with stages.stage("rewrite weights"):
        rewrite(decoder, plan.rotate, plan.seed, stages.progress.note, r3=plan.precision.kv_bits == 4)
    decoder.set_prefix(compute_prefix_kv(decoder, prefix) if prefix else None)
    return replace(arena.dynamic_blocks(decoder, _searched_dynamic(arena), stages), prefix=prefix)


def _smoothquant(arena: Arena, stages: Stages) -> Candidate:
    decoder, plan = arena.decoder(), arena.plan
    with stages.stage("smooth", len(arena.crops)) as advance:
        ranges = observe_channels(decoder, arena.crops, progress=advance)
        alpha = choose_alpha(decoder, ranges, plan.precision)
        stages.progress.note(f"alpha {alpha}")
        smooth(decoder, ranges, alpha)
    place = place_searched(plan.search_samples, plan.search_length)
    return arena.static_blocks(decoder, place, arena.rounding, stages)


def _outliertune(arena: Arena, stages: Stages) -> Candidate:
    decoder, plan = arena.decoder(), arena.plan
    with stages.stage("fold channel scales", len(arena.crops)) as advance:
        ranges = observe_channels(decoder, arena.crops, progress=advance)
        fold_channel_scales(decoder, ranges, plan.precision.activation_bits)
    place = place_searched(plan.search_samples, plan.search_length)
    return arena.static_blocks(decoder, place, arena.rounding, stages)


def _static(arena: Arena, stages: Stages) -> Candidate:
    return arena.recipe(stages, arena.common_steps, ())


def _qfep(arena: Arena, stages: Stages) -> Candidate:
    with stages.stage("find prefix by QFeP's rule"):
        prefix = qfep_prefix(arena.checkpoint.decoder, arena.crops, arena.bos)
    return arena.recipe(stages, arena.common_steps, prefix)


def _cushioncache(arena: Arena, stages: Stages) -> Candidate:
    options, bits = CushionOptions(), min(arena.plan.precision.activation_bits, 8)
    with stages.stage("find prefix by CushionCache's search", options.max_tokens) as advance:
        prefix = cushion_prefix(arena.checkpoint.decoder, arena.crops, arena.bos, bits, options, advance)
    return arena.recipe(stages, arena.common_steps, prefix)


def _prefixquant(arena: Arena, stages: Stages) -> Candidate:
    return arena.recipe(stages, arena.plan.steps)


def _prefixquant_rtn(arena: Arena, stages: Stages) -> Candidate:
    return arena.recipe(stages, SEARCH)


METHODS = {
    method.name: method
    for method in (
        Method("fp", "Floating point", "", None, _fp),
        Method("fp+prefix", "Floating point with our prefix", "", None, _fp_prefix),
        Method("rtn", "Static per tensor, round to nearest", "", True, _rtn),
        Method("smoothquant", "SmoothQuant, static per tensor", "2211.10438", True, _smoothquant, True),
        Method("outliertune", "OutlierTune, static per channel", "2406.18832", True, _outliertune, True),
        Method("static", "Ours without prefix", "", True, _static),
        Method("quarot", "QuaRot, dynamic per token", "2404.00456", False, _quarot_fixed),
        Method("quarot+clip", "QuaRot with searched clipping", "2404.00456", False, _quarot_searched),
        Method("qfep", "QFeP's prefix, ours else", "2405.14428", True, _qfep),
        Method("cushioncache", "CushionCache's prefix, ours else", "2406.12016", True, _cushioncache),
        Method("prefix+dynamic", "Our prefix, dynamic per token (O1)", "2410.05265", False, _prefix_dynamic),
        Method("prefixquant-rtn", "Ours, round to nearest", "2410.05265", True, _prefixquant_rtn),
        Method("prefixquant", "Ours, the recipe as it is", "2410.05265", True, _prefixquant),
    )
}


def find_methods(names: str | None, plan: Plan) -> list[Method]:
    """Methods of the comma-separated ``names`` in their order; ``None`` is all that the precision allows."""
    weight_only = plan.precision.activation_bits == 16
    if names is None:
        return [method for method in METHODS.values() if not (weight_only and method.activations)]
    chosen = list(dict.fromkeys(name.strip().lower() for name in names.split(",") if name.strip()))
    if not chosen:
        raise UsageError("--methods names no method", cure=f"There are: {', '.join(METHODS)}.")
    for name in chosen:
        if name not in METHODS:
            raise UsageError(f"--methods: unknown method '{name}'", cure=f"There are: {', '.join(METHODS)}.")
        if weight_only and METHODS[name].activations:
            raise UsageError(
                f"--methods: '{name}' is about quantized activations, which {plan.precision} has not",
                cure="Leave it out, or choose another precision.",
            )
    return [METHODS[name] for name in chosen]


def compare(
    checkpoint: Checkpoint, plan: Plan, methods: list[Method], windows: Tensor, rounding: str, stages: Stages
) -> list[Row]:
    """Run ``methods`` one after the other and evaluate each on ``windows`` [N, S] int64; a row for each.

    ``checkpoint`` stays as it is. ``rounding``, of :data:`ROUNDINGS`, is that of every method that does not
    name its own. A method that fails raises :class:`PqExportError` with its name.
    """
    arena, reference, rows = Arena(checkpoint, plan, rounding), torch_logits(checkpoint.decoder), list[Row]()
    fp = 0.0
    if methods[0].name != "fp":
        fp = compare_logits(reference, {"fp": reference}, windows)["fp"].perplexity
    for method in methods:
        own = Stages(_Titled(stages.progress, method.name))
        started = time.perf_counter()
        try:
            with memory_errors(own):
                candidate = method.run(arena, own)
        except PqExportError as error:
            where = f"method {method.name}" + (f", {error.where}" if error.where else "")
            raise type(error)(error.what, where=where, cure=error.cure) from None
        seconds = time.perf_counter() - started if method.static is not None else 0.0
        with memory_errors(own), own.stage("evaluate", len(windows)) as advance:
            logits = reference if candidate.decoder is checkpoint.decoder and not candidate.prefix else candidate.logits
            found = compare_logits(reference, {method.name: logits}, windows, advance)[method.name]
        fp = fp or found.perplexity
        own.progress.note(f"perplexity {found.perplexity:.3f}, KL {found.kl:.4f}, {seconds:.1f} s")
        rows.append(
            Row(
                method=method.name,
                title=method.title,
                paper=method.paper,
                precision=_precision(method, plan, candidate),
                static=method.static,
                online=online_operations(candidate.decoder),
                prefix=tuple(checkpoint.tokenizer.decode([token]) for token in candidate.prefix),
                weights=candidate.weights,
                perplexity=found.perplexity,
                ratio=found.perplexity / fp,
                kl=found.kl,
                top1=found.top1,
                seconds=seconds,
                tokens_per_second=found.tokens_per_second,
            )
        )
        del candidate, logits  # before the next method's copy is made
    return rows


def _precision(method: Method, plan: Plan, candidate: Candidate) -> str:
    if method.static is None:
        return "FP32"
    return f"{plan.precision} but {candidate.overrides}" if candidate.overrides else str(plan.precision)


def online_operations(decoder: Decoder) -> tuple[str, ...]:
    """What ``decoder`` executes that the floating-point model does not, besides constant quantizers."""
    layers: list[Any] = list(decoder.layers)
    names = {
        "R3": any(isinstance(layer.self_attn.k_rotation, HadamardTransform) for layer in layers),
        "R4": any(isinstance(layer.mlp.down_rotation, HadamardTransform) for layer in layers),
        "norm shift": any(layer.input_layernorm.bias is not None for layer in layers),
        "key shift": any(layer.self_attn.key_offset is not None for layer in layers),
        "token scales": any(isinstance(m, (DynamicQuantizer, DynamicKVQuantizer)) for m in decoder.modules()),
    }
    return tuple(name for name, there in names.items() if there)


class _Titled:
    """Progress whose titles begin with the method's name."""

    def __init__(self, progress: Progress, name: str):
        self._progress, self._name = progress, name

    def start(self, title: str, total: int | None) -> None:
        self._progress.start(f"{self._name}: {title}", total)

    def advance(self, steps: int = 1) -> None:
        self._progress.advance(steps)

    def note(self, text: str) -> None:
        self._progress.note(text)

    def warn(self, text: str) -> None:
        self._progress.warn(f"{self._name}: {text}")
