"""Outlier channel splitting: two small channels instead of a large one, where nothing online can flatten them.

Zhao et al., arXiv 1901.09504. Channel c of down_proj's input is ``silu(gate_c) · up_c``. Copied k times with
``up_c / k``, beside k copies of down_proj's column, it computes what it did, and its range is a k-th::

    gate_proj   rows (and bias) copied
    up_proj     rows (and bias) copied, divided by k
    down_proj   columns copied

The intermediate size grows by ``copies`` in every layer; each copy goes to the channel whose share is largest at that
moment. Unlike smoothing, it leaves the range of the weights as it is. Nothing is executed online.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pq_export.calib.checkpoint import full_logits, probe_ids
from pq_export.calib.rewrites import assert_unchanged
from pq_export.calib.smooth import DOWN_SITE
from pq_export.decoder import MLP, Decoder
from pq_export.errors import PqExportError

GRANULE = 32  # integer kernels want sizes of a multiple of it


@dataclass(frozen=True)
class SplitOptions:
    """``share`` of the intermediate size that is added, rounded to a multiple of 32."""

    share: float = 0.0625

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise ValueError(f"share must be above 0 and at most 1, not {self.share}")

    def copies(self, intermediate_size: int) -> int:
        """Channels to add to a layer."""
        return max(1, round(self.share * intermediate_size / GRANULE)) * GRANULE


def count_copies(peaks: Tensor, extra: int) -> Tensor:
    """How often each channel stands in the layer, int64 [C], 1 and more, ``extra`` in all above 1.

    ``peaks`` [C]: max |x| of each. Minimises the largest ``peak / copies``.
    """
    counts = torch.ones(len(peaks), dtype=torch.int64)
    heap = [(-peak, channel) for channel, peak in enumerate(peaks.tolist())]
    heapq.heapify(heap)
    for _ in range(extra):
        _, channel = heap[0]
        counts[channel] += 1
        heapq.heapreplace(heap, (-peaks[channel].item() / counts[channel].item(), channel))
    return counts


@torch.no_grad()
def split_channels(decoder: Decoder, peaks: dict[str, Tensor], extra: int) -> None:
    """Add ``extra`` channels to the MLP of each layer in place.

    ``peaks``: of :func:`pq_export.calib.observe.channel_peaks`. Raises :class:`PqExportError` if the logits change, and
    beside R4, which mixes the channels.
    """
    if not isinstance(decoder.layers[0].mlp.down_rotation, nn.Identity):
        raise PqExportError(
            "R4 mixes the channels of down_proj's input", where="split_channels", cure="Use --rotate offline or none."
        )
    ids = probe_ids(decoder.config.vocab_size).to(decoder.embed_tokens.weight.device)
    reference = full_logits(decoder, ids)
    for index, layer in enumerate(decoder.layers):
        _split(layer.mlp, count_copies(peaks[f"layers.{index}.{DOWN_SITE}"].cpu(), extra).to(ids.device))
    decoder.config = replace(decoder.config, intermediate_size=decoder.config.intermediate_size + extra)
    assert_unchanged(full_logits(decoder, ids), reference, "split channels")


def _split(mlp: MLP, counts: Tensor) -> None:
    share = counts.repeat_interleave(counts).double()
    for name, divisor in (("gate_proj", None), ("up_proj", share)):
        linear = mlp.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        for parameter in (linear.weight, linear.bias):
            if parameter is not None:
                rows = parameter.repeat_interleave(counts, 0)
                if divisor is not None:
                    rows = (rows.double() / divisor.view(-1, *[1] * (rows.dim() - 1))).to(rows.dtype)
                parameter.data = rows
        linear.out_features = len(share)
    mlp.down_proj.weight.data = mlp.down_proj.weight.repeat_interleave(counts, 1)
    mlp.down_proj.in_features = len(share)
