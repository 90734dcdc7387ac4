"""Pass: the KV cache holds static integer codes.

Before::

    past (fp32) ─┐
                 Concat ─► present (fp32), attention
    new ─────────┘

After, form ``unsigned``: codes are uint8 with zero point 2^(b-1), one scale per KV head (axis 1) at 4 bits::

    past (uint8) ──────────────────────┐
                                       Concat ─► present (uint8) ─► DequantizeLinear ─► attention
    new ─► QuantizeLinear [─► Min] ────┘

After, form ``signed``: codes are int8 with zero point 0, and no quantizer has more than one scale; scales of KV heads
are products of their own. For compilers that take no zero point and one scale an activation, as TensorRT does::

    past (int8) ──────────────────────────────────────────────┐
                                                              Concat ─► present (int8) ─► DequantizeLinear(1) ─► Mul ─►
    new ─► Div(scales) [─► Clip] ─► QuantizeLinear(1, int8) ──┘

4-bit codes take 16 values in an 8-bit container. There is one scale per KV head at 4 bits, one per tensor at 8. Bits
are those of each tensor: a key may have 8 in a layer whose value has 4, and one at 16 bits stays as it was. Keys and
values that were just computed go through the same quantizer as cached ones, so prefill and decode see the same numbers,
and both forms make the same codes: ``Div`` and a scale of 1 is what ``QuantizeLinear`` does.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from pq_export.calibration import Calibration
from pq_export.export.fp_graph import FPGraph
from pq_export.quantizer import code_range
from pq_export.rewrite.edit import add_node, reconnect, single_node


class CacheForm(str, Enum):
    """How codes of keys and values are written."""

    UNSIGNED = "unsigned"
    SIGNED = "signed"


def quantize_kv_cache(fp: FPGraph, calibration: Calibration, form: CacheForm = CacheForm.UNSIGNED) -> None:
    """Quantize every present, dequantize every past; nothing to do where they have 16 bits."""
    quantize = _quantize_unsigned if form is CacheForm.UNSIGNED else _quantize_signed
    for site in calibration.kv_sites():
        if (bits := calibration.kv_bits(site)) < 16:
            quantize(fp, site, np.asarray(calibration.kv_scales[site], dtype=np.float32), bits)


def _quantize_unsigned(fp: FPGraph, site: str, values: np.ndarray, bits: int) -> None:
    """Keys or values of one layer."""
    (low, high), u8 = code_range(bits), np.dtype(np.uint8)
    concat = single_node(fp, f"{site}_cache", "Concat")
    past, new = concat.inputs
    present = concat.outputs[0]
    readers = list(present.outputs)
    per_head = len(values) > 1
    scale = gs.Constant(f"{site}.scale", values if per_head else values.reshape(()))
    zero = gs.Constant(f"{site}.zero_point", np.full(values.shape if per_head else (), -low, np.uint8))
    axis: dict[str, Any] = {"axis": 1} if per_head else {}
    codes = add_node(fp.graph, "QuantizeLinear", [new, scale, zero], f"{site}/codes", u8, **axis)
    if bits < 8:
        top = gs.Constant(f"{site}.max", np.asarray(high - low, np.uint8))
        codes = add_node(fp.graph, "Min", [codes, top], f"{site}/codes_clamped", u8)
    past.dtype = present.dtype = u8
    concat.inputs = [past, codes]
    f32 = np.dtype(np.float32)
    floats = add_node(fp.graph, "DequantizeLinear", [present, scale, zero], f"{site}/dequantized", f32, **axis)
    reconnect(present, floats, readers)


def _quantize_signed(fp: FPGraph, site: str, values: np.ndarray, bits: int) -> None:
    """Keys or values of one layer."""
    (low, high), i8, f32 = code_range(bits), np.dtype(np.int8), np.dtype(np.float32)
    graph, concat = fp.graph, single_node(fp, f"{site}_cache", "Concat")
    past, steps = concat.inputs
    present = concat.outputs[0]
    readers = list(present.outputs)
    heads = gs.Constant(f"{site}.scale", values.reshape(1, -1, 1, 1))
    zero = gs.Constant(f"{site}.zero_point", np.zeros((), np.int8))
    one = gs.Constant(f"{site}.unit_scale", np.ones((), np.float32))
    steps = add_node(graph, "Div", [steps, heads], f"{site}/steps", f32)
    if bits < 8:
        ends = [gs.Constant(f"{site}.{n}", np.asarray(v, np.float32)) for n, v in (("lowest", low), ("highest", high))]
        steps = add_node(graph, "Clip", [steps, *ends], f"{site}/clipped", f32)
    codes = add_node(graph, "QuantizeLinear", [steps, one, zero], f"{site}/codes", i8)
    past.dtype = present.dtype = i8
    concat.inputs = [past, codes]
    integers = add_node(graph, "DequantizeLinear", [present, one, zero], f"{site}/integers", f32)
    reconnect(present, add_node(graph, "Mul", [integers, heads], f"{site}/dequantized", f32), readers)
