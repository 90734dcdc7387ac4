"""Pass: the prefix KV becomes part of the graph (PrefixQuant, section 4.2).

Per layer, in front of the keys and values that attention reads::

    prefix (FP16 initializer [1, G, p, D]) ─► Cast ─► Expand to the batch ─┐
                                                                           Concat ─► attention
    past and new, dequantized ─────────────────────────────────────────────┘

and once: positions move by p (``Add``) and the mask gets p columns that every query sees (``Pad``). The
cache that goes in and out never holds the prefix.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from pq_export.calibration import Calibration
from pq_export.export.fp_graph import FPGraph
from pq_export.rewrite.edit import add_node, cast, module_output, reconnect, single_node


def bake_prefix(fp: FPGraph, calibration: Calibration) -> None:
    """Insert the prefix of ``calibration``; nothing to do without one. Runs after the KV pass."""
    prefix = calibration.prefix_kv()
    if prefix is None:
        return
    graph, f32, i64 = fp.graph, np.dtype(np.float32), np.dtype(np.int64)
    length = len(calibration.prefix.token_ids)
    input_ids = next(t for t in graph.inputs if t.name == "input_ids")
    batch = add_node(graph, "Shape", [input_ids], "prefix/batch", i64, start=0, end=1)
    ones = gs.Constant("prefix.ones", np.ones(3, np.int64))
    expanded = add_node(graph, "Concat", [batch, ones], "prefix/expanded_shape", i64, axis=0)
    made = {t.name: t for node in graph.nodes for t in node.outputs}
    for layer, pair in enumerate(prefix):
        for kind, values in zip(("key", "value"), pair, strict=True):
            name = f"layers.{layer}.prefix.{kind}"
            concat = single_node(fp, f"layers.{layer}.self_attn.{kind}_cache", "Concat")
            cached = concat.outputs[0]
            # At 16 bits attention reads the cache itself, else what its codes became.
            dequantized = [n for n in cached.outputs if n.op == "DequantizeLinear"]
            keys = made[f"layers.{layer}.self_attn.{kind}/dequantized"] if dequantized else cached
            readers = list(keys.outputs)
            wide = cast(graph, gs.Constant(name, values[None]), "float32", f"{name}/fp32")
            batched = add_node(graph, "Expand", [wide, expanded], f"{name}/batched", f32)
            reconnect(keys, add_node(graph, "Concat", [batched, keys], f"{name}/with_cache", f32, axis=2), readers)
    _offset_positions(fp, length)
    _show_prefix(fp, length)


def _offset_positions(fp: FPGraph, length: int) -> None:
    positions = next(t for t in fp.graph.inputs if t.name == "position_ids")
    readers = list(positions.outputs)
    offset = gs.Constant("prefix.length", np.asarray(length, np.int64))
    moved = add_node(fp.graph, "Add", [positions, offset], "prefix/position_ids", np.dtype(np.int64))
    reconnect(positions, moved, readers)


def _show_prefix(fp: FPGraph, length: int) -> None:
    mask = module_output(fp, "causal_mask")
    readers = list(mask.outputs)
    pads = gs.Constant("prefix.mask_pads", np.array([0, 0, 0, length, 0, 0, 0, 0], np.int64))
    zero = gs.Constant("prefix.visible", np.zeros((), np.float32))
    reconnect(mask, add_node(fp.graph, "Pad", [mask, pads, zero], "prefix/mask", np.dtype(np.float32)), readers)
