"""From a loaded checkpoint to a :class:`Calibration`: the stages in their order, each resumable."""

from __future__ import annotations

import copy
import json
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pq_export.calib.block import Block, install
from pq_export.calib.checkpoint import Checkpoint
from pq_export.calib.memory import memory_errors
from pq_export.calib.outliers import choose_prefix, observe_outliers, prefix_bos
from pq_export.calib.ranges import collect_ranges
from pq_export.calib.recipe import StepError, kinds_and_options
from pq_export.calib.rewrites import rewrite
from pq_export.calib.run import Run
from pq_export.calib.steps import Phase, StepKind
from pq_export.calib.text import mixed_crops, read_texts, tokenize
from pq_export.calib.work import WorkDirectory
from pq_export.calibration import (
    ASSETS_NAME,
    KV_SITES,
    SITES,
    Calibration,
    Prefix,
    check_calibration,
    prefix_key,
    save_calibration,
)
from pq_export.errors import PqExportError
from pq_export.files import new_directory
from pq_export.plan import Plan
from pq_export.quantizer import pack_int4
from pq_export.stages import Stages

STAGES_NAME = "stages.json"
MORE_CROPS_SEED = 1000  # beyond the plan's seed: crops that only training steps see
Steps = list[tuple[StepKind, Any]]


@torch.no_grad()
def calibrate(checkpoint: Checkpoint, plan: Plan, output: Path, stages: Stages) -> Calibration:
    """Calibrate ``checkpoint`` and write the result to ``output``; its decoder is consumed (rewritten).

    Interrupted, it leaves ``<output>.work`` and goes on from there when called again with the same plan.
    """
    with memory_errors(stages):
        run = begin(checkpoint, plan, WorkDirectory(output, plan.fingerprint(checkpoint.source.sha256)), stages)
        quantize_decoder(run)
    calibration = assemble(run)
    check_calibration(calibration, output)
    with new_directory(output) as directory:
        save_calibration(calibration, directory)
        save_assets(checkpoint, directory / ASSETS_NAME)
        (directory / STAGES_NAME).write_text(json.dumps(stages.to_list(), indent=1) + "\n", encoding="utf-8")
    run.work.remove()
    return calibration


def begin(checkpoint: Checkpoint, plan: Plan, work: WorkDirectory, stages: Stages) -> Run:
    """Read the calibration text and rewrite the weights. ``work`` is opened once both are known to fit."""
    torch.backends.cuda.matmul.allow_tf32 = False  # whatever the environment says: results are those of a CPU
    limit = checkpoint.decoder.config.max_position_embeddings
    if plan.seq_len > limit:
        raise PqExportError(
            f"--seq-len {plan.seq_len} is longer than the model's context of {limit}",
            where=checkpoint.source.name,
            cure=f"Use --seq-len {limit} or less.",
        )
    texts = {name: tokenize(checkpoint.tokenizer, text) for name, text in read_texts(plan.calib_data).items()}
    steps = kinds_and_options(plan)
    for kind, options in steps:
        if trouble := kind.trouble(options, plan, checkpoint.decoder.config):
            raise StepError(f"step '{kind.name}' {trouble}", step=kind.name)
    # Drawn apart, so that ranges and Hessians see the same crops whatever a later step trains on.
    own = max(plan.calib_samples, plan.search_samples)
    more = max(kind.crops(options, plan) for kind, options in steps) - own
    parts = [mixed_crops(texts, own, plan.seq_len, plan.seed)]
    if more > 0:
        parts.append(mixed_crops(texts, more, plan.seq_len, plan.seed + MORE_CROPS_SEED))
    crops = torch.cat(parts)
    for name, tokens in texts.items():
        if len(tokens) // plan.seq_len < len(crops) // len(texts):
            stages.progress.warn(f"{name} has {len(tokens):,} tokens: some of its {plan.seq_len}-token crops overlap")
    work.open()
    smoothed = any(kind.name == "smooth_attention" for kind, _ in steps)
    with stages.stage("rewrite weights"):
        # R3 serves 4-bit keys and nothing else, and SmoothAttention stands in for it.
        r3 = plan.precision.kv_bits == 4 and not smoothed
        rotation = rewrite(checkpoint.decoder, plan.rotate, plan.seed, stages.progress.note, r3=r3)
    return Run(checkpoint, plan, stages, work, crops, rotation)


