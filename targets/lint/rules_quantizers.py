"""Rules on quantizers: types, granularity and zero points of activations and weights."""

from __future__ import annotations

import numpy as np
import onnx

from pq_export.targets.lint.finding import Findings, finding
from pq_export.targets.lint.view import DEQUANTIZE, MOVES, QUANTIZE, GraphView, Quantizer
from pq_export.targets.profile import Profile, takes

BIAS = "int32"


def activations(view: GraphView, profile: Profile) -> Findings:
    """Types, granularity and zero points of tensors that depend on inputs, and of constants beside them."""
    weights = {id(linear.weight.node) for linear in view.linears}
    for quantizer in view.quantizers:
        if id(quantizer.node) in weights:
            continue
        kind = view.code_type(quantizer)
        if view.is_constant(quantizer.data) and quantizer.node.op_type == DEQUANTIZE:
            if kind != BIAS:  # a bias has the scales of its sum, one a channel
                yield from _constant(view, profile, quantizer, kind)
            continue
        if quantizer.node.op_type == QUANTIZE:
            yield from _type(view, profile, quantizer, kind, "activations")
            yield from _granularity(view, profile, quantizer)
        elif view.quantizer_of(quantizer.data, QUANTIZE) is None:  # else its QuantizeLinear is the one to name
            yield from _granularity(view, profile, quantizer)
        else:
            continue
        yield from _zero_point(view, profile, quantizer, kind)


def moves(view: GraphView, profile: Profile) -> Findings:
    """Codes do not change their scale, zero point or type where they are moved, nor behind a Transpose and a Split.

    Both were seen to become Dequantize, a floating-point Transpose and Quantize: onnxruntime pushes a Transpose through
    a Split and the conversion behind it. A Reshape between them keeps it in its place.
    """
    if not profile.activations.moves_keep_codes:
        return
    cure = "Convert in front of it: DequantizeLinear -> QuantizeLinear, as --target does by itself."
    for written in view.quantizers:
        if written.node.op_type != QUANTIZE:
            continue
        node = view.producer.get(written.data)
        if node is not None and node.op_type in MOVES:
            read = view.quantizer_of(node.input[0], DEQUANTIZE)
            if read is None or view.is_constant(read.data) or _same_codes(view, read, written):
                continue
            reason = f"'{written.node.name}' writes other codes than '{read.node.name}' reads"
            yield finding(view, "moved-codes", node, reason, cure)
        elif node is not None and node.op_type == DEQUANTIZE:
            read = view.quantizer_of(written.data, DEQUANTIZE)
            transposed = None if read is None else _transposed(view, read.data)
            if read is not None and transposed is not None and not _same_codes(view, read, written):
                reason = f"'{written.node.name}' converts what '{transposed.name}' transposed and a Split cut"
                yield finding(view, "moved-codes", written.node, reason, cure)


def _transposed(view: GraphView, codes: str) -> onnx.NodeProto | None:
    """The Transpose that ``codes`` come from through a Split."""
    split = False
    while (written := view.quantizer_of(codes, QUANTIZE)) is not None:
        node = view.producer.get(written.data)
        if node is None or node.op_type not in ("Transpose", "Split"):
            return None
        if node.op_type == "Transpose":
            return node if split else None
        split = True
        read = view.quantizer_of(node.input[0], DEQUANTIZE)
        if read is None:
            return None
        codes = read.data
    return None


def _same_codes(view: GraphView, one: Quantizer, other: Quantizer) -> bool:
    if view.code_type(one) != view.code_type(other):
        return False
    return view.equal(one.scale, other.scale) and view.equal(one.zero_point, other.zero_point)


def _constant(view: GraphView, profile: Profile, quantizer: Quantizer, kind: str | None) -> Findings:
    """The embedding, a norm's gain, the prefix, ..."""
    if kind is not None and not (takes(profile.activations.types, kind) or takes(profile.weights.types, kind)):
        yield from _type(view, profile, quantizer, kind, "constants")
    yield from _granularity(view, profile, quantizer)


def _type(view: GraphView, profile: Profile, quantizer: Quantizer, kind: str | None, what: str) -> Findings:
    listed = profile.activations.types
    if kind is None or takes(listed, kind):
        return
    reason = f"{what} are {kind}; {profile.name} computes with {', '.join(listed) or 'none'}"
    cure = "Use 8-bit activations and --kv 8." if kind in ("int4", "uint4") else _precision(profile)
    yield finding(view, "activation-type", quantizer.node, reason, cure)


def _granularity(view: GraphView, profile: Profile, quantizer: Quantizer) -> Findings:
    scales = _count(view, quantizer.scale)
    kind = "block" if quantizer.block else "channel" if scales > 1 else "tensor"
    if takes(profile.activations.granularity, kind):
        return
    reason = f"{scales} scales in '{quantizer.scale}', one a {kind}; {profile.name} takes one a tensor"
    cure = "Use --kv 8 where these are keys or values, whose 4-bit codes have a scale a head; else calibrate again."
    yield finding(view, "activation-granularity", quantizer.node, reason, cure)


