"""Rules on linears: products of an activation and quantized weights."""

from __future__ import annotations

import numpy as np

from pq_export.targets.lint.finding import Findings, finding
from pq_export.targets.lint.view import DEQUANTIZE, QUANTIZE, GraphView, Linear, Quantizer
from pq_export.targets.profile import Profile, takes, takes_pair

ROUND_OFF = 1e-5  # of an fp32 quotient


def linears(view: GraphView, profile: Profile) -> Findings:
    """Types of both sides, what stands around the product, and the factor that its sums are scaled by."""
    rules = profile.linears
    for linear in view.linears:
        read, written = _around(view, linear)
        activation = view.code_type(read) if read is not None else None
        weight = view.code_type(linear.weight)
        known = activation and weight and takes(profile.weights.types, weight)  # else another rule's
        if known and not takes_pair(rules.pairs, str(activation), str(weight)):
            reason = f"{activation} activations beside {weight} weights; {profile.name} has no such product"
            yield finding(view, "type-pair", linear.node, reason, _pair_cure(profile, str(activation), str(weight)))
        if rules.unit and (read is None or written is None):
            missing = "DequantizeLinear in front of it" if read is None else "QuantizeLinear behind it"
            reason = f"no {missing}: the product becomes a floating-point one"
            cure = f"Build it with --target {profile.built_by}: its fixed-shape graphs quantize both sides of a linear."
            yield finding(view, "linear-unit", linear.node, reason, cure)
        if read is not None and written is not None:
            yield from _requantization(view, profile, linear, read, written)
        inner = _summed(view, linear)
        if rules.max_inputs and inner is not None and inner > rules.max_inputs:
            reason = f"an output sums {inner} products, at most {rules.max_inputs} are taken"
            yield finding(view, "linear-size", linear.node, reason, "Split the linear, or take a smaller model.")


def _around(view: GraphView, linear: Linear) -> tuple[Quantizer | None, Quantizer | None]:
    """The DequantizeLinear that it reads and the QuantizeLinear that alone reads it."""
    behind = view.readers.get(linear.node.output[0], [])
    single = behind[0][0] if len(behind) == 1 and behind[0][0].op_type == QUANTIZE else None
    written = view.quantizer_of(single.output[0], QUANTIZE) if single is not None else None
    return view.quantizer_of(linear.activation, DEQUANTIZE), written


def _requantization(view: GraphView, profile: Profile, linear: Linear, read: Quantizer, written: Quantizer) -> Findings:
    rules = profile.linears
    before, after = view.code_type(read), view.code_type(written)
    if rules.same_type and before and after and before != after:
        reason = f"it reads {before} and writes {after}: {profile.name} wants one type"
        cure = "Change the type behind it by DequantizeLinear -> QuantizeLinear, as --target does by itself."
        yield finding(view, "linear-types", linear.node, reason, cure)
        return
    scales = (read.scale, linear.weight.scale, written.scale)
    if not rules.max_multiplier or any(name not in view.constants for name in scales):
        return
    s_x, s_w, s_y = (view.values(name).astype(np.float64) for name in scales)
    if not all((s > 0).all() and np.isfinite(s).all() for s in (s_x, s_w, s_y)):
        return  # another rule's
    largest = float(s_x.max() * s_w.max() / s_y.min())
    if largest > rules.max_multiplier * (1 + ROUND_OFF):
        reason = f"s_x * s_w / s_y is {largest:.3g}, above {rules.max_multiplier:g}: results lose accuracy or are wrong"
        cure = "Observe more text (--calib-samples), so that the output's range is wider, or use 16-bit activations."
        yield finding(view, "requantization-multiplier", linear.node, reason, cure)


def _summed(view: GraphView, linear: Linear) -> int | None:
    """K of [K, N], from the activation's last dimension."""
    shape = view.shape_of(linear.activation)
    return shape[-1] if shape and isinstance(shape[-1], int) else None


def _pair_cure(profile: Profile, activation: str, weight: str) -> str:
    fitting = sorted({a for a, w in profile.linears.pairs if w in (weight, "any")})
    if activation in ("int4", "uint4"):
        wide = fitting[0] if fitting else "int8"
        return f"Convert to {wide} in front of the product: DequantizeLinear -> QuantizeLinear."
    if not fitting:
        return "Use --w8a8."
    types = " or ".join(fitting)
    return f"Write activations as {types} (symmetric int8 is uint8 with zero point 128), or use --w8a8."


LINEAR_RULES = (linears,)