def quantize_decoder(run: Run) -> None:
    """Find the prefix and take the plan's steps, in their phases: ``run.decoder`` is quantized in place."""
    steps = kinds_and_options(run.plan)

    def of(phase: Phase) -> Steps:
        return [(kind, options) for kind, options in steps if kind.phase is phase]

    _find_prefix(run)
    for kind, options in of(Phase.WEIGHTS):
        kind.run(run, options)
    for kind, options in of(Phase.CENTER):
        kind.run(run, options)
    _collect_ranges(run)
    kept = run.work.load("overrides")
    for kind, options in of(Phase.PRECISION) if kept is None else []:
        kind.run(run, options)
    if kept is not None:
        run.overrides, run.statistics = dict(kept["overrides"]), {**run.statistics, **kept["statistics"]}
    elif of(Phase.PRECISION):
        chosen = {name: run.statistics[name] for name in ("sensitivity", "key_bits") if name in run.statistics}
        run.work.save("overrides", {"overrides": run.overrides, "statistics": chosen})
    # Without a prefix tune_prefix does nothing, and needs nobody to follow.
    if any(kind.teacher and (run.token_ids or kind.name != "tune_prefix") for kind, _ in steps):
        run.reference = copy.deepcopy(run.decoder)
    _quantize_blocks(run, of(Phase.BLOCKS))
    for kind, options in of(Phase.MODEL):
        _model_step(run, kind, options)
    run.reference = None


def _find_prefix(run: Run) -> None:
    """Set the prefix token ids and the prefix KV; keep the statistics without prefix."""
    kept, crops = run.work.load("prefix"), run.calibration_crops
    with run.stages.stage("find outlier tokens", len(crops), reused=kept is not None) as advance:
        if kept is None:
            statistics = observe_outliers(run.decoder, crops, progress=advance)
            kept = {"statistics": statistics.to_dict(), "token_ids": list(_prefix_ids(run, statistics))}
            run.work.save("prefix", kept)
        token_ids = tuple(kept["token_ids"])
        limit = run.decoder.config.max_position_embeddings
        if len(token_ids) + run.plan.seq_len > limit:
            raise PqExportError(
                f"prefix of {len(token_ids)} tokens and --seq-len {run.plan.seq_len} exceed the "
                f"model's context of {limit}",
                cure="Use a smaller --seq-len.",
            )
        run.token_ids = token_ids
        run.set_prefix()
    run.statistics["outliers_before"] = kept["statistics"]


def _prefix_ids(run: Run, statistics: Any) -> tuple[int, ...]:
    tokenizer, prefix = run.checkpoint.tokenizer, run.plan.prefix
    if prefix == "none":
        return ()
    if prefix == "auto":
        return choose_prefix(statistics, prefix_bos(tokenizer))
    ids = tuple(tokenizer(prefix, add_special_tokens=False)["input_ids"])
    if not ids:
        raise PqExportError(
            f"--prefix {prefix!r} has no tokens in this vocabulary", cure="Use auto, none or other text."
        )
    return ids


def _collect_ranges(run: Run) -> None:
    kept, ranges, crops = run.work.load("ranges"), run.work.load_tensors("ranges"), run.calibration_crops
    reused = kept is not None and ranges is not None
    with run.stages.stage("collect ranges", len(crops), reused) as advance:
        if kept is None or ranges is None:
            ranges, statistics = collect_ranges(run.decoder, crops, progress=advance)
            kept = statistics.to_dict()
            run.work.save_tensors("ranges", ranges)
            run.work.save("ranges", kept)
    run.ranges = ranges
    run.statistics["outliers_after"] = kept


