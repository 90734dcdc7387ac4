"""The ONNX form that TensorRT's parser hands to the plugin in ``csrc/plugin_linear.cpp``.

Before (:mod:`pq_export.rewrite.qlinear`, a node with its definition attached as a function)::

    QLinear(x, codes [K, N] INT4 or INT8, scale [N], input scale [, bias])     weight_bits, activation_bits, site

After, what the kernels read, and no function (a parser would prefer it to the plugin)::

    QLinear(x, packed INT8 [N16/16, K64/64, 512], scale [N] [, bias])     the same, and layout, K, N, input_scale,
                                                                          output_type; scale = input scale * scale

With ``shared_codes``, linears that read one x at one site share a QuantizeLinear, which TensorRT fuses into what made
x, and their x is INT8. TensorRT may multiply by 1 / scale there instead of dividing: a value next to a tie can then get
the neighbouring code, while the plugin's own codes are exactly those of the definition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pq_export.errors import PqExportError
from pq_export.plugins.abi import Layout
from pq_export.plugins.layouts import TILE_BYTES, TILE_CHANNELS, pack
from pq_export.quantizer import code_range
from pq_export.rewrite.qlinear import DOMAIN, OP

# (weight bits, activation bits) -> the layout that the weights are packed in.
LayoutOf = Callable[[int, int], Layout]

K_MULTIPLE = 32  # what the kernels need
OUTPUT_TYPES = ("float16", "bfloat16", "float32")


def layout_for(sm: int) -> LayoutOf:
    """What ``pq_preferred_layout`` says on a GPU: only sm_80..89 have int4 tensor cores."""

    def choose(weight_bits: int, activation_bits: int) -> Layout:
        if weight_bits == 8:
            return Layout.W8
        return Layout.S4 if activation_bits == 4 and sm < 90 else Layout.S8

    return choose


def to_plugin_form(
    model: onnx.ModelProto, layout_of: LayoutOf, *, shared_codes: bool = False, output_type: str = "float32"
) -> onnx.ModelProto:
    """``model`` with every ``pq::QLinear`` as the plugin takes it. The given model is left as it is.

    ``shared_codes``: quantize in the graph, once for all linears of a site (not those of layout S4, which read packed
    codes). ``output_type``: what such linears return, the type of the graph's floating tensors.

    Raises :class:`PqExportError` for what no kernel multiplies: 16-bit activations, K not a multiple of 32.
    """
    if output_type not in OUTPUT_TYPES:
        raise PqExportError(f"output type {output_type} is unknown", cure=f"Choose from {', '.join(OUTPUT_TYPES)}.")
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    result = onnx.ModelProto()
    _copy_fields(model, result, {"graph", "functions"})
    result.functions.extend(f for f in model.functions if (f.domain, f.name) != (DOMAIN, OP))
    _copy_fields(model.graph, result.graph, {"node", "initializer"})

    form = _Form(constants, layout_of, output_type if shared_codes else None)
    replaced: set[str] = set()
    for node in model.graph.node:
        if (node.domain, node.op_type) == (DOMAIN, OP):
            replaced.update(node.input[1:])
            result.graph.node.extend(form.lower(node))
        else:
            result.graph.node.append(node)
    orphans = replaced - set(_names_read(result.graph))
    result.graph.initializer.extend(t for name, t in constants.items() if name not in orphans)
    result.graph.initializer.extend(form.made.values())
    return result


@dataclass
class _Form:
    """What the nodes of one model share: constants that were made, and codes that exist already."""

    constants: dict[str, TensorProto]
    layout_of: LayoutOf
    shared_output_type: str | None
    made: dict[str, TensorProto] = field(default_factory=dict)
    codes: dict[tuple[str, str], str] = field(default_factory=dict)  # (x, site) -> INT8 tensor

    def lower(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """One ``pq::QLinear`` -> itself as the plugin takes it, with its quantizer in front if there is none yet."""
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        name = node.name or node.output[0]
        weight_bits, activation_bits = attributes["weight_bits"], attributes["activation_bits"]
        if activation_bits == 16:
            raise PqExportError(
                "weight-only linears have no kernel in the plugin", where=name, cure="Write them in the qdq form."
            )
        x, codes, scale, input_scale, *bias = (tensor for tensor in node.input if tensor)
        s_x = np.float32(self._array(input_scale, name).item())
        w = self._array(codes, name).astype(np.int8).T
        channels, inner = w.shape
        if inner % K_MULTIPLE:
            raise PqExportError(
                f"{inner} inputs are not a multiple of {K_MULTIPLE}, which the kernels need",
                where=name,
                cure="Write this model in the qdq or integer form.",
            )
        layout = self.layout_of(weight_bits, activation_bits)
        attributes.update(layout=layout.name.lower(), K=inner, N=channels, input_scale=float(s_x), output_type="same")
        nodes: list[onnx.NodeProto] = []
        if self.shared_output_type is not None and layout is not Layout.S4:
            attributes["output_type"] = self.shared_output_type
            key = (x, attributes["site"].decode())
            if key not in self.codes:
                self.codes[key], nodes = self._quantizer(x, key[1], input_scale, s_x, activation_bits)
            x = self.codes[key]
        packed = f"{codes}.{attributes['layout']}"
        if packed not in self.made:
            tiles = pack(np.ascontiguousarray(w), layout).view(np.int8)
            self._make(packed, tiles.reshape(-(-channels // TILE_CHANNELS), -1, TILE_BYTES))
        combined = self._make(f"{name}.combined_scale", s_x * self._array(scale, name).astype(np.float32))
        lowered = helper.make_node(OP, [x, packed, combined, *bias], node.output, name=node.name, domain=DOMAIN)
        lowered.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        return [*nodes, lowered]

    def _quantizer(self, x: str, site: str, scale: str, s_x: np.float32, bits: int) -> tuple[str, list[onnx.NodeProto]]:
        """``x [-> Clip] -> QuantizeLinear``: int8 codes, and at 4 bits only the 16 that there are."""
        nodes: list[onnx.NodeProto] = []
        source, prefix = x, f"{site}/{x}"
        if bits < 8:  # INT8 saturates by itself
            low, high = (
                self._make(f"{site}.{end}", np.asarray(s_x * np.float32(code), np.float32))
                for end, code in zip(("lowest", "highest"), code_range(bits), strict=True)
            )
            source = f"{prefix}/clipped"
            nodes.append(helper.make_node("Clip", [x, low, high], [source], name=source))
        zero = self._make(f"{site}.zero_point", np.zeros((), np.int8))
        codes = f"{prefix}/codes"
        nodes.append(helper.make_node("QuantizeLinear", [source, scale, zero], [codes], name=codes))
        return codes, nodes

    def _make(self, name: str, values: np.ndarray) -> str:
        self.made[name] = numpy_helper.from_array(values, name)
        return name

    def _array(self, name: str, linear: str) -> np.ndarray:
        tensor = self.constants.get(name)
        if tensor is None or tensor.data_location == TensorProto.EXTERNAL:
            raise PqExportError(
                f"{name} is not a constant in memory", where=linear, cure="Load the model with its external data."
            )
        return numpy_helper.to_array(tensor)


def _copy_fields(source: Any, target: Any, skip: set[str]) -> None:
    """Copy a message field by field: a model's weights must not be copied only to be dropped."""
    for descriptor, value in source.ListFields():
        if descriptor.name in skip:
            continue
        if hasattr(value, "extend"):
            getattr(target, descriptor.name).extend(value)
        else:
            setattr(target, descriptor.name, value)


def _names_read(graph: onnx.GraphProto) -> Iterator[str]:
    """Every tensor that a node here or in a subgraph reads, and the outputs."""
    yield from (value.name for value in graph.output)
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _names_read(inner)
