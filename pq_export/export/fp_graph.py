"""Export the decoder's structure as ONNX, without weights.

The decoder is built on fake tensors, so that exporting an 8B model needs no memory for it; its
parameters come out as dangling inputs of the graph, named as in PyTorch, which the rewrite replaces by
the tensors of a ``Calibration``. Where each node came from is read from the exporter's own metadata
(``pkg.torch.onnx.name_scopes``), never guessed from node or tensor names.
"""

from __future__ import annotations

import ast
import logging
import warnings
from dataclasses import dataclass

import onnx
import onnx_graphsurgeon as gs
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from pq_export.decoder import Decoder, DecoderConfig

OPSET = 21  # the first with INT4 tensors
SCOPES_KEY = "pkg.torch.onnx.name_scopes"


def past_names(layers: int) -> list[str]:
    """``past_key_values.N.key``, ``past_key_values.N.value``, layer by layer."""
    return [f"past_key_values.{i}.{kind}" for i in range(layers) for kind in ("key", "value")]


def present_names(layers: int) -> list[str]:
    return [f"present.{i}.{kind}" for i in range(layers) for kind in ("key", "value")]


@dataclass
class FPGraph:
    """A graphsurgeon graph and ``scope_of``: first output name of a node -> path of its module.

    ``"layers.3.self_attn.q_proj"``; the empty string is the decoder itself. Parameters are graph inputs
    named in ``parameters``.
    """

    graph: gs.Graph
    scope_of: dict[str, str]
    parameters: set[str]

    def nodes_in(self, module: str) -> list[gs.Node]:
        """Nodes made by exactly this module, in order."""
        return [n for n in self.graph.nodes if n.outputs and self.scope_of.get(n.outputs[0].name) == module]


def export_fp_graph(config: DecoderConfig) -> FPGraph:
    """The decoder as a graph with dynamic batch, sequence and past length and Hugging Face's I/O names."""
    model = _export_structure(config)
    scope_of = {}
    for node in model.graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == SCOPES_KEY), None)
        if scopes and node.output:
            # The last entry is the operator's own name, the one before it the innermost module.
            path = ast.literal_eval(scopes)
            scope_of[node.output[0]] = path[-2] if len(path) > 1 else ""
    io = {"input_ids", "attention_mask", "position_ids", *past_names(config.num_layers)}
    parameters = {value.name for value in model.graph.input} - io
    return FPGraph(gs.import_onnx(model), scope_of, parameters)


def _export_structure(config: DecoderConfig) -> onnx.ModelProto:
    batch, new, past = 2, 5, 3  # any sizes that are neither 0 nor 1 nor equal
    names = past_names(config.num_layers)
    mode = FakeTensorMode()
    with mode:
        decoder = Decoder(config).eval().requires_grad_(False)
        cache = [torch.empty(batch, config.num_kv_heads, past, config.head_dim) for _ in names]
        arguments = (
            torch.zeros(batch, new, dtype=torch.long),
            torch.ones(batch, past + new, dtype=torch.long),
            torch.zeros(batch, new, dtype=torch.long),
            list(zip(cache[0::2], cache[1::2], strict=True)),
        )
    kv_axes = {0: "batch", 2: "past"}
    shapes = (
        {0: "batch", 1: "sequence"},
        {0: "batch", 1: "total"},
        {0: "batch", 1: "sequence"},
        [(kv_axes, kv_axes)] * config.num_layers,
    )
    # The exporter warns about axis names, which are shared on purpose, and about torchvision.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), mode:
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            decoder,
            arguments,
            dynamo=True,
            dynamic_shapes=shapes,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            input_names=["input_ids", "attention_mask", "position_ids", *names],
            output_names=["logits", *present_names(config.num_layers)],
        )
    assert program is not None
    graph = program.model.graph
    for name, value in list(graph.initializers.items()):
        if isinstance(getattr(value.const_value, "raw", None), FakeTensor):
            value.const_value = None
            del graph.initializers[name]
            graph.inputs.append(value)
    program.optimize()  # after the fake tensors are gone: it folds constants
    return program.model_proto
