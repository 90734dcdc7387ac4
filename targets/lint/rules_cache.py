"""Rules on the cache: its types, how it grows, and the prefix in front of it."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from pq_export.targets.lint.finding import Findings, finding
from pq_export.targets.lint.view import DEQUANTIZE, MOVES, QUANTIZE, GraphView
from pq_export.targets.profile import Profile, takes

PAST, PRESENT = "past_key_values.", "present."
UPDATES = {
    "Concat": "concat",
    "ScatterND": "scatter",
    "ScatterElements": "scatter",
    "TensorScatter": "tensor-scatter",
}
# What may stand between the cache and what it joins: readers of its values, one by one.
KEEPS = (QUANTIZE, DEQUANTIZE, "Cast", "Mul", "Min", "Clip", *MOVES)


def cache(view: GraphView, profile: Profile) -> Findings:
    """Types of past and present, and the operators that join them."""
    for value in (*view.inputs, *view.outputs):
        kind = view.type_of(value.name)
        if value.name.startswith((PAST, PRESENT)) and kind is not None and not takes(profile.cache.types, kind):
            reason = f"its type is {kind}; {profile.name} takes {', '.join(profile.cache.types)}"
            cure = f"Use --kv 8 with --target {profile.built_by}, which writes codes in whole bytes."
            yield finding(view, "cache-type", None, reason, cure, tensor=value.name)
    for value in view.inputs:
        if not value.name.startswith(PAST):
            continue
        for node in _joins(view, value.name):
            how = UPDATES.get(node.op_type)
            if node.op_type in profile.operators.refused:
                continue  # named as an operator
            if how is not None and not takes(profile.cache.update, how):
                reason = f"'{value.name}' grows by {node.op_type}; {profile.name} takes {_listed(profile.cache.update)}"
                cure = f"Build it with --target {profile.built_by}: new keys and values are concatenated."
                yield finding(view, "cache-update", node, reason, cure)


def prefix(view: GraphView, profile: Profile, length: int | None) -> Findings:
    """The prefix of ``length`` tokens (None: not known) is a constant that joins every past."""
    if not profile.cache.constant_prefix:
        return
    cure = "Build the bundle from a calibration with --prefix auto: its keys and values become initializers."
    runtime = [value.name for value in view.inputs if "prefix" in value.name.lower()]
    for name in runtime:
        reason = "the prefix comes in at run time: a caller may forget it, and no static range covers it"
        yield finding(view, "prefix-at-run-time", None, reason, cure, tensor=name)
    if runtime or not length:
        return
    for value in view.inputs:
        if value.name.startswith(PAST) and not any(_has_constant(view, node) for node in _joins(view, value.name)):
            reason = f"no constant of the {length} prefix tokens is in front of this cache"
            yield finding(view, "prefix-at-run-time", None, reason, cure, tensor=value.name)


def _joins(view: GraphView, tensor: str) -> Iterator[onnx.NodeProto]:
    """Operators that join ``tensor`` with something, and those behind them."""
    pending, seen = [tensor], set()
    while pending:
        for node, _ in view.readers.get(pending.pop(), ()):
            if id(node) in seen:
                continue
            seen.add(id(node))
            if node.op_type in UPDATES:
                yield node
                pending += node.output
            elif node.op_type in KEEPS:
                pending += node.output


def _has_constant(view: GraphView, node: onnx.NodeProto) -> bool:
    return any(view.is_constant(name) for name in node.input if name)


def _listed(values: tuple[str, ...]) -> str:
    return " or ".join(values)
