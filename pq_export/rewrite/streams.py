"""Pass: the residual stream gets names.

``layers.N/attention_residual`` and ``layers.N/output``: for whoever reads the graph, and for validation,
which feeds each block its own input. Nothing changes but the names.
"""

from __future__ import annotations

from pq_export.decoder import DecoderConfig
from pq_export.export.fp_graph import FPGraph


def block_output(layer: int) -> str:
    """Name of the residual stream behind a block."""
    return f"layers.{layer}/output"


def name_streams(fp: FPGraph, config: DecoderConfig) -> None:
    """Name the two sums that each decoder layer itself computes."""
    for layer in range(config.num_layers):
        attention, output = (n for n in fp.nodes_in(f"layers.{layer}") if n.op == "Add")
        attention.outputs[0].name = f"layers.{layer}/attention_residual"
        output.outputs[0].name = block_output(layer)
