"""What a run will need, before it runs: for ``--dry-run``."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from pq_export.plan import Plan

FIXED_SECONDS = 20.0  # imports, tokenizer, rewrites of a small model


@dataclass(frozen=True)
class Estimate:
    """Bytes of weights in the bundle, peak memory in bytes, and seconds of calibration on this machine."""

    bundle_bytes: int
    peak_bytes: int
    calibrate_seconds: float


def estimate(model: dict[str, Any], plan: Plan, step_tokens: float) -> Estimate:
    """``model`` is what ``describe_checkpoint`` says; ``step_tokens``: how many the recipe's steps run through all
    blocks. Good to a factor of two.
    """
    layers = min(plan.num_layers or model["layers"], model["layers"])
    linear = model["linear_parameters_per_layer"] * layers
    embedding = model["vocab_size"] * model["hidden_size"]
    bundle = linear * plan.precision.weight_bits // 8 + 2 * embedding * 2
    tokens = 2 * plan.calib_samples * plan.seq_len + step_tokens
    seconds = FIXED_SECONDS + 2.0 * linear * tokens / (0.5 * _flops_per_second())
    return Estimate(int(bundle), int(4 * (linear + 2 * embedding) * 2.5) + 2**30, seconds)


def _flops_per_second() -> float:
    """Rate of a fp32 matrix product here, measured in a few hundredths of a second."""
    import torch

    a = torch.ones(1024, 1024)
    a @ a
    started, rounds = time.perf_counter(), 0
    while time.perf_counter() - started < 0.1:
        a @ a
        rounds += 1
    return 2.0 * 1024**3 * rounds / (time.perf_counter() - started)
