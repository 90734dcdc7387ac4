"""Greedy generation by the graph and by the fake-quant model, token against token."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pq_export.decoder import Decoder
from pq_export.runtime import OrtDecoder


@torch.no_grad()
def torch_greedy(decoder: Decoder, prompt: Tensor, steps: int) -> list[int]:
    """``steps`` tokens after ``prompt`` [1, S]: prefill, then one token at a time through the cache."""
    past, tokens = decoder.empty_past(1), []
    ids, length = prompt, 0
    for _ in range(steps):
        positions = torch.arange(length, length + ids.shape[1])[None]
        length += ids.shape[1]
        logits, past = decoder(ids, torch.ones(1, length, dtype=torch.long), positions, past)
        tokens.append(int(logits[0, -1].argmax()))
        ids = torch.tensor([[tokens[-1]]])
    return tokens


def onnx_greedy(decoder: OrtDecoder, prompt: Tensor, steps: int) -> list[int]:
    """The same by a graph in onnxruntime."""
    state, tokens, ids = decoder.empty(), [], prompt.numpy()
    for _ in range(steps):
        logits, state, _ = decoder.step(ids, state, last_only=True)
        tokens.append(int(logits[0, -1].argmax()))
        ids = np.array([[tokens[-1]]], dtype=np.int64)
    return tokens


def agreeing(a: list[int], b: list[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
