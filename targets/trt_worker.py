"""One engine in a process of its own: polygraphy builds it with TensorRT and compares it with onnxruntime's outputs.

``python trt_worker.py REQUEST``, a JSON file that :mod:`pq_export.targets.trt_engine` wrote::

    {"onnx": path, "library": path or null, "oldest": "10.3", "engine": path, "layers": path, "result": path,
     "profiles": [{"name": "prefill", "shapes": {input: [[min], [opt], [max]]}}],
     "steps": [{"name": "prefill", "profile": 0, "tokens": 64, "inputs": path, "outputs": path,
                "limits": {output: number}}]}

``inputs`` and ``outputs`` are .npz files: what the engine is fed, and what onnxruntime made of it. An output of
``limits`` may differ from it by that much in the mean; of ``present.*`` the new ``tokens`` count, and what is in front
of them, the past, has to be the same. The worker writes the engine, TensorRT's listing of its layers
and, last, the result: ``{"seconds", "peak_rss", "tensorrt", "polygraphy", "counts", "steps": [...]}``, or ``{"error":
line, "where": name, "cure": line}``. Messages of TensorRT and polygraphy go to standard output. It is run by its path
and imports nothing of this package, whose own imports take time and memory.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MODULE = "tensorrt"
CACHE = "present."
OWN_ERROR = "pq::"  # how the plugin's messages begin
ERROR_CHARACTERS = 400
Arrays = dict[str, np.ndarray]


class RefusedError(Exception):
    """What the parent tells the user: ``what``, ``where``, ``cure``."""

    def __init__(self, what: str, where: str = "", cure: str = ""):
        super().__init__(what)
        self.answer = {"error": " ".join(what.split())[:ERROR_CHARACTERS], "where": where, "cure": cure}


def run(request: dict[str, Any]) -> dict[str, Any]:
    """The engine of ``request``, written and compared; what to record of it."""
    trt = importlib.import_module(MODULE)
    check_version(trt.__version__, request["oldest"])
    started = time.perf_counter()
    if request["library"] and not trt.get_plugin_registry().load_library(request["library"]):
        raise RefusedError("TensorRT does not take the plugin library", Path(request["library"]).name)
    content = build(trt, request)
    Path(request["engine"]).write_bytes(content)
    seconds, peak = time.perf_counter() - started, peak_rss()
    engine = load_engine(content)
    del content
    layers = list_layers(trt, engine)
    Path(request["layers"]).write_text(json.dumps(layers, indent=1) + "\n", encoding="utf-8")
    return {
        "seconds": round(seconds, 1),
        "peak_rss": peak,
        "tensorrt": trt.__version__,
        "polygraphy": importlib.import_module("polygraphy").__version__,
        "counts": dict(sorted(Counter(kind_of(layer) for layer in layers).items())),
        "steps": [compare(step, engine) for step in request["steps"]],
    }


def check_version(version: str, oldest: str) -> None:
    """Refuse a TensorRT that is older than the file was written for; both as in "10.3.0"."""
    numbers = [[int(part) for part in text.split(".")[:2]] for text in (version, oldest)]
    if numbers[0] < numbers[1]:
        raise RefusedError(f"TensorRT {version} is older than {oldest}", cure=f"Install TensorRT {oldest} or later.")


def build(trt: Any, request: dict[str, Any]) -> Any:
    """The serialized engine: a strongly typed network, every profile, names of ONNX nodes in the listing of layers."""
    backend = importlib.import_module("polygraphy.backend.trt")
    network = backend.NetworkFromOnnxPath(request["onnx"], strongly_typed=True)
    return memoryview(backend.EngineBytesFromNetwork(network, config=configuration(trt, request))())


def configuration(trt: Any, request: dict[str, Any]) -> Callable[[Any, Any], Any]:
    """``(builder, network)`` -> the builder's configuration."""
    backend = importlib.import_module("polygraphy.backend.trt")
    profiles = []
    for profile in request["profiles"]:
        shapes = backend.Profile()
        for name, (smallest, best, largest) in profile["shapes"].items():
            shapes.add(name, tuple(smallest), tuple(best), tuple(largest))
        profiles.append(shapes)
    made: Callable[[Any, Any], Any] = backend.CreateConfig(
        profiles=profiles, profiling_verbosity=trt.ProfilingVerbosity.DETAILED
    )
    return made


def load_engine(content: Any) -> Any:
    """The engine on this machine's GPU."""
    return importlib.import_module("polygraphy.backend.trt").EngineFromBytes(content)()


def list_layers(trt: Any, engine: Any) -> list[Any]:
    """TensorRT's own description of the engine's layers."""
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    layers: list[Any] = json.loads(text)["Layers"]
    return layers


def kind_of(layer: Any) -> str:
    """Type of a layer in the listing, which has names only where an engine was built without details."""
    return str(layer.get("LayerType", "unknown")) if isinstance(layer, dict) else "unknown"


