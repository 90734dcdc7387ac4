"""Rules of every target: nothing is decided at run time, and the quantizers are whole."""

from __future__ import annotations

import numpy as np
import onnx

from pq_export.targets.lint.finding import Findings, finding
from pq_export.targets.lint.view import DEQUANTIZE, QUANTIZE, GraphView
from pq_export.targets.profile import Profile

DYNAMIC = ("DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM")
DATA_DEPENDENT = (
    *("If", "Loop", "Scan", "SequenceMap", "NonZero", "Unique", "Compress", "NonMaxSuppression", "Bernoulli"),
    *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial"),
)
# Where the operators that compute with codes have scales and zero points.
SCALES = {QUANTIZE: (1,), DEQUANTIZE: (1,), "QLinearMatMul": (1, 4, 6), "MatMulIntegerToFloat": (2, 3)}
ZERO_POINTS = {
    QUANTIZE: (2,),
    DEQUANTIZE: (2,),
    "QLinearMatMul": (2, 5, 7),
    "MatMulInteger": (2, 3),
    "MatMulIntegerToFloat": (4, 5),
}
RANGES = ("ReduceMax", "ReduceMin", "ReduceL1")
# Between a maximum and the rounding that it scales; not Sub, by which a softmax takes its maximum away.
SCALING = (
    *("Abs", "Cast", "Clip", "Div", "Expand", "Identity", "Max", "Min", "Mul", "Neg", "Reciprocal", "Reshape"),
    *("Squeeze", "Unsqueeze", "Where"),
)
ROUNDING = ("Round", "Floor", "Ceil")
CALIBRATE = "Build the bundle from a calibration: pq-export build CALIB --target {name}; its scales are constants."


def dynamic(view: GraphView, profile: Profile) -> Findings:
    """Operators that quantize by what they see, or whose work depends on data."""
    for node in view.nodes:
        if _is_dynamic(node):
            reason = f"{node.op_type} finds its scale at run time; some compilers drop the quantization without a word"
            yield finding(view, "dynamic-quantization", node, reason, _calibrate(profile))
        elif node.op_type in DATA_DEPENDENT:
            cure = "Unroll it: pq-export's own graphs have none, so build the bundle again from its calibration."
            yield finding(view, "data-dependent", node, f"{node.op_type} depends on data at run time", cure)


def _is_dynamic(node: onnx.NodeProto) -> bool:
    if node.op_type == "MatMulNBits":  # level 4 is int8, with a scale found for every block of activations
        return any(a.name == "accuracy_level" and a.i == 4 for a in node.attribute)
    return node.op_type in DYNAMIC


def run_time_ranges(view: GraphView, profile: Profile) -> Findings:
    """A maximum of the data that scales what is then rounded: dynamic quantization in plain operators."""
    for node in view.nodes:
        if node.op_type in RANGES and not view.is_constant(node.output[0]):
            rounded = _rounds(view, node)
            if rounded is not None:
                reason = f"its result scales what {rounded.name or rounded.op_type} rounds"
                yield finding(view, "run-time-range", node, reason, _calibrate(profile))


def _rounds(view: GraphView, start: onnx.NodeProto) -> onnx.NodeProto | None:
    pending, seen = list(start.output), set()
    while pending:
        for node, position in view.readers.get(pending.pop(), ()):
            if id(node) in seen:
                continue
            seen.add(id(node))
            if node.op_type in ROUNDING or (node.op_type == QUANTIZE and position == 1):
                return node
            if node.op_type in SCALING:
                pending += node.output
    return None


