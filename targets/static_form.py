"""The static form: two ONNX graphs of fixed shape over the same weights, for accelerators that run nothing else.

``prefill`` takes S tokens, ``decode`` one, both behind a cache of C tokens; a prefix is inside as a constant::

    input_ids       int32  [1, S]              logits             uint16 [1, S, V]
    position_ids    int32  [1, S]       ─►     present.N.key      uint8  [1, G, S, D]   new tokens only
    attention_bias  uint16 [1, 1, S, C+S]      present.N.value
    past_key_values.N.key, .value  uint8  [1, G, C, D]

``position_ids`` count real tokens from 0. ``attention_bias`` has one code for "visible" and one for "hidden"; columns
0..C-1 are the cache, the others the new tokens. Every floating-point tensor has a constant scale: 8 bits where
calibration said so, 16 elsewhere (:mod:`pq_export.targets.static_plan`). What the host must know besides is
``static.json``, see :attr:`StaticGraphs.facts`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, external_data_helper

from pq_export.errors import PqExportError, UsageError
from pq_export.rewrite.edit import Int4Constant, pack_int4_initializers
from pq_export.targets.static_float import BIAS, FloatGraph, float_graph
from pq_export.targets.static_plan import QParams, Range, observed_names
from pq_export.targets.static_quantize import Quantizer

PREFILL, DECODE = "prefill", "decode"
WEIGHTS_NAME, FACTS_NAME = "weights.data", "static.json"
OPSET, IR_VERSION = 23, 11  # RMSNormalization came with 23
EXTERNAL_ABOVE = 1024  # bytes


@dataclass(frozen=True)
class StaticForm:
    """What the graphs are made for.

    ``prefill_len`` S and ``cache_len`` C in tokens, C without the prefix. ``wide_outputs``: last parts of the names of
    8-bit linears whose outputs have 16 bits (they then run with 16-bit inputs, which hold the same codes); None: all.
    Outputs of 8 bits cost most behind down_proj, where the residual stream's largest values come from, and behind
    gate_proj and up_proj once smoothing has left their channels as different as those of down_proj's input were.
    ``float_parts``: only linears of 8 bits and cache have codes, all else is floating point, lm_head too; all linears
    then have 8 bits in and out.
    """

    prefill_len: int = 64
    cache_len: int = 1024
    wide_outputs: tuple[str, ...] | None = None
    float_parts: bool = False

    def __post_init__(self) -> None:
        if self.prefill_len < 2 or self.cache_len < 1:
            raise UsageError(
                f"a prefill of {self.prefill_len} tokens and a cache of {self.cache_len} are not possible",
                cure="Use at least 2 and 1.",
            )


@dataclass(frozen=True)
class StaticGraphs:
    """``models``: "prefill" and "decode". ``facts``: the content of ``static.json``."""

    models: dict[str, onnx.ModelProto]
    facts: dict[str, Any]


def tensors_to_observe(model: onnx.ModelProto) -> list[str]:
    """Names of tensors of ``model`` (form ``qdq``) whose ranges :func:`static_graphs` may need, for any form."""
    return observed_names(float_graph(model, 1, 1))


def static_graphs(model: onnx.ModelProto, form: StaticForm, ranges: Mapping[str, Range]) -> StaticGraphs:
    """Prefill and decode graph of ``model``, a portable graph of form ``qdq`` (not changed).

    ``ranges``: smallest and largest value of each tensor that :func:`tensors_to_observe` names. Raises
    :class:`PqExportError` for a range that is missing and for what has no static form.
    """
    models, facts = {}, {}
    wide_outputs = () if form.float_parts else form.wide_outputs
    for name, new_len in ((PREFILL, form.prefill_len), (DECODE, 1)):
        fg = float_graph(model, new_len, form.cache_len)
        quantizer = Quantizer(fg, ranges, wide_outputs, floats=form.float_parts)
        quantizer.run()
        models[name] = _finish(fg, name)
        facts = _facts(fg, quantizer.outputs, form)
    return StaticGraphs(models, facts)


def _finish(fg: FloatGraph, name: str) -> onnx.ModelProto:
    graph = fg.graph
    graph.name, graph.opset = f"pq_export_{name}", OPSET
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Variable) and tensor not in graph.inputs:
            tensor.shape = None
    graph.import_domains = [onnx.helper.make_opsetid("", OPSET)]
    int4 = {n for n, tensor in graph.tensors().items() if isinstance(tensor, Int4Constant)}
    model = gs.export_onnx(graph, do_type_check=False)
    pack_int4_initializers(model, int4)
    model.ir_version = IR_VERSION
    model.producer_name = "pq-export"
    del model.graph.value_info[:]
    shapes = onnx.shape_inference.infer_shapes(_without_weights(model), strict_mode=True, data_prop=True).graph
    inferred = {v.name: v for v in (*shapes.output, *shapes.value_info)}
    for output in model.graph.output:
        output.CopyFrom(inferred[output.name])
    model.graph.value_info.extend(v for v in shapes.value_info)
    check_static(model)
    return model


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` for shape inference: large initializers become inputs of the same shape, so that it stays small."""
    light = onnx.ModelProto()
    light.CopyFrom(model)
    del light.graph.initializer[:]
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) <= EXTERNAL_ABOVE:
            light.graph.initializer.append(tensor)
        else:
            light.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return light


