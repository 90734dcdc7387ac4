"""What reaches the quantizers' places of a decoder while crops run through it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from pq_export.calib.fake_quant import site_quantizer
from pq_export.calib.outliers import hidden_states
from pq_export.decoder import Decoder


@torch.no_grad()
def observe_sites(
    decoder: Decoder,
    crops: Tensor,
    sites: Iterable[str],
    see: Callable[[str, Tensor], None],
    batch: int = 4,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Call ``see("layers.N.<site>", x)`` with what each site reads, ``batch`` crops at a time.

    ``crops`` int64 [N, S]; x [B, S, C], or [B, G, S, D] of keys and values. The decoder's prefix stands in front, and
    its own keys and values do not count: they stay in FP16.
    """
    handles = [
        site_quantizer(layer, site).register_forward_pre_hook(
            lambda module, args, name=f"layers.{index}.{site}": see(name, args[0])
        )
        for index, layer in enumerate(decoder.layers)
        for site in sites
    ]
    try:
        for part in crops.split(batch):
            hidden_states(decoder, part.to(decoder.embed_tokens.weight.device))
            progress(len(part))
    finally:
        for handle in handles:
            handle.remove()


def channel_peaks(
    decoder: Decoder,
    crops: Tensor,
    sites: Iterable[str],
    batch: int = 4,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Tensor]:
    """``layers.N.<site>`` -> max |x| [C] of each channel over ``crops`` [N, S], for sites that linears read."""
    peaks: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        peak = x.abs().amax((0, 1))
        peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak

    observe_sites(decoder, crops, sites, see, batch, progress)
    return peaks
