"""All passes in their order: the floating-point graph and a ``Calibration`` in, a quantized ONNX out."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import onnx_graphsurgeon as gs

from pq_export import __version__
from pq_export.calibration import Calibration
from pq_export.decoder import Decoder, DecoderConfig
from pq_export.export.fp_graph import OPSET, FPGraph, past_names, present_names
from pq_export.rewrite.edit import Int4Constant, pack_int4_initializers
from pq_export.rewrite.hadamards import insert_online_hadamards
from pq_export.rewrite.kv_cache import CacheForm, quantize_kv_cache
from pq_export.rewrite.last_logits import keep_last_logits
from pq_export.rewrite.linears import quantize_linears
from pq_export.rewrite.prefix import bake_prefix
from pq_export.rewrite.qlinear import DOMAIN, VERSION, Form, function_proto, lower_qlinears, overload
from pq_export.rewrite.reshapes import make_reshapes_constant
from pq_export.rewrite.streams import name_streams
from pq_export.rewrite.weights import bind_float_parameters

IR_VERSION = 10  # the one of opset 21


def quantized_model(
    fp: FPGraph,
    calibration: Calibration,
    form: Form,
    progress: Callable[[str], None] = lambda name: None,
    *,
    cache: CacheForm = CacheForm.UNSIGNED,
) -> onnx.ModelProto:
    """Run the passes on ``fp`` (consumed) and return the finished model."""
    c = calibration
    passes: list[tuple[str, Callable[[], None]]] = [
        ("insert online Hadamards", lambda: insert_online_hadamards(fp, c.decoder, c.rotation.online)),
        ("quantize linears", lambda: quantize_linears(fp, c)),
        ("quantize KV cache", lambda: quantize_kv_cache(fp, c, cache)),
        ("bake prefix", lambda: bake_prefix(fp, c)),
        ("bind parameters", lambda: bind_float_parameters(fp, c.tensors, c.decoder)),
        ("constant reshapes", lambda: make_reshapes_constant(fp)),
        ("name residual stream", lambda: name_streams(fp, c.decoder)),
        ("keep last logits", lambda: keep_last_logits(fp)),
        (f"write linears as {form.value}", lambda: lower_qlinears(fp.graph, form)),
    ]
    for name, run in passes:
        progress(name)
        run()
    return finish(fp.graph, c.decoder, attach_functions=form is Form.PLUGIN)


def float_model(fp: FPGraph, decoder: Decoder) -> onnx.ModelProto:
    """The unquantized decoder as a fp32 ONNX model with the same inputs and outputs: the baseline."""
    tensors = {name: p.detach().float().cpu().numpy() for name, p in decoder.named_parameters()}
    bind_float_parameters(fp, tensors, decoder.config)
    make_reshapes_constant(fp)
    keep_last_logits(fp)
    return finish(fp.graph, decoder.config)


def finish(graph: gs.Graph, config: DecoderConfig, attach_functions: bool = False) -> onnx.ModelProto:
    """Clean up, name the axes, and turn the graph into a ``ModelProto`` whose bytes are reproducible."""
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    _declare_io(graph, config)
    graph.name, graph.opset = "pq_export", OPSET
    nodes = {(int(n.attrs["activation_bits"]), len(n.inputs) > 4) for n in graph.nodes if n.domain == DOMAIN}
    imports = [onnx.helper.make_opsetid("", OPSET)]
    if nodes:
        imports.append(onnx.helper.make_opsetid(DOMAIN, VERSION))
    graph.import_domains = imports
    int4 = {name for name, tensor in graph.tensors().items() if isinstance(tensor, Int4Constant)}
    model = gs.export_onnx(graph, do_type_check=False)
    pack_int4_initializers(model, int4)
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "pq-export", __version__
    if nodes and attach_functions:
        for node in model.graph.node:
            if node.domain == DOMAIN:
                attrs = {a.name: a.i for a in node.attribute}
                node.overload = overload(attrs["activation_bits"], len(node.input) > 4)
        model.functions.extend(function_proto(bits, bias, OPSET) for bits, bias in sorted(nodes))
    return model


def _declare_io(graph: gs.Graph, config: DecoderConfig) -> None:
    shape = ["batch", config.num_kv_heads, None, config.head_dim]
    for names, axis, tensors in (
        (past_names(config.num_layers), "past_sequence", graph.inputs),
        (present_names(config.num_layers), "total_sequence", graph.outputs),
    ):
        by_name = {t.name: t for t in tensors}
        for name in names:
            by_name[name].shape = [*shape[:2], axis, shape[3]]
    by_name = {t.name: t for t in graph.inputs}
    by_name["attention_mask"].shape = ["batch", "total_sequence"]
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Variable) and tensor not in graph.inputs and tensor not in graph.outputs:
            tensor.shape = None  # the exporter's symbolic names would contradict the prefix
