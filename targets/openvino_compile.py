"""OpenVINO's IR of a bundle, and the proof that its CPU plugin runs it as meant.

The work is done by a process of its own (:mod:`pq_export.targets.openvino_worker`). ``openvino/`` in the bundle then
holds::

    model.xml, model.bin    the IR: same inputs and outputs as model.onnx, ``num_logits_to_keep`` no longer optional
    config.json             properties that it must be compiled with, in the form of benchmark_app's -load_config
    layers.json             the CPU plugin's own list of layers: name, type, type of arithmetic, kernel
    compile.log             what OpenVINO said, kept also when it failed
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from pq_export.errors import PqExportError
from pq_export.files import errors_of
from pq_export.rewrite.last_logits import NUM_LOGITS
from pq_export.targets.worker_process import Worker, new_log

INSTALL = "pip install openvino==2026.4.1"
FOLDER = "openvino"
IR_NAME, CONFIG_NAME, LAYERS_NAME, LOG_NAME = "model.xml", "config.json", "layers.json", "compile.log"
WORKER = Path(__file__).with_name("openvino_worker.py")
TIMEOUT = 1800.0  # seconds

# Without these OpenVINO is not static: it would quantize the inputs of linears with 4-bit weights anew for each token,
# in groups of 32, and compute everything else in bf16 where the CPU has that.
PROPERTIES = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}

INTEGER_TYPES = (TensorProto.INT8, TensorProto.UINT8)


@dataclass(frozen=True)
class Agreement:
    """OpenVINO beside onnxruntime, same file, same tokens: a prompt and one token behind it.

    ``cosine`` and ``max_error`` of the logits of both steps, ``max_logit`` the largest of onnxruntime's;
    ``equal_codes``: share of equal codes in the cache, None where it holds none.
    """

    tokens: int
    cosine: float
    max_error: float
    max_logit: float
    equal_codes: float | None


@dataclass(frozen=True)
class IrRecord:
    """The IR of a bundle, as ``pq_config.json`` holds it.

    ``file`` and ``layers`` are paths inside the bundle; ``bytes`` of both files of the IR. ``int8_linears`` of
    ``quantized_linears`` run as integers on ``device``; ``wanted_int8``: as many as have 8-bit codes on both sides.
    ``counts``: "type precision" -> how many layers. Seconds and ``peak_rss`` (bytes) are of the process that made it.
    """

    file: str
    layers: str
    bytes: int
    openvino: str
    device: str
    properties: dict[str, str]
    quantized_linears: int
    wanted_int8: int
    int8_linears: int
    convert_seconds: float
    compile_seconds: float
    peak_rss: int
    agreement: Agreement
    counts: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_openvino() -> tuple[Path, str]:
    """Folder that OpenVINO would be imported from (it is not), and its version; an error with pip's line otherwise."""
    spec = importlib.util.find_spec("openvino")
    if spec is None or spec.origin is None:
        raise PqExportError(
            "OpenVINO is not installed: no module openvino", cure=f"Install it: {INSTALL} (licence: Apache-2.0)."
        )
    site = Path(spec.origin).parents[1]
    found = (d.version for d in metadata.distributions(path=[str(site)]) if d.metadata["Name"] == "openvino")
    return site, next(found, "unknown")


def linears_of(model: onnx.ModelProto) -> dict[str, bool]:
    """Quantized linears of a graph in form ``qdq``: name -> whether both sides have 8-bit codes.

    Only such a product can be one of integers on a CPU; 4-bit codes on either side are dequantized to fp32.
    """
    producer = {name: node for node in model.graph.node for name in node.output}
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        weight = producer.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is None:
            continue
        name = node.name.removesuffix("/product")
        if weight.op_type == "DequantizeLinear" and weight.input[0] in types:
            x = producer.get(node.input[0])
            codes = (types[weight.input[0]], None if x is None or len(x.input) < 3 else types.get(x.input[2]))
            found[name] = all(kind in INTEGER_TYPES for kind in codes)
        elif weight.op_type == "Mul" and weight.name.startswith(f"{name}/weight"):  # weights alone
            found[name] = False
    return found


