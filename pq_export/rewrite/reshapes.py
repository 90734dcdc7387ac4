"""Pass: Reshape targets become constants.

Before::

    Concat(batch, 9, -1, 64) ─► Reshape          batch from a Shape node

After::

    [0, 9, -1, 64] ─► Reshape                    0 copies the axis

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
        first, *rest = target.inputs[0].inputs
        if all(isinstance(t, gs.Constant) for t in rest) and not isinstance(first, gs.Constant):
            shape = [0, *(int(v) for t in rest for v in np.atleast_1d(t.values))]
            if sum(s == -1 for s in shape) <= 1 and all(s != 0 for s in shape[1:]):
                node.attrs["allowzero"] = 0
                node.inputs[1] = gs.Constant(f"{node.outputs[0].name}.shape", np.array(shape, np.int64))
