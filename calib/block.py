"""One decoder layer while it is being quantized: what every block-wise step works on.

Two streams run through the blocks: the floating-point one (``reference_*``) and the quantized one, which
has passed all blocks before with their integers in place. A step may use either as input or target.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pq_export.calib.fake_quant import StaticQuantizer, set_kv_quantizer, set_site_quantizer
from pq_export.calibration import KV_SITES, SITE_OF_LINEAR, SITES
from pq_export.decoder import DecoderLayer, KVPair
from pq_export.precision import Precision
from pq_export.quantizer import quantize

BATCH = 8  # crops that run through a block at once


@dataclass(frozen=True)
class LayerBits:
    """Bits of one layer's linears, of its input sites and of its keys and values; 16 is floating point."""

    weight: dict[str, int]
    activation: dict[str, int]
    kv: dict[str, int]

    @classmethod
    def of(cls, precision: Precision, overrides: dict[str, int] | None = None, index: int = 0) -> LayerBits:
        """The precision's bits but for ``layers.<index>.<linear or site>`` in ``overrides``."""

        def bits(names: tuple[str, ...], default: int) -> dict[str, int]:
            return {name: (overrides or {}).get(f"layers.{index}.{name}", default) for name in names}

        return cls(
            bits(tuple(SITE_OF_LINEAR), precision.weight_bits),
            bits(SITES, precision.activation_bits),
            bits(KV_SITES, precision.kv_bits),
        )


@dataclass
class LayerScales:
    """What the steps found for one block. Scales: site -> scalar; KV -> [G] or [1]; weights -> [out].

    ``codes``: linear -> int8 [out, in]. ``parameters``: floating-point parameters of the layer that changed, by name.
    ``factors``: the clipping factor chosen (mean over channels for weights). ``error``: relative MSE of the quantized
    block's output against the floating-point block on the same input.
    """

    activation: dict[str, Tensor] = field(default_factory=dict)
    kv: dict[str, Tensor] = field(default_factory=dict)
    weight: dict[str, Tensor] = field(default_factory=dict)
    codes: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)
    error: float = 0.0


NORMS = ("input_layernorm", "post_attention_layernorm")


def get_linear(layer: DecoderLayer, name: str) -> nn.Linear:
    """The linear ``name`` (``mlp.down_proj`` …) of a layer."""
    linear = layer.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


class StagedBlock:
    """A decoder layer cut at its four linear-input sites, so that a step re-runs only what follows.

    The quantizers in the layer act; ``x`` is [N, S, hidden]. Crops run :data:`BATCH` at a time.
    """

    def __init__(self, layer: DecoderLayer, rope: KVPair, mask: Tensor):
        """rope: two of [1, 1, S, D/2]; mask: [1, 1, R·S, T], the prefix's columns included."""
        self.layer, self.rope, self.mask = layer, rope, mask

    def context(self, x: Tensor) -> Tensor:
        """Attention output before o_proj."""
        attention = self.layer.self_attn

        def part(x: Tensor) -> Tensor:
            q, k, v = attention.qkv(self.layer.input_layernorm(x), self.rope)
            return attention.attend(q, *attention.with_prefix(k, v), self.mask)

        return in_batches(part, x)

    def residual(self, x: Tensor, context: Tensor) -> Tensor:
        """Residual stream after attention."""
        attention = self.layer.self_attn
        return x + in_batches(lambda c: attention.o_proj(attention.o_input_quantizer(c)), context)

    def inner(self, h: Tensor) -> Tensor:
        """down_proj's input, after R4."""
        return in_batches(lambda h: self.layer.mlp.inner(self.layer.post_attention_layernorm(h)), h)

    def output(self, h: Tensor, inner: Tensor) -> Tensor:
        mlp = self.layer.mlp
        return h + in_batches(lambda i: mlp.down_proj(mlp.down_input_quantizer(i)), inner)

    def run(self, x: Tensor) -> Tensor:
        h = self.residual(x, self.context(x))
        return self.output(h, self.inner(h))


