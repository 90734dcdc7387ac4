"""Rule on floating-point tensors.

In a Q/DQ file every operator works on floating-point numbers by name. What counts is what a compiler makes of it: an
operator between DequantizeLinear and QuantizeLinear becomes an integer one. A tensor is floating point on the device
where an operator writes it and no QuantizeLinear alone reads it, or where a floating-point constant or input is read.
"""

from __future__ import annotations

import onnx

from pq_export.targets.lint.finding import Finding, Findings, finding
from pq_export.targets.lint.rules_static import SCALES, is_reported_elsewhere
from pq_export.targets.lint.view import DEQUANTIZE, QUANTIZE, GraphView
from pq_export.targets.profile import FLOATS, Profile, takes

# Inputs that are parameters of the operator and no tensors on a device.
PARAMETERS = {"Clip": (1, 2), "Pad": (2,), "Resize": (1, 2), "Dropout": (1,), **SCALES}


def floats(view: GraphView, profile: Profile) -> Findings:
    """Tensors of a type that the target does not compute with, each named once, where it begins."""
    if "any" in profile.floats.types:
        return
    named: set[str] = set()
    outputs = {value.name for value in view.outputs}
    for value in view.inputs:
        if _wrong(view, profile, value.name):
            named.add(value.name)
            yield _named(view, profile, None, value.name, "comes in as")
    for node in view.nodes:
        if node.op_type in (QUANTIZE, DEQUANTIZE) or is_reported_elsewhere(view, node):
            continue
        if all(view.is_constant(name) for name in node.output):
            continue  # computed before anything runs
        for position, name in enumerate(node.input):
            if name in named or not view.is_constant(name) or position in PARAMETERS.get(node.op_type, ()):
                continue
            if _wrong(view, profile, name) and not view.is_dequantized(name):
                named.add(name)
                yield _named(view, profile, node, name, "is a constant of type")
        for name in node.output:
            if name and name not in named and _wrong(view, profile, name) and not _becomes_codes(view, name, outputs):
                named.add(name)
                yield _named(view, profile, node, name, "stays")
    for quantizer in view.quantizers:
        name = quantizer.node.output[0]
        if quantizer.node.op_type == DEQUANTIZE and name in outputs and _wrong(view, profile, name):
            yield _named(view, profile, quantizer.node, name, "goes out as")


def _wrong(view: GraphView, profile: Profile, tensor: str) -> bool:
    kind = view.type_of(tensor)
    return kind in FLOATS and not takes(profile.floats.types, str(kind))


def _becomes_codes(view: GraphView, tensor: str, outputs: set[str]) -> bool:
    readers = view.readers.get(tensor, [])
    return tensor not in outputs and all(node.op_type == QUANTIZE and position == 0 for node, position in readers)


def _named(view: GraphView, profile: Profile, node: onnx.NodeProto | None, tensor: str, how: str) -> Finding:
    kind = view.type_of(tensor)
    takes_types = ", ".join(profile.floats.types)
    chip = f" on {profile.soc.name} ({profile.soc.architecture})" if profile.soc else ""
    what = f"takes {takes_types} only" if takes_types else "has no floating-point arithmetic"
    reason = f"'{tensor}' {how} {kind}; {profile.name}{chip} {what}"
    other = _socs_with(profile, str(kind))
    cure = f"Build it with --target {profile.built_by}, whose fixed-shape graphs quantize every tensor"
    cure += (
        f"; or take --soc {' or '.join(other)}, which {'has' if len(other) == 1 else 'have'} {kind}." if other else "."
    )
    return finding(view, "float-tensor", node, reason, cure, tensor=tensor)


def _socs_with(profile: Profile, kind: str) -> list[str]:
    """Up to three other chips of this target that compute with ``kind``."""
    if profile.soc is None or "floats" not in profile.soc.overrides:
        return []
    return [name for name, soc in profile.socs.items() if name != profile.soc.name and "floats" not in soc.overrides][
        :3
    ]
