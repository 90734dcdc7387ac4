"""A small graph of fixed shapes as the static form writes it: one layer of attention, every tensor quantized."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

TOKENS, CACHED, PREFIX, WIDTH, VOCAB = 4, 6, 2, 8, 16
KEYS = PREFIX + CACHED + TOKENS
ZERO = {"uint8": 128, "uint16": 32768, "int8": 0, "int16": 0, "int4": 0, "uint4": 8}
ELEM = {
    "uint8": TensorProto.UINT8,
    "int8": TensorProto.INT8,
    "uint16": TensorProto.UINT16,
    "int4": TensorProto.INT4,
    "float16": TensorProto.FLOAT16,
    "float32": TensorProto.FLOAT,
    "int16": TensorProto.INT16,
    "uint4": TensorProto.UINT4,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
}


def make_constant(name: str, values: Any, kind: str) -> TensorProto:
    array = np.asarray(values)
    if kind in ("int4", "uint4"):
        return helper.make_tensor(name, ELEM[kind], array.shape, array.reshape(-1).astype(int).tolist())
    return numpy_helper.from_array(array.astype(kind), name)


class Builder:
    """Nodes and constants by name; a tensor is called as the node that makes it."""

    def __init__(self, opset: int = 23):
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []
        self.opset = opset

    def node(self, op: str, name: str, *inputs: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, name: str, values: Any, kind: str = "float32") -> str:
        if name not in {t.name for t in self.constants}:
            self.constants.append(make_constant(name, values, kind))
        return name

    def quantize(self, tensor: str, name: str, kind: str = "uint16", scale: float = 0.02) -> str:
        """QuantizeLinear called ``name``, with constants ``name.scale`` and ``name.zero_point``."""
        self.constant(f"{name}.scale", np.float32(scale))
        self.constant(f"{name}.zero_point", ZERO[kind], kind)
        return self.node("QuantizeLinear", name, tensor, f"{name}.scale", f"{name}.zero_point")

    def dequantize(self, codes: str, name: str, parameters: str = "") -> str:
        """DequantizeLinear with the constants of ``parameters``, by default those that wrote ``codes``."""
        of = parameters or codes
        return self.node("DequantizeLinear", name, codes, f"{of}.scale", f"{of}.zero_point")

    def requantize(self, tensor: str, name: str, kind: str = "uint16", scale: float = 0.02) -> str:
        """Through codes called ``name/codes`` and back."""
        return self.dequantize(self.quantize(tensor, f"{name}/codes", kind, scale), name)

    def linear(self, tensor: str, name: str, kind: str, outputs: int = WIDTH, into: str = "uint8") -> str:
        """A complete unit; ``tensor`` is dequantized already. Its codes are ``name/codes``."""
        rng = np.random.default_rng(len(name))
        top = 7 if kind == "int4" else 127
        self.constant(f"{name}.codes", rng.integers(-top, top + 1, (WIDTH, outputs)), kind)
        self.constant(f"{name}.scale", np.full(outputs, 0.01, np.float32))
        self.constant(f"{name}.zero_point", np.zeros(outputs), kind)
        weight = self.node(
            "DequantizeLinear",
            f"{name}/weight",
            *(f"{name}.{part}" for part in ("codes", "scale", "zero_point")),
            axis=1,
        )
        product = self.node("MatMul", name, tensor, weight)
        return self.requantize(product, f"{name}/output", into, 0.05)

    def model(self, inputs: dict[str, tuple[str, list[Any]]], outputs: dict[str, tuple[str, list[Any]]]) -> Any:
        values = [
            [helper.make_tensor_value_info(name, ELEM[kind], shape) for name, (kind, shape) in declared.items()]
            for declared in (inputs, outputs)
        ]
        graph = helper.make_graph(self.nodes, "static", *values, self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=11)


def static_graph(*, cache: str = "uint8", update: str = "Concat", prefix: str = "constant") -> onnx.ModelProto:
    """``update``: "Concat" or "ScatterND". ``prefix``: "constant", "input" or "none"."""
    b = Builder()
    layer = "layers.0.self_attn"
    b.constant("embed_tokens.codes", np.arange(VOCAB * WIDTH).reshape(VOCAB, WIDTH), "uint8")
    b.constant("embed_tokens.scale", np.float32(0.01))
    b.constant("embed_tokens.zero_point", 128, "uint8")
    x = b.dequantize(
        b.node("Gather", "embedding/codes", "embed_tokens.codes", "input_ids"), "embedding", "embed_tokens"
    )
    new = b.linear(x, f"{layer}.k_proj", "int8")
    b.constant("heads.shape", [1, 1, TOKENS, WIDTH], "int64")
    keys = b.quantize(b.node("Reshape", "new_keys", new, "heads.shape"), "present.0.key", cache, 0.05)
    parts = ["past_key_values.0.key", keys]
    inputs: dict[str, tuple[str, list[Any]]] = {
        "input_ids": ("int32", [1, TOKENS]),
        "past_key_values.0.key": (cache, [1, 1, CACHED, WIDTH]),
    }
    total = KEYS
    if prefix == "constant":
        parts.insert(0, b.constant("layers.0.prefix.key", np.ones((1, 1, PREFIX, WIDTH)), cache))
    elif prefix == "input":
        parts.insert(0, "prefix.0.key")
        inputs["prefix.0.key"] = (cache, [1, 1, PREFIX, WIDTH])
    else:
        total -= PREFIX
    if update == "ScatterND":
        b.constant("slots", np.stack(np.meshgrid(0, 0, np.arange(TOKENS), indexing="ij"), -1), "int64")
        parts[-2:] = [b.node("ScatterND", f"{layer}/scattered", parts[-2], "slots", keys)]
        total -= TOKENS
    joined = parts[0] if len(parts) == 1 else b.node("Concat", f"{layer}/keys/codes", *parts, axis=2)
    values = b.dequantize(joined, f"{layer}/keys", "present.0.key")
    queries = b.requantize(b.node("Reshape", "queries", x, "heads.shape"), f"{layer}/queries", "uint8", 0.01)
    turned = b.requantize(b.node("Transpose", "turned", values, perm=[0, 1, 3, 2]), f"{layer}/turned", "uint8", 0.05)
    scores = b.requantize(b.node("MatMul", f"{layer}/scores", queries, turned), f"{layer}/scores16")
    weights = b.requantize(b.node("Softmax", f"{layer}/softmax", scores, axis=-1), f"{layer}/softmax16", scale=1e-4)
    mixed = b.requantize(b.node("MatMul", f"{layer}/mixed", weights, values), f"{layer}/mixed16")
    b.constant("tokens.shape", [1, TOKENS, WIDTH], "int64")
    flat = b.requantize(b.node("Reshape", "flat", mixed, "tokens.shape"), "flat16")
    flat = b.requantize(flat, f"{layer}.o_input", "uint8", 0.03)
    attended = b.requantize(b.linear(flat, f"{layer}.o_proj", "int4"), f"{layer}/wide")
    wide = b.requantize(x, "embedding16")
    residual = b.requantize(b.node("Add", "layers.0/residual", wide, attended), "layers.0/output")
    b.requantize(residual, "hidden")
    b.linear("hidden", "lm_head", "int8", VOCAB, "uint16")
    b.nodes.pop()  # the codes of the logits go out
    b.nodes[-1].output[0] = "logits"
    outputs = {
        "logits": ("uint16", [1, TOKENS, VOCAB]),
        "present.0.key": (cache, [1, 1, TOKENS, WIDTH]),
    }
    return b.model(inputs, outputs)


def find_node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def set_constant(model: onnx.ModelProto, name: str, values: Any, kind: str | None = None) -> None:
    """Give the constant other values, and another type if ``kind`` says so."""
    tensor = next(t for t in model.graph.initializer if t.name == name)
    old = next(known for known, elem in ELEM.items() if elem == tensor.data_type)
    tensor.CopyFrom(make_constant(name, values, kind or old))
