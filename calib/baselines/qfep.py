"""QFeP, the quantization-free prefix of Yang et al. (arXiv 2405.14428, section 4.2): ``[BOS, context, candidate]``.

The layer with the largest mean of max over median names the candidates: the tokens that spike most in it. A
prefix is good if the candidate spikes the first time it stands behind its context and not the second time,
that is, if the largest magnitude at the first place over that at the second is largest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pq_export.calib.baselines.spikes import token_peaks
from pq_export.decoder import Decoder


@dataclass(frozen=True)
class QFePOptions:
    """``per_sample`` largest tokens of a crop vote; ``candidates`` best ones are tried behind ``contexts`` tokens."""

    per_sample: int = 3
    candidates: int = 3
    contexts: int = 200


def qfep_prefix(
    decoder: Decoder, crops: Tensor, bos: int | None, options: QFePOptions = QFePOptions()
) -> tuple[int, ...]:
    """Token ids of the prefix; ``crops`` [N, S] int64. Without BOS the other two stand alone."""
    peaks = token_peaks(decoder, crops)  # [L, N, S]
    ratio = peaks.amax(-1) / peaks.median(-1).values.clamp_min(1e-12)
    layer = int(ratio.mean(1).argmax())
    candidates = _candidates(peaks[layer], crops, bos, options)
    contexts = frequent_ids(crops, bos, options.contexts)
    head = [] if bos is None else [bos]
    rows = torch.tensor([[*head, c, k, c, k] for k in candidates for c in contexts])
    spikes = token_peaks(decoder, rows)[layer]
    first, second = spikes[:, len(head) + 1], spikes[:, len(head) + 3]
    best = int((first / second.clamp_min(1e-12)).argmax())
    return tuple(rows[best, : len(head) + 2].tolist())


def _candidates(peaks: Tensor, crops: Tensor, bos: int | None, options: QFePOptions) -> list[int]:
    """Ids among the largest tokens of any crop, by their largest magnitude; ``peaks`` [N, S]."""
    top = peaks.topk(min(options.per_sample, peaks.shape[1]), dim=1)
    largest: dict[int, float] = {}
    for token, value in zip(
        crops.gather(1, top.indices).flatten().tolist(), top.values.flatten().tolist(), strict=True
    ):
        if token != bos:
            largest[token] = max(largest.get(token, 0.0), value)
    return sorted(largest, key=lambda token: (-largest[token], token))[: options.candidates]


def frequent_ids(crops: Tensor, bos: int | None, count: int) -> list[int]:
    """The most frequent ids of the crops but BOS; of equals the smaller id first."""
    ids, counts = crops.unique(return_counts=True)
    order = sorted(zip((-counts).tolist(), ids.tolist(), strict=True))
    return [token for _, token in order if token != bos][:count]
