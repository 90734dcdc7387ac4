"""Qualcomm Hexagon (HTP): context binaries for static graphs, compiled and simulated on x86 by ``onnxruntime-qnn``.

The whole model runs on the accelerator in integers: 8-bit (or 16-bit) inputs of linears with calibrated scales, uint16
elsewhere with ranges that were observed on sample text, an 8-bit cache as raw codes, the prefix inside the binary.

========================  =======================  ==============================================================
precision                 linears                  note
========================  =======================  ==============================================================
w8a8                      uint8 x int8             in uint16 containers where the output has 16 bits, which is
w4a8                      uint8 x int4             everywhere unless ``--wide-outputs`` says otherwise
w4a16                     uint16 x int4            with ``--kv 8`` the cache has a byte a value, else two
w4a4                      uint16 x int4            activations are rounded to 4 bits and then widened: the chip
                                                   has no 4-bit activations, so they cost accuracy for nothing
========================  =======================  ==============================================================
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx

from pq_export.errors import UsageError
from pq_export.precision import Precision
from pq_export.rewrite.kv_cache import CacheForm
from pq_export.rewrite.qlinear import Form
from pq_export.stages import Stages
from pq_export.targets.base import STATIC_FLAGS, Target, TargetOptions
from pq_export.targets.lint import refuse_findings
from pq_export.targets.profile import find_profile
from pq_export.targets.qnn_compare import compare_simulated
from pq_export.targets.qnn_compile import compile_context, find_qnn
from pq_export.targets.qnn_simulator import TARGET, open_simulator
from pq_export.targets.static_form import StaticForm, save_static, static_graphs, tensors_to_observe
from pq_export.targets.static_options import resolve_static
from pq_export.targets.static_ranges import observe_ranges

STATIC = "static"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NO_GAIN = "4-bit activations gain nothing on this chip: it holds them in 8 bits; w4a8 is as fast and more accurate"


def _resolve(options: TargetOptions, context: int | None) -> TargetOptions:
    find_qnn()  # before anything is calibrated
    if unknown := [name for name in options.wide_outputs or () if name not in LINEARS]:
        raise UsageError(
            f"--wide-outputs: no linear is called '{unknown[0]}'",
            cure=f"Use all, none, or some of {', '.join(LINEARS)}.",
        )
    return resolve_static(options, context, find_profile(TARGET))


def _choose_form(precision: Precision, has_bias: bool, options: TargetOptions) -> tuple[Form, str]:
    reason = "the static graphs for the accelerator are made from Q/DQ"
    return Form.QDQ, f"{reason}; {NO_GAIN}" if precision.activation_bits == 4 else reason


def _finish(directory: Path, config: dict[str, Any], options: TargetOptions, stages: Stages) -> dict[str, Any]:
    assert options.samples is not None and options.prefill_len and options.cache_len
    if Precision.parse(config["precision"]).activation_bits == 4:
        stages.progress.warn(NO_GAIN)
    model = onnx.load(directory / "model.onnx")
    form = StaticForm(options.prefill_len, options.cache_len, options.wide_outputs)
    with stages.stage("observe ranges", len(options.samples)) as advance:
        ranges = observe_ranges(model, tensors_to_observe(model), options.samples, advance)
    with stages.stage("static graphs"):
        graphs = static_graphs(model, form, ranges)
        for soc in options.socs:
            refuse_findings(graphs.models, find_profile(TARGET).for_soc(soc), config["prefix"]["length"])
        (directory / STATIC).mkdir()
        save_static(graphs, directory / STATIC)
    paths = {name: f"{STATIC}/{name}.onnx" for name in graphs.models}
    static = {"graphs": paths, "facts": f"{STATIC}/static.json"}
    records = []
    with stages.stage("compile context binaries", len(options.socs)) as advance:
        for name in options.socs:
            profile = find_profile(TARGET).for_soc(name)
            assert profile.soc is not None
            records.append(
                compile_context(
                    {graph: directory / path for graph, path in paths.items()},
                    directory,
                    profile.soc,
                    floats=bool(profile.floats.types) and bool(graphs.facts.get("float_tensors")),
                    progress=stages.progress.note,
                    failed_logs=directory.parent,
                )
            )
            advance()
    engines = [record.to_dict() for record in records]
    if options.simulation:
        with stages.stage("compare with the simulator", len(records)) as advance:
            for engine in engines:
                soc, layers = find_profile(TARGET).socs[engine["soc"]], directory / engine["layers"]
                compared = compare_simulated(directory, {**config, "static": static}, soc, options.samples, layers)
                engine["simulator"] = compared.to_dict()
                advance()
    return {"static": static, "engines": engines}


QNN_HTP = Target(
    name=TARGET,
    title="Qualcomm Hexagon NPUs (Snapdragon), compiled and simulated on x86",
    executes="integers only, the whole model on the accelerator: w8a8, w4a8, w4a16; w4a4 without a gain",
    forms=(Form.QDQ,),
    choose_form=_choose_form,
    cache=CacheForm.UNSIGNED,
    resolve=_resolve,
    finish=_finish,
    takes=(*STATIC_FLAGS, "--wide-outputs", "--no-simulation"),
    wants_samples=True,
    online_rotation=False,
    simulate=open_simulator,
)
