"""From a loaded checkpoint to a :class:`Calibration`: the stages in their order, each resumable."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pq_export.calib.checkpoint import Checkpoint
from pq_export.calib.clip_search import LayerScales, apply_layer, run_layer, search_layer
from pq_export.calib.outliers import choose_prefix, compute_prefix_kv, observe_outliers, prefix_bos
from pq_export.calib.ranges import collect_ranges
from pq_export.calib.rewrites import rewrite
from pq_export.calib.text import random_crops, read_text, tokenize
from pq_export.calib.work import WorkDirectory
from pq_export.calibration import (
    ASSETS_NAME,
    KV_SITES,
    SITES,
    Calibration,
    Prefix,
    Rotation,
    prefix_key,
    save_calibration,
)
from pq_export.decoder import Decoder
from pq_export.errors import PqExportError
from pq_export.files import new_directory
from pq_export.plan import Plan
from pq_export.quantizer import pack_int4
from pq_export.stages import Stages

STAGES_NAME = "stages.json"


@dataclass
class _Run:
    """State of one calibration while it goes."""

    checkpoint: Checkpoint
    plan: Plan
    stages: Stages
    work: WorkDirectory
    decoder: Decoder = field(init=False)

    def __post_init__(self) -> None:
        self.decoder = self.checkpoint.decoder


@torch.no_grad()
def calibrate(checkpoint: Checkpoint, plan: Plan, output: Path, stages: Stages) -> Calibration:
    """Calibrate ``checkpoint`` and write the result to ``output``; its decoder is consumed (rewritten).

    Interrupted, it leaves ``<output>.work`` and goes on from there when called again with the same plan.
    """
    limit = checkpoint.decoder.config.max_position_embeddings
    if plan.seq_len > limit:
        raise PqExportError(
            f"--seq-len {plan.seq_len} is longer than the model's context of {limit}",
            where=checkpoint.source.name,
            cure=f"Use --seq-len {limit} or less.",
        )
    tokens = tokenize(checkpoint.tokenizer, read_text(plan.calib_data))
    crops = random_crops(tokens, plan.calib_samples, plan.seq_len, plan.seed, plan.calib_data)
    work = WorkDirectory(output, plan.fingerprint(checkpoint.source.sha256))
    run = _Run(checkpoint, plan, stages, work)
    with stages.stage("rewrite weights") as _:
        rotation = rewrite(run.decoder, plan.rotate, plan.seed, stages.progress.note, r3=plan.precision.kv_bits == 4)
    token_ids, before = _find_prefix(run, crops)
    ranges, after = _collect_ranges(run, crops, token_ids)
    layers = _search(run, crops, ranges)
    calibration = _assemble(run, rotation, token_ids, layers, {"outliers_before": before, "outliers_after": after})
    with new_directory(output) as directory:
        save_calibration(calibration, directory)
        save_assets(checkpoint, directory / ASSETS_NAME)
        (directory / STAGES_NAME).write_text(json.dumps(stages.to_list(), indent=1) + "\n", encoding="utf-8")
    work.remove()
    return calibration


def _find_prefix(run: _Run, crops: Tensor) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Prefix token ids and the statistics without prefix; sets the prefix KV in the decoder."""
    kept = run.work.load("prefix")
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
        run.decoder.set_prefix(compute_prefix_kv(run.decoder, token_ids) if token_ids else None)
    return token_ids, kept["statistics"]


def _prefix_ids(run: _Run, statistics: Any) -> tuple[int, ...]:
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


def _collect_ranges(run: _Run, crops: Tensor, token_ids: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    kept, ranges = run.work.load("ranges"), run.work.load_tensors("ranges")
    reused = kept is not None and ranges is not None
    with run.stages.stage("collect ranges", len(crops), reused) as advance:
        if kept is None or ranges is None:
            ranges, statistics = collect_ranges(run.decoder, crops, progress=advance)
            kept = statistics.to_dict()
            run.work.save_tensors("ranges", ranges)
            run.work.save("ranges", kept)
    return ranges, kept


def _search(run: _Run, crops: Tensor, ranges: dict[str, Tensor]) -> list[LayerScales]:
    """Quantize block after block; later blocks see the quantized ones' output."""
    decoder, plan = run.decoder, run.plan
    ids = crops[: plan.search_samples, : plan.search_length].to(decoder.embed_tokens.weight.device)
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    rope, mask = decoder.context(positions, torch.ones_like(ids), 0)
    x, results = decoder.embed(ids), []
    kept = [run.work.load_layer(i, ids.device) for i in range(len(decoder.layers))]
    with run.stages.stage("search scales", len(decoder.layers), reused=all(k is not None for k in kept)) as advance:
        for index, layer in enumerate(decoder.layers):
            found = kept[index]
            if found is not None:
                apply_layer(layer, found, plan.precision)
                x = run_layer(layer, x, rope, mask, found, plan.precision)
            else:
                prefix = f"layers.{index}."
                own = {name.removeprefix(prefix): r for name, r in ranges.items() if name.startswith(prefix)}
                found, x = search_layer(layer, x, rope, mask, own, plan.precision)
                run.work.save_layer(index, found)
            results.append(found)
            advance()
    return results


def _assemble(
    run: _Run, rotation: Rotation, token_ids: tuple[int, ...], layers: list[LayerScales], outliers: dict[str, Any]
) -> Calibration:
    decoder, plan, tokenizer = run.decoder, run.plan, run.checkpoint.tokenizer
    tensors: dict[str, np.ndarray] = {}
    for name, parameter in decoder.named_parameters():
        if name in ("embed_tokens.weight", "lm_head.weight"):
            tensors[name] = _half(parameter, name)
        elif name.endswith(".bias") or "norm" in name:
            tensors[name] = parameter.detach().float().cpu().numpy()
    activation_scales: dict[str, float] = {}
    kv_scales: dict[str, tuple[float, ...]] = {}
    for index, found in enumerate(layers):
        for name, codes in found.codes.items():
            array = codes.cpu().numpy()
            tensors[f"layers.{index}.{name}.codes"] = pack_int4(array) if plan.precision.weight_bits == 4 else array
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
    for statistics in outliers.values():
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
        tensors=tensors,
        plan=plan.to_dict(),
        fingerprint=plan.fingerprint(run.checkpoint.source.sha256),
        bos_token_id=prefix_bos(tokenizer),
        statistics={
            **outliers,
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
