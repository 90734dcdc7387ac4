"""The engine for this machine's GPU: built when the bundle is written, and compared with onnxruntime at once.

That takes a GPU that the bundle is for, TensorRT, polygraphy, and for linears in plugin form the plugin's library, or
what compiles it. A process of its own (:mod:`pq_export.targets.trt_worker`) builds the engine and runs it, so that a
crash of TensorRT is one line here. ``engines/`` in the bundle then holds::

    sm90.engine         the plan, for GPUs of this compute capability and this version of TensorRT only
    sm90.layers.json    its layers, as TensorRT's inspector lists them
    sm90.log            what TensorRT and polygraphy said; beside the bundle's directory where it failed
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from pq_export.bundle import Bundle, file_record
from pq_export.errors import PqExportError
from pq_export.files import errors_of
from pq_export.plugins.build import build as build_library
from pq_export.plugins.build import find_library
from pq_export.plugins.toolchain import find_tensorrt, local_sms
from pq_export.rewrite.qlinear import Form
from pq_export.stages import Stages
from pq_export.targets.base import TargetOptions
from pq_export.targets.rtx_engines import ENGINES, TIMEOUT, EngineRecord, check_memory, run_worker
from pq_export.targets.tensorrt_form import executable
from pq_export.targets.tensorrt_levels import Level
from pq_export.targets.tensorrt_options import Profile, profiles
from pq_export.targets.worker_process import new_log

WORKER = Path(__file__).with_name("trt_worker.py")
MODULES = ("tensorrt", "polygraphy")
INSTALL = 'pip install "pq-export[trt]"'
COMPARED_TOKENS = 64
# Largest mean differences: of codes, and of floating-point values by their root mean square. With every result rounded
# to FP16, codes of SmolLM2-135M differ from those in FP32 by 0.05 in the first layer, which is in front of all chaos,
# and by 0.44 in the second, which is behind a linear of every kind; those of the token before by 1.2 and 1.9 or more.
CODES_LIMITS = (0.25, 1.0)
FLOAT_LIMITS = (0.25, 0.5)
LOGITS_LIMIT = 0.25


@dataclass(frozen=True)
class Step:
    """One call of the graph: its inputs, what onnxruntime made of them, and how far an engine may be from that.

    ``profile``: index of the optimization profile that allows it. ``tokens``: how many are new. ``limits``: judged
    output -> largest mean difference, in the output's own unit.
    """

    name: str
    profile: int
    tokens: int
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    limits: dict[str, float]


def build_here(
    directory: Path, config: dict[str, Any], options: TargetOptions, level: Level, stages: Stages
) -> EngineRecord | None:
    """The engine of the bundle in ``directory`` for this machine's GPU, or None where none can be built.

    A GPU that the bundle is for, but without the means to build, is told to the user. Raises :class:`PqExportError`
    where building fails, or where the engine's outputs are not onnxruntime's.
    """
    here = [sm for sm in local_sms() if sm in options.sms]
    if not here:
        return None
    model = directory / "model.onnx"
    try:
        check_installed(level)
        library = _library(directory, here[0], stages) if config["form"] == Form.PLUGIN.value else None
        check_memory(model)
    except PqExportError as reason:
        stages.progress.warn(f"no engine is built here: {reason}")
        return None
    wanted = profiles(config, options)
    with stages.stage("compute what the engine is compared with"):
        steps = reference_steps(Bundle(directory, config), wanted)
    with stages.stage(f"build and compare engine for SM{here[0]}"):
        return build_engine(model, directory, here[0], wanted, steps, level, library)


def check_installed(level: Level) -> None:
    """Refuse a machine without TensorRT and polygraphy, with a TensorRT that is too old, or with different GPUs."""
    if missing := [name for name in MODULES if importlib.util.find_spec(name) is None]:
        raise PqExportError(f"no module {missing[0]}", cure=f"Install it: {INSTALL}.")
    if len(found := local_sms()) > 1:
        raise PqExportError(
            f"this machine has different GPUs, SM {', '.join(map(str, found))}",
            cure="Choose one with CUDA_VISIBLE_DEVICES.",
        )
    try:
        version = metadata.version("tensorrt")
    except metadata.PackageNotFoundError:
        return  # the worker asks the module
    if _numbers(version) < _numbers(level.name):
        raise PqExportError(f"TensorRT {version} is older than {level.name}, which the graph is for")


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")[:2]]


def _library(directory: Path, sm: int, stages: Stages) -> Path:
    """The plugin for this GPU in the bundle, compiled where that was not done yet."""
    common = directory / "deploy" / "libpq.so"  # there where one library serves all GPUs that the bundle is for
    if common.is_file():
        return common
    try:
        found = find_library(sm, plugin=True)
    except PqExportError:
        if find_tensorrt(None) is None:
            raise
        found = build_library([sm], progress=stages.progress.note).path
    copy = directory / "deploy" / f"libpq-sm{sm}.so"
    shutil.copy2(found, copy)
    return copy


def reference_steps(bundle: Bundle, wanted: Sequence[Profile]) -> list[Step]:
    """A prefill of random tokens and a decode step behind it, as onnxruntime computes them from the same file."""
    from pq_export.runtime import decoder_of, session_options

    model = onnx.load(bundle.model_path)
    containers = {i.name: onnx.helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type) for i in model.graph.input}
    decoder = decoder_of(executable(model), session_options(bundle.max_weight_bits))
    vocabulary = decoder.session.get_outputs()[0].shape[-1]
    prompt = min(COMPARED_TOKENS, wanted[0].shapes["input_ids"][2][1])
    ids = np.random.default_rng(0).integers(0, vocabulary, (1, prompt + 1))
    state, past, steps = decoder.empty(), 0, []
    for index, (profile, tokens) in enumerate(zip(wanted, (prompt, 1), strict=True)):
        new = ids[:, past : past + tokens]
        inputs = {
            "input_ids": new,
            "attention_mask": np.ones((1, past + tokens), np.int64),
            "position_ids": np.arange(past, past + tokens, dtype=np.int64)[None],
            **{name: codes.astype(containers[name]) for name, codes in state.past.items()},
        }
        logits, state, _ = decoder.step(new, state, last_only=True)
        present = {name.replace("past_key_values", "present"): codes for name, codes in state.past.items()}
        outputs = {"logits": logits, **present}
        steps.append(Step(profile.name, index, tokens, inputs, outputs, limits(outputs)))
        past += tokens
    return steps


def limits(outputs: dict[str, np.ndarray]) -> dict[str, float]:
    """Largest mean differences of the logits, and of keys and values of the first two layers.

    Behind those a single tie that falls the other way changes the codes of all layers.
    """
    largest = {"logits": LOGITS_LIMIT * _size(outputs["logits"])}
    for layer, (of_codes, of_floats) in enumerate(zip(CODES_LIMITS, FLOAT_LIMITS, strict=True)):
        for name in (f"present.{layer}.key", f"present.{layer}.value"):
            values = outputs.get(name)
            if values is not None:
                floating = np.issubdtype(values.dtype, np.floating)
                largest[name] = of_floats * _size(values) if floating else of_codes
    return largest


def _size(values: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(values.astype(np.float64)))))


def build_engine(
    model: Path,
    directory: Path,
    sm: int,
    wanted: Sequence[Profile],
    steps: Sequence[Step],
    level: Level,
    library: Path | None,
    *,
    timeout: float = TIMEOUT,
) -> EngineRecord:
    """``directory/engines/smNN.engine`` of the ONNX file ``model``, with all profiles of ``wanted``, in their order.

    It appears whole, and only if it passed all ``steps``. ``library``: the plugin, for a model in plugin form.
    ``timeout``: seconds. Raises :class:`PqExportError`, which names the log.
    """
    where = f"engine for SM{sm}"
    engine, layers = f"{ENGINES}/sm{sm}.engine", f"{ENGINES}/sm{sm}.layers.json"
    with errors_of(directory):
        (directory / ENGINES).mkdir(parents=True, exist_ok=True)
    with errors_of(directory), tempfile.TemporaryDirectory(prefix=f".sm{sm}.", dir=directory / ENGINES) as folder:
        part = Path(folder)
        request = {
            "onnx": str(model.resolve()),
            "library": library and str(library.resolve()),
            "oldest": level.name,
            "engine": str(part / "engine"),
            "layers": str(part / "layers"),
            "result": str(part / "result"),
            "profiles": [asdict(profile) for profile in wanted],
            "steps": [_written(step, part) for step in steps],
        }
        (part / "request").write_text(json.dumps(request), encoding="utf-8")
        log = new_log(directory.parent, f"sm{sm}.log")
        answer = run_worker(
            WORKER, part / "request", log, where=where, title="TensorRT", environment=dict(os.environ), timeout=timeout
        )
        check_agreement(answer["steps"], where, log)
        content = file_record(part / "engine")
        record = EngineRecord(
            sm=sm,
            file=engine,
            sha256=content["sha256"],
            bytes=content["bytes"],
            weight_bytes=None,
            seconds=answer["seconds"],
            peak_rss=answer["peak_rss"],
            tensorrt=answer["tensorrt"],
            plugin=library and library.relative_to(directory).as_posix(),
            plugin_sha256=library and file_record(library)["sha256"],
            layers=layers,
            counts=answer["counts"],
            comparison={"polygraphy": answer["polygraphy"], "steps": [_judged(step) for step in answer["steps"]]},
        )
        shutil.move(log, directory / ENGINES / f"sm{sm}.log")
        (part / "layers").replace(directory / layers)
        (part / "engine").replace(directory / engine)
    return record


def _written(step: Step, folder: Path) -> dict[str, Any]:
    """``step`` as the worker reads it, its arrays in files."""
    paths = {}
    for kind, arrays in (("inputs", step.inputs), ("outputs", step.outputs)):
        paths[kind] = str(folder / f"{step.name}.{kind}.npz")
        with open(paths[kind], "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # its own argument allow_pickle is a bool
    return {"name": step.name, "profile": step.profile, "tokens": step.tokens, "limits": step.limits, **paths}


def check_agreement(steps: Sequence[dict[str, Any]], where: str, log: Path) -> None:
    """Refuse an engine that did not pass: the first output that is too far away, in one line."""
    for step in steps:
        if step["passed"]:
            continue
        judged = [(name, o) for name, o in step["outputs"].items() if o["limit"] is not None]
        far = [(name, o) for name, o in judged if not o["mean_difference"] <= o["limit"]]  # a NaN is too far, too
        what = "the cache does not come back as it went in" if not step["past_kept"] else "an output is not finite"
        if far:
            name, figures = far[0]
            difference, limit = figures["mean_difference"], figures["limit"]
            what = f"{name} differs from onnxruntime's by {difference:.3g} in the mean, more than {limit:.3g}"
        raise PqExportError(what, where=f"{where}, {step['name']}", cure=f"Do not use it. The log: {log}.")


def _judged(step: dict[str, Any]) -> dict[str, Any]:
    """What ``pq_config.json`` keeps of a comparison: the judged outputs, and the lowest share of equal codes."""
    judged = {name: figures for name, figures in step["outputs"].items() if figures["limit"] is not None}
    shares = [figures["equal"] for name, figures in step["outputs"].items() if name != "logits"]
    return {"name": step["name"], "outputs": judged, "lowest_share_of_equal_codes": min(shares, default=None)}
