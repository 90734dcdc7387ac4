"""Pass: every linear of the layers becomes ``pq::QLinear``.

Before::

    x -> MatMul <- Transpose <- layers.N.<linear>.weight        [-> Add <- bias]

After::

    x -> pq::QLinear(codes INT4/INT8 [K, N], scale [N], input scale, bias)

The MatMul is found by the module that made it, so fused or renamed tensors do not matter.
"""

from __future__ import annotations

import numpy as np

from pq_export.calibration import Calibration, input_site
from pq_export.export.fp_graph import FPGraph
from pq_export.rewrite.edit import module_output, reconnect, single_node
from pq_export.rewrite.qlinear import LinearConstants, insert_qlinear


def quantize_linears(fp: FPGraph, calibration: Calibration) -> None:
    """Replace all linears that ``calibration`` quantized, with their parameters."""
    for name in calibration.linear_names():
        matmul = single_node(fp, name, "MatMul")
        x, output = matmul.inputs[0], module_output(fp, name)
        replaced = fp.nodes_in(name)
        result = insert_qlinear(fp.graph, x, linear_constants(calibration, name), input_site(name))
        reconnect(output, result)
        for node in replaced:
            node.inputs.clear()
            fp.graph.nodes.remove(node)
        fp.graph.inputs = [t for t in fp.graph.inputs if t.name not in (f"{name}.weight", f"{name}.bias")]


def linear_constants(calibration: Calibration, name: str) -> LinearConstants:
    """Integers of one linear in the graph's layout [K, N]."""
    scale = calibration.input_scale(name)
    return LinearConstants(
        name=name,
        codes=np.ascontiguousarray(calibration.weight_codes(name).T),
        scale=calibration.tensors[f"{name}.scale"],
        bias=calibration.tensors.get(f"{name}.bias"),
        input_scale=None if scale is None else np.float32(scale),
        weight_bits=calibration.weight_bits(name),
        activation_bits=calibration.activation_bits(input_site(name)),
    )
