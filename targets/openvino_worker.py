"""OpenVINO in a process of its own: an ONNX file becomes IR, is compiled for this CPU, listed and run.

``python openvino_worker.py REQUEST``, a JSON file that :mod:`pq_export.targets.openvino_compile` wrote::

    {"onnx": path, "ir": path.xml, "layers": path, "outputs": path.npz, "properties": {name: value},
     "input_ids": [ids of a prompt], "next_id": id, "optional": name or null, "result": path}

It writes the IR, compiles the written file, writes the compiled layers as JSON, runs the prompt and one more token
behind it, and writes logits and cache of both runs: ``prefill``, ``decode`` (float32 [1, 1, vocab]) and
``present.N.key/value``. It is run by its path and imports nothing of this package.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

KEYS = {
    "layerType": "type",
    "runtimePrecision": "precision",
    "primitiveType": "kernel",
    "outputPrecisions": "writes",
    "originalLayersNames": "made_of",
}


def convert(ov: Any, core: Any, request: dict[str, Any]) -> None:
    """Write the IR: weights as they are, and ``optional``, a constant with a default in ONNX, as an input."""
    model = core.read_model(request["onnx"])
    name = request["optional"]
    found = [op for op in model.get_ops() if op.get_friendly_name() == name and op.get_type_name() == "Constant"]
    for constant in found:
        parameter = ov.op.Parameter(constant.get_output_element_type(0), ov.PartialShape(constant.get_output_shape(0)))
        parameter.set_friendly_name(name)
        parameter.output(0).get_tensor().set_names({name})
        for reader in list(constant.output(0).get_target_inputs()):
            reader.replace_source_output(parameter.output(0))
        model.add_parameters([parameter])
    model.validate_nodes_and_infer_types()
    for key, value in request["properties"].items():
        model.set_rt_info(value, ["runtime_options", key])
    ov.save_model(model, request["ir"], compress_to_fp16=False)


def layers_of(compiled: Any) -> list[dict[str, str]]:
    """What the CPU plugin really built: name, type of layer, type of its arithmetic, kernel."""
    layers = []
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        text = {key: info[key].astype(str) if key in info else "" for key in KEYS}
        layers.append({"name": node.get_friendly_name(), **{KEYS[key]: value for key, value in text.items()}})
    return layers


def run(np: Any, compiled: Any, request: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """Logits and cache of the prompt and of one token behind it, and the seconds of both runs."""
    ids = np.array([request["input_ids"]], np.int64)
    past = {}
    for value in compiled.inputs:
        if value.get_any_name().startswith("past_key_values."):
            heads, size = (value.get_partial_shape()[axis].get_length() for axis in (1, 3))
            past[value.get_any_name()] = np.zeros((1, heads, 0, size), value.get_element_type().to_dtype())
    results: dict[str, Any] = {}
    started, infer, seen = time.perf_counter(), compiled.create_infer_request(), 0
    for name, tokens in (("prefill", ids), ("decode", np.array([[request["next_id"]]], np.int64))):
        positions = np.arange(seen, seen + tokens.shape[1])[None]
        seen += tokens.shape[1]
        feeds = {"input_ids": tokens, "attention_mask": np.ones((1, seen), np.int64), "position_ids": positions, **past}
        if request["optional"]:
            feeds[request["optional"]] = np.ones(1, np.int64)
        infer.infer(feeds)
        outputs = {o.get_any_name(): np.array(infer.get_tensor(o).data) for o in compiled.outputs}
        results[name] = outputs.pop("logits")
        past = {key.replace("present", "past_key_values"): codes for key, codes in outputs.items()}
    return results | outputs, time.perf_counter() - started


def peak_rss() -> int:
    """Bytes. On Linux ru_maxrss would be that of the process that started this one, where it was larger."""
    status = Path("/proc/self/status")
    if not status.is_file():  # macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(status.read_text(encoding="ascii").partition("VmHWM:")[2].split()[0]) * 1024


def main(request_path: str) -> None:
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    np, ov = importlib.import_module("numpy"), importlib.import_module("openvino")
    started, core = time.perf_counter(), ov.Core()
    try:
        convert(ov, core, request)
        converted = time.perf_counter()
        compiled = core.compile_model(request["ir"], "CPU", request["properties"])
        built = time.perf_counter()
        layers = layers_of(compiled)
        for layer in layers:
            print(layer["type"], layer["precision"], layer["name"])
        Path(request["layers"]).write_text(json.dumps(layers, indent=1) + "\n", encoding="utf-8")
        outputs, run_seconds = run(np, compiled, request)
    except RuntimeError as error:  # what OpenVINO's own exceptions arrive as
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        print(error, file=sys.stderr)
        answer: dict[str, Any] = {"error": f"OpenVINO refuses it: {lines[-1] if lines else 'no reason given'}"[:400]}
    else:
        np.savez(request["outputs"], **outputs)
        answer = {
            "version": ov.__version__,
            "device": core.get_property("CPU", "FULL_DEVICE_NAME"),
            "int8": "INT8" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"),
            "convert_seconds": round(converted - started, 2),
            "compile_seconds": round(built - converted, 2),
            "run_seconds": round(run_seconds, 3),
            "peak_rss": peak_rss(),
        }
    Path(request["result"]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its modules are no top-level ones, and one of them is called openvino
    main(sys.argv[1])
