"""Pass: the online Hadamards R3 and R4 as products with constants, in factored form.

R4, before down_proj, n = K·m::

    x [B, S, n] -> Reshape [B, S, K, m] -> MatMul <- H_m/√n -> MatMul(H_Kᵀ, ·) -> Reshape [B, S, n] -> down_proj

R3, after RoPE, on queries and keys [B, heads, S, D]: one MatMul with the dense D×D matrix, which is
cheaper than two at head sizes.

Constants and MatMul only: a custom operator here would be traced away into a constant.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from pq_export.decoder import DecoderConfig
from pq_export.export.fp_graph import FPGraph
from pq_export.hadamard import hadamard_factors
from pq_export.rewrite.edit import add_node, module_output, reconnect, single_node


def insert_online_hadamards(fp: FPGraph, config: DecoderConfig, online: tuple[str, ...]) -> None:
    """Insert those of R3 and R4 that ``online`` names. Runs before linears are quantized."""
    f32 = np.dtype(np.float32)
    if "R3" in online:
        matrix = gs.Constant("rotation.R3", hadamard_factors(config.head_dim).matrix().astype(np.float32))
        for layer in range(config.num_layers):
            for side in ("q_rotary", "k_rotary"):
                x = module_output(fp, f"layers.{layer}.self_attn.{side}")
                readers = list(x.outputs)
                reconnect(x, add_node(fp.graph, "MatMul", [x, matrix], f"{x.name}/R3", f32), readers)
    if "R4" in online:
        n = config.intermediate_size
        factors = hadamard_factors(n)
        right = gs.Constant("rotation.R4.right", factors.right().astype(np.float32))
        left = gs.Constant("rotation.R4.left", np.ascontiguousarray(factors.left().T.astype(np.float32)))
        # 0 copies the axis: batch and sequence stay dynamic.
        tiled = gs.Constant("rotation.R4.tiled", np.array([0, 0, factors.left_order, factors.right_order], np.int64))
        flat = gs.Constant("rotation.R4.flat", np.array([0, 0, n], np.int64))
        for layer in range(config.num_layers):
            name = f"layers.{layer}.mlp.down_proj"
            matmul = single_node(fp, name, "MatMul")
            y = add_node(fp.graph, "Reshape", [matmul.inputs[0], tiled], f"{name}/R4.tiles", f32)
            y = add_node(fp.graph, "MatMul", [y, right], f"{name}/R4.right", f32)
            if factors.left_order > 1:
                y = add_node(fp.graph, "MatMul", [left, y], f"{name}/R4.left", f32)
            matmul.inputs[0] = add_node(fp.graph, "Reshape", [y, flat], f"{name}/R4", f32)
