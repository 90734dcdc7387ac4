"""One engine in a process of its own: TensorRT for RTX parses an ONNX file and builds for one GPU, without a GPU.

``python rtx_worker.py REQUEST``, a JSON file that :mod:`pq_export.targets.rtx_engines` wrote::

    {"onnx": path, "sm": 86, "library": path or null, "engine": path, "layers": path, "result": path,
     "profiles": [{"name": "prefill", "shapes": {input: [[min], [opt], [max]]}}]}

It writes the engine, its layers as JSON and, last, the result: what an ``EngineRecord`` holds, or ``{"error": line,
"where": name, "cure": line}``. TensorRT's messages go to standard error. It is run by its path and imports nothing of
this package, whose own imports take time and memory.

The layers are read from the builder's verbose log: TensorRT's engine inspector wants a GPU.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LAYER = re.compile(r"^Name: (.*?), LayerType: (\w+), (.*?)Metadata: (.*)$", re.MULTILINE)
LISTING = "Layers:\n"  # how the message that lists the layers begins
DATATYPE = re.compile(r"Datatype: (\w+)")
ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
WEIGHTS = re.compile(r"Total Weights Memory: (\d+) bytes")
OWN_ERROR = "pq::"  # how the plugin's messages begin
ERROR_CHARACTERS = 400


class RefusedError(Exception):
    """What the parent tells the user: ``what``, ``where``, ``cure``."""

    def __init__(self, what: str, where: str = "", cure: str = ""):
        super().__init__(what)
        self.answer = {"error": " ".join(what.split())[:ERROR_CHARACTERS], "where": where, "cure": cure}


def build(request: dict[str, Any]) -> dict[str, Any]:
    """The engine of ``request``, written; what to record of it."""
    trt = importlib.import_module("tensorrt_rtx")
    started = time.perf_counter()
    log = _new_log(trt)
    builder = trt.Builder(log)
    if request["library"]:
        trt.get_plugin_registry().load_library(request["library"])
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(request["onnx"]):
        raise _parser_refusal(parser, log)
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{request['sm']}"), 0)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # names of ONNX nodes in the listing
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    for profile in request["profiles"]:
        check_profile(profile, {tensor.name: tuple(tensor.shape) for tensor in inputs})
        config.add_optimization_profile(_native_profile(builder, profile, inputs))
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise RefusedError(log.errors[-1] if log.errors else "the builder gave no engine and no reason")
    content = memoryview(engine)
    Path(request["engine"]).write_bytes(content)
    layers = list(parse_layers("".join(log.listings)))
    Path(request["layers"]).write_text(json.dumps(layers, indent=1) + "\n", encoding="utf-8")
    return {
        "bytes": content.nbytes,
        "weight_bytes": log.weight_bytes,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_rss": peak_rss(),
        "tensorrt": trt.__version__,
        "counts": dict(sorted(Counter(layer["type"] for layer in layers).items())),
    }


def parse_layers(listing: str) -> Iterator[dict[str, Any]]:
    """Layers as the builder prints them: name, type, data types read and written, and the ONNX nodes they come from."""
    for name, kind, body, metadata in LAYER.findall(listing):
        read, _, written = body.partition("Outputs: ")
        yield {
            "name": name,
            "type": kind,
            "reads": sorted(set(DATATYPE.findall(read))),
            "writes": sorted(set(DATATYPE.findall(written))),
            "onnx": ONNX_LAYER.findall(metadata),
        }


def check_profile(profile: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse what contradicts the network's inputs; a dimension of -1 may have any size."""
    name, given = f"profile {profile['name']}", profile["shapes"]
    if unknown := sorted(set(given) - set(shapes)):
        raise RefusedError(f"the model has no input {unknown[0]}", name, f"Its inputs: {', '.join(shapes)}.")
    for tensor, shape in shapes.items():
        where = f"{name}, {tensor}"
        if tensor not in given:
            if any(size < 0 for size in shape):
                raise RefusedError(f"has no sizes for dynamic {list(shape)}", where, "Give min, opt and max.")
            continue
        smallest, usual, largest = given[tensor]
        for point in (smallest, usual, largest):
            if len(point) != len(shape) or any(want not in (-1, got) for want, got in zip(shape, point, strict=True)):
                raise RefusedError(f"is {list(point)}, but the model has {list(shape)}", where, "-1 takes any size.")
        if any(not 0 <= a <= b <= c for a, b, c in zip(smallest, usual, largest, strict=True)):
            raise RefusedError(
                f"min {list(smallest)}, opt {list(usual)}, max {list(largest)} do not increase", where, "Reorder them."
            )


def _native_profile(builder: Any, profile: dict[str, Any], inputs: list[Any]) -> Any:
    native = builder.create_optimization_profile()
    for tensor in inputs:
        fixed = [tuple(tensor.shape)] * 3
        native.set_shape(tensor.name, *map(tuple, profile["shapes"].get(tensor.name, fixed)))
    return native


def _parser_refusal(parser: Any, log: Any) -> RefusedError:
    """The plugin's own words where there are any, else the parser's."""
    if own := [text for text in log.errors if text.startswith(OWN_ERROR)]:
        return RefusedError(own[0])
    if not parser.num_errors:
        return RefusedError(log.errors[-1] if log.errors else "is not an ONNX file", cure="Build the bundle again.")
    error = parser.get_error(0)
    node = f"{error.node_operator()} {error.node_name()}".strip()
    return RefusedError(error.desc() or "the parser gave no reason", node)


def _new_log(trt: Any) -> Any:
    """A logger that keeps errors, listings of layers and the size of weights; the rest goes to standard error."""

    class Log(trt.ILogger):  # type: ignore[misc]  # a base class that only the child can import
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.listings: list[str] = []
            self.weight_bytes = 0

        def log(self, severity: Any, text: str) -> None:
            if text.startswith(LISTING):
                self.listings.append(text)
                return
            if found := WEIGHTS.search(text):
                self.weight_bytes = int(found[1])
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(text)
            print(f"{severity.name.lower()}: {text}", file=sys.stderr)

    return Log()


def peak_rss() -> int:
    """Bytes. ru_maxrss would be that of the process that started this one, where it was larger."""
    return int(Path("/proc/self/status").read_text(encoding="ascii").partition("VmHWM:")[2].split()[0]) * 1024


def main(request_path: str, run: Callable[[dict[str, Any]], dict[str, Any]] = build) -> None:
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    try:
        answer = run(request)
    except RefusedError as refusal:
        answer = refusal.answer
    Path(request["result"]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its modules are no top-level ones
    main(sys.argv[1])