def _quantize_blocks(run: Run, steps: Steps) -> None:
    """Quantize block after block; later blocks see the quantized ones' output."""
    decoder, plan = run.decoder, run.plan
    samples, length = _stream_size(run, steps)
    ids = run.crops[:samples, :length].to(run.device)
    positions = torch.arange(length, device=ids.device)[None]
    context = decoder.context(positions, torch.ones_like(positions), 0)
    reference_x = x = decoder.embed(ids)
    window = max((kind.window(options) for kind, options in steps), default=1)
    recent: deque[Block] = deque(maxlen=window)
    # A layer's state is kept under the index of the last block that was quantized when it was made.
    tags: list[str] = (run.work.load("blocks") or {"tags": []})["tags"]
    kept = [run.work.load_layer(index, tag, ids.device) for index, tag in enumerate(tags)]
    usable = _usable(kept, tags)
    kept, tags = [*kept[:usable], *[None] * (len(decoder.layers) - usable)], tags[:usable]
    with run.stages.stage("quantize blocks", len(decoder.layers), reused=usable == len(decoder.layers)) as advance:
        if usable == len(decoder.layers):  # nothing will read the streams
            run.layers = [found for found in kept if found is not None]
            for index, (layer, found) in enumerate(zip(decoder.layers, run.layers, strict=True)):
                install(layer, found, run.bits(index))
                advance()
            return
        for index, layer in enumerate(decoder.layers):
            prefix = f"layers.{index}."
            own = {name.removeprefix(prefix): r for name, r in run.ranges.items() if name.startswith(prefix)}
            block = Block.of(index, layer, context, x, reference_x, run.bits(index), own)
            recent.append(block)
            found = kept[index]
            if found is not None:
                block.found = found
                install(layer, found, block.bits)
            else:
                for kind, options in steps:
                    kind.run(run, list(recent), options)
                block.found.error = block.measure_error(plan.search_samples)
                old, tags = tags, [*tags[:index], ""]
                for one in recent:
                    run.work.save_layer(one.index, str(index), one.found)
                    tags[one.index] = str(index)
                run.work.save("blocks", {"tags": tags})
                for one in list(recent)[:-1]:
                    run.work.drop_layer(one.index, old[one.index])
            run.layers.append(block.found)
            x, reference_x = block.staged().run(block.x), block.reference_y
            advance()


def _usable(kept: Sequence[object], tags: Sequence[str]) -> int:
    """How many of the first layers were kept in the state in which the next one found them.

    What follows a file that does not read back is made again, and so is what was trained together with it.
    """
    count = next((index for index, found in enumerate(kept) if found is None), len(kept))
    while any(int(tag) >= count for tag in tags[:count]):
        count -= 1
    return count


def _stream_size(run: Run, steps: Steps) -> tuple[int, int]:
    """Crops and tokens that must run through the blocks: as few as the steps need."""
    plan = run.plan
    if all(kind.name == "clip_search" for kind, _ in steps):
        return plan.search_samples, plan.search_length
    return max(kind.crops(options, plan) for kind, options in steps), plan.seq_len


def _model_step(run: Run, kind: StepKind, options: Any) -> None:
    """A step on the whole model. Its result is kept whole: scales and codes of all layers, and the prefix KV."""
    prefix = run.work.load_tensors(f"{kind.name}.prefix")
    layers = [run.work.load_layer(index, kind.name, run.device) for index in range(len(run.decoder.layers))]
    if prefix is None or any(found is None for found in layers) or run.work.load(kind.name) is None:
        kind.run(run, options)
        for index, found in enumerate(run.layers):
            run.work.save_layer(index, kind.name, found)
        run.work.save_tensors(f"{kind.name}.prefix", _prefix_tensors(run))
        run.work.save(kind.name, {"statistics": run.statistics.get(kind.name)})
        return
    with run.stages.stage(kind.name.replace("_", " "), reused=True):
        run.layers = [found for found in layers if found is not None]
        for index, (layer, found) in enumerate(zip(run.decoder.layers, run.layers, strict=True)):
            install(layer, found, run.bits(index))
            for which in ("key", "value") if run.token_ids else ():
                setattr(layer.self_attn, f"prefix_{which}", prefix[f"{index}.{which}"].to(run.device))
        run.statistics[kind.name] = (run.work.load(kind.name) or {}).get("statistics")


