"""What SmoothQuant and OutlierTune look at: the range of every channel that leaves a norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pq_export.calib.observe import observe_sites
from pq_export.decoder import Decoder, DecoderLayer, RMSNorm

SAMPLED_TOKENS = 512  # of each site, to judge a rewrite on

# A norm of a layer: the site its output is, and the linears that read it.
NORM_SITES = {
    "self_attn.qkv_input": ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    "mlp.gate_up_input": ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
}


@dataclass
class ChannelRange:
    """Range of each of the C channels of a norm's output over all crops.

    ``low``, ``high`` [C]: the extremes. ``center`` [C]: mean over crops of a crop's ``(max + min) / 2``.
    ``tokens`` [n, C]: some of the inputs themselves, evenly spaced.
    """

    low: Tensor
    high: Tensor
    center: Tensor
    tokens: Tensor

    @property
    def peak(self) -> Tensor:
        """max |x| [C]."""
        return torch.maximum(self.high, -self.low)


def norm_and_linears(layer: DecoderLayer, site: str) -> tuple[RMSNorm, list[nn.Linear]]:
    """The norm whose output is ``site``, and the linears that read it."""
    norm_name, linear_names = NORM_SITES[site]
    norm, linears = layer.get_submodule(norm_name), [layer.get_submodule(name) for name in linear_names]
    assert isinstance(norm, RMSNorm)
    return norm, [linear for linear in linears if isinstance(linear, nn.Linear)]


@torch.no_grad()
def observe_channels(
    decoder: Decoder, crops: Tensor, batch: int = 4, progress: Callable[[int], None] = lambda done: None
) -> dict[str, ChannelRange]:
    """``layers.N.<site>`` -> :class:`ChannelRange` of each norm's output; ``crops`` [N, S] int64."""
    seen: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    per_crop = max(1, SAMPLED_TOKENS // len(crops))
    stride = max(1, crops.shape[1] // per_crop)

    def see(name: str, x: Tensor) -> None:  # [B, S, C]
        seen.setdefault(name, []).append((x.amin(1), x.amax(1), x[:, ::stride].flatten(0, 1)))

    observe_sites(decoder, crops, NORM_SITES, see, batch, progress)
    ranges = {}
    for name, parts in seen.items():
        low, high, tokens = (torch.cat(kind) for kind in zip(*parts, strict=True))
        ranges[name] = ChannelRange(low.amin(0), high.amax(0), ((low + high) / 2).mean(0), tokens)
    return ranges
