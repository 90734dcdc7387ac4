"""Perplexity of PyTorch decoders and ONNX bundles over the same windows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pq_export.decoder import Decoder
from pq_export.runtime import OrtDecoder

LogitsOf = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Perplexity:
    """``value = exp(mean NLL)`` over all tokens but each window's first; ``tokens_per_second`` of the forward pass."""

    value: float
    tokens_per_second: float


def perplexity(logits_of: LogitsOf, windows: Tensor, advance: Callable[[int], None] = lambda n: None) -> Perplexity:
    """``windows`` [N, S] of token ids; ``logits_of`` maps [1, S] to logits [1, S, vocab]."""
    total, count, seconds = 0.0, 0, 0.0
    for row in windows:
        logits, elapsed = timed(logits_of, row[None])
        seconds += elapsed
        targets = row[1:].to(logits.device)
        nll = torch.nn.functional.cross_entropy(logits[0, :-1].float(), targets, reduction="sum")
        total, count = total + nll.item(), count + len(targets)
        advance(1)
    return Perplexity(float(np.exp(total / count)), windows.numel() / seconds)


def timed(logits_of: LogitsOf, ids: Tensor) -> tuple[Tensor, float]:
    """Logits of ``ids`` and the seconds they took."""
    started = time.perf_counter()
    logits = logits_of(ids)
    if logits.is_cuda:  # a GPU has only been told what to do when the call returns
        torch.cuda.synchronize(logits.device)
    return logits, time.perf_counter() - started


def torch_logits(decoder: Decoder, prefix_ids: tuple[int, ...] = ()) -> LogitsOf:
    """Logits of a decoder. ``prefix_ids`` are run in front and their logits dropped: the FP model with prefix."""

    @torch.no_grad()
    def run(ids: Tensor) -> Tensor:
        device = decoder.embed_tokens.weight.device
        full = torch.cat((torch.tensor([prefix_ids], dtype=torch.long).expand(len(ids), -1), ids), 1).to(device)
        positions = torch.arange(full.shape[1], device=device).expand_as(full)
        logits, _ = decoder(full, torch.ones_like(full), positions, decoder.empty_past(len(full)))
        return logits[:, len(prefix_ids) :]

    return run


def onnx_logits(decoder: OrtDecoder) -> LogitsOf:
    """Logits of a graph in onnxruntime."""

    def run(ids: Tensor) -> Tensor:
        return torch.from_numpy(decoder.step(ids.numpy(), decoder.empty(len(ids)))[0])

    return run