def make_ir(
    model: Path,
    directory: Path,
    reference: Callable[[list[int], int], dict[str, np.ndarray]],
    input_ids: list[int],
    next_id: int,
    *,
    failed_logs: Path | None = None,
    timeout: float = TIMEOUT,
) -> IrRecord:
    """Write ``directory/openvino`` from the ONNX file ``model`` and compare it with ``reference``.

    ``reference(input_ids, next_id)`` gives what onnxruntime computes: ``prefill`` and ``decode`` logits
    [1, 1, vocab] and the cache behind both, by name of output. The log of a failure goes to ``failed_logs``. Raises
    :class:`PqExportError`, also where a linear with 8-bit codes on both sides does not run as integers on a CPU that
    has them.
    """
    site, _ = find_openvino()
    proto = onnx.load(model, load_external_data=False)
    linears = linears_of(proto)
    optional = NUM_LOGITS if any(i.name == NUM_LOGITS for i in proto.graph.input) else None
    del proto
    target = directory / FOLDER
    with errors_of(directory):
        target.mkdir(parents=True)
        log = new_log(failed_logs or target, f"openvino.{LOG_NAME}")
        with tempfile.TemporaryDirectory(prefix=".openvino.", dir=directory) as folder:
            part = Path(folder).resolve()
            request = {
                "onnx": str(model.resolve()),
                "ir": str(part / IR_NAME),
                "layers": str(part / LAYERS_NAME),
                "outputs": str(part / "outputs.npz"),
                "properties": PROPERTIES,
                "optional": optional,
                "input_ids": input_ids,
                "next_id": next_id,
            }
            paths = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
            worker = Worker("OpenVINO", [sys.executable, str(WORKER)], timeout)
            answer = worker.run(request, part, log, "OpenVINO IR", {**os.environ, "PYTHONPATH": paths})
            layers: list[dict[str, str]] = json.loads((part / LAYERS_NAME).read_text(encoding="utf-8"))
            integers = check_layers(layers, linears, answer["int8"], answer["device"], log)
            with np.load(part / "outputs.npz", allow_pickle=False) as outputs:
                agreement = compare(dict(outputs), reference(input_ids, next_id), len(input_ids) + 1)
            for path in (*part.glob("model.*"), part / LAYERS_NAME):
                path.replace(target / path.name)
        (target / CONFIG_NAME).write_text(json.dumps({"CPU": PROPERTIES}, indent=1) + "\n", encoding="utf-8")
        shutil.move(log, target / LOG_NAME)
    return IrRecord(
        file=f"{FOLDER}/{IR_NAME}",
        layers=f"{FOLDER}/{LAYERS_NAME}",
        bytes=sum(path.stat().st_size for path in target.glob("model.*")),
        openvino=answer["version"],
        device=answer["device"],
        properties=PROPERTIES,
        quantized_linears=len(linears),
        wanted_int8=sum(linears.values()),
        int8_linears=integers,
        convert_seconds=answer["convert_seconds"],
        compile_seconds=answer["compile_seconds"],
        peak_rss=answer["peak_rss"],
        agreement=agreement,
        counts=counts(layers),
    )


def check_layers(layers: list[dict[str, str]], linears: dict[str, bool], has_int8: bool, device: str, log: Path) -> int:
    """How many linears run as integers; an error where fewer do than could on a CPU that has integer kernels.

    ``layers`` as the worker lists them. OpenVINO's passes rename some products, so they are counted, and names only
    help to say which is missing.
    """
    products = [layer for layer in layers if layer["type"] == "FullyConnected"]
    integer = [layer for layer in products if layer["precision"] in ("i8", "u8")]
    wanted = [name for name, both in linears.items() if both]
    if has_int8 and len(integer) < len(wanted):
        floats = " ".join(f"{layer['name']} {layer['made_of']}" for layer in products if layer not in integer)
        named = [name for name in wanted if f"{name}/product" in floats]
        raise PqExportError(
            f"OpenVINO runs {len(integer)} of {len(wanted)} int8 linears as integers on {device}",
            where=named[0] if named else "",
            cure=f"This was made with {INSTALL.split()[-1]}; the layers are in the log, {log}.",
        )
    return len(integer)


def counts(layers: list[dict[str, str]]) -> dict[str, int]:
    """Products of a listing by type and arithmetic: "FullyConnected i8" -> 210."""
    kinds = [f"{la['type']} {la['precision']}" for la in layers if la["type"] in ("FullyConnected", "MatMul")]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def compare(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tokens: int) -> Agreement:
    """Two answers of ``reference``'s form."""
    steps = ("prefill", "decode")
    a, b = (np.concatenate([answer[s].ravel() for s in steps]).astype(np.float64) for answer in (expected, found))
    if not np.isfinite(b).all():
        raise PqExportError("OpenVINO's logits are not finite", where="OpenVINO IR")
    codes = [name for name, values in expected.items() if name not in steps and values.dtype.kind in "iu"]
    return Agreement(
        tokens=tokens,
        cosine=float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))),
        max_error=float(np.abs(a - b).max()),
        max_logit=float(np.abs(a).max()),
        equal_codes=float(np.mean([np.mean(found[n] == expected[n]) for n in codes])) if codes else None,
    )
