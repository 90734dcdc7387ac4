"""Prefill and decode speed of graphs in onnxruntime, the baseline in the same run."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np

from pq_export.runtime import OrtDecoder


def measure(decoder: OrtDecoder, vocab_size: int, prompt: int, steps: int, repeats: int) -> dict[str, float]:
    """Median tokens/s: prefill of ``prompt`` tokens with all logits and with the last only, then decode.

    Decode runs ``steps`` single tokens after the prompt, greedy, cache growing.
    """
    rng = np.random.default_rng(0)
    ids = rng.integers(0, vocab_size, (1, prompt))
    token = ids[:, :1]
    all_logits, last_logits, decode = [], [], []
    decoder.step(ids, decoder.empty())  # warm up: allocations, thread pool
    for _ in range(repeats):
        started = time.perf_counter()
        decoder.step(ids, decoder.empty())
        all_logits.append(prompt / (time.perf_counter() - started))
        started = time.perf_counter()
        _, state, _ = decoder.step(ids, decoder.empty(), last_only=True)
        last_logits.append(prompt / (time.perf_counter() - started))
        started = time.perf_counter()
        for _ in range(steps):
            _, state, _ = decoder.step(token, state, last_only=True)
        decode.append(steps / (time.perf_counter() - started))
    return {
        "prefill": statistics.median(last_logits),
        "prefill_all_logits": statistics.median(all_logits),
        "decode": statistics.median(decode),
    }


def compare_speed(
    decoders: dict[str, Any], vocab_size: int, prompt: int = 512, steps: int = 32, repeats: int = 3
) -> dict[str, Any]:
    """One row a model. ``decoders``: name -> function that makes an :class:`OrtDecoder`.

    One session lives at a time: two spinning thread pools on few cores slow each other down.
    """
    rows = []
    for name, make in decoders.items():
        decoder = make()
        rows.append({"model": name, **measure(decoder, vocab_size, prompt, steps, repeats)})
        del decoder
    return {"prompt": prompt, "context": prompt, "steps": steps, "rows": rows}