def in_batches(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function`` over :data:`BATCH` rows of ``x`` at a time."""
    return torch.cat([function(part) for part in x.split(BATCH)]) if len(x) > BATCH else function(x)


@dataclass
class Block:
    """A layer with its inputs, its reference and what was found so far.

    ``layer`` is quantized in place; ``reference`` is a copy of it in floating point. ``x`` and
    ``reference_x`` [N, S, hidden]: the quantized and the floating-point stream at its input;
    ``reference_y``: the latter at its output. ``ranges``: site -> max |x|.
    """

    index: int
    layer: DecoderLayer
    reference: DecoderLayer
    rope: KVPair
    mask: Tensor
    x: Tensor
    reference_x: Tensor
    reference_y: Tensor
    bits: LayerBits
    ranges: dict[str, Tensor]
    found: LayerScales = field(default_factory=LayerScales)

    @classmethod
    def of(
        cls,
        index: int,
        layer: DecoderLayer,
        context: tuple[KVPair, Tensor],
        x: Tensor,
        reference_x: Tensor,
        bits: LayerBits,
        ranges: dict[str, Tensor],
    ) -> Block:
        """``layer`` still in floating point; ``context``: RoPE rows and mask of one sequence (batch 1)."""
        reference = copy.deepcopy(layer)
        reference_y = StagedBlock(reference, *context).run(reference_x)
        return cls(index, layer, reference, *context, x, reference_x, reference_y, bits, ranges)

    def staged(self, length: int | None = None) -> StagedBlock:
        """The block being quantized, for sequences of the first ``length`` tokens of each crop."""
        return StagedBlock(self.layer, *self.context(length))

    def staged_reference(self, length: int | None = None) -> StagedBlock:
        """The floating-point block."""
        return StagedBlock(self.reference, *self.context(length))

    def context(self, length: int | None = None) -> tuple[KVPair, Tensor]:
        """RoPE rows and mask for the first ``length`` positions."""
        full = self.x.shape[1]
        if length is None or length == full:
            return self.rope, self.mask
        columns = self.mask.shape[-1] - full + length
        rows = self.mask.unflatten(2, (-1, full))[:, :, :, :length, :columns].flatten(2, 3)
        cos, sin = self.rope
        return (cos[:, :, :length], sin[:, :, :length]), rows

    def set_activation(self, site: str, scale: Tensor) -> None:
        """Quantize ``site`` with ``scale`` (scalar) from here on."""
        self.found.activation[site] = scale
        set_site_quantizer(self.layer, site, StaticQuantizer(scale, self.bits.activation[site]))

    def set_kv(self, site: str, scale: Tensor) -> None:
        """Quantize keys or values with ``scale`` [G] or [1]."""
        self.found.kv[site] = scale
        set_kv_quantizer(self.layer, site, scale, self.bits.kv[site])

    def set_weight(self, name: str, scale: Tensor, codes: Tensor | None = None) -> None:
        """Give a linear its scale [out] and codes [out, in]; without codes the original weight is rounded."""
        if codes is None:
            codes = quantize(get_linear(self.reference, name).weight, scale[:, None], self.bits.weight[name])
        self.found.weight[name], self.found.codes[name] = scale, codes.to(torch.int8)
        get_linear(self.layer, name).weight.data = codes.to(scale.dtype) * scale[:, None]

    def measure_error(self, samples: int | None = None) -> float:
        """Error energy of the output over the energy of what the block adds, both on the quantized stream."""
        x = self.x[:samples]
        target = self.staged_reference().run(x)
        difference = self.staged().run(x) - target
        return (difference.square().sum() / (target - x).square().sum().clamp_min(1e-30)).item()


def install(layer: DecoderLayer, found: LayerScales, bits: LayerBits) -> None:
    """Put what was found into a floating-point layer: fake-quantized weights, quantizers, biases and norms."""
    for name, scale in found.weight.items():
        get_linear(layer, name).weight.data = found.codes[name].to(scale.dtype) * scale[:, None]
    for site, scale in found.activation.items():
        set_site_quantizer(layer, site, StaticQuantizer(scale, bits.activation[site]))
    for site, scale in found.kv.items():
        set_kv_quantizer(layer, site, scale, bits.kv[site])
    for name, value in found.parameters.items():
        layer.get_parameter(name).data = value
