"""Which constant scale every floating-point tensor of a static graph gets.

Most tensors have the range that was observed when ``model.onnx`` ran on sample text; some need no observation:

================================  ==================================================================
tensor                            scale
================================  ==================================================================
rows of a table                   range of the table
Reshape, Transpose, Split, ...    that of its input: codes only move
halves that a Concat joins        that of the joined tensor
a Concat of tensors of one scale  that scale: codes only move
Softmax, Sigmoid                  [0, 1]
scores behind the mask            those before it, and :data:`HIDDEN_MARGIN` below them
``attention_bias``                [hidden, 0]; two codes
outputs of narrow linears         8 bits over the observed range, then the same range in 16
keys and values in attention      symmetric over cache and prefix
values that become codes as they  that of the cache
leave an 8-bit linear
================================  ==================================================================

16-bit containers are asymmetric and :data:`HEADROOM` wider than observed: text that was not seen goes further, and of
65,536 levels some can be spared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from pq_export.errors import PqExportError
from pq_export.rewrite.qlinear import OP
from pq_export.targets.static_float import BIAS, CACHE, LM_HEAD, CacheTensor, FloatGraph

Range = tuple[float, float]

HEADROOM = 1.25
HIDDEN_MARGIN = 20.0  # exp(-20) = 2e-9: even ten thousand hidden tokens weigh less than one of 65,536 levels
MOVES = ("Reshape", "Transpose", "Split", "Slice", "Squeeze", "Unsqueeze", "Identity")
UNIT = ("Softmax", "Sigmoid")
SMALLEST_RANGE = 1e-6
CODES = {"uint8": (0, 255), "uint16": (0, 65535), "int4": (-8, 7), "int8": (-128, 127)}


@dataclass(frozen=True)
class QParams:
    """Scale and zero point of a tensor: ``value = scale · (code - zero_point)``. ``dtype``: a key of ``CODES``."""

    scale: float
    zero_point: int
    dtype: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", float(np.float32(self.scale)))  # as the graph holds it

    @property
    def range(self) -> Range:
        """Smallest and largest value that has a code."""
        low, high = CODES[self.dtype]
        return (low - self.zero_point) * self.scale, (high - self.zero_point) * self.scale


def spread(low: float, high: float, dtype: str = "uint16") -> QParams:
    """Asymmetric codes over [low, high] and 0, which gets a code of its own."""
    low, high = min(low, 0.0), max(high, 0.0)
    levels = CODES[dtype][1]
    scale = max(high - low, SMALLEST_RANGE) / levels
    return QParams(scale, int(np.clip(np.rint(-low / scale), 0, levels)), dtype)


def centred(top: float, dtype: str = "uint16") -> QParams:
    """Codes over [-top, top] with the zero point in the middle."""
    middle = (CODES[dtype][1] + 1) // 2
    return QParams(max(top, SMALLEST_RANGE) / (middle - 1), middle, dtype)


def widened(params: QParams) -> QParams:
    """The range of 8-bit codes in 16 bits: each old code is 257 new ones."""
    return QParams(params.scale / 257, params.zero_point * 257, "uint16")


def narrowed(params: QParams) -> QParams:
    """Inverse of :func:`widened`; 8-bit codes stay as they are."""
    return params if params.dtype == "uint8" else QParams(params.scale * 257, params.zero_point // 257, "uint8")


def plan_scales(
    fg: FloatGraph, ranges: Mapping[str, Range], wide_outputs: tuple[str, ...] | None
) -> dict[str, QParams]:
    """Parameters of every float variable of ``fg`` by name.

    ``wide_outputs``: the last part of the names of 8-bit linears whose outputs have 16 bits; None: all of them. Raises
    :class:`PqExportError` for a range that is missing or not finite.
    """
    plan = _scores(fg, ranges)
    joined = {
        t.name: node.outputs[0].name
        for node in fg.graph.nodes
        if node.op == "Concat"
        for t in node.inputs
        if isinstance(t, gs.Variable)
    }
    for node in fg.graph.nodes:
        for output in node.outputs:
            name = output.name
            if name in plan or name.startswith("present."):
                continue
            if node.op in MOVES or _joins_one_scale(node, plan):
                plan[name] = plan[node.inputs[0].name]
            elif node.op == "Gather":
                plan[name] = spread(float(node.inputs[0].values.min()), float(node.inputs[0].values.max()))
            elif node.op in UNIT:
                plan[name] = spread(0.0, 1.0)
            elif node.op == CACHE:
                plan[name] = attended(fg.cache[node.inputs[0].name], node.inputs[1].name, ranges)
            elif node.op == OP and has_narrow_output(node, wide_outputs):
                cached = _becomes_codes(output, fg)
                plan[name] = cache_codes(cached) if cached else widened(spread(*_observed(ranges, name), "uint8"))
            else:
                low, high = _observed(ranges, joined.get(name, name))
                plan[name] = spread(low * HEADROOM, high * HEADROOM)
    return plan


def _joins_one_scale(node: gs.Node, plan: Mapping[str, QParams]) -> bool:
    """Whether this is a Concat of tensors whose codes mean the same."""
    scales = [plan.get(t.name) for t in node.inputs]
    return bool(node.op == "Concat" and scales[0] is not None and all(s == scales[0] for s in scales))


class _Recorder(dict[str, Range]):
    """Ranges that remember who was asked for."""

    def __missing__(self, name: str) -> Range:
        self[name] = (-1.0, 1.0)
        return self[name]

    def __contains__(self, name: object) -> bool:
        return True


def observed_names(fg: FloatGraph) -> list[str]:
    """Tensors of ``model.onnx`` whose range :func:`plan_scales` may look up, sorted."""
    recorder = _Recorder()
    plan_scales(fg, recorder, wide_outputs=None)
    return sorted(recorder)


def has_narrow_output(node: gs.Node, wide_outputs: tuple[str, ...] | None) -> bool:
    """Whether a linear writes 8-bit codes: its input has 8 bits, and nobody asked for more."""
    return bool(
        node.attrs["activation_bits"] == 8
        and node.name != LM_HEAD
        and wide_outputs is not None
        and node.name.rsplit(".", 1)[-1] not in wide_outputs
    )


def cache_codes(cached: CacheTensor) -> QParams:
    """Parameters of the 8-bit codes in a cache with one scale."""
    assert cached.scale is not None
    return QParams(float(cached.scale[0]), cached.zero_point, "uint8")


def attended(cached: CacheTensor, new: str, ranges: Mapping[str, Range]) -> QParams:
    """Parameters of the keys or values that attention reads: cache and prefix on one 16-bit grid around zero.

    The zero point is in the middle because products of two 16-bit tensors want one side symmetric.
    """
    if cached.scale is None:
        top = max(map(abs, _observed(ranges, new))) * HEADROOM
    else:
        top = float(cached.scale.max()) * cached.zero_point
    return centred(max(top, 0.0 if cached.prefix is None else float(np.abs(cached.prefix).max())))


def _becomes_codes(output: gs.Variable, fg: FloatGraph) -> CacheTensor | None:
    """The 8-bit cache with one scale that this tensor enters without any arithmetic on the way."""
    while len(output.outputs) == 1 and output.outputs[0].op in MOVES:
        output = output.outputs[0].outputs[0]
    reader = output.outputs[0]
    if reader.op != CACHE or reader.inputs[1] is not output:
        return None
    cached = fg.cache[reader.inputs[0].name]
    return cached if cached.scale is not None and cached.scale.size == 1 and cached.top == 255 else None


def _observed(ranges: Mapping[str, Range], name: str) -> Range:
    if name not in ranges:
        raise PqExportError("has no observed range", where=name, cure="Observe ranges on the same model.onnx.")
    low, high = ranges[name]
    if not (np.isfinite(low) and np.isfinite(high) and low <= high):
        raise PqExportError(f"has the observed range {low:.3g} to {high:.3g}", where=name)
    return float(low), float(high)


def _scores(fg: FloatGraph, ranges: Mapping[str, Range]) -> dict[str, QParams]:
    """Attention scores and the bias that hides some: hidden ones saturate at the lowest code."""
    plan, hidden = {}, HIDDEN_MARGIN
    for raw, biased in fg.scores:
        # Behind the mask only the maximum means something, before it only the minimum is of use: what is hidden
        # may saturate.
        low, high = _finite(ranges, raw, 0), _finite(ranges, biased, 1)
        low, high = min(low, high, 0.0) * HEADROOM, max(high, 0.0) * HEADROOM
        plan[raw] = spread(low, high)
        plan[biased] = spread(low - HIDDEN_MARGIN, high)
        hidden = max(hidden, high - low + HIDDEN_MARGIN)
    bias = QParams(hidden / 65535, 65535, "uint16")
    return plan | dict.fromkeys((BIAS, f"prefix/{BIAS}", f"heads/{BIAS}"), bias)


def _finite(ranges: Mapping[str, Range], name: str, side: int) -> float:
    if name not in ranges or not np.isfinite(ranges[name][side]):
        return _observed(ranges, name)[side]
    return float(ranges[name][side])