def _zero_point(view: GraphView, profile: Profile, quantizer: Quantizer, kind: str | None) -> Findings:
    wanted = profile.activations.zero_points.get(kind or "")
    if wanted is None:
        return
    found = view.values(quantizer.zero_point) if quantizer.zero_point in view.constants else np.zeros(1, np.int64)
    if quantizer.zero_point and quantizer.zero_point not in view.constants:
        return
    wrong = sorted({int(value) for value in found.astype(np.int64).reshape(-1)} - set(wanted))
    if wrong:
        reason = f"the zero point is {wrong[0]}; {profile.name} takes {_listed(wanted)} for {kind}"
        cure = f"Build it with --target {profile.built_by}, which writes symmetric codes."
        yield finding(view, "activation-zero-point", quantizer.node, reason, cure)


def weights(view: GraphView, profile: Profile) -> Findings:
    """Types, granularity, axis and zero points of quantized weights."""
    seen: set[int] = set()
    for linear in view.linears:
        weight = linear.weight
        if id(weight.node) in seen:
            continue
        seen.add(id(weight.node))
        kind = view.code_type(weight)
        if kind is not None and not takes(profile.weights.types, kind):
            reason = f"weights are {kind}; {profile.name} computes with {', '.join(profile.weights.types) or 'none'}"
            yield finding(view, "weight-type", weight.node, reason, _precision(profile))
            continue
        yield from _weight_granularity(view, profile, weight, kind)
        yield from _weight_zero_point(view, profile, weight, kind)


def _weight_granularity(view: GraphView, profile: Profile, weight: Quantizer, kind: str | None) -> Findings:
    rules = profile.weights
    scales = _count(view, weight.scale)
    granularity = "block" if weight.block else "channel" if scales > 1 else "tensor"
    listed = rules.granularity_by_type.get(kind or "", rules.granularity)
    if not takes(listed, granularity):
        reason = f"{kind} weights have one scale a {granularity}; {profile.name} takes one a {' or '.join(listed)}"
        yield finding(view, "weight-granularity", weight.node, reason, f"Build it with --target {profile.built_by}.")
    elif granularity == "block" and rules.block_sizes and weight.block not in rules.block_sizes:
        reason = f"blocks of {weight.block}; {profile.name} takes {_listed(rules.block_sizes)}"
        yield finding(view, "weight-block", weight.node, reason, f"Build it with --target {profile.built_by}.")
    elif granularity == "channel" and rules.channel_axis == "output":
        shape = view.shape_of(weight.data) or ()
        axis = weight.axis % len(shape) if shape else weight.axis
        if shape and axis != _output_axis(view, weight, len(shape)):
            reason = f"its scales are those of axis {axis}, the inputs that are summed"
            cure = "Quantize weights per output channel, as every recipe of pq-export does."
            yield finding(view, "weight-axis", weight.node, reason, cure)


def _output_axis(view: GraphView, weight: Quantizer, rank: int) -> int:
    """Of the codes: the last one of a MatMul's [K, N], through transpositions and Gemm's transB; Conv's is 0."""
    tensor, axis_from_end = weight.node.output[0], 1
    while True:
        node, position = next(iter(view.readers.get(tensor, ())), (None, 0))
        if node is None:
            return rank - axis_from_end
        if node.op_type == "Transpose":
            axis_from_end = 3 - axis_from_end if axis_from_end in (1, 2) else axis_from_end
            tensor = node.output[0]
        elif node.op_type == "Conv":
            return 0
        elif node.op_type in ("MatMul", "Gemm"):
            transposed = any(a.name == ("transA", "transB")[min(position, 1)] and a.i for a in node.attribute)
            swapped = transposed != (position == 0)
            return rank - (3 - axis_from_end if swapped else axis_from_end)
        else:
            tensor = node.output[0]


def _weight_zero_point(view: GraphView, profile: Profile, weight: Quantizer, kind: str | None) -> Findings:
    rules = profile.weights
    if not weight.zero_point:
        if kind in rules.explicit_zero_point:
            reason = f"{kind} weights name no zero point; without one {profile.name} reads the codes as 8-bit"
            cure = f"Build it with --target {profile.built_by}, which writes zeros."
            yield finding(view, "weight-zero-point-missing", weight.node, reason, cure)
        return
    if rules.zero_point == "any" or weight.zero_point not in view.constants:
        return
    if rules.zero_point == "zero-by-channel" and _count(view, weight.scale) == 1:
        return
    if view.values(weight.zero_point).astype(np.int64).any():
        reason = f"zero point '{weight.zero_point}' of weights with one scale a channel is not 0"
        cure = "Quantize weights symmetrically, as every recipe of pq-export does."
        yield finding(view, "weight-zero-point", weight.node, reason, cure)


def _count(view: GraphView, tensor: str) -> int:
    shape = view.shape_of(tensor)
    return int(np.prod([d for d in shape or () if isinstance(d, int)], dtype=np.int64)) if shape else 1


def _precision(profile: Profile) -> str:
    flags = " or ".join(f"--{name}" for name in profile.precisions)
    return f"Use {flags} with --target {profile.built_by}." if flags else f"Build it with --target {profile.built_by}."


def _listed(values: tuple[int, ...]) -> str:
    return " or ".join(map(str, values))


QUANTIZER_RULES = (activations, moves, weights)
