"""One graph for one Rockchip NPU, in a process and a Python of its own: compiled, and run by the simulator.

``PYTHON rknn_worker.py REQUEST``, a JSON file that :mod:`pq_export.targets.rknn_compile` wrote::

    {"onnx": path, "rknn": path, "platform": "rk3588", "disable_rules": [...], "optimization_level": 3,
     "feeds": path.npz, "outputs": path.npz, "result": path}

PYTHON is that of the environment with rknn-toolkit2, which wants older packages than pq-export. The simulator runs
what the same process compiled; it cannot load a file. The toolkit's messages, with its table of layers, go to standard
output. This script is run by its path and imports nothing of pq-export.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any


def build(api: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Compile, export and simulate; what to record of it. The toolkit answers 0 where all is well."""
    np = importlib.import_module("numpy")
    started = time.perf_counter()
    rknn = api.RKNN(verbose=True)
    options = {name: request[name] for name in ("disable_rules", "optimization_level")}
    steps = {
        "config": lambda: rknn.config(target_platform=request["platform"], **options),
        "load_onnx": lambda: rknn.load_onnx(request["onnx"]),
        "build": lambda: rknn.build(do_quantization=False),
        "export_rknn": lambda: rknn.export_rknn(request["rknn"]),
        "init_runtime": lambda: rknn.init_runtime(),
    }
    for name, step in steps.items():
        if name == "init_runtime":
            seconds = time.perf_counter() - started
        if code := step():
            return {"error": f"rknn-toolkit2 refuses it: {name} answered {code}"}
    with np.load(request["feeds"], allow_pickle=False) as feeds:
        inputs = [feeds[name] for name in request["inputs"]]
    ran = time.perf_counter()
    outputs = rknn.inference(inputs=inputs, data_format=["nchw"] * len(inputs))
    if outputs is None or len(outputs) != len(request["results"]):
        return {"error": "rknn-toolkit2's simulator gave no outputs"}
    np.savez(request["outputs"], **dict(zip(request["results"], map(np.asarray, outputs), strict=True)))
    return {
        "version": metadata.version("rknn-toolkit2"),
        "seconds": round(seconds, 2),
        "simulator_seconds": round(time.perf_counter() - ran, 2),
        "peak_rss": peak_rss(),
    }


def peak_rss() -> int:
    """Bytes. ru_maxrss would be that of the process that started this one, where it was larger."""
    return int(Path("/proc/self/status").read_text(encoding="ascii").partition("VmHWM:")[2].split()[0]) * 1024


def main(request_path: str) -> None:
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    api = importlib.import_module("rknn.api")
    try:
        answer = build(api, request)
    except Exception as error:  # the toolkit raises what it likes, with a traceback as its text
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        print(error, flush=True)
        answer = {"error": f"rknn-toolkit2 refuses it: {lines[-1] if lines else type(error).__name__}"[:400]}
    Path(request["result"]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its modules are no top-level ones, and one of them is called rknn
    main(sys.argv[1])