def engine_runner(engine: Any, profile: int) -> Any:
    """Polygraphy's runner of the engine in one of its optimization profiles."""
    return importlib.import_module("polygraphy.backend.trt").TrtRunner(engine, optimization_profile=profile)


def compare(step: dict[str, Any], engine: Any) -> dict[str, Any]:
    """Run the engine on ``step``'s inputs and compare with its outputs: figures of each of them, and a verdict.

    ``past_kept``: the cache came back as it went in. In the figures of ``outputs``, ``mean_difference`` and
    ``max_difference`` are in the output's own unit, ``equal`` is the share of equal values, ``limit`` what the mean may
    be (None: not judged).
    """
    with np.load(step["inputs"]) as inputs:
        feeds = dict(inputs.items())
    with np.load(step["outputs"]) as outputs:
        expected = {name: values.astype(np.float32) for name, values in outputs.items()}
    with engine_runner(engine, step["profile"]) as runner:
        got = {name: np.array(values, np.float32) for name, values in runner.infer(feeds).items()}
    where = f"comparison with onnxruntime, {step['name']}"
    if missing := sorted(set(expected) - set(got)):
        raise RefusedError(f"the engine has no output {missing[0]}", where)
    for name, values in expected.items():
        if got[name].shape != values.shape:
            raise RefusedError(f"{name} is {list(got[name].shape)}, expected {list(values.shape)}", where)
    kept = all(np.array_equal(_past(got, name, step), _past(expected, name, step)) for name in expected)
    got, expected = ({name: _new(arrays, name, step) for name in expected} for arrays in (got, expected))
    agree = _agree(got, expected, step["limits"])
    return {
        "name": step["name"],
        "passed": agree and kept,
        "past_kept": kept,
        "outputs": {name: _figures(got[name], expected[name], step["limits"].get(name)) for name in expected},
    }


def _new(arrays: Arrays, name: str, step: dict[str, Any]) -> np.ndarray:
    """The new tokens of a cache [batch, heads, past + tokens, head_dim]; logits as they are."""
    new = arrays[name][:, :, -step["tokens"] :] if name.startswith(CACHE) else arrays[name]
    return np.ascontiguousarray(new)  # polygraphy takes no other


def _past(arrays: Arrays, name: str, step: dict[str, Any]) -> np.ndarray:
    """The tokens in front of those; nothing of the logits."""
    return arrays[name][:, :, : -step["tokens"]] if name.startswith(CACHE) else arrays[name][:0]


def _figures(got: np.ndarray, expected: np.ndarray, limit: float | None) -> dict[str, Any]:
    difference = np.abs(got.astype(np.float64) - expected)
    return {
        "mean_difference": float(difference.mean()),
        "max_difference": float(difference.max()),
        "equal": float((difference == 0).mean()),
        "limit": limit,
    }


def _agree(got: Arrays, expected: Arrays, limits: dict[str, float]) -> bool:
    """Polygraphy's verdict on the mean differences; relative ones do not count, and a NaN is never equal."""
    comparator = importlib.import_module("polygraphy.comparator")
    results = comparator.RunResults()
    for name, outputs in (("TensorRT", got), ("onnxruntime", expected)):
        results.add([{key: outputs[key] for key in limits}], runner_name=name)
    close = comparator.CompareFunc.simple(atol=limits, rtol=0.0, check_error_stat="mean")
    finite = all(bool(np.isfinite(values).all()) for values in got.values())
    return bool(comparator.Comparator.compare_accuracy(results, compare_func=close)) and finite


def remember_errors() -> list[str]:
    """A list that gets every error that polygraphy logs from now on: TensorRT's own among them."""
    logger = importlib.import_module("polygraphy.logger").G_LOGGER
    errors: list[str] = []
    say = logger.error

    def error(message: Any, *rest: Any, **options: Any) -> None:
        errors.append(str(message() if callable(message) else message))
        say(message, *rest, **options)

    logger.error = error
    return errors


def reason(errors: list[str], otherwise: str) -> str:
    """The plugin's own words where there are any, else TensorRT's last ones; polygraphy only says that it failed."""
    own = [text[text.index(OWN_ERROR) :] for text in errors if OWN_ERROR in text]
    return [*own[:1], *reversed(errors), otherwise][0]


def peak_rss() -> int:
    """Bytes. ru_maxrss would be that of the process that started this one, where it was larger."""
    return int(Path("/proc/self/status").read_text(encoding="ascii").partition("VmHWM:")[2].split()[0]) * 1024


def main(request_path: str) -> None:
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    mistake = importlib.import_module("polygraphy.exception").PolygraphyException
    errors = remember_errors()
    try:
        answer = run(request)
    except RefusedError as refusal:
        answer = refusal.answer
    except mistake as error:
        answer = RefusedError(reason(errors, str(error))).answer
    Path(request["result"]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its modules are no top-level ones
    main(sys.argv[1])
