"""How large each token's activations are, with any tokens in front: what the rival prefix searches ask."""

from __future__ import annotations

import torch
from torch import Tensor

from pq_export.calib.outliers import hidden_states
from pq_export.decoder import Decoder


@torch.no_grad()
def token_peaks(decoder: Decoder, ids: Tensor, batch: int = 16) -> Tensor:
    """max |x| of each token's down_proj input, before R4: ``ids`` [N, S] -> [layers, N, S], on the CPU."""
    device = decoder.embed_tokens.weight.device
    return torch.cat([_peaks(decoder, part.to(device)) for part in ids.split(batch)], 1)


def _peaks(decoder: Decoder, ids: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handles = [
        layer.mlp.down_rotation.register_forward_pre_hook(lambda m, args: seen.append(args[0].abs().amax(-1).cpu()))
        for layer in decoder.layers
    ]
    try:
        hidden_states(decoder, ids)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(seen)
