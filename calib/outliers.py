"""Outlier tokens and the prefix they make (PrefixQuant, section 4.1 and 5.1).

A token of a sequence is an outlier in a block if the largest magnitude of its down_proj input exceeds
64 times the median of that maximum over the sequence. The input is taken before R4, where outliers are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pq_export.calibration import OUTLIER_RATIO
from pq_export.decoder import Decoder, KVPair
from pq_export.errors import PqExportError

RARE_SHARE = 0.1  # a single candidate seen in fewer samples than this is noise (reference implementation)


@dataclass
class OutlierStatistics:
    """Token-wise maxima of the down_proj input over a set of crops.

    ``counts`` [samples, layers]: outlier tokens. ``max_ratio`` and ``max_value`` [layers].
    ``token_counts``: ids at outlier positions other than 0. ``example``: ratios [S] and ids of the crop
    and layer with the largest ratio.
    """

    counts: Tensor
    max_ratio: Tensor
    max_value: Tensor
    token_counts: Counter[int] = field(default_factory=Counter)
    example: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For the report: plain lists."""
        return {
            "mean_count": self.counts.double().mean(0).tolist(),
            "max_ratio": self.max_ratio.tolist(),
            "max_value": self.max_value.tolist(),
            "token_counts": self.token_counts.most_common(16),
            "example": self.example,
        }


class OutlierObserver:
    """Collects :class:`OutlierStatistics` through forward hooks; use as a context manager.

    Hooks the input of ``mlp.down_rotation``, that is down_proj's input before R4.
    """

    def __init__(self, decoder: Decoder):
        layers = len(decoder.layers)
        self._decoder = decoder
        self._handles: list[Any] = []
        self._ids: Tensor | None = None
        self._rows: dict[int, Tensor] = {}
        self._counts: list[Tensor] = []
        self.statistics = OutlierStatistics(torch.zeros(0, layers), torch.zeros(layers), torch.zeros(layers))

    def __enter__(self) -> OutlierObserver:
        for index, layer in enumerate(self._decoder.layers):
            self._handles.append(
                layer.mlp.down_rotation.register_forward_pre_hook(lambda module, args, i=index: self._see(i, args[0]))
            )
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self.statistics.counts = torch.cat(self._counts) if self._counts else self.statistics.counts

    def begin(self, ids: Tensor) -> None:
        """Say which tokens [B, S] the next forward pass runs."""
        self._ids = ids
        self._counts.append(torch.zeros(len(ids), len(self._decoder.layers)))

    def _see(self, layer: int, x: Tensor) -> None:
        assert self._ids is not None
        s = self.statistics
        token_max = x.abs().amax(-1).cpu()  # [B, S]
        ratio = token_max / token_max.median(-1, keepdim=True).values.clamp_min(1e-12)
        outlier = ratio > OUTLIER_RATIO
        self._counts[-1][:, layer] = outlier.sum(-1)
        s.max_value[layer] = torch.maximum(s.max_value[layer], token_max.max())
        inner = outlier.clone()
        inner[:, 0] = False
        s.token_counts.update(self._ids.cpu()[inner].tolist())
        if ratio.max() > s.max_ratio.max():
            row = int(ratio.amax(-1).argmax())
            s.example = {"layer": layer, "ratio": ratio[row].tolist(), "token_ids": self._ids[row].tolist()}
        s.max_ratio[layer] = torch.maximum(s.max_ratio[layer], ratio.max())


@torch.no_grad()
def hidden_states(decoder: Decoder, ids: Tensor) -> Tensor:
    """Run all layers on ``ids`` [B, S] with an empty cache; no final norm, no lm_head."""
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    rope, mask = decoder.context(positions, torch.ones_like(ids), 0)
    hidden = decoder.embed(ids)
    for layer, past in zip(decoder.layers, decoder.empty_past(len(ids)), strict=True):
        hidden, _ = layer(hidden, rope, mask, past)
    return hidden


def observe_outliers(
    decoder: Decoder, crops: Tensor, batch: int = 4, progress: Callable[[int], None] = lambda done: None
) -> OutlierStatistics:
    """Statistics over ``crops`` [N, S]."""
    with OutlierObserver(decoder) as observer:
        for start in range(0, len(crops), batch):
            ids = crops[start : start + batch].to(decoder.embed_tokens.weight.device)
            observer.begin(ids)
            hidden_states(decoder, ids)
            progress(len(ids))
    return observer.statistics


def choose_prefix(statistics: OutlierStatistics, bos_token_id: int | None) -> tuple[int, ...]:
    """The paper's rule: the O most frequent outlier ids outside position 0, then BOS.

    ``O = ceil(max over blocks of the mean number of outlier tokens)``, counting position 0. With O = 0,
    or where only position 0 is an outlier, the prefix is BOS alone. Without BOS the ids stand alone, and
    the prefix may be empty.
    """
    outliers = math.ceil(statistics.counts.double().mean(0).max().item()) if len(statistics.counts) else 0
    candidates = sorted(statistics.token_counts.items(), key=lambda item: (-item[1], item[0]))
    candidates = [(token, count) for token, count in candidates if token != bos_token_id]
    if len(candidates) == 1 and candidates[0][1] < RARE_SHARE * len(statistics.counts):
        candidates = []
    chosen = [token for token, _ in candidates[:outliers]]
    return (*chosen, *(() if bos_token_id is None else (bos_token_id,)))


def prefix_bos(tokenizer: Any) -> int | None:
    """The token that ends a prefix: BOS, or what stands for it in tokenizers without one.

    Qwen and GPT-NeoX have no BOS; their documents are separated by ``<|endoftext|>``, which is the eos
    of base models and the pad of chat models.
    """
    if tokenizer.bos_token_id is not None:
        return int(tokenizer.bos_token_id)
    vocabulary = tokenizer.get_vocab()
    for token in ("<|endoftext|>", tokenizer.eos_token, tokenizer.pad_token):
        if token is not None and token in vocabulary:
            return int(vocabulary[token])
    return None


@torch.no_grad()
def compute_prefix_kv(decoder: Decoder, token_ids: tuple[int, ...]) -> list[KVPair]:
    """KV [1, G, p, D] of the prefix by the unquantized rewritten model in fp32, rounded to FP16.

    FP16 is what the graph holds, so it is what calibration must see. Raises if a value does not fit.
    """
    device = decoder.embed_tokens.weight.device
    ids = torch.tensor([token_ids], device=device)
    decoder.set_prefix(None)
    positions = torch.arange(len(token_ids), device=device)[None]
    rope, mask = decoder.context(positions, torch.ones_like(ids), 0)
    hidden, pairs = decoder.embed(ids), []
    for index, (layer, past) in enumerate(zip(decoder.layers, decoder.empty_past(1), strict=True)):
        hidden, (key, value) = layer(hidden, rope, mask, past)
        pair = (key.half(), value.half())
        if not all(torch.isfinite(t).all() for t in pair):
            raise PqExportError(
                "its key or value does not fit in FP16",
                where=f"prefix KV of layer {index}",
                cure="Choose other tokens with --prefix TEXT, or --prefix none.",
            )
        pairs.append((pair[0].float(), pair[1].float()))
    return pairs
