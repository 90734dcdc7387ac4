"""Search of clipping factors, block by block (PrefixQuant, section 5.2, without its code's defects).

Each scale is ``factor · scale_from_max(range)``; factors never compound. Order inside a block:

1. keys: MSE of ``softmax(QKᵀ/√d)`` per KV head, causal, prefix keys included;
2. values: MSE of V per head;
3. weights: MSE of the linear's output per output channel, ``(W - Ŵ) XᵀX (W - Ŵ)ᵀ``, with the inputs the
   linear really has (down_proj: after R4);
4. activations: MSE of the block output against the floating-point block on the same input, with
   quantized weights and cache in place, mask and prefix included; sites in order of execution, earlier
   ones quantized.

Block inputs come from the already quantized blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pq_export.calibration import SITE_OF_LINEAR, SITES
from pq_export.decoder import DecoderLayer, KVPair
from pq_export.precision import Precision
from pq_export.quantizer import fake_quantize, quantize, scale_from_max
from pq_export.simulate import KVQuantizer

KV_FACTORS = tuple(1.0 - 0.05 * i for i in range(16))  # 1.00 .. 0.25
WEIGHT_FACTORS = tuple(1.0 - 0.05 * i for i in range(10))  # 1.00 .. 0.55
COARSE_FACTORS = tuple(1.0 - 0.1 * i for i in range(10))  # 1.0 .. 0.1
FINE_STEPS = (0.05, -0.05, 0.025, -0.025)  # around the best so far, in turn


@dataclass
class LayerScales:
    """What one block's search found. Scales: site -> scalar; KV -> [G] or [1]; weights -> [out].

    ``factors``: the chosen clipping factor (mean over channels for weights), ``error``: relative MSE of
    the quantized block's output.
    """

    activation: dict[str, Tensor] = field(default_factory=dict)
    kv: dict[str, Tensor] = field(default_factory=dict)
    weight: dict[str, Tensor] = field(default_factory=dict)
    codes: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)
    error: float = 0.0


class StagedBlock:
    """A decoder layer cut at its four linear-input sites, so that a search re-runs only what follows.

    ``scales[site]`` quantizes that site; ``None`` leaves it in floating point. ``x``: [N, S, hidden].
    """

    def __init__(self, layer: DecoderLayer, rope: KVPair, mask: Tensor, bits: int):
        self.layer, self.rope, self.mask, self.bits = layer, rope, mask, bits
        self.scales: dict[str, Tensor | None] = dict.fromkeys(SITES)
        self.seen: dict[str, Tensor] = {}

    def _site(self, name: str, x: Tensor) -> Tensor:
        self.seen[name] = x
        scale = self.scales[name]
        return x if scale is None else fake_quantize(x, scale, self.bits)

    def with_prefix(self, k: Tensor, v: Tensor) -> KVPair:
        attention = self.layer.self_attn
        if attention.prefix_key is None or attention.prefix_value is None:
            return k, v
        n = len(k)
        return (
            torch.cat((attention.prefix_key.expand(n, -1, -1, -1), k), 2),
            torch.cat((attention.prefix_value.expand(n, -1, -1, -1), v), 2),
        )

    def context(self, x: Tensor) -> Tensor:
        """Attention output before o_proj."""
        attention = self.layer.self_attn
        q, k, v = attention.qkv(self._site("self_attn.qkv_input", self.layer.input_layernorm(x)), self.rope)
        return attention.attend(q, *self.with_prefix(k, v), self.mask)

    def residual(self, x: Tensor, context: Tensor) -> Tensor:
        """Residual stream after attention."""
        return x + self.layer.self_attn.o_proj(self._site("self_attn.o_input", context))

    def inner(self, h: Tensor) -> Tensor:
        """down_proj's input, after R4."""
        mlp = self.layer.mlp
        n = self._site("mlp.gate_up_input", self.layer.post_attention_layernorm(h))
        return mlp.down_rotation(F.silu(mlp.gate_proj(n)) * mlp.up_proj(n))

    def output(self, h: Tensor, inner: Tensor) -> Tensor:
        return h + self.layer.mlp.down_proj(self._site("mlp.down_input", inner))

    def run(self, x: Tensor) -> Tensor:
        h = self.residual(x, self.context(x))
        return self.output(h, self.inner(h))


