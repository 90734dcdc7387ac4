"""Pass: an optional input that limits the logits to the last tokens of the sequence.

Before::

    hidden [B, S, hidden] ─► norm ─► lm_head ─► logits [B, S, vocab]

After::

    hidden ─► Slice(-num_logits_to_keep .. end) ─► norm ─► lm_head ─► logits

``num_logits_to_keep`` (int64 [1]) has the default 0, which keeps all: a caller that does not know it need
not feed it. Prefill asks for 1 and saves a product with the whole vocabulary for every other token.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from pq_export.export.fp_graph import FPGraph
from pq_export.rewrite.edit import add_node, reconnect

NUM_LOGITS = "num_logits_to_keep"


def keep_last_logits(fp: FPGraph) -> None:
    """Insert the Slice in front of the final norm and add the input with its default."""
    nodes = fp.nodes_in("norm")
    inside = {id(t) for n in nodes for t in n.outputs}
    hidden = next(t for n in nodes for t in n.inputs if isinstance(t, gs.Variable) and id(t) not in inside)
    i64 = np.dtype(np.int64)
    count = gs.Constant(NUM_LOGITS, np.zeros(1, np.int64))
    start = add_node(fp.graph, "Neg", [count], "last_logits/start", i64)
    end = gs.Constant("last_logits.end", np.array([np.iinfo(np.int64).max]))
    axis = gs.Constant("last_logits.axis", np.array([1], np.int64))
    kept = add_node(fp.graph, "Slice", [hidden, start, end, axis], "last_logits/hidden", np.dtype(np.float32))
    reconnect(hidden, kept, nodes)
    fp.graph.inputs.append(count)
    logits = next(t for t in fp.graph.outputs if t.name == "logits")
    if logits.shape is not None:
        logits.shape = [logits.shape[0], "logits_sequence", logits.shape[2]]
