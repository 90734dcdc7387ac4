"""Pass: the KV cache holds static integer codes.

Before::

    past (fp32) ─┐
                 Concat ─► present (fp32), attention
    new ─────────┘

After::

    past (uint8) ──────────────────────┐
                                       Concat ─► present (uint8) ─► DequantizeLinear ─► attention
    new ─► QuantizeLinear [─► Min] ────┘

Codes are uint8 with zero point 2^(b-1); 4-bit codes take the values 0..15. One scale per KV head
(axis 1) at 4 bits, one per tensor at 8. Bits are those of each tensor: a key may have 8 in a layer whose value
has 4, and one at 16 bits stays as it was. Keys and values that were just computed go through the same
quantizer as cached ones, so prefill and decode see the same numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from pq_export.calibration import Calibration
from pq_export.export.fp_graph import FPGraph
from pq_export.quantizer import code_range
from pq_export.rewrite.edit import add_node, reconnect, single_node


def quantize_kv_cache(fp: FPGraph, calibration: Calibration) -> None:
    """Quantize every present, dequantize every past; nothing to do where they have 16 bits."""
    for site in calibration.kv_sites():
        if (bits := calibration.kv_bits(site)) < 16:
            _quantize_cache(fp, site, calibration.kv_scales[site], bits)


def _quantize_cache(fp: FPGraph, site: str, scales: tuple[float, ...], bits: int) -> None:
    """Keys or values of one layer."""
    (low, high), u8 = code_range(bits), np.dtype(np.uint8)
    concat = single_node(fp, f"{site}_cache", "Concat")
    past, new = concat.inputs
    present = concat.outputs[0]
    readers = list(present.outputs)
    values = np.asarray(scales, dtype=np.float32)
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
