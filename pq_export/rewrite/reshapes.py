"""Pass: Reshape targets become constants.

Before::

    Concat(batch, sequence, 576) ─► Reshape      batch and sequence from Shape nodes

After::

    [0, -1, 576] ─► Reshape                      0 copies the axis, -1 takes what is left

The exporter computes the batch size for every Reshape; in this decoder axis 0 is the batch everywhere,
and at most one other axis is dynamic. Saves a dozen tiny nodes a layer and a shape chain per step.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from pq_export.export.fp_graph import FPGraph


def make_reshapes_constant(fp: FPGraph) -> None:
    """Rewrite Reshapes inside the layers whose target is a Concat of a batch size and constants."""
    for node in fp.graph.nodes:
        if node.op != "Reshape" or not fp.scope_of.get(node.outputs[0].name, "").startswith("layers."):
            continue
        target = node.inputs[1]
        if isinstance(target, gs.Constant) or not target.inputs or target.inputs[0].op != "Concat":
            continue
        batch, *rest = target.inputs[0].inputs
        sizes = [int(v) for t in rest for v in (np.atleast_1d(t.values) if isinstance(t, gs.Constant) else [-1])]
        if not isinstance(batch, gs.Constant) and sizes.count(-1) <= 1 and 0 not in sizes:
            node.attrs["allowzero"] = 0
            node.inputs[1] = gs.Constant(f"{node.outputs[0].name}.shape", np.array([0, *sizes], np.int64))
