"""Quantizers that a gradient passes through: what calibration puts into a decoder.

Rounding and clamping are straight-through; scales get LSQ's gradient (Esser et al., arXiv 1902.08153)
because the same graph computes it. Scales are trained as logarithms relative to where they start, and
weights in units of their step, so that one learning rate serves every layer of every model.
Without gradients both modules compute exactly :func:`pq_export.quantizer.fake_quantize`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pq_export.calibration import KV_SITES, SITES
from pq_export.decoder import Decoder, DecoderLayer
from pq_export.quantizer import code_range

# A weight's master value stays inside the cell of its code when training starts, this far from the edge: nearer, the
# first updates would undo all at once what GPTQ chose against rounding to nearest.
CELL_MARGIN = 0.15


def round_ste(x: Tensor) -> Tensor:
    """Round half to even; the gradient is the identity's."""
    return x + (torch.round(x) - x).detach() if x.requires_grad else torch.round(x)


class StaticQuantizer(nn.Module):
    """Fake quantizer with constant scales. ``scale`` broadcasts against the input: scalar, or [G, 1, 1] for KV.

    ``shift`` [like scale] is the trainable part: ``scale = start · exp(shift)``, exactly ``start`` untrained.
    """

    start: Tensor

    def __init__(self, scale: Tensor, bits: int):
        super().__init__()
        self.bits = bits
        self.register_buffer("start", scale.float())
        self.shift = nn.Parameter(torch.zeros_like(self.start), requires_grad=False)

    @property
    def scale(self) -> Tensor:
        return self.start * self.shift.exp()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale
        low, high = code_range(self.bits)
        return (round_ste((x.float() / scale).clamp(low, high)) * scale).to(x.dtype)


class SteppedLinear(nn.Module):
    """A linear whose weight is trained under its quantizer: ``weight = round(steps) · scale``.

    ``steps`` [out, in]: master weights in units of the step. They start at the original weight, held inside
    the cell of its code, so that training starts from exactly the codes that rounding chose.
    """

    start: Tensor

    def __init__(self, weight: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, bits: int):
        """weight [out, in] in floating point; codes [out, in]; scale [out]; bias [out]."""
        super().__init__()
        self.bits = bits
        codes, margin = codes.to(scale.dtype), 0.5 - CELL_MARGIN
        steps = torch.maximum(torch.minimum(weight / scale[:, None], codes + margin), codes - margin)
        self.steps = nn.Parameter(steps, requires_grad=False)
        self.register_buffer("start", scale)
        self.shift = nn.Parameter(torch.zeros_like(scale), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def scale(self) -> Tensor:
        return self.start * self.shift.exp()

    @property
    def weight(self) -> Tensor:
        return self.codes() * self.scale[:, None]

    def codes(self) -> Tensor:
        """Integers [out, in] as floats; differentiable."""
        low, high = code_range(self.bits)
        return round_ste(self.steps.clamp(low, high))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def site_quantizer(layer: DecoderLayer, site: str) -> nn.Module:
    """The submodule that quantizes ``site`` (``self_attn.key``, ``mlp.down_input`` …): Identity or a quantizer."""
    return layer.get_submodule(f"{site}_quantizer")


def set_site_quantizer(layer: DecoderLayer, site: str, quantizer: nn.Module | None) -> None:
    """Put a quantizer at ``site``, or take it away with ``None``."""
    parent, _, leaf = site.rpartition(".")
    setattr(layer.get_submodule(parent), f"{leaf}_quantizer", quantizer or nn.Identity())


def quantizers(decoder: Decoder) -> Iterator[tuple[str, StaticQuantizer]]:
    """Every static quantizer of a decoder as ``layers.N.<site>``, in order of execution."""
    for index, layer in enumerate(decoder.layers):
        for site in (*SITES, *KV_SITES):
            module = site_quantizer(layer, site)
            if isinstance(module, StaticQuantizer):
                yield f"layers.{index}.{site}", module


def set_kv_quantizer(layer: DecoderLayer, site: str, scale: Tensor, bits: int) -> None:
    """Static quantizer of keys or values [B, G, S, D]; ``scale`` [G] or [1]."""
    set_site_quantizer(layer, site, StaticQuantizer(scale[:, None, None], bits).to(scale.device))
