"""Running ONNX graphs in onnxruntime, for tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime as ort

from pq_export.runtime import session_options

Arrays = dict[str, np.ndarray]


def session(model: onnx.ModelProto, plain: bool = False) -> ort.InferenceSession:
    """``plain``: without graph optimizations."""
    options = session_options(threads=1)
    if plain:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model: onnx.ModelProto, feeds: Arrays, extra: Sequence[str] = (), plain: bool = False) -> Arrays:
    """All outputs by name, and the inner tensors named in ``extra``."""
    if extra:
        wider = onnx.ModelProto()
        wider.CopyFrom(model)
        for name in extra:
            wider.graph.output.append(onnx.ValueInfoProto(name=name))
        model = wider
    runner = session(model, plain)
    return dict(zip([o.name for o in runner.get_outputs()], runner.run(None, feeds), strict=True))


def close(one: np.ndarray, other: np.ndarray, tolerance: float = 1e-4) -> bool:
    return one.shape == other.shape and bool(np.abs(one - other).max() <= tolerance * np.abs(other).max())


def near(one: np.ndarray, other: np.ndarray) -> bool:
    """Equal but for a few values that round-off moved across a rounding boundary."""
    return one.shape == other.shape and bool(np.linalg.norm(one - other) <= 0.01 * np.linalg.norm(other))


def check(model: onnx.ModelProto) -> None:
    onnx.checker.check_model(model, full_check=True)


def initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(t for t in model.graph.initializer if t.name == name)
