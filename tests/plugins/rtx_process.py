"""A process of its own around TensorRT for RTX: load a plugin library, parse ONNX files, build engines on the CPU.

``python rtx_process.py LIBRARY TASKS`` with TASKS a JSON list of ``{"onnx": path, "targets": ["SM86", ...]}``; the
last line of its output is a JSON list of ``{"parsed": bool, "errors": [text], "engines": {target: [layer]}}``, a layer
being ``[type, metadata]``.

An engine's layers are those of the builder's verbose log: the engine inspector wants a GPU.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import tensorrt_rtx as trt

SIZES = (1, 4, 8)  # of every dynamic dimension: min, opt, max
LAYER = re.compile(r"^Name: \S+, LayerType: (\w+), .*Metadata: (.*)$", re.MULTILINE)


class Log(trt.ILogger):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, str]] = []

    def log(self, severity: trt.ILogger.Severity, text: str) -> None:
        self.lines.append((severity.name, text))


def engine_layers(builder: trt.Builder, network: trt.INetworkDefinition, target: str, log: Log) -> list[list[str]]:
    """What an engine of ``network`` for ``target`` consists of; empty if none could be built."""
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, target), 0)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    profile = builder.create_optimization_profile()
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        shapes = [[size if dim < 0 else dim for dim in tensor.shape] for size in SIZES]
        profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)
    first = len(log.lines)
    if builder.build_serialized_network(network, config) is None:
        return []
    (listing,) = [text for _, text in log.lines[first:] if text.startswith("Layers:")]
    return [list(layer) for layer in LAYER.findall(listing)]


def run(task: dict[str, Any], log: Log, builder: trt.Builder) -> dict[str, Any]:
    log.lines = []
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    parsed = bool(parser.parse_from_file(task["onnx"]))
    engines = {target: engine_layers(builder, network, target, log) for target in task["targets"] if parsed}
    errors = [text for severity, text in log.lines if severity in ("ERROR", "INTERNAL_ERROR")]
    return {"parsed": parsed, "errors": errors, "engines": engines}


def main(library: str, tasks: str) -> None:
    log = Log()
    builder = trt.Builder(log)
    trt.get_plugin_registry().load_library(library)
    print(json.dumps([run(task, log, builder) for task in json.loads(tasks)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
