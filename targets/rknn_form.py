"""A decoder as Rockchip's RKNN compiler reads it: opset 19, fixed shapes, int8 linears between static Q/DQ.

Made of ``model.onnx`` through :mod:`pq_export.targets.static_float`. What is not a linear stays floating point, which
the compiler makes FP16. A linear runs in int8 only if its output has codes, too; without the last pair here the
compiler quietly makes it FP16::

    x -> QuantizeLinear -> DequantizeLinear ─► MatMul -> QuantizeLinear -> DequantizeLinear [-> Add(bias)]
    codes int8 [K, N] -> DequantizeLinear ───┘

The input has its calibrated scale, the output the range that was observed on sample tokens, values the scale of their
cache. Keys and values go out dequantized, because RKNN's inputs and outputs are no integer codes of our choice; their
numbers are those of the codes. The cache input holds such values::

    past (float [1, G, C, D]) ─────────────────────────────────┐
    prefix (constant) ─────────────────────────────────────────┤
                                                               Concat ─► attention
    new -> QuantizeLinear -> DequantizeLinear ─► present [1, G, S, D]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from pq_export.errors import PqExportError
from pq_export.rewrite.edit import reconnect
from pq_export.rewrite.qlinear import OP
from pq_export.targets.static_float import CACHE, F32, LM_HEAD, NORM, FloatGraph, float_graph
from pq_export.targets.static_form import DECODE, PREFILL, StaticGraphs
from pq_export.targets.static_plan import Range

OPSET, IR_VERSION = 19, 9  # the newest that the compiler reads
HIDDEN = -10_000.0  # added to the score of a hidden token; fp16 holds it


def tensors_to_observe(model: onnx.ModelProto) -> list[str]:
    """Names of tensors of ``model`` (form ``qdq``) whose ranges :func:`rknn_graphs` needs."""
    fg = float_graph(model, 1, 1)
    return [n.outputs[0].name for n in fg.graph.nodes if n.op == OP and n.name != LM_HEAD]


def rknn_graphs(model: onnx.ModelProto, prefill_len: int, cache_len: int, ranges: Mapping[str, Range]) -> StaticGraphs:
    """``prefill`` of ``prefill_len`` tokens and ``decode`` of one, of ``model`` in form ``qdq`` (not changed).

    ``ranges``: of the tensors that :func:`tensors_to_observe` names. W8A8 with a cache of 8 or 16 bits; anything else
    raises :class:`PqExportError`.
    """
    head, models, facts = _lm_head(model), {}, {}
    for name, length in ((PREFILL, prefill_len), (DECODE, 1)):
        fg = float_graph(model, length, cache_len)
        models[name] = _finish(Lowering(fg, head, ranges).run(), name)
        facts = _facts(fg, prefill_len, cache_len)
    return StaticGraphs(models, facts)


def _facts(fg: FloatGraph, prefill_len: int, cache_len: int) -> dict[str, Any]:
    """``static.json``, see :class:`pq_export.static_runtime.StaticFacts`."""
    return {
        "prefill_len": prefill_len,
        "cache_len": cache_len,
        "prefix_len": fg.prefix_len,
        "logits": {"dtype": "float32", "scale": None, "zero_point": None},
        "attention_bias": {"visible": 0.0, "hidden": HIDDEN, "dtype": "float32"},
        "cache": {name: {"dtype": "float32", "zero_point": 0} for name in fg.cache},
        "float_tensors": True,
        "graphs": {name: f"{name}.onnx" for name in (PREFILL, DECODE)},
    }


def _lm_head(model: onnx.ModelProto) -> np.ndarray | None:
    """The head [K, V] as the file has it, in fp32: the static form would round it to int8."""
    for tensor in model.graph.initializer:
        if tensor.name == f"{LM_HEAD}.weight":
            return np.ascontiguousarray(onnx.numpy_helper.to_array(tensor).astype(np.float32).T)
    return None


def _finish(graph: gs.Graph, name: str) -> onnx.ModelProto:
    graph.cleanup().toposort()
    graph.name, graph.opset = f"pq_export_{name}", OPSET
    graph.import_domains = [onnx.helper.make_opsetid("", OPSET)]
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Variable) and tensor not in graph.inputs:
            tensor.shape = None
    model = gs.export_onnx(graph, do_type_check=False)
    model.ir_version, model.producer_name = IR_VERSION, "pq-export"
    del model.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    outputs = list(inferred.graph.output)
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    return model


def _int8(ranges: Mapping[str, Range], name: str) -> tuple[float, Any]:
    """Scale and zero point of int8 codes for the range of ``name``, which is widened to hold 0."""
    if name not in ranges:
        raise PqExportError("has no observed range: this is a defect, please report it", where=name)
    low, high = min(ranges[name][0], 0.0), max(ranges[name][1], 0.0)
    scale = max(high - low, np.finfo(np.float32).tiny) / 255
    return scale, np.int8(np.clip(np.rint(-128 - low / scale), -128, 127))


class Lowering:
    """Writes the nodes of one :class:`FloatGraph` that ONNX 19 does not have.

    ``head``: lm_head [K, V], None to take the rounded one of the graph.
    """

    def __init__(self, fg: FloatGraph, head: np.ndarray | None, ranges: Mapping[str, Range]):
        self.fg, self.graph, self.head, self.ranges = fg, fg.graph, head, ranges
        self._constants: dict[str, gs.Constant] = {}
        self._quantized: dict[tuple[str, str], gs.Variable] = {}

    def run(self) -> gs.Graph:
        """The graph, rewritten in place."""
        # Caches first: their scale is also that of the linear in front of them.
        for op, lower in ((CACHE, self._cache), (OP, self._linear), (NORM, self._norm)):
            for node in [n for n in self.graph.nodes if n.op == op]:
                inputs, outputs = list(node.inputs), list(node.outputs)
                node.inputs.clear()
                node.outputs.clear()
                self.graph.nodes.remove(node)
                lower(node, inputs, outputs)
        return self.graph

    def _constant(self, name: str, values: Any) -> gs.Constant:
        if name not in self._constants:
            self._constants[name] = gs.Constant(name, np.asarray(values))
        return self._constants[name]

    def _add(self, op: str, inputs: list[gs.Tensor], output: str | gs.Variable, **attrs: Any) -> gs.Variable:
        variable = output if isinstance(output, gs.Variable) else gs.Variable(output, dtype=F32)
        self.graph.nodes.append(gs.Node(op, name=variable.name, attrs=attrs, inputs=inputs, outputs=[variable]))
        return variable

    def _through_codes(self, x: gs.Tensor, scale: float, zero: Any, site: str) -> gs.Variable:
        """``x`` rounded to codes and back; ``zero``: a NumPy scalar of the codes' type."""
        key = x.name, site
        if key not in self._quantized:
            parts = [
                self._constant(f"{site}.scale", np.float32(scale)),
                self._constant(f"{site}.zero_point", zero),
            ]
            codes = gs.Variable(f"{site}/codes", dtype=zero.dtype)
            self._add("QuantizeLinear", [x, *parts], codes)
            self._quantized[key] = self._add("DequantizeLinear", [codes, *parts], f"{site}/values")
        return self._quantized[key]

    def _linear(self, node: gs.Node, inputs: list[gs.Tensor], outputs: list[gs.Variable]) -> None:
        x, codes, scale, *rest = inputs
        if node.name == LM_HEAD:
            values = codes.values.astype(np.float32) * scale.values if self.head is None else self.head
            self._add("MatMul", [x, self._constant(f"{LM_HEAD}.weight", values)], outputs[0])
            return
        weight_bits, activation_bits = int(node.attrs["weight_bits"]), int(node.attrs["activation_bits"])
        if (weight_bits, activation_bits) != (8, 8):
            raise PqExportError(
                f"has W{weight_bits}A{activation_bits}; RKNN runs static W8A8 only",
                where=node.name,
                cure="Calibrate with --w8a8.",
            )
        site = rest[0].name.removesuffix(".scale")
        source = self._through_codes(x, float(rest[0].values), np.int8(0), site)
        zeros = self._constant(f"{node.name}.zero_point", np.zeros(scale.values.shape, np.int8))
        weight = self._add("DequantizeLinear", [codes, scale, zeros], f"{node.name}/weight", axis=1)
        output = self._add("MatMul", [source, weight], outputs[0])
        readers = list(output.outputs)
        if any(reader.op == "QuantizeLinear" for reader in readers):
            return  # by the cache
        scale, zero = _int8(self.ranges, output.name)
        reconnect(output, self._through_codes(output, scale, zero, f"{node.name}.output"), readers)

    def _cache(self, node: gs.Node, inputs: list[gs.Tensor], outputs: list[gs.Variable]) -> None:
        past, new, *prefix = inputs
        present, attended = outputs
        cached = self.fg.cache[past.name]
        past.dtype = present.dtype = F32
        if cached.scale is not None:
            if cached.scale.size != 1 or cached.top != 255:
                raise PqExportError(
                    "has 4 bits; RKNN has no 4-bit codes", where=cached.site, cure="Calibrate with --kv 8."
                )
            source = self._source(new)
            readers = list(source.outputs)
            rounded = self._through_codes(source, float(cached.scale[0]), np.int8(0), cached.site)
            reconnect(source, rounded, readers)
            new = rounded if new is source else new
        self._add("Identity", [new], present)
        self._add("Concat", [*prefix, past, new], attended, axis=2)

    def _source(self, tensor: gs.Tensor) -> gs.Tensor:
        """What ``tensor`` was before it was only moved."""
        while tensor.inputs and tensor.inputs[0].op in ("Reshape", "Transpose"):
            tensor = tensor.inputs[0].inputs[0]
        return tensor

    def _norm(self, node: gs.Node, inputs: list[gs.Tensor], outputs: list[gs.Variable]) -> None:
        """RMSNormalization came with opset 23."""
        (x, gain), name = inputs, outputs[0].name
        square = self._add("Pow", [x, self._constant("norm.two", np.float32(2))], f"{name}/square")
        mean = self._add("ReduceMean", [square, self._constant("norm.axis", [-1])], f"{name}/mean", keepdims=1)
        epsilon = self._constant(f"{name}.epsilon", np.float32(node.attrs["epsilon"]))
        root = self._add("Sqrt", [self._add("Add", [mean, epsilon], f"{name}/variance")], f"{name}/root")
        self._add("Mul", [self._add("Div", [x, root], f"{name}/normalized"), gain], outputs[0])
