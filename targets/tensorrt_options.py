"""What the command line may ask of a TensorRT target, its defaults, and the optimization profiles that follow."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pq_export.errors import UsageError
from pq_export.plugins.toolchain import ARCHITECTURES, JETSON_ORIN, local_sms
from pq_export.targets.base import TargetOptions
from pq_export.targets.tensorrt_levels import JETPACKS, OLDEST, Level, find_jetpack

INPUT_LEN, SEQ_LEN, BATCH = 1024, 4096, 1
FLOAT_TYPES = ("fp16", "fp32")


@dataclass(frozen=True)
class Profile:
    """An optimization profile. ``shapes``: input -> (smallest, best, largest) shape."""

    name: str
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


def level_of(options: TargetOptions) -> Level:
    """The TensorRT that the file must be readable for."""
    return OLDEST if options.jetpack is None else find_jetpack(options.jetpack).level


def resolve_gpu(options: TargetOptions, context: int | None) -> TargetOptions:
    """For TensorRT itself: the JetPack's board, else this machine's GPU, else an Orin."""
    sms = options.sms
    if options.jetpack is not None:
        jetpack = find_jetpack(options.jetpack)
        if wrong := [sm for sm in sms if sm not in jetpack.sms]:
            raise UsageError(
                f"--jetpack {jetpack.version} is for {jetpack.boards}, SM {_listed(jetpack.sms)}, not {wrong[0]}",
                cure=f"Leave --sm out, or choose among JetPack {', '.join(JETPACKS)}.",
            )
        sms = sms or jetpack.sms[:1]
    sms = sms or tuple(sm for sm in local_sms() if sm in ARCHITECTURES) or (JETSON_ORIN,)
    if unknown := [sm for sm in sms if sm not in ARCHITECTURES]:
        raise UsageError(f"unknown SM '{unknown[0]}'", cure=f"SMs: {_listed(ARCHITECTURES)}.")
    return resolve_lengths(replace(options, sms=tuple(sorted(set(sms)))), context)


def resolve_lengths(options: TargetOptions, context: int | None) -> TargetOptions:
    """Fill in lengths, batch and float type; refuse lengths that contradict each other or the model's context."""
    limit = context if context is not None else options.max_seq_len or SEQ_LEN
    longest = options.max_seq_len or min(SEQ_LEN, limit)
    prompt = options.max_input_len or min(INPUT_LEN, longest - 1)
    if longest > limit:
        raise UsageError(
            f"--max-seq-len {longest} is longer than the model's context beside the prefix, {limit}",
            cure=f"Use --max-seq-len {limit} or less.",
        )
    if prompt >= longest:
        raise UsageError(
            f"--max-input-len {prompt} leaves no room for an answer in --max-seq-len {longest}",
            cure="Give a shorter --max-input-len or a longer --max-seq-len.",
        )
    float_type = options.float_type or "fp16"
    if float_type not in FLOAT_TYPES:
        raise UsageError(f"unknown --float-type '{float_type}'", cure=f"Types: {', '.join(FLOAT_TYPES)}.")
    return replace(
        options,
        max_batch_size=options.max_batch_size or BATCH,
        max_input_len=prompt,
        max_seq_len=longest,
        float_type=float_type,
    )


def profiles(config: dict[str, Any], options: TargetOptions) -> list[Profile]:
    """Prefill, of prompts in pieces if they are long, and decode, one token. ``config``: of the bundle."""
    batch, prompt, longest = options.max_batch_size, options.max_input_len, options.max_seq_len
    assert batch and prompt and longest
    middle = max(1, longest // 2)
    prefill = _profile(config, "prefill", batch, new=(1, max(1, prompt // 2), prompt), past=(0, 0, longest - prompt))
    decode = _profile(config, "decode", batch, new=(1, 1, 1), past=(1, middle, longest - 1))
    return [prefill, decode]


def _profile(config: dict[str, Any], name: str, batch: int, new: tuple[int, ...], past: tuple[int, ...]) -> Profile:
    heads, head_dim = config["kv_cache"]["heads"], config["kv_cache"]["head_dim"]
    batches = (1, batch, batch)
    tokens = [(b, n) for b, n in zip(batches, new, strict=True)]
    seen = [(b, n + p) for b, n, p in zip(batches, new, past, strict=True)]
    cache = [(b, heads, p, head_dim) for b, p in zip(batches, past, strict=True)]
    names = [f"past_key_values.{i}.{kind}" for i in range(config["num_layers"]) for kind in ("key", "value")]
    shapes: dict[str, Any] = {"input_ids": tokens, "attention_mask": seen, "position_ids": tokens}
    shapes |= dict.fromkeys(names, cache)
    return Profile(name, {key: (value[0], value[1], value[2]) for key, value in shapes.items()})


def _listed(values: Any) -> str:
    return ", ".join(map(str, values))