def constants(view: GraphView, profile: Profile) -> Findings:
    """Scales and zero points are constants, and scales positive and finite."""
    for node in view.nodes:
        for position in SCALES.get(node.op_type, ()):
            if position >= len(node.input) or not node.input[position]:
                continue
            name = node.input[position]
            if name not in view.constants:
                if not _reported_at_its_source(view, name):
                    yield finding(
                        view, "scale-not-constant", node, f"its scale '{name}' is not a constant", _calibrate(profile)
                    )
            elif bad := _bad_scale(view.values(name)):
                cure = "Calibrate again; a calibration text that reaches every channel helps (--calib-data)."
                yield finding(view, "scale-value", node, f"scale '{name}' {bad}", cure)
        for position in ZERO_POINTS.get(node.op_type, ()):
            if position < len(node.input) and node.input[position]:
                name = node.input[position]
                if name not in view.constants and not _reported_at_its_source(view, name):
                    reason = f"its zero point '{name}' is not a constant"
                    yield finding(view, "zero-point-not-constant", node, reason, _calibrate(profile))


def _reported_at_its_source(view: GraphView, name: str) -> bool:
    """Whether another rule names the node that computes this scale."""
    return any(is_reported_elsewhere(view, node) for node in view.ancestors(name))


def _bad_scale(values: np.ndarray) -> str:
    wide = values.astype(np.float64)
    if np.isnan(wide).any():
        return "is NaN"
    if np.isinf(wide).any():
        return "is infinite"
    if not (wide > 0).all():
        return "is 0" if not (wide < 0).any() else "is negative"
    return ""


def scale_shapes(view: GraphView, profile: Profile) -> Findings:
    """As many scales as channels."""
    for quantizer in view.quantizers:
        shape, scales = view.shape_of(quantizer.data), view.shape_of(quantizer.scale)
        if shape is None or scales is None or quantizer.block or not scales or scales == (1,):
            continue
        axis = quantizer.axis + len(shape) if quantizer.axis < 0 else quantizer.axis
        channels = shape[axis] if axis < len(shape) else None
        if isinstance(channels, int) and scales != (channels,):
            reason = f"'{quantizer.scale}' has shape {list(scales)}, axis {axis} of '{quantizer.data}' has {channels}"
            yield finding(view, "scale-shape", quantizer.node, reason, "Build the bundle again from its calibration.")


def pairs(view: GraphView, profile: Profile) -> Findings:
    """A DequantizeLinear right behind a QuantizeLinear has its scale and zero point."""
    for reader in view.quantizers:
        writer = view.quantizer_of(reader.data, QUANTIZE)
        if reader.node.op_type != DEQUANTIZE or writer is None:
            continue
        for what, one, other in (
            ("scale", writer.scale, reader.scale),
            ("zero point", writer.zero_point, reader.zero_point),
        ):
            if not view.equal(one, other):
                reason = f"reads codes with {what} '{other}', which were written with '{one}'"
                cure = "To change the type write DequantizeLinear -> QuantizeLinear; or build the bundle again."
                yield finding(view, "quantizer-pair", reader.node, reason, cure)
                break


def connected(view: GraphView, profile: Profile) -> Findings:
    """Every output depends on ``input_ids`` (where there is such an input), and every input is read."""
    cure = "A tracer baked values in: build the bundle again from its calibration."
    names = {value.name for value in view.inputs}
    depends = {"input_ids"}
    for node in view.nodes:  # sorted by the standard
        if depends & set(node.input):
            depends |= set(node.output)
    for value in view.outputs:
        if "input_ids" in names and value.name not in depends:
            reason = "this output does not depend on input_ids"
            yield finding(view, "connected", None, reason, cure, tensor=value.name)
    for name in sorted(names - set(view.readers)):
        yield finding(view, "connected", None, "no node reads this input", cure, tensor=name)


def _calibrate(profile: Profile) -> str:
    return CALIBRATE.format(name=profile.built_by)


def is_reported_elsewhere(view: GraphView, node: onnx.NodeProto) -> bool:
    """Whether a rule of this module names this node: then it need not be called an unknown operator as well."""
    if node.op_type in RANGES:
        return _rounds(view, node) is not None
    return _is_dynamic(node) or node.op_type in DATA_DEPENDENT


RULES_OF_EVERY_TARGET = (dynamic, run_time_ranges, constants, scale_shapes, pairs, connected)
