"""A graph as the rules read it: who makes a tensor, who reads it, its type and shape, its constants' values."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from pq_export.errors import IntegrityError

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
PRODUCTS = ("MatMul", "Gemm", "Conv")
# They move elements and change none: what goes in comes out.
MOVES = ("Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Tile", "Transpose", "Unsqueeze")
SMALL = 1024  # elements of a constant that shape inference may want to read
_LAYER = re.compile(r"(?:layers|past_key_values|present|prefix)[._/](\d+)")

Shape = tuple["int | str | None", ...]


@dataclass(frozen=True)
class Quantizer:
    """A QuantizeLinear or DequantizeLinear. ``zero_point`` is an empty name where there is none."""

    node: onnx.NodeProto
    data: str
    scale: str
    zero_point: str
    axis: int
    block: int


@dataclass(frozen=True)
class Linear:
    """A product with a quantized constant: ``weight`` dequantizes it, ``activation`` is the other input's name."""

    node: onnx.NodeProto
    weight: Quantizer
    activation: str


class GraphView:
    """One graph of a bundle; ``directory`` is where its external data lies. Values are read when a rule asks."""

    def __init__(self, model: onnx.ModelProto, name: str = "model", directory: Path | None = None):
        self.model, self.name, self.directory = model, name, directory
        graph = model.graph
        self.nodes: list[onnx.NodeProto] = list(graph.node)
        declared = {value.name for value in graph.input}
        # An initializer that is an input, too, is only a default: the caller may give another value.
        self.constants = {t.name: t for t in graph.initializer if t.name not in declared}
        for node in self.nodes:
            if node.op_type == "Constant":
                for attribute in node.attribute:
                    if attribute.name == "value":
                        self.constants[node.output[0]] = attribute.t
        initializers = {t.name for t in graph.initializer}
        self.inputs = [value for value in graph.input if value.name not in initializers]
        self.outputs = list(graph.output)
        self.producer = {output: node for node in self.nodes for output in node.output if output}
        self.readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
        for node in self.nodes:
            for position, tensor in enumerate(node.input):
                if tensor:
                    self.readers.setdefault(tensor, []).append((node, position))
        self._infos = self._infer()

    def _infer(self) -> dict[str, onnx.TypeProto.Tensor]:
        """Types and shapes by ONNX's own inference, on a copy whose large constants are inputs: nothing is read."""
        graph = self.model.graph
        skeleton = onnx.ModelProto(ir_version=self.model.ir_version)
        skeleton.opset_import.extend(self.model.opset_import)
        skeleton.functions.extend(self.model.functions)
        skeleton.graph.name = graph.name
        skeleton.graph.node.extend(graph.node)
        skeleton.graph.input.extend(graph.input)
        skeleton.graph.output.extend(graph.output)
        declared = {value.name for value in graph.input}
        for tensor in graph.initializer:
            if tensor.name in declared:
                continue
            small = np.prod(tensor.dims, dtype=np.int64) <= SMALL
            if small and not uses_external_data(tensor):
                skeleton.graph.initializer.append(tensor)
            elif small and tensor.data_type == TensorProto.INT64:  # a shape, if anything
                skeleton.graph.initializer.append(numpy_helper.from_array(self.values(tensor.name), tensor.name))
            else:
                shape = list(tensor.dims)
                skeleton.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, shape))
        try:
            inferred = onnx.shape_inference.infer_shapes(skeleton, data_prop=True)
        except Exception as error:  # onnx raises what its C++ half throws
            raise IntegrityError(f"is not a valid graph ({' '.join(str(error).split())})", where=self.name) from None
        values = (*inferred.graph.value_info, *inferred.graph.output, *graph.value_info, *graph.output, *graph.input)
        return {value.name: value.type.tensor_type for value in values if value.type.HasField("tensor_type")}

    @cached_property
    def opset(self) -> int:
        """Of the default domain; 0 where the file names none."""
        return next((o.version for o in self.model.opset_import if o.domain in ("", "ai.onnx")), 0)

    def type_of(self, tensor: str) -> str | None:
        """``"float32"``, ``"uint8"``, ``"int4"``, ...; None where it is not known."""
        if tensor in self.constants:
            return type_name(self.constants[tensor].data_type)
        info = self._infos.get(tensor)
        return type_name(info.elem_type) if info is not None and info.elem_type else None

    def shape_of(self, tensor: str) -> Shape | None:
        """A number, a symbol's name or None for every dimension; None where even their count is not known."""
        if tensor in self.constants:
            return tuple(self.constants[tensor].dims)
        info = self._infos.get(tensor)
        if info is None or not info.HasField("shape"):
            return None
        return tuple(
            d.dim_value if d.HasField("dim_value") else d.dim_param if d.HasField("dim_param") else None
            for d in info.shape.dim
        )

    def values(self, tensor: str) -> np.ndarray:
        """The elements of a constant."""
        proto = self.constants[tensor]
        if uses_external_data(proto):
            location = next((e.value for e in proto.external_data if e.key == "location"), "")
            path = PurePosixPath(location)
            if self.directory is None or path.is_absolute() or ".." in path.parts or "\\" in location:
                raise IntegrityError(f"initializer {tensor} points to external data '{location}'", where=self.name)
            copy = TensorProto()
            copy.CopyFrom(proto)
            try:
                load_external_data_for_tensor(copy, str(self.directory))
            except (OSError, ValueError, onnx.checker.ValidationError) as error:
                raise IntegrityError(
                    f"initializer {tensor} cannot be read: {error}", where=self.directory / location
                ) from None
            proto = copy
        return numpy_helper.to_array(proto)

    def equal(self, one: str, other: str) -> bool:
        """Whether two scales or zero points have the same values; an empty name is 0.

        True where one of them is no constant: that has a rule of its own.
        """
        if one == other or any(name and name not in self.constants for name in (one, other)):
            return True
        a, b = (self.values(name).astype(np.float64).reshape(-1) if name else np.zeros(1) for name in (one, other))
        return (a.size == b.size or 1 in (a.size, b.size)) and bool((a == b).all())

    @cached_property
    def quantizers(self) -> list[Quantizer]:
        """In the order of the file."""
        return [self._quantizer(node) for node in self.nodes if node.op_type in (QUANTIZE, DEQUANTIZE)]

    def _quantizer(self, node: onnx.NodeProto) -> Quantizer:
        attributes = {a.name: a.i for a in node.attribute}
        data, scale, *rest = (*node.input, "", "")[:3]
        return Quantizer(
            node, data, scale, rest[0] if rest else "", attributes.get("axis", 1), attributes.get("block_size", 0)
        )

    def quantizer_of(self, tensor: str, op: str) -> Quantizer | None:
        """The quantizer that makes ``tensor``, if it is one of type ``op``."""
        node = self.producer.get(tensor)
        return self._quantizer(node) if node is not None and node.op_type == op else None

    def code_type(self, quantizer: Quantizer) -> str | None:
        """The type of its codes."""
        if quantizer.zero_point:
            return self.type_of(quantizer.zero_point)
        if quantizer.node.op_type == DEQUANTIZE:
            return self.type_of(quantizer.data)
        return self.type_of(quantizer.node.output[0]) or "uint8"  # ONNX's default

    @cached_property
    def linears(self) -> list[Linear]:
        """Products of an activation and a dequantized constant."""
        found = []
        for node in self.nodes:
            if node.op_type not in PRODUCTS:
                continue
            for position, other in ((1, 0), (0, 1)):
                weight = self._weight_of(node.input[position])
                if weight is not None and not self.is_constant(node.input[other]):
                    found.append(Linear(node, weight, node.input[other]))
                    break
        return found

    def _weight_of(self, tensor: str) -> Quantizer | None:
        """Its DequantizeLinear, through a transposition or the like, if the codes are constant."""
        while (node := self.producer.get(tensor)) is not None and node.op_type in MOVES:
            tensor = node.input[0]
        weight = self.quantizer_of(tensor, DEQUANTIZE)
        return weight if weight is not None and self.is_constant(weight.data) else None

    def is_constant(self, tensor: str) -> bool:
        """Whether its elements follow from constants alone; how often Expand and Tile repeat them does not matter."""
        return tensor in self._constant_tensors

    @cached_property
    def _constant_tensors(self) -> set[str]:
        known = {"", *self.constants}
        for node in self.nodes:  # sorted, as the standard wants
            data = node.input[:1] if node.op_type in ("Expand", "Tile", "Reshape") else node.input
            if node.op_type in ("Shape", "Size") or all(name in known for name in data):
                known |= set(node.output)
        return known

    def is_dequantized(self, tensor: str) -> bool:
        """Whether a DequantizeLinear made it, through a transposition or the like."""
        while (node := self.producer.get(tensor)) is not None and node.op_type in MOVES:
            tensor = node.input[0]
        return node is not None and node.op_type == DEQUANTIZE

    def ancestors(self, tensor: str) -> Iterator[onnx.NodeProto]:
        """Nodes that ``tensor`` is computed from, nearest first."""
        pending, seen = [tensor], set()
        while pending:
            node = self.producer.get(pending.pop(0))
            if node is None or id(node) in seen:
                continue
            seen.add(id(node))
            yield node
            pending += node.input

    def layer_of(self, node: onnx.NodeProto | None, tensor: str = "") -> int | None:
        """The decoder layer by names of the node and its tensors, else of the nearest ones in front of it."""
        if match := _LAYER.search(tensor):
            return int(match[1])
        if node is None:
            return None
        for near in (node, *self._in_front(node)):
            for name in (near.name, *near.output, *near.input):
                if match := _LAYER.search(name):
                    return int(match[1])
        return None

    def _in_front(self, node: onnx.NodeProto, most: int = 24) -> Iterator[onnx.NodeProto]:
        for tensor in node.input:
            for count, near in enumerate(self.ancestors(tensor)):
                if count == most:
                    break
                yield near


def type_name(elem_type: int) -> str:
    """``TensorProto.FLOAT`` -> ``"float32"``."""
    name = str(TensorProto.DataType.Name(elem_type)).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)
