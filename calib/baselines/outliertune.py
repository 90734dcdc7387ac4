"""OutlierTune (Wang et al., arXiv 2406.18832): per-channel static activations at the cost of per-tensor ones.

1. Symmetrization: the center ``z_j`` of each channel that leaves a norm is subtracted and its image ``W z``
   becomes the linear's bias; RMSNorm gets one for ``-z``.
2. Pre-executed dequantization: each channel has its own scale ``s_j``, folded into the norm's gain and the
   weight's columns, so the quantizer behind the norm has scale 1 and integers need no scale of their own.

Its targets are the linears behind a norm; o_proj and down_proj keep per-tensor scales.
"""

from __future__ import annotations

import torch
from torch import nn

from pq_export.calib.baselines.channels import NORM_SITES, ChannelRange, norm_and_linears
from pq_export.calib.baselines.smoothquant import SMALLEST, scale_channels
from pq_export.calib.checkpoint import full_logits, probe_ids
from pq_export.calib.rewrites import assert_unchanged
from pq_export.decoder import Decoder
from pq_export.quantizer import code_range


@torch.no_grad()
def fold_channel_scales(decoder: Decoder, ranges: dict[str, ChannelRange], bits: int) -> None:
    """Symmetrize and pre-execute the dequantization of every norm's output, in place.

    Afterwards scale 1 and ``bits`` bits are the per-channel static quantizer of these sites. Raises
    :class:`PqExportError` if the logits change.
    """
    ids = probe_ids(decoder.config.vocab_size).to(decoder.embed_tokens.weight.device)
    reference = full_logits(decoder, ids)
    for index, layer in enumerate(decoder.layers):
        for site in NORM_SITES:
            found, (norm, linears) = ranges[f"layers.{index}.{site}"], norm_and_linears(layer, site)
            z = found.center
            peak = torch.maximum(found.high - z, z - found.low)
            s = (peak / code_range(bits)[1]).clamp_min(SMALLEST)
            for linear in linears:
                moved = linear.weight.double() @ z.double()
                bias = moved if linear.bias is None else linear.bias.double() + moved
                linear.bias = nn.Parameter(bias.to(linear.weight.dtype), requires_grad=False)
            scale_channels(norm.weight, linears, s)
            norm.bias = nn.Parameter(-z / s, requires_grad=False)
    assert_unchanged(full_logits(decoder, ids), reference, "OutlierTune")
