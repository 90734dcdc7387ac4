"""Rockchip RK3588, RK3576 and RV1126B: W8A8 graphs of fixed shapes, compiled and simulated by rknn-toolkit2.

Optional, in an environment of its own (docs/openvino-rknn.md): set PQ_RKNN_PYTHON to the Python that has the toolkit.
Linears run in INT8 on the NPU, all or the build fails; the rest in FP16. The simulator follows the scales of the file
but not bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx

from pq_export.errors import PqExportError
from pq_export.precision import Precision
from pq_export.rewrite.qlinear import Form
from pq_export.stages import Stages
from pq_export.static_runtime import StaticDecoder, StaticFacts, appended, chunk_inputs, onnxruntime_sessions
from pq_export.targets.base import STATIC_FLAGS, Target, TargetOptions
from pq_export.targets.lint import refuse_findings
from pq_export.targets.profile import find_profile
from pq_export.targets.rknn_compile import compile_graph, find_rknn, save_layers
from pq_export.targets.rknn_form import rknn_graphs, tensors_to_observe
from pq_export.targets.static_form import save_static
from pq_export.targets.static_options import resolve_static
from pq_export.targets.static_ranges import observe_ranges

NAME, STATIC = "rknn", "static"


def _choose_form(precision: Precision, has_bias: bool, options: TargetOptions) -> tuple[Form, str]:
    if (precision.weight_bits, precision.activation_bits) != (8, 8) or precision.kv_bits == 4:
        raise PqExportError(
            f"--target rknn has no {precision}: RKNN's static codes have 8 bits", cure="Use --w8a8, and --kv 8 or 16."
        )
    return Form.QDQ, "the static graphs for the accelerator are made from Q/DQ"


def _resolve(options: TargetOptions, context: int | None) -> TargetOptions:
    resolved = resolve_static(options, context, find_profile(NAME))
    find_rknn()  # before anything is calibrated
    return resolved


def _finish(directory: Path, config: dict[str, Any], options: TargetOptions, stages: Stages) -> dict[str, Any]:
    assert options.samples is not None and options.prefill_len and options.cache_len
    model = onnx.load(directory / "model.onnx")
    with stages.stage("observe ranges", len(options.samples)) as advance:
        ranges = observe_ranges(model, tensors_to_observe(model), options.samples, advance)
    with stages.stage("static graphs"):
        graphs = rknn_graphs(model, options.prefill_len, options.cache_len, ranges)
        for platform in options.socs:
            refuse_findings(graphs.models, find_profile(NAME).for_soc(platform), config["prefix"]["length"])
        (directory / STATIC).mkdir()
        save_static(graphs, directory / STATIC)
    paths = {name: f"{STATIC}/{name}.onnx" for name in graphs.models}
    static = {"graphs": paths, "facts": f"{STATIC}/static.json"}
    facts = StaticFacts.read(directory, config | {"static": static})
    runs = reference_runs(directory, config | {"static": static}, facts, options.samples[0])
    records, rknn = [], find_rknn()
    with stages.stage("compile for RKNN", len(options.socs) * len(paths)) as advance:
        for platform in options.socs:
            tables = {}
            for name, path in paths.items():
                record, tables[name] = compile_graph(
                    name,
                    directory / path,
                    directory,
                    platform,
                    *runs[name],
                    rknn=rknn,
                    failed_logs=directory.parent,
                    progress=stages.progress.note,
                )
                records.append(record.to_dict())
                advance()
            save_layers(directory, platform, tables)
    return {"static": static, "engines": records}


Run = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]


def reference_runs(directory: Path, config: dict[str, Any], facts: StaticFacts, tokens: np.ndarray) -> dict[str, Run]:
    """Inputs and onnxruntime's outputs of both graphs: a prefill of the first ``tokens`` [T], and the next one."""
    sessions = onnxruntime_sessions(directory, config)
    sequence = StaticDecoder(facts, sessions).empty().sequences[0]
    length = min(facts.prefill_len, len(tokens) - 1)
    runs: dict[str, Run] = {}
    for name, ids, width in (
        ("prefill", tokens[:length], facts.prefill_len),
        ("decode", tokens[length : length + 1], 1),
    ):
        feeds = {**chunk_inputs(facts, ids, sequence, width), **sequence.cache}
        names = ["logits", *(past.replace("past_key_values", "present") for past in facts.cache)]
        outputs = dict(zip(names, sessions[name].run(names, feeds), strict=True))
        new = {past: outputs[past.replace("past_key_values", "present")] for past in facts.cache}
        sequence = appended(sequence, new, len(ids))
        runs[name] = feeds, outputs
    return runs


RKNN = Target(
    name=NAME,
    title="Rockchip RK3588, RK3576, RV1126B",
    executes="int8 kernels for W8A8 linears, FP16 for the rest",
    forms=(Form.QDQ,),
    choose_form=_choose_form,
    resolve=_resolve,
    finish=_finish,
    takes=STATIC_FLAGS,
    wants_samples=True,
)
