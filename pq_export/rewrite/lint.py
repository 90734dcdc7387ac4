"""Linter: what makes a quantized graph static, checked on the finished file.

* every scale and zero point of QuantizeLinear, DequantizeLinear and MatMulInteger is an initializer,
  finite and positive;
* nothing quantizes dynamically, and no value is computed by a loop or a branch;
* every output depends on the tokens, and every declared input is used.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

DYNAMIC_OPS = ("DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "If", "Loop", "Scan", "NonZero")
SCALE_INPUTS = {"QuantizeLinear": (1,), "DequantizeLinear": (1,)}
ZERO_POINT_INPUTS = {"QuantizeLinear": (2,), "DequantizeLinear": (2,), "MatMulInteger": (2, 3)}


@dataclass(frozen=True)
class Finding:
    """``node`` breaks ``rule``; ``detail`` says how."""

    node: str
    rule: str
    detail: str

    def __str__(self) -> str:
        return f"{self.node}: {self.rule}: {self.detail}"


def lint(model: onnx.ModelProto) -> list[Finding]:
    """All findings on ``model``; an empty list means that it is static and connected."""
    graph = model.graph
    initializers = {t.name: t for t in graph.initializer}
    overridable = {i.name for i in graph.input} & set(initializers)
    findings = []
    for node in graph.node:
        name = node.name or node.op_type
        if node.op_type in DYNAMIC_OPS:
            findings.append(Finding(name, "static", f"{node.op_type} is decided at run time"))
        for kind, table in (("scale", SCALE_INPUTS), ("zero point", ZERO_POINT_INPUTS)):
            for position in table.get(node.op_type, ()):
                if position >= len(node.input) or not node.input[position]:
                    continue
                tensor = initializers.get(node.input[position])
                if tensor is None or tensor.name in overridable:
                    findings.append(Finding(name, "static", f"its {kind} '{node.input[position]}' is not a constant"))
                elif kind == "scale" and not _positive(tensor):
                    findings.append(Finding(name, "scale", f"'{tensor.name}' is not positive and finite"))
    return findings + _connections(model, initializers)


def _positive(tensor: onnx.TensorProto) -> bool:
    values = numpy_helper.to_array(tensor)
    return bool(np.isfinite(values).all() and (values > 0).all())


def _connections(model: onnx.ModelProto, initializers: dict[str, onnx.TensorProto]) -> list[Finding]:
    producer = {output: node for node in model.graph.node for output in node.output}
    findings, used = [], {name for node in model.graph.node for name in node.input}
    reaches: dict[str, frozenset[str]] = {i.name: frozenset([i.name]) for i in model.graph.input}
    for node in model.graph.node:  # topologically sorted, the checker guarantees it
        sources = (
            frozenset().union(*(reaches.get(name, frozenset()) for name in node.input)) if node.input else frozenset()
        )
        for output in node.output:
            reaches[output] = sources
    for output in model.graph.output:
        if "input_ids" not in reaches.get(output.name, frozenset()):
            findings.append(Finding(output.name, "connected", "this output does not depend on input_ids"))
        if output.name not in producer:
            findings.append(Finding(output.name, "connected", "nothing computes this output"))
    for value in model.graph.input:
        if value.name not in used and value.name not in initializers:
            findings.append(Finding(value.name, "connected", "no node reads this input"))
    return findings
