"""The first half of the static form: ``model.onnx`` as a floating-point graph in which every shape is a number.

Input: the portable graph of form ``qdq`` with an unsigned cache. Output, for S new tokens and a cache of C: the same
function of ``input_ids``, ``position_ids``, ``attention_bias`` and the cache, with

* every quantized linear as one ``pq::QLinear`` node, as the rewriter had it (:mod:`pq_export.rewrite.qlinear`);
* the cache as one node a tensor: codes in, codes of the new tokens out;
* the prefix, the rotary tables and every target of a Reshape as constants;
* no operator that works on shapes or on the mask;
* with more than one token, rotary tables repeated for each head, and heads merged without a Reshape from stacked
  queries: Qualcomm's compiler computes wrong numbers with the shorter forms for some shapes.

Names of tensors stay those of ``model.onnx``, so that ranges observed there hold here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, numpy_helper

from pq_export.errors import PqExportError
from pq_export.quantizer import unpack_int4
from pq_export.rewrite.edit import Int4Constant, add_node, reconnect
from pq_export.rewrite.last_logits import NUM_LOGITS
from pq_export.rewrite.qlinear import DOMAIN, OP

BIAS = "attention_bias"
NORM = "RMSNormalization"
LM_HEAD = "lm_head"
CACHE = "Cache"  # pseudo operator: past, new[, prefix] -> codes of new, what attention reads
F32, U8, I32, I64 = (np.dtype(t) for t in (np.float32, np.uint8, np.int32, np.int64))


@dataclass(frozen=True)
class CacheTensor:
    """Keys or values of one layer: ``site`` as the graph names it, input, output, and codes.

    ``scale`` [G or 1] and ``zero_point`` of uint8 codes; None where the cache has 16 bits. ``top``: the largest code.
    ``prefix`` float32 [1, G, p, D] or None.
    """

    site: str
    past: str
    present: str
    scale: np.ndarray | None
    zero_point: int
    top: int
    prefix: np.ndarray | None


@dataclass
class FloatGraph:
    """A graphsurgeon graph of fixed shapes, and what the second half must know of it.

    ``scores``: (raw, biased) names of the attention scores of each layer. ``cache``: by input name.
    """

    graph: gs.Graph
    cache: dict[str, CacheTensor]
    scores: list[tuple[str, str]]
    prefix_len: int


def float_graph(model: onnx.ModelProto, new_len: int, cache_len: int) -> FloatGraph:
    """``model`` (not changed) for ``new_len`` tokens behind a cache of ``cache_len``."""
    graph = gs.import_onnx(_with_int8_codes(model))
    _unpack_marks(graph, model)
    raise_linears(graph)
    raise_lm_head(graph)
    cache = make_cache_append_only(graph, cache_len)
    prefix_len = max((t.prefix.shape[2] for t in cache.values() if t.prefix is not None), default=0)
    repeats, scores = replace_mask(graph, new_len, cache_len, prefix_len)
    shift_rotary_tables(graph, prefix_len)
    drop_logits_slice(graph)
    fuse_norms(graph)
    pin_inputs(graph, new_len)
    graph.cleanup(remove_unused_graph_inputs=True).toposort()
    pin_shapes(graph, new_len, repeats)
    if new_len > 1:
        repeat_rotary_tables(graph)
        unstack_queries(graph, new_len, repeats)
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    return FloatGraph(graph, cache, scores, prefix_len)


def _with_int8_codes(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose INT4 initializers are INT8: NumPy has no packed type."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.data_type == TensorProto.INT4:
            packed = np.frombuffer(tensor.raw_data, np.uint8)
            codes = unpack_int4(packed, tuple(tensor.dims))
            tensor.CopyFrom(numpy_helper.from_array(codes, tensor.name))
    return copy


def _unpack_marks(graph: gs.Graph, model: onnx.ModelProto) -> None:
    """Constants that were INT4 become :class:`Int4Constant`."""
    int4 = {t.name for t in model.graph.initializer if t.data_type == TensorProto.INT4}
    for name, tensor in graph.tensors().items():
        if name in int4 and isinstance(tensor, gs.Constant):
            tensor.__class__ = Int4Constant


def raise_linears(graph: gs.Graph) -> None:
    """Every quantized linear is one node again, its bias an Add behind it.

    Before::

        x -> QuantizeLinear -> DequantizeLinear -> MatMul <- DequantizeLinear <- codes      8- and 4-bit activations
        x -> MatMul <- Mul(Cast(codes), scale)                                              16-bit activations

    After::

        x -> pq::QLinear(codes, scale[, input scale])
    """
    for node in [n for n in graph.nodes if n.op == "MatMul"]:
        found = _weight(node.inputs[1])
        if found is None:
            continue
        codes, scale = found
        x, inputs, bits = node.inputs[0], [codes, scale], 16
        if x.inputs and x.inputs[0].op == "DequantizeLinear":
            quantize = x.inputs[0].inputs[0].inputs[0]
            x, input_scale, zero = quantize.inputs
            bits = 4 if isinstance(zero, Int4Constant) else 8
            inputs.append(input_scale)
        name = codes.name.removesuffix(".codes")
        attrs = {"weight_bits": 4 if isinstance(codes, Int4Constant) else 8, "activation_bits": bits}
        graph.nodes.append(
            gs.Node(OP, name=name, attrs=attrs, inputs=[x, *inputs], outputs=list(node.outputs), domain=DOMAIN)
        )
        node.outputs.clear()  # cleanup() takes it away


def _weight(tensor: gs.Tensor) -> tuple[gs.Constant, gs.Constant] | None:
    """Codes and scale of a weight that is dequantized in the graph."""
    if not tensor.inputs:
        return None
    node = tensor.inputs[0]
    if node.op == "DequantizeLinear" and isinstance(node.inputs[0], gs.Constant):
        return node.inputs[0], node.inputs[1]
    if node.op == "Mul" and node.inputs[0].inputs and node.inputs[0].inputs[0].op == "Cast":
        codes = node.inputs[0].inputs[0].inputs[0]
        if isinstance(codes, gs.Constant):
            return codes, node.inputs[1]
    return None


def raise_lm_head(graph: gs.Graph) -> None:
    """The FP16 head becomes a linear of int8 codes, rounded to nearest with one scale for each token.

    Before::

        hidden -> MatMul <- Transpose <- Cast <- lm_head.weight [V, K]

    After::

        hidden -> pq::QLinear(codes [K, V], scale [V]) -> logits
    """
    logits = next(t for t in graph.outputs if t.name == "logits")
    node = logits.inputs[0]
    values = _constant_behind(node.inputs[1])  # [V, K], behind Transpose and Cast
    scale = np.maximum(np.abs(values).max(1), np.finfo(np.float32).tiny) / np.float32(127)
    codes = np.rint(values / scale[:, None]).astype(np.int8)
    inputs = [
        node.inputs[0],
        gs.Constant(f"{LM_HEAD}.codes", np.ascontiguousarray(codes.T)),
        gs.Constant(f"{LM_HEAD}.scale", scale.astype(np.float32)),
    ]
    attrs = {"weight_bits": 8, "activation_bits": 16}
    node.outputs.clear()
    graph.nodes.append(gs.Node(OP, name=LM_HEAD, attrs=attrs, inputs=inputs, outputs=[logits], domain=DOMAIN))


def make_cache_append_only(graph: gs.Graph, cache_len: int) -> dict[str, CacheTensor]:
    """The graph reads C past entries and writes those of the new tokens only; the prefix is a constant.

    Before::

        new -> codes ─┐
        past ─────────┴ Concat ─► present ─► DequantizeLinear ─┐
        prefix -> Cast -> Expand ──────────────────────────────┴ Concat ─► attention

    After, one pseudo node that the second half writes out; ``present`` has the new tokens only::

        past, new, prefix (float32 constant) -> Cache ─► present, <site>/attended ─► attention
    """
    found: dict[str, CacheTensor] = {}
    for past in [t for t in graph.inputs if t.name.startswith("past_key_values.")]:
        past.shape = [1, past.shape[1], cache_len, past.shape[3]]
        _, layer, kind = past.name.split(".")
        site = f"layers.{layer}.self_attn.{kind}"
        concat = next(node for node in past.outputs if node.op == "Concat")
        new, present = concat.inputs[1], concat.outputs[0]
        concat.inputs.clear()
        concat.outputs.clear()
        scale, zero, read = None, 0, present
        reader = next((n for n in present.outputs if n.op == "DequantizeLinear"), None)
        if reader is not None:
            scale, zero = np.atleast_1d(reader.inputs[1].values), int(np.atleast_1d(reader.inputs[2].values)[0])
            new, read = _before_codes(new), reader.outputs[0]
            reader.inputs.clear()
            reader.outputs.clear()
        prefix, attended = None, read
        joined = next((n for n in read.outputs if n.op == "Concat"), None)
        if joined is not None:
            prefix, attended = _constant_behind(joined.inputs[0]), joined.outputs[0]
        output = gs.Variable(f"{site}/attended", dtype=F32)
        reconnect(attended, output, list(attended.outputs))
        inputs = (
            [past, new] if prefix is None else [past, new, gs.Constant(f"layers.{layer}.prefix.{kind}/values", prefix)]
        )
        graph.nodes.append(gs.Node(CACHE, name=site, inputs=inputs, outputs=[present, output], domain=DOMAIN))
        found[past.name] = CacheTensor(site, past.name, present.name, scale, zero, 15 if zero == 8 else 255, prefix)
    return found


def _constant_behind(tensor: gs.Tensor) -> np.ndarray:
    """float32 values of the constant that ``tensor`` is a Cast or an Expand of."""
    while not isinstance(tensor, gs.Constant):
        tensor = tensor.inputs[0].inputs[0]
    return tensor.values.astype(np.float32)


def _before_codes(tensor: gs.Tensor) -> gs.Tensor:
    """The keys or values that ``tensor``, their codes, was made of."""
    node = tensor.inputs[0]
    return _before_codes(node.inputs[0]) if node.op == "Min" else node.inputs[0]


def replace_mask(graph: gs.Graph, new_len: int, cache_len: int, prefix_len: int) -> tuple[int, list[tuple[str, str]]]:
    """All mask arithmetic gives way to the input ``attention_bias`` [1, 1, S, C + S].

    Before::

        attention_mask -> ... -> Where -> Tile(R) -> Pad(prefix) ─► Add(scores)

    After::

        0 [1, 1, S, p], attention_bias -> Concat -> Concat(R times, axis 2) ─► Add(scores)
    """
    adds = [n.inputs[0].inputs[0] for n in graph.nodes if n.op == "Softmax"]
    masks = {id(add.inputs[1]): add.inputs[1] for add in adds}
    if len(masks) != 1:
        raise PqExportError(f"attention has {len(masks)} masks; the static form knows graphs with one")
    mask = next(iter(masks.values()))
    bias = gs.Variable(BIAS, dtype=F32, shape=[1, 1, new_len, cache_len + new_len])
    graph.inputs = [t for t in graph.inputs if t.name != "attention_mask"]
    graph.inputs.insert(2, bias)
    whole: gs.Tensor = bias
    if prefix_len:
        visible = gs.Constant(f"prefix.visible/{new_len}", np.zeros((1, 1, new_len, prefix_len), np.float32))
        whole = add_node(graph, "Concat", [visible, bias], "prefix/attention_bias", F32, axis=3)
    repeats = _repeats(mask)
    if repeats > 1:
        whole = add_node(graph, "Concat", [whole] * repeats, "heads/attention_bias", F32, axis=2)
    reconnect(mask, whole)
    return repeats, [(add.inputs[0].name, add.outputs[0].name) for add in adds]


def _repeats(mask: gs.Tensor) -> int:
    """R, the query heads that share a KV head: from the Tile behind ``mask``."""
    node = mask.inputs[0]
    if node.op == "Pad":
        node = node.inputs[0].inputs[0]
    return int(node.inputs[1].values[2]) if node.op == "Tile" else 1


def shift_rotary_tables(graph: gs.Graph, prefix_len: int) -> None:
    """``position_ids + p -> Gather(table)`` becomes ``position_ids -> Gather(table[p:])``."""
    positions = next(t for t in graph.inputs if t.name == "position_ids")
    for node in [n for n in graph.nodes if n.op == "Gather" and n.inputs[0].name.startswith("rotary.")]:
        table = node.inputs[0]
        node.inputs[0] = gs.Constant(table.name, np.ascontiguousarray(table.values[prefix_len:]))
        node.inputs[1] = positions


def drop_logits_slice(graph: gs.Graph) -> None:
    """Logits of all S tokens: without ``num_logits_to_keep`` and its Slice."""
    graph.inputs = [t for t in graph.inputs if t.name != NUM_LOGITS]
    for node in [n for n in graph.nodes if n.op == "Slice" and n.outputs[0].name == "last_logits/hidden"]:
        reconnect(node.outputs[0], node.inputs[0])


def fuse_norms(graph: gs.Graph) -> None:
    """``x / sqrt(mean(x²) + eps) · gain`` is one RMSNormalization: squares would not survive 16 bits of fixed point.

    Before::

        x -> Pow -> ReduceMean -> Add(eps) -> Sqrt ─► Div(x, ·) -> Mul(gain)

    After::

        x -> RMSNormalization(gain), opset 23
    """
    for node in [n for n in graph.nodes if n.op == "Sqrt"]:
        add = node.inputs[0].inputs[0]
        divide = node.outputs[0].outputs[0]
        if add.op != "Add" or divide.op != "Div" or add.inputs[0].inputs[0].op != "ReduceMean":
            continue
        x, multiply = divide.inputs[0], divide.outputs[0].outputs[0]
        gain = next(t for t in multiply.inputs if isinstance(t, gs.Constant))
        attrs = {"axis": -1, "epsilon": float(add.inputs[1].values)}
        output = multiply.outputs[0]
        multiply.outputs.clear()
        graph.nodes.append(gs.Node(NORM, name=output.name, attrs=attrs, inputs=[x, gain], outputs=[output]))


def pin_inputs(graph: gs.Graph, new_len: int) -> None:
    """Batch 1, S tokens, int32 ids; the embedding as rows of a float32 table."""
    for tensor in graph.inputs:
        if tensor.name in ("input_ids", "position_ids"):
            tensor.shape, tensor.dtype = [1, new_len], I32
    for node in [n for n in graph.nodes if n.op == "Gather" and n.inputs[0].name == "embed_tokens.weight"]:
        cast = node.outputs[0].outputs[0]
        rows = cast.outputs[0] if cast.op == "Cast" else node.outputs[0]
        inputs = [gs.Constant("embed_tokens.table", node.inputs[0].values.astype(np.float32)), node.inputs[1]]
        if cast.op == "Cast":
            cast.outputs.clear()
        node.outputs.clear()
        graph.nodes.append(gs.Node("Gather", name="embed_tokens", attrs={"axis": 0}, inputs=inputs, outputs=[rows]))


def pin_shapes(graph: gs.Graph, new_len: int, repeats: int) -> None:
    """Targets of Reshape become plain numbers: batch 1, and S or R·S where there was -1."""
    for node in graph.nodes:
        if node.op != "Reshape":
            continue
        target = [int(v) for v in node.inputs[1].values]
        # [0, G, -1, D] stacks the R query heads of a KV head; every other -1 is the sequence.
        stacked = target[2:3] == [-1] and node.outputs[0].outputs and _is_query_stack(node)
        shape = [1 if i == 0 else new_len if v == 0 else v for i, v in enumerate(target)]
        shape = [new_len * (repeats if stacked else 1) if v == -1 else v for v in shape]
        node.attrs.pop("allowzero", None)
        node.inputs[1] = gs.Constant(f"{node.outputs[0].name}.shape/{new_len}", np.array(shape, np.int64))


def _is_query_stack(node: gs.Node) -> bool:
    """Whether this Reshape feeds the product of queries and keys, not the merge of heads behind attention."""
    following = node.outputs[0].outputs[0]
    return following.op in ("Mul", "MatMul")


def repeat_rotary_tables(graph: gs.Graph) -> None:
    """The rotary tables come once for each head: products with them need no broadcasting.

    QNN 2.51 computes wrong products for some shapes where a table is broadcast: for 9 heads of 64 and 64 tokens those
    of the last 32 tokens.

    Before::

        cos [1, 1, S, D/2] ─► Mul(x [1, H, S, D/2])

    After, one Concat a table and number of heads, for all layers::

        cos -> Concat(H times, axis 1) ─► Mul(x)
    """
    for gather in [n for n in graph.nodes if n.op == "Gather" and n.inputs[0].name.startswith("rotary.")]:
        table = gather.outputs[0].outputs[0].outputs[0]  # behind Unsqueeze
        products: dict[int, list[gs.Node]] = {}
        for node in table.outputs:
            products.setdefault(_heads(next(t for t in node.inputs if t is not table)), []).append(node)
        for heads, nodes in products.items():
            repeated = add_node(graph, "Concat", [table] * heads, f"{table.name}/{heads}", F32, axis=1)
            reconnect(table, repeated, nodes)


def _heads(tensor: gs.Tensor) -> int:
    """H of a tensor [1, H, S, ...] that is made of a Reshape to [1, S, H, D]."""
    node = tensor.inputs[0]
    return int(node.inputs[1].values[2]) if node.op == "Reshape" else _heads(node.inputs[0])


def unstack_queries(graph: gs.Graph, new_len: int, repeats: int) -> None:
    """What attention gives for the R queries that share a KV head goes side by side without a Reshape.

    Nothing changes where R is 1. QNN 2.51 computes wrong numbers for 2 stacked queries of 8 tokens where the Reshape
    leads to 8-bit codes.

    Before::

        [1, G, R·S, D] -> Reshape -> [1, G·R, S, D] -> Transpose -> [1, S, G·R, D] -> Reshape ─► [1, S, G·R·D]

    After::

        [1, G, R·S, D] -> Split -> R times [1, G, S, D] -> Concat -> [1, G, S, R·D] -> Transpose -> Reshape ─►
    """
    if repeats == 1:
        return
    sizes = gs.Constant(f"heads.split/{new_len}", np.full(repeats, new_len, np.int64))
    for softmax in [n for n in graph.nodes if n.op == "Softmax"]:
        stacked = softmax.outputs[0].outputs[0].outputs[0]
        reshape = stacked.outputs[0]
        parts = [gs.Variable(f"{stacked.name}/{i}", dtype=F32) for i in range(repeats)]
        split = gs.Node("Split", f"{stacked.name}/split", {"axis": 2}, [stacked, sizes], parts)
        graph.nodes.append(split)
        beside = reshape.outputs[0]
        reshape.outputs.clear()
        graph.nodes.append(gs.Node("Concat", beside.name, {"axis": 3}, list(parts), [beside]))
