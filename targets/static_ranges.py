"""The range of every tensor that has no calibrated scale, observed on sample tokens.

``model.onnx`` itself runs in onnxruntime, without padding. Minima and maxima are taken inside the graph, by a ReduceMin
and a ReduceMax behind each tensor, so that memory does not grow with the number of windows::

    t ─► ReduceMin, ReduceMax -> two numbers a window
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import onnx
from onnx import helper

from pq_export.errors import PqExportError
from pq_export.runtime import decoder_of, session_options

Range = tuple[float, float]


def observe_ranges(
    model: onnx.ModelProto,
    names: Iterable[str],
    windows: np.ndarray,
    progress: Callable[[int], None] = lambda done: None,
    threads: int | None = None,
) -> dict[str, Range]:
    """Smallest and largest value of each tensor in ``names`` over ``windows``, int64 [n, T] of token ids.

    Each window is a sequence of its own behind the prefix. ``model`` (not changed): a portable graph of form ``qdq``
    with its weights inside. The huge negative number that hides scores counts like any other. Raises
    :class:`PqExportError` for windows without tokens and for values that are not finite.
    """
    if windows.ndim != 2 or 0 in windows.shape:
        raise PqExportError(f"there are no tokens to observe ranges on (windows of shape {windows.shape})")
    wanted = list(names)
    observed = onnx.ModelProto()
    observed.CopyFrom(model)
    outputs = []
    for name in wanted:
        for op in ("ReduceMin", "ReduceMax"):
            output = f"{name}/{op}"
            observed.graph.node.append(helper.make_node(op, [name], [output], name=output, keepdims=0))
            observed.graph.output.append(helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, []))
            outputs.append(output)
    decoder = decoder_of(observed, session_options(threads=threads, fuse=False))
    low, high = np.full(len(wanted), np.inf), np.full(len(wanted), -np.inf)
    for window in windows:
        _, _, values = decoder.step(window[None].astype(np.int64), decoder.empty(), extra=outputs)
        pairs = np.array(values, np.float64).reshape(-1, 2)
        low, high = np.minimum(low, pairs[:, 0]), np.maximum(high, pairs[:, 1])
        progress(1)
    bad = [name for name, a, b in zip(wanted, low, high, strict=True) if not (np.isfinite(a) and np.isfinite(b))]
    if bad:
        raise PqExportError("is not finite on the sample text", where=bad[0])
    return {name: (float(a), float(b)) for name, a, b in zip(wanted, low, high, strict=True)}