@torch.no_grad()
def search_layer(
    layer: DecoderLayer, x: Tensor, rope: KVPair, mask: Tensor, ranges: dict[str, Tensor], precision: Precision
) -> tuple[LayerScales, Tensor]:
    """Find all scales of one block and quantize it in place.

    ``x`` [N, S, hidden]: inputs from the quantized blocks before. ``ranges``: site -> maximum (without
    ``layers.N.``). The layer's weights become their fake-quantized values and its KV quantizers are set.
    Returns the scales and the quantized block's output on ``x``.
    """
    block, found = StagedBlock(layer, rope, mask, precision.activation_bits), LayerScales()
    target = block.run(x)
    if precision.kv_bits < 16:
        _search_kv(block, x, ranges, precision, found)
    inputs = {site: block.seen[site].flatten(0, -2) for site in SITES}
    for name, site in SITE_OF_LINEAR.items():
        linear = layer.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        gram = inputs[site].T @ inputs[site]
        scale, factor = search_weight(linear.weight, gram, precision.weight_bits)
        found.weight[name] = scale
        found.codes[name] = quantize(linear.weight, scale[:, None], precision.weight_bits).to(torch.int8)
        found.factors[name] = factor
        linear.weight.data = found.codes[name].to(scale.dtype) * scale[:, None]
    inputs.clear()
    if precision.activation_bits < 16:
        _search_activations(block, x, target, ranges, precision.activation_bits, found)
    result = block.run(x)
    found.error = _relative_error(result, target, x)
    return found, result


def apply_layer(layer: DecoderLayer, found: LayerScales, precision: Precision) -> None:
    """Put earlier results back into a block: fake-quantized weights and KV quantizers."""
    for name, scale in found.weight.items():
        linear = layer.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        linear.weight.data = found.codes[name].to(scale.dtype) * scale[:, None]
    _set_kv_quantizers(layer, found, precision)


@torch.no_grad()
def run_layer(
    layer: DecoderLayer, x: Tensor, rope: KVPair, mask: Tensor, found: LayerScales, precision: Precision
) -> Tensor:
    """Output of an already quantized block on ``x``."""
    block = StagedBlock(layer, rope, mask, precision.activation_bits)
    block.scales.update(found.activation)
    return block.run(x)


def _relative_error(result: Tensor, target: Tensor, x: Tensor) -> float:
    """Error energy over the energy of what the block adds to the stream."""
    return ((result - target).square().sum() / (target - x).square().sum().clamp_min(1e-30)).item()


def _set_kv_quantizers(layer: DecoderLayer, found: LayerScales, precision: Precision) -> None:
    for site, scales in found.kv.items():
        quantizer = KVQuantizer(tuple(scales.tolist()), precision.kv_bits).to(scales.device)
        setattr(layer.self_attn, f"{site.rpartition('.')[2]}_quantizer", quantizer)