def check_static(model: onnx.ModelProto) -> None:
    """Raises where a tensor has an axis whose size is not a positive number."""
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        dims = value.type.tensor_type.shape.dim
        if not value.type.tensor_type.HasField("shape") or any(d.dim_value <= 0 for d in dims):
            raise PqExportError("has no fixed shape: this is a defect, please report it", where=value.name)


def _facts(fg: FloatGraph, outputs: dict[str, QParams], form: StaticForm) -> dict[str, Any]:
    """What the host must know: see common fields below; everything else is in the graphs."""
    past = {t.name: t for t in fg.graph.inputs}
    return {
        "prefill_len": form.prefill_len,
        "cache_len": form.cache_len,
        "prefix_len": fg.prefix_len,
        "logits": asdict(outputs["logits"])
        if "logits" in outputs
        else {"scale": 1.0, "zero_point": 0, "dtype": "float32"},
        BIAS: {"visible": outputs[BIAS].zero_point, "hidden": 0, "dtype": outputs[BIAS].dtype},
        "cache": {
            name: {
                "dtype": np.dtype(past[name].dtype).name,
                "zero_point": outputs[cached.present].zero_point if cached.present in outputs else 0,
                "shape": list(past[name].shape),
            }
            for name, cached in fg.cache.items()
        },
        "float_tensors": form.float_parts,
        "lm_head": "float32" if form.float_parts else "int8, one scale a token, rounded to nearest",
        "graphs": {name: f"{name}.onnx" for name in (PREFILL, DECODE)},
    }


def save_static(graphs: StaticGraphs, directory: Path) -> list[Path]:
    """Write ``prefill.onnx``, ``decode.onnx``, their common ``weights.data`` and ``static.json`` into ``directory``.

    Both graphs point to the same bytes of one file. The caller makes the directory appear (:mod:`pq_export.files`).
    Returns the paths.
    """
    written: dict[str, tuple[bytes, int]] = {}
    paths = [directory / f"{name}.onnx" for name in graphs.models]
    with open(directory / WEIGHTS_NAME, "wb") as file:
        for (name, model), path in zip(graphs.models.items(), paths, strict=True):
            light = onnx.ModelProto()
            light.CopyFrom(model)
            for tensor in light.graph.initializer:
                if len(tensor.raw_data) > EXTERNAL_ABOVE:
                    _move_outside(tensor, file, written, name)
            path.write_bytes(light.SerializeToString(deterministic=True))
    (directory / FACTS_NAME).write_text(json.dumps(graphs.facts, indent=1) + "\n", encoding="utf-8")
    return [*paths, directory / WEIGHTS_NAME, directory / FACTS_NAME]


def _move_outside(tensor: TensorProto, file: Any, written: dict[str, tuple[bytes, int]], graph: str) -> None:
    """Replace the bytes of ``tensor`` by their place in ``file``, where another graph may have put them."""
    raw = tensor.raw_data
    if tensor.name not in written:
        file.write(b"\0" * (-file.tell() % 64))
        written[tensor.name] = raw, file.tell()
        file.write(raw)
    known, offset = written[tensor.name]
    if known != raw:
        raise AssertionError(f"{tensor.name} of {graph} differs from that of the other graph")
    external_data_helper.set_external_data(tensor, WEIGHTS_NAME, offset=offset, length=len(raw))
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
