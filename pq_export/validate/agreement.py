"""How far models are from a reference, token by token: KL divergence and equal top-1, beside perplexity.

Perplexity on one text can improve while the model moves away from the one it was made of; the divergence
from the floating-point model cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pq_export.validate.perplexity import LogitsOf, timed

CHUNK_VALUES = 2**24  # logits compared at once: 64 MiB in fp32, whatever the vocabulary


@dataclass(frozen=True)
class Agreement:
    """One model beside the reference, over all tokens but each window's first.

    ``perplexity`` of the model itself; ``kl``: mean KL(reference || model) in nats a token; ``top1``: share
    of tokens where both find the same one most likely; ``tokens_per_second`` of the model's forward pass.
    """

    perplexity: float
    kl: float
    top1: float
    tokens_per_second: float


@dataclass
class _Sums:
    nll: float = 0.0
    kl: float = 0.0
    equal: int = 0
    seconds: float = 0.0


def compare_logits(
    reference: LogitsOf,
    candidates: dict[str, LogitsOf],
    windows: Tensor,
    advance: Callable[[int], None] = lambda n: None,
) -> dict[str, Agreement]:
    """Run ``windows`` [N, S] of token ids through the reference and every candidate, one window after the other.

    Each function maps [1, S] to logits [1, S, vocab], on any device. The reference runs once a window; where
    it is a candidate too, its logits are used again. ``advance(1)`` is called after each window.
    """
    sums = {name: _Sums() for name in candidates}
    for row in windows:
        expected, expected_seconds = timed(reference, row[None])
        for name, logits_of in candidates.items():
            again = logits_of is reference
            logits, seconds = (expected, expected_seconds) if again else timed(logits_of, row[None])
            sums[name].seconds += seconds
            _add(sums[name], expected[0, :-1], logits[0, :-1], row[1:])
        advance(1)
    count = windows.shape[0] * (windows.shape[1] - 1)
    return {
        name: Agreement(float(np.exp(s.nll / count)), s.kl / count, s.equal / count, windows.numel() / s.seconds)
        for name, s in sums.items()
    }


def _add(sums: _Sums, reference: Tensor, logits: Tensor, targets: Tensor) -> None:
    """Add the tokens of one window: both logits [S, vocab], ``targets`` [S]."""
    rows = max(1, CHUNK_VALUES // logits.shape[1])
    for start in range(0, len(targets), rows):
        part = slice(start, start + rows)
        q = logits[part].float()
        p = reference[part].to(q.device).float()
        sums.equal += int((p.argmax(-1) == q.argmax(-1)).sum())
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        sums.nll -= q.gather(1, targets[part, None].to(q.device)).sum(dtype=torch.float64).item()
        # p and q are freed with the chunk; exp(p) is the only other tensor of its size.
        sums.kl += torch.sum(p.exp() * (p - q), dtype=torch.float64).item()
