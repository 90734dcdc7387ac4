"""Search of clipping factors, block by block (PrefixQuant, section 5.2, without its code's defects).

Each scale is ``factor · scale_from_max(range)``; factors never compound. Order inside a block:

1. keys: MSE of ``softmax(QKᵀ/√d)`` per KV head, causal, prefix keys included;
2. values: MSE of V per head;
3. weights: MSE of the linear's output per output channel, ``(W - Ŵ) XᵀX (W - Ŵ)ᵀ``, with the floating-point
   block's inputs of the linear (down_proj: after R4);
4. activations: MSE of the block output against the floating-point block on the same input, with
   quantized weights and cache in place, mask and prefix included; sites in order of execution, the
   others as they are then. With ``passes: 2``, or in a second clip_search, every other site is quantized.

Block inputs come from the already quantized blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pq_export.calib.block import Block, StagedBlock, get_linear
from pq_export.calibration import KV_SITES, SITE_OF_LINEAR, SITES
from pq_export.quantizer import fake_quantize, scale_from_max

KV_FACTORS = tuple(1.0 - 0.05 * i for i in range(16))  # 1.00 .. 0.25
WEIGHT_FACTORS = tuple(1.0 - 0.05 * i for i in range(10))  # 1.00 .. 0.55
COARSE_FACTORS = tuple(1.0 - 0.1 * i for i in range(10))  # 1.0 .. 0.1
FINE_STEPS = (0.05, -0.05, 0.025, -0.025)  # around the best so far, in turn


@dataclass(frozen=True)
class ClipSearchOptions:
    """Which scales to search; ``passes`` over the activation sites."""

    weights: bool = True
    kv: bool = True
    activations: bool = True
    passes: int = 1

    def __post_init__(self) -> None:
        if self.passes < 1:
            raise ValueError(f"passes must be at least 1, not {self.passes}")


@torch.no_grad()
def clip_search(block: Block, options: ClipSearchOptions, samples: int, length: int) -> None:
    """Find scales of one block and quantize it in place, on ``samples`` crops of ``length`` tokens."""
    x = block.x[:samples, :length]
    reference = block.staged_reference(length)
    if options.kv:
        _search_kv(block, x)
    if options.weights:
        _search_weights(block, reference, x)
    if options.activations and any(bits < 16 for bits in block.bits.activation.values()):
        target = reference.run(x)
        for _ in range(options.passes):
            _search_activations(block, x, target)


def _search_kv(block: Block, x: Tensor) -> None:
    staged = block.staged_reference(x.shape[1])
    attention = staged.layer.self_attn
    q, k, v = attention.qkv(staged.layer.input_layernorm(x), staged.rope)
    keys, _ = attention.with_prefix(k, v)
    prefix = keys[:, :, : keys.shape[2] - k.shape[2]]
    reference = attention.attention_weights(q, keys, staged.mask)

    def key_error(quantized: Tensor) -> Tensor:  # -> [G]
        weights = attention.attention_weights(q, torch.cat((prefix, quantized), 2), staged.mask)
        return (weights - reference).square().sum((0, 2, 3))

    def value_error(quantized: Tensor) -> Tensor:
        return (quantized - v).square().sum((0, 2, 3))

    for site, tensor, error in zip(KV_SITES, (k, v), (key_error, value_error), strict=True):
        bits = block.bits.kv[site]
        if bits == 16:
            continue
        per_head, peak = bits == 4, block.ranges[site].to(x.device)
        if not per_head:
            peak = peak.max().expand_as(peak)
        base = scale_from_max(peak, bits)
        losses = []
        for factor in KV_FACTORS:
            loss = error(fake_quantize(tensor, (base * factor)[:, None, None], bits))
            losses.append(loss if per_head else loss.sum().expand_as(loss))
        best = torch.stack(losses).argmin(0)  # first of equals: the larger factor
        factors = torch.tensor(KV_FACTORS, device=x.device)[best]
        scales = base * factors
        block.set_kv(site, scales if per_head else scales[:1])
        block.found.factors[site] = factors.mean().item()


def _search_weights(block: Block, reference: StagedBlock, x: Tensor) -> None:
    context = reference.context(x)
    h = reference.residual(x, context)
    inputs = {
        "self_attn.qkv_input": reference.layer.input_layernorm(x),
        "self_attn.o_input": context,
        "mlp.gate_up_input": reference.layer.post_attention_layernorm(h),
        "mlp.down_input": reference.inner(h),
    }
    grams = {site: (flat := value.flatten(0, -2)).T @ flat for site, value in inputs.items()}
    for name, site in SITE_OF_LINEAR.items():
        weight = get_linear(block.reference, name).weight
        scale, factor = search_weight(weight, grams[site], block.bits.weight[name])
        block.found.factors[name] = factor
        block.set_weight(name, scale)


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


def _search_activations(block: Block, x: Tensor, target: Tensor) -> None:
    """One pass over the sites; the first finds later ones without a quantizer."""
    staged, state = block.staged(x.shape[1]), {"x": x}

    def at_qkv() -> Tensor:
        return staged.run(x)

    def at_o() -> Tensor:
        h = staged.residual(x, state["context"])
        return staged.output(h, staged.inner(h))

    def at_gate_up() -> Tensor:
        return staged.output(state["h"], staged.inner(state["h"]))

    def at_down() -> Tensor:
        return staged.output(state["h"], state["inner"])

    def settle(site: str) -> None:  # what later sites start from, with this site's scale fixed
        if site == "self_attn.qkv_input":
            state["context"] = staged.context(x)
        elif site == "self_attn.o_input":
            state["h"] = staged.residual(x, state["context"])
        elif site == "mlp.gate_up_input":
            state["inner"] = staged.inner(state["h"])

    evaluate = dict(zip(SITES, (at_qkv, at_o, at_gate_up, at_down), strict=True))
    for site in SITES:
        bits = block.bits.activation[site]
        if bits < 16:
            base = scale_from_max(block.ranges[site].to(x.device), bits)

            def loss(factor: float, site: str = site, base: Tensor = base) -> float:
                block.set_activation(site, base * factor)
                return (evaluate[site]() - target).square().mean().item()

            factor = line_search(loss)
            block.set_activation(site, base * factor)
            block.found.factors[site] = factor
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
