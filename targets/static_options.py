"""What the command line may ask of a target with graphs of fixed shapes: chips and lengths, and their defaults."""

from __future__ import annotations

from dataclasses import replace

from pq_export.errors import UsageError
from pq_export.targets.base import TargetOptions
from pq_export.targets.profile import Profile

PREFILL_LEN, CACHE_LEN = 64, 512


def resolve_static(options: TargetOptions, context: int | None, profile: Profile) -> TargetOptions:
    """Chips that ``profile`` knows, and lengths in tokens that fit each other and ``context`` (None: not known yet).

    The cache must hold a whole prefill. Raises :class:`UsageError`.
    """
    default = (profile.default_soc,) if profile.default_soc else ()
    socs = tuple(dict.fromkeys(soc.lower() for soc in options.socs)) or default
    for soc in socs:
        profile.for_soc(soc)
    prefill, cache = options.prefill_len or PREFILL_LEN, options.cache_len or CACHE_LEN
    if context is not None and options.cache_len is None:
        cache = min(cache, context)
    if context is not None and max(prefill, cache) > context:
        flag = "--cache-len" if cache > context else "--prefill-len"
        raise UsageError(
            f"{flag} {max(prefill, cache)} is longer than the model's context beside the prefix, {context}",
            cure=f"Use {context} or less.",
        )
    if prefill > cache:
        raise UsageError(
            f"--prefill-len {prefill} is longer than the cache of {cache} tokens",
            cure="Give a shorter --prefill-len or a longer --cache-len.",
        )
    return replace(options, socs=socs, prefill_len=prefill, cache_len=cache)
