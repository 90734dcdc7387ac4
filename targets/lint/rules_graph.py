"""Rules on the graph itself: opset, operators, dimensions, inputs and outputs."""

from __future__ import annotations

import onnx

from pq_export.targets.lint.finding import Findings, finding
from pq_export.targets.lint.rules_static import is_reported_elsewhere
from pq_export.targets.lint.view import GraphView
from pq_export.targets.profile import Profile, takes

STANDARD = ("", "ai.onnx")


def opset(view: GraphView, profile: Profile) -> Findings:
    """The opset is one that the target reads."""
    low, high = profile.opset.min, profile.opset.max
    if low <= view.opset <= high:
        return
    reason = f"{view.opset}; {profile.name} reads {low} to {high}"
    cure = f"Build it with --target {profile.built_by}, which writes one that {profile.name} reads."
    yield finding(view, "opset", None, reason, cure, tensor="model")


def operators(view: GraphView, profile: Profile) -> Findings:
    """Operators, their domains and their ranks."""
    listed = profile.operators
    build = f"Build it with --target {profile.built_by}"
    standard_form = f"{build} or --form qdq: standard operators only."
    own_form = f"{build}, whose fixed-shape graphs do without." if profile.shapes.static else f"{build}."
    for node in view.nodes:
        if is_reported_elsewhere(view, node):
            continue
        if node.op_type in listed.refused:
            yield finding(view, "operator", node, f"{profile.name} refuses {node.op_type}", own_form)
        elif node.domain not in STANDARD and not takes(listed.domains, node.domain):
            reason = f"{node.domain}::{node.op_type} is of a domain that {profile.name} does not know"
            yield finding(view, "domain", node, reason, standard_form)
        elif not takes(listed.allowed, node.op_type):
            reason = f"{node.op_type} is none of the operators that {profile.name} takes"
            yield finding(view, "operator", node, reason, own_form)
        yield from _rank(view, profile, node)
    for function in view.model.functions:
        if not listed.functions:
            reason = f"{function.domain}::{function.name} is defined in the file; {profile.name} reads no definitions"
            yield finding(view, "local-function", None, reason, standard_form, tensor=function.name)


def _taken(profile: Profile, node: onnx.NodeProto) -> bool:
    listed = profile.operators
    known = node.domain in STANDARD or takes(listed.domains, node.domain)
    return known and node.op_type not in listed.refused and takes(listed.allowed, node.op_type)


def _rank(view: GraphView, profile: Profile, node: onnx.NodeProto) -> Findings:
    most = profile.operators.max_rank.get(node.op_type)
    shape = view.shape_of(node.input[0]) if most and node.input else None
    if most and shape is not None and len(shape) > most:
        reason = f"{node.op_type} gets {len(shape)} dimensions, at most {most} are taken"
        yield finding(view, "rank", node, reason, "Reshape in front of it.")


def shapes(view: GraphView, profile: Profile) -> Findings:
    """Every dimension is a number, and none is 0. A node is named where its inputs are static and its output is not."""
    if not profile.shapes.static:
        return
    pin = f"Fix it with --prefill-len and --cache-len: pq-export build CALIB --target {profile.built_by}."
    constant = "Leave it out: fixed-shape graphs have a cache of --cache-len tokens, hidden where it is empty."
    unknown: set[str] = set()
    for value in (*view.inputs, *view.outputs):
        shape = view.shape_of(value.name)
        if shape is None or not all(isinstance(d, int) for d in shape):
            unknown.add(value.name)
            if value.name in view.producer and any(not _static(view, name) for name in view.producer[value.name].input):
                continue  # named where it begins
            text = "unknown" if shape is None else str([d if d is not None else "?" for d in shape])
            yield finding(view, "symbolic-dimension", None, f"its shape is {text}", pin, tensor=value.name)
        elif 0 in shape:
            yield finding(view, "empty-dimension", None, f"its shape is {list(shape)}", constant, tensor=value.name)
    for node in view.nodes:
        if is_reported_elsewhere(view, node) or not _taken(profile, node):
            unknown |= set(node.output)
    for node in view.nodes:
        if unknown & set(node.input):
            unknown |= {output for output in node.output if not _static(view, output)}
            continue
        for output in node.output:
            if not output or output in unknown:
                continue
            shape = view.shape_of(output)
            if shape is None or not all(isinstance(d, int) for d in shape):
                unknown.add(output)
                if node.domain in STANDARD:  # of others nobody knows the shapes
                    reason = f"the shape of '{output}' is decided at run time"
                    yield finding(view, "symbolic-dimension", node, reason, pin)
            elif 0 in shape and output not in {value.name for value in view.outputs}:
                yield finding(view, "empty-dimension", node, f"'{output}' has shape {list(shape)}", constant)


def _static(view: GraphView, tensor: str) -> bool:
    shape = view.shape_of(tensor)
    return not tensor or (shape is not None and all(isinstance(d, int) for d in shape))


def exchanged_types(view: GraphView, profile: Profile) -> Findings:
    """Types of inputs and outputs but the cache's, which have a rule of their own, and floats, which have theirs."""
    for value in (*view.inputs, *view.outputs):
        kind = view.type_of(value.name)
        if kind is None or value.name.startswith(("past_key_values.", "present.")) or "float" in kind:
            continue
        if not takes(profile.io.types, kind):
            reason = f"its type is {kind}; {profile.name} exchanges {', '.join(profile.io.types)}"
            cure = f"Build it with --target {profile.built_by}; 4-bit codes travel in 8-bit containers."
            yield finding(view, "io-type", None, reason, cure, tensor=value.name)


GRAPH_RULES = (opset, operators, shapes, exchanged_types)
