"""Centering: constant offsets that take the mean of every channel away before it is quantized.

Half of the energy of what linears read behind a norm, and of the keys, is the mean of each channel over all
tokens: it carries no information, and a symmetric quantizer with one scale a tensor spends its codes on it.
What is constant can be taken off in front of a quantizer and given back behind the product, by a bias:

    q/k/v_proj, gate/up_proj   norm(x) - m          bias + W m       channel-wise shifting, Outlier Suppression+
                                                                     (arXiv 2304.09145, section 3.2)
    keys                       k - m                nothing: softmax does not see what all keys share, the
                                                    prefix's too (SageAttention, arXiv 2410.02367, section 4.2,
                                                    which subtracts the running mean)
    values                     v_proj bias - m      o_proj bias + W m: attention weights sum to 1

Means come from calibration and are constants: the first two cost an addition of a vector beside an operation that
is executed anyway (the norm, RoPE), the third nothing. In floating point the function stays what it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pq_export.calib.biases import add_key_offsets, add_linear_biases, add_norm_biases
from pq_export.calib.block import get_linear
from pq_export.calib.checkpoint import full_logits, probe_ids
from pq_export.calib.observe import observe_sites
from pq_export.calib.rewrites import assert_unchanged
from pq_export.calib.smooth import NORM_OF_SITE
from pq_export.calibration import KV_SITES, SITE_OF_LINEAR
from pq_export.decoder import Decoder, DecoderLayer
from pq_export.precision import Precision

KEY, VALUE = KV_SITES
CENTERABLE = (*NORM_OF_SITE, *KV_SITES)


@dataclass(frozen=True)
class CenterOptions:
    """``sites`` to center, each only where it has at most ``bits``: finer steps do not mind a mean."""

    sites: tuple[str, ...] = CENTERABLE
    bits: int = 4

    def __post_init__(self) -> None:
        for site in self.sites:
            if site not in CENTERABLE:
                raise ValueError(f"site '{site}' cannot be centered; there are {', '.join(CENTERABLE)}")
        if len(set(self.sites)) < len(self.sites):
            raise ValueError("a site stands twice in 'sites'")
        if self.bits not in (4, 8, 16):
            raise ValueError(f"bits must be 4, 8 or 16, not {self.bits}")

    def chosen(self, precision: Precision) -> tuple[str, ...]:
        """The sites that a model of this precision centers."""
        bits = dict.fromkeys(NORM_OF_SITE, precision.activation_bits) | dict.fromkeys(KV_SITES, precision.kv_bits)
        return tuple(site for site in self.sites if bits[site] <= self.bits)


@torch.no_grad()
def find_means(
    decoder: Decoder,
    crops: Tensor,
    sites: tuple[str, ...],
    batch: int = 4,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Tensor]:
    """``layers.N.<site>`` -> mean over all tokens of ``crops`` [N, S]: [hidden], or [G, D] of keys and values.

    ``decoder`` in floating point, its prefix in front. Sums of a batch are fp32, their total fp64.
    """
    totals: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        sums = x.sum((0, 2) if x.dim() == 4 else (0, 1)).double()
        totals[name] = totals[name] + sums if name in totals else sums

    observe_sites(decoder, crops, sites, see, batch, progress)
    return {name: (total / crops.numel()).float() for name, total in totals.items()}


@torch.no_grad()
def center(decoder: Decoder, means: dict[str, Tensor]) -> None:
    """Fold ``means`` (from :func:`find_means`) into offsets and biases in place.

    The prefix's keys and values move too; compute the prefix KV again afterwards, for they are no longer FP16
    values. Raises :class:`PqExportError` if the logits change.
    """
    if not means:
        return
    ids = probe_ids(decoder.config.vocab_size).to(decoder.embed_tokens.weight.device)
    reference = full_logits(decoder, ids)
    add_linear_biases(decoder)
    sites = {name.split(".", 2)[2] for name in means}
    if sites & set(NORM_OF_SITE):
        add_norm_biases(decoder)
    if KEY in sites:
        add_key_offsets(decoder)
    for name, mean in means.items():
        _, index, site = name.split(".", 2)
        layer, mean = decoder.layers[int(index)], mean.to(ids.device)
        if site == KEY:
            _center_keys(layer, mean)
        elif site == VALUE:
            _center_values(layer, mean)
        else:
            _center_input(layer, site, mean)
    assert_unchanged(full_logits(decoder, ids), reference, "center")


def _center_input(layer: DecoderLayer, site: str, mean: Tensor) -> None:
    """Take ``mean`` [hidden] off the norm's output; the linears that read it give it back."""
    _add(layer.get_parameter(f"{NORM_OF_SITE[site]}.bias"), -mean)
    for name in (name for name, of in SITE_OF_LINEAR.items() if of == site):
        _add(layer.get_parameter(f"{name}.bias"), get_linear(layer, name).weight.double() @ mean.double())


def _center_keys(layer: DecoderLayer, mean: Tensor) -> None:
    """Take ``mean`` [G, D] off all keys."""
    attention = layer.self_attn
    _add(layer.get_parameter("self_attn.key_offset"), -mean[:, None])
    if attention.prefix_key is not None:
        attention.prefix_key = attention.prefix_key - mean[:, None]


def _center_values(layer: DecoderLayer, mean: Tensor) -> None:
    """Take ``mean`` [G, D] off all values; o_proj's bias gives it back to every query head."""
    attention = layer.self_attn
    _add(layer.get_parameter("self_attn.v_proj.bias"), -mean.flatten())
    repeats = attention.num_heads // attention.num_kv_heads
    of_heads = mean.repeat_interleave(repeats, 0).flatten().double()  # query head h reads KV head h // repeats
    _add(layer.get_parameter("self_attn.o_proj.bias"), attention.o_proj.weight.double() @ of_heads)
    if attention.prefix_value is not None:
        attention.prefix_value = attention.prefix_value - mean[:, None]


def _add(parameter: Tensor, offset: Tensor) -> None:
    parameter.data = (parameter.double() + offset).to(parameter.dtype)
