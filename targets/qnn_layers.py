"""What QNN made of a graph: the layers that it lists, and whether they are what a static export promises.

Nothing that onnxruntime says tells that integers are computed: a strict session takes float graphs, too. QNN's own
listing does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from pq_export.errors import PqExportError

# QnnTypes.h: Qnn_DataType_t.
DATA_TYPES = {
    **{0x000 + bits: f"int{number}" for bits, number in ((0x08, 8), (0x16, 16), (0x32, 32), (0x64, 64))},
    **{0x100 + bits: f"uint{number}" for bits, number in ((0x08, 8), (0x16, 16), (0x32, 32), (0x64, 64))},
    **{0x200 + bits: f"float{number}" for bits, number in ((0x16, 16), (0x32, 32), (0x64, 64))},
    **{0x300 + bits: f"sfixed{number}" for bits, number in ((0x04, 4), (0x08, 8), (0x16, 16), (0x32, 32))},
    **{0x400 + bits: f"ufixed{number}" for bits, number in ((0x04, 4), (0x08, 8), (0x16, 16), (0x32, 32))},
    0x508: "bool8",
}
NARROW_ENCODINGS = (2, 3)  # with a bit width of their own: 4-bit codes, in tensors that name 8 bits
PRODUCTS = ("FullyConnected", "MatMul", "Conv2d")
SHOWN = 3


@dataclass(frozen=True)
class Layer:
    """One node of QNN's graph: ``reads`` and ``writes`` are types such as "ufixed16", "sfixed8/4" for 4-bit codes."""

    name: str
    type: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "type": self.type, "reads": list(self.reads), "writes": list(self.writes)}


def read_layers(folder: Path) -> list[Layer]:
    """Layers of the one graph that QNN dumped as JSON into ``folder``."""
    files = [path for path in sorted(folder.glob("*.json")) if not path.name.endswith("_tensor_log.json")]
    if len(files) != 1:
        raise PqExportError(f"QNN listed {len(files)} graphs, not one: part of the graph is not on the accelerator")
    graph = json.loads(files[0].read_text(encoding="utf-8"))["graph"]
    types = {name: _type(tensor) for name, tensor in graph["tensors"].items()}
    return [
        Layer(
            name,
            node["type"],
            tuple(types[i] for i in node["input_names"]),
            tuple(types[i] for i in node["output_names"]),
        )
        for name, node in graph["nodes"].items()
    ]


def _type(tensor: dict[str, Any]) -> str:
    name = DATA_TYPES.get(tensor["data_type"], f"type {tensor['data_type']:#x}")
    narrow = tensor.get("quant_params", {}).get("encoding") in NARROW_ENCODINGS
    return f"{name}/4" if narrow and name.endswith("8") else name


def linears_of(model: onnx.ModelProto) -> dict[str, int]:
    """MatMul nodes whose second factor is a dequantized constant: name -> bits of its codes."""
    codes = {t.name: 4 if t.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4) else _bits(t.data_type)
             for t in model.graph.initializer}  # fmt: skip
    made = {n.output[0]: n for n in model.graph.node if n.op_type in ("DequantizeLinear", "Transpose")}
    found = {}
    for node in model.graph.node:
        if node.op_type != "MatMul":
            continue
        source = made.get(node.input[1])
        while source is not None and source.op_type == "Transpose":
            source = made.get(source.input[0])
        if source is not None and source.input[0] in codes:
            found[node.name] = codes[source.input[0]]
    return found


def _bits(elem_type: int) -> int:
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(elem_type)).itemsize * 8


def check_layers(layers: list[Layer], linears: Mapping[str, int], floats: bool) -> list[str]:
    """What contradicts a static export: every linear is one integer product, and without ``floats`` nothing is float.

    ``linears``: node name -> bits of its weight's codes. Empty where all is well.
    """
    findings = []
    products = {layer.name: layer for layer in layers if layer.type in PRODUCTS}
    for name, bits in linears.items():
        layer = products.get(name)
        if layer is None:
            findings.append(f"{name}: is no {PRODUCTS[0]} on the accelerator")
        elif any(kind.startswith("float") for kind in (*layer.reads, *layer.writes)):
            findings.append(f"{name}: computes {' x '.join(layer.reads[:2])} -> {layer.writes[0]}, not integers")
        elif bits == 4 and not layer.reads[1].endswith("4"):
            findings.append(f"{name}: its 4-bit weight is held as {layer.reads[1]}")
    if not floats:
        for layer in layers:
            if kinds := [kind for kind in (*layer.reads, *layer.writes) if kind.startswith("float")]:
                findings.append(f"{layer.name} ({layer.type}): has a {kinds[0]} tensor")
    return findings


def refuse(graph: str, findings: list[str]) -> None:
    """One error for ``findings``, which names the first of them."""
    if findings:
        more = f" and {len(findings) - SHOWN} more" if len(findings) > SHOWN else ""
        raise PqExportError(
            f"QNN made something else of it: {'; '.join(findings[:SHOWN])}{more}",
            where=graph,
            cure="This is a defect, please report it.",
        )