def _prefix_tensors(run: Run) -> dict[str, Tensor]:
    attentions = [layer.self_attn for layer in run.decoder.layers]
    pairs = [(a.prefix_key, a.prefix_value) for a in attentions]
    named = {f"{i}.{which}": t for i, pair in enumerate(pairs) for which, t in zip(("key", "value"), pair, strict=True)}
    return {name: tensor.cpu() for name, tensor in named.items() if tensor is not None}


def assemble(run: Run) -> Calibration:
    """The calibration of a run whose decoder is quantized."""
    decoder, plan, tokenizer, layers = run.decoder, run.plan, run.checkpoint.tokenizer, run.layers
    token_ids, rotation = run.token_ids, run.rotation
    tensors: dict[str, np.ndarray] = {}
    for name, parameter in decoder.named_parameters():
        if name in ("embed_tokens.weight", "lm_head.weight"):
            tensors[name] = _half(parameter, name)
        elif name.endswith((".bias", ".key_offset")) or "norm" in name:
            tensors[name] = parameter.detach().float().cpu().numpy()
    activation_scales: dict[str, float] = {}
    kv_scales: dict[str, tuple[float, ...]] = {}
    for index, found in enumerate(layers):
        bits = run.bits(index)
        for name, codes in found.codes.items():
            array = codes.cpu().numpy()
            tensors[f"layers.{index}.{name}.codes"] = pack_int4(array) if bits.weight[name] == 4 else array
            tensors[f"layers.{index}.{name}.scale"] = found.weight[name].float().cpu().numpy()
        # In a fixed order: results that were kept on disk come back in another one.
        activation_scales |= {f"layers.{index}.{s}": found.activation[s].item() for s in SITES if s in found.activation}
        kv_scales |= {f"layers.{index}.{s}": tuple(found.kv[s].tolist()) for s in KV_SITES if s in found.kv}
    key = prefix_key(tensors, token_ids, rotation, decoder.config)
    if token_ids:
        for index, layer in enumerate(decoder.layers):
            pair = (layer.self_attn.prefix_key, layer.self_attn.prefix_value)
            for which, tensor in zip(("key", "value"), pair, strict=True):
                assert tensor is not None
                tensors[f"layers.{index}.prefix.{which}"] = tensor[0].half().cpu().numpy()
    for statistics in (run.statistics["outliers_before"], run.statistics["outliers_after"]):
        if example := statistics["example"]:
            example["tokens"] = [tokenizer.decode([i]) for i in example["token_ids"]]
        statistics["tokens"] = [tokenizer.decode([i]) for i, _ in statistics["token_counts"]]
    return Calibration(
        source=run.checkpoint.source,
        decoder=decoder.config,
        precision=plan.precision,
        rotation=rotation,
        prefix=Prefix(token_ids, tuple(tokenizer.decode([i]) for i in token_ids), key),
        activation_scales=activation_scales,
        kv_scales=kv_scales,
        overrides=dict(sorted(run.overrides.items())),
        tensors=tensors,
        plan=plan.to_dict(),
        fingerprint=plan.fingerprint(run.checkpoint.source.sha256),
        bos_token_id=prefix_bos(tokenizer),
        statistics={
            **run.statistics,
            "layer_error": [found.error for found in layers],
            "clip_factors": [found.factors for found in layers],
        },
    )


def _half(parameter: Tensor, name: str) -> np.ndarray:
    half = parameter.detach().half()
    if not torch.isfinite(half).all():
        raise PqExportError("does not fit in FP16", where=name, cure="Try --rotate none.")
    return half.cpu().numpy()


def save_assets(checkpoint: Checkpoint, directory: Path) -> None:
    """Tokenizer, chat template, config and generation config, as a Hugging Face directory has them."""
    checkpoint.tokenizer.save_pretrained(directory)
    config = checkpoint.hf_config
    document = {k: v for k, v in config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    document["architectures"] = [checkpoint.source.architecture]
    (directory / "config.json").write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    checkpoint.generation_config.save_pretrained(directory)
