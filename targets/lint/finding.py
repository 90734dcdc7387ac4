"""What the linter says, and its rules by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx

from pq_export.targets.lint.view import GraphView

# Rule -> what it asks, in the order of docs/profiles.md.
RULES = {
    "dynamic-quantization": "no operator quantizes by what it sees at run time",
    "run-time-range": "no scale is computed from a maximum of the data",
    "data-dependent": "no loop, branch, or shape that depends on data",
    "scale-not-constant": "every scale is an initializer",
    "zero-point-not-constant": "every zero point is an initializer",
    "scale-value": "every scale is positive and finite",
    "scale-shape": "one scale a tensor, or as many as the axis has channels",
    "quantizer-pair": "codes are read with the scale and zero point that wrote them",
    "connected": "outputs depend on the tokens, and every input is read",
    "opset": "the opset is one that the target reads",
    "operator": "every operator is one that the target takes",
    "domain": "every operator's domain is one that the target knows",
    "local-function": "no model-local functions where the target takes none",
    "rank": "no operator gets more dimensions than it takes",
    "symbolic-dimension": "every dimension is a number",
    "empty-dimension": "no dimension is 0",
    "activation-type": "codes of activations have a type that the target computes with",
    "activation-granularity": "activations have as many scales as the target takes: one a tensor on most",
    "activation-zero-point": "zero points of activations have the values that the target takes",
    "moved-codes": "an operator that only moves elements keeps scale and zero point where the target needs that",
    "weight-type": "codes of weights have a type that the target computes with",
    "weight-granularity": "weights have one scale a tensor, a channel or a block, as the target takes it",
    "weight-axis": "scales a channel are those of output channels",
    "weight-zero-point": "zero points of weights are 0 where the target wants that",
    "weight-zero-point-missing": "a type whose zero point the target needs to see has one",
    "weight-block": "blocks have a size that the target takes",
    "type-pair": "activation and weight of a linear are types that the target multiplies",
    "linear-unit": "a linear stands between DequantizeLinear and QuantizeLinear",
    "linear-types": "input and output of a linear have one type",
    "requantization-multiplier": "s_x * s_w / s_y of every channel stays below the target's limit",
    "linear-size": "an output sums no more products than the accumulator holds",
    "cache-type": "keys and values of the cache have a type that the target takes",
    "cache-update": "new keys and values join the cache by an operator that the target takes",
    "prefix-at-run-time": "the prefix's keys and values are constants of the graph",
    "float-tensor": "no tensor has a floating-point type that the target does not compute with",
    "io-type": "inputs and outputs have types that the target exchanges",
}


@dataclass(frozen=True)
class Finding:
    """``node`` of ``graph`` (in decoder layer ``layer``, None outside of them) breaks ``rule``.

    ``reason`` says how, ``cure`` names the flag or recipe that mends it.
    """

    graph: str
    node: str
    layer: int | None
    rule: str
    reason: str
    cure: str

    def __str__(self) -> str:
        where = f"{self.graph}: {self.node}" + ("" if self.layer is None else f" (layer {self.layer})")
        return f"{where}: {self.rule}: {self.reason}"


Findings = Iterator[Finding]


def finding(
    view: GraphView, rule: str, node: onnx.NodeProto | None, reason: str, cure: str, *, tensor: str = ""
) -> Finding:
    """One finding on ``node``, or on ``tensor`` where it is no node's."""
    assert rule in RULES, rule
    name = tensor if node is None else node.name or f"{node.op_type} -> {', '.join(node.output)}"
    return Finding(view.name, name, view.layer_of(node, tensor), rule, reason, cure)
