"""Tokens of a bundle on a GPU: prefill, then one CUDA graph replayed for every token."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pq_export.bundle import Bundle
from pq_export.cuda.decoder import CudaDecoder
from pq_export.cuda.readers import bundle_source
from pq_export.cuda.weights import load_weights
from pq_export.errors import PqExportError
from pq_export.runtime import Sampling, sample

LIBRARY_VARIABLE = "PQ_LIBRARY"  # a libpq.so in place of the one that was built for this GPU


class DecodeGraph:
    """One decode step of ``decoder`` as a CUDA graph: greedy choice and the cache's length are in it.

    ``logits`` [B, vocab] fp32 and ``token`` int64 [B] are static: a replay reads ``token``, and writes both.
    Capture leaves the cache's length as it was.
    """

    def __init__(self, decoder: CudaDecoder):
        self.decoder = decoder
        device = decoder.weights.device
        self.token = torch.zeros(decoder.cache.batch, dtype=torch.int64, device=device)
        held = decoder.cache.length.clone()
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # what kernels and libraries set up at their first call
            for _ in range(2):
                decoder.step(self.token)
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = decoder.step(self.token)
            self.token.copy_(self.logits.argmax(-1))
            decoder.advance()
        decoder.cache.length.copy_(held)

    def __call__(self, token: Tensor | None = None) -> Tensor:
        """Logits behind ``token`` (default: the greedy one of the last call); overwritten by the next call."""
        if token is not None:
            self.token.copy_(token)
        self.graph.replay()
        return self.logits


def tokens_of(
    decoder: CudaDecoder, prompt: list[int], max_new_tokens: int, stop: set[int], sampling: Sampling | None = None
) -> Iterator[int]:
    """Prefill ``prompt`` and yield token ids; as :func:`pq_export.runtime.generate`, in batches of one."""
    if len(prompt) + max_new_tokens - 1 > decoder.cache.capacity:
        raise PqExportError(
            f"{len(prompt)} tokens and {max_new_tokens} new ones do not fit: the cache holds {decoder.cache.capacity}",
            cure="Make the decoder with a larger capacity.",
        )
    sampling = sampling or Sampling()
    rng = np.random.default_rng(sampling.seed)
    device = decoder.weights.device
    logits, graph = None, None
    token = -1
    for _ in range(max_new_tokens):
        with torch.no_grad():
            if logits is None:
                logits = decoder.prefill(torch.tensor([prompt], device=device))
            elif device.type == "cuda":
                graph = graph or DecodeGraph(decoder)
                logits = graph(torch.tensor([token], device=device))
            else:
                logits = decoder.step(torch.tensor([token], device=device))
                decoder.advance()
        token = int(logits.argmax()) if sampling.temperature == 0 else sample(logits[0].cpu().numpy(), sampling, rng)
        if token in stop:
            return
        yield token


def generate_on_cuda(
    bundle: Bundle,
    prompt_ids: list[int],
    max_new_tokens: int,
    stop: set[int],
    sampling: Sampling | None = None,
    dtype: torch.dtype = torch.float16,
) -> Iterator[int]:
    """Tokens of ``bundle`` on PyTorch's current GPU, with the kernels built for it or those of ``PQ_LIBRARY``.

    ``dtype``: of activations; float32 repeats onnxruntime's tokens. Loads the weights at the first token. Raises
    :class:`PqExportError` without a GPU, without kernels, and for what they cannot run.
    """
    from pq_export.plugins.library import Library

    if not torch.cuda.is_available():
        raise PqExportError("PyTorch finds no CUDA device", cure="Generate with onnxruntime: leave out --device cuda.")
    path = os.environ.get(LIBRARY_VARIABLE)
    library = Library(Path(path)) if path else Library.of_device()
    length = len(prompt_ids) + max_new_tokens
    weights = load_weights(bundle_source(bundle), library, dtype=dtype, max_length=length)
    yield from tokens_of(CudaDecoder(weights, library, capacity=length), prompt_ids, max_new_tokens, stop, sampling)