def _search_kv(
    block: StagedBlock, x: Tensor, ranges: dict[str, Tensor], precision: Precision, found: LayerScales
) -> None:
    attention = block.layer.self_attn
    q, k, v = attention.qkv(block.layer.input_layernorm(x), block.rope)
    keys, _ = block.with_prefix(k, v)
    prefix = keys[:, :, : keys.shape[2] - k.shape[2]]
    reference = attention.attention_weights(q, keys, block.mask)

    def key_error(quantized: Tensor) -> Tensor:  # -> [G]
        weights = attention.attention_weights(q, torch.cat((prefix, quantized), 2), block.mask)
        return (weights - reference).square().sum((0, 2, 3))

    def value_error(quantized: Tensor) -> Tensor:
        return (quantized - v).square().sum((0, 2, 3))

    for site, tensor, error in (("self_attn.key", k, key_error), ("self_attn.value", v, value_error)):
        peak = ranges[site].to(x.device)
        if not precision.kv_per_head:
            peak = peak.max().expand_as(peak)
        base = scale_from_max(peak, precision.kv_bits)
        losses = []
        for factor in KV_FACTORS:
            loss = error(fake_quantize(tensor, (base * factor)[:, None, None], precision.kv_bits))
            losses.append(loss if precision.kv_per_head else loss.sum().expand_as(loss))
        best = torch.stack(losses).argmin(0)  # first of equals: the larger factor
        factors = torch.tensor(KV_FACTORS, device=x.device)[best]
        scales = base * factors
        found.kv[site] = scales if precision.kv_per_head else scales[:1]
        found.factors[site] = factors.mean().item()
    _set_kv_quantizers(block.layer, found, precision)


def search_weight(weight: Tensor, gram: Tensor, bits: int) -> tuple[Tensor, float]:
    """Scale per output channel [out] that minimises ``(W - Ŵ) G (W - Ŵ)ᵀ``, and the mean factor.

    ``weight`` [out, in]; ``gram`` [in, in] = XᵀX of the linear's inputs.
    """
    base = scale_from_max(weight.abs().amax(1), bits)
    losses = []
    for factor in WEIGHT_FACTORS:
        difference = fake_quantize(weight, (base * factor)[:, None], bits) - weight
        losses.append(((difference @ gram) * difference).sum(1))
    factors = torch.tensor(WEIGHT_FACTORS, device=weight.device)[torch.stack(losses).argmin(0)]
    return base * factors, factors.mean().item()


def _search_activations(
    block: StagedBlock, x: Tensor, target: Tensor, ranges: dict[str, Tensor], bits: int, found: LayerScales
) -> None:
    state: dict[str, Tensor] = {"x": x}

    def at_qkv() -> Tensor:
        return block.run(x)

    def at_o() -> Tensor:
        h = block.residual(x, state["context"])
        return block.output(h, block.inner(h))

    def at_gate_up() -> Tensor:
        return block.output(state["h"], block.inner(state["h"]))

    def at_down() -> Tensor:
        return block.output(state["h"], state["inner"])

    def settle(site: str) -> None:  # what later sites start from, with this site's scale fixed
        if site == "self_attn.qkv_input":
            state["context"] = block.context(x)
        elif site == "self_attn.o_input":
            state["h"] = block.residual(x, state["context"])
        elif site == "mlp.gate_up_input":
            state["inner"] = block.inner(state["h"])

    evaluate = dict(zip(SITES, (at_qkv, at_o, at_gate_up, at_down), strict=True))
    for site in SITES:
        base = scale_from_max(ranges[site].to(x.device), bits)

        def loss(factor: float, site: str = site, base: Tensor = base) -> float:
            block.scales[site] = base * factor
            return (evaluate[site]() - target).square().mean().item()

        factor = line_search(loss)
        block.scales[site] = found.activation[site] = base * factor
        found.factors[site] = factor
        settle(site)


def line_search(loss: Callable[[float], float]) -> float:
    """Coarse then fine over clipping factors in (0, 1]; of equal losses the larger factor wins.

    The coarse walk goes down from 1 and stops once two steps in a row are worse than the best.
    """
    best, best_loss, worse = 1.0, float("inf"), 0
    for factor in COARSE_FACTORS:
        current = loss(factor)
        if current < best_loss:
            best, best_loss, worse = factor, current, 0
        elif (worse := worse + 1) == 2:
            break
    for step in FINE_STEPS:
        candidate = min(best + step, 1.0)
        if candidate != best and ((current := loss(candidate)), -candidate) < (best_loss, -best):
            best, best_loss = candidate, current
    return best
