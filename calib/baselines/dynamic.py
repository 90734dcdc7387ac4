"""Quantizers that look at each token as it comes, as QuaRot and SpinQuant use them: no static graph has them.

Linear inputs: symmetric, a scale per token, ``clip · max|x| / (2^(b-1) - 1)``. Keys and values: asymmetric,
scale and zero point per token and head. Both as in QuaRot (Ashkboos et al., arXiv 2404.00456, section 5),
which clips activations to 0.9 and the cache to 0.95 of the range.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pq_export.calib.block import Block
from pq_export.calib.clip_search import line_search
from pq_export.calib.fake_quant import set_site_quantizer
from pq_export.calibration import KV_SITES, SITES
from pq_export.quantizer import code_range, fake_quantize

ACTIVATION_CLIP, KV_CLIP = 0.9, 0.95  # QuaRot, section 5


class DynamicQuantizer(nn.Module):
    """Symmetric fake quantizer of linear inputs [..., C] with one scale for each token.

    ``clip``: the share of a token's largest magnitude that the largest code stands for.
    """

    def __init__(self, bits: int, clip: float = 1.0):
        super().__init__()
        self.bits, self.clip = bits, clip

    def forward(self, x: Tensor) -> Tensor:
        peak = x.float().abs().amax(-1, keepdim=True)
        scale = _positive(self.clip * peak / code_range(self.bits)[1])
        return fake_quantize(x.float(), scale, self.bits).to(x.dtype)


class DynamicKVQuantizer(nn.Module):
    """Asymmetric fake quantizer of keys or values [B, G, S, D]: scale and zero point for each token and head.

    ``clip``: the share of both ends of the range that is kept.
    """

    def __init__(self, bits: int, clip: float = 1.0):
        super().__init__()
        self.bits, self.clip = bits, clip

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        low, high = self.clip * wide.amin(-1, keepdim=True), self.clip * wide.amax(-1, keepdim=True)
        scale = _positive((high - low) / (2**self.bits - 1))
        # Moving the range onto the signed codes by a whole number of steps is an integer zero point.
        shift = torch.round(low / scale - code_range(self.bits)[0]) * scale
        return (fake_quantize(wide - shift, scale, self.bits) + shift).to(x.dtype)


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))


def place_dynamic(block: Block, clip: float = ACTIVATION_CLIP, kv_clip: float = KV_CLIP) -> None:
    """Dynamic quantizers at every site that has fewer than 16 bits, with the same clip ratio everywhere."""
    for site in (*SITES, *KV_SITES):
        _set(block, site, kv_clip if site in KV_SITES else clip)


@torch.no_grad()
def search_dynamic(block: Block, samples: int, length: int) -> None:
    """Dynamic quantizers with a clip ratio per site: least MSE of the block's output on the quantized stream.

    Keys and values first, then the inputs in order of execution, earlier sites quantized; on the first
    ``samples`` crops and ``length`` tokens. As PrefixQuant's O1 and, with learned ratios, SpinQuant.
    """
    x = block.x[:samples, :length]
    staged, target = block.staged(length), block.staged_reference(length).run(x)
    for site in (*KV_SITES, *SITES):
        if _bits(block, site) == 16:
            continue

        def loss(clip: float, site: str = site) -> float:
            _set(block, site, clip)
            return (staged.run(x) - target).square().mean().item()

        block.found.factors[site] = best = line_search(loss)
        _set(block, site, best)


def _bits(block: Block, site: str) -> int:
    return block.bits.kv[site] if site in KV_SITES else block.bits.activation[site]


def _set(block: Block, site: str, clip: float) -> None:
    if (bits := _bits(block, site)) < 16:
        kind: Callable[[int, float], nn.Module] = DynamicKVQuantizer if site in KV_SITES else DynamicQuantizer
        set_site_quantizer(block.layer, site, kind(bits, clip))
