"""``--target static`` and ``--target ./my-npu.toml``: bundles for accelerators that pq-export has no compiler for.

A bundle holds the portable Q/DQ graph and, beside it, prefill and decode graphs of fixed shape, which are compared with
the profile before they are written. Their compiler is the user's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx

from pq_export.bundle import MODEL_NAME
from pq_export.errors import UsageError
from pq_export.precision import Precision
from pq_export.rewrite.qlinear import Form
from pq_export.stages import Stages
from pq_export.targets.base import STATIC_FLAGS, Target, TargetOptions
from pq_export.targets.lint import refuse_findings
from pq_export.targets.profile import BASE, Profile, find_profile, takes
from pq_export.targets.static_form import StaticForm, save_static, static_graphs, tensors_to_observe
from pq_export.targets.static_options import resolve_static
from pq_export.targets.static_ranges import observe_ranges

FOLDER = "static"
GRAPH_OPSET = 23  # of the graphs of fixed shapes


def profile_target(profile: Profile) -> Target:
    """The generic target for ``profile``. Bundles are of target ``static``: what reads them needs no profile."""

    def resolve(options: TargetOptions, context: int | None) -> TargetOptions:
        low, high = profile.opset.min, profile.opset.max
        if profile.shapes.static and not low <= GRAPH_OPSET <= high:
            raise UsageError(
                f"profile {profile.name} reads opsets {low} to {high}; graphs of fixed shapes have {GRAPH_OPSET}",
                cure=f"Let opset.min and opset.max include {GRAPH_OPSET}, or set shapes.static = false for the "
                "portable graph alone, of opset 21.",
            )
        # Without fixed shapes there is no length that the context could be too short for.
        return resolve_static(options, context if profile.shapes.static else None, profile)

    def choose_form(precision: Precision, has_bias: bool, options: TargetOptions) -> tuple[Form, str]:
        name = f"w{precision.weight_bits}a{precision.activation_bits}"
        if name not in profile.precisions:
            flags = ", ".join(f"--{known}" for known in profile.precisions) or "none"
            raise UsageError(f"profile {profile.name} does not take {name}", cure=f"It takes: {flags}.")
        if not profile.shapes.static:
            return Form.QDQ, "a portable graph of Q/DQ is what the profile takes"
        floats = takes(profile.floats.types, "float32")
        if floats and precision.activation_bits != 8:
            raise UsageError(
                f"profile {profile.name} takes float32, and graphs of fixed shapes have 8-bit linears then, not {name}",
                cure="Use --w8a8 or --w4a8, or take float32 out of floats.types: every tensor is quantized then.",
            )
        if precision.kv_bits == 4 and (floats or not takes(profile.activations.types, "int4")):
            raise UsageError(f"profile {profile.name} takes no 4-bit codes of keys and values", cure="Use --kv 8.")
        return Form.QDQ, "static graphs are made from Q/DQ"

    def finish(directory: Path, config: dict[str, Any], options: TargetOptions, stages: Stages) -> dict[str, Any]:
        return _finish(directory, config, options, stages, profile)

    return Target(
        name=BASE,
        title=profile.title,
        executes=profile.executes,
        forms=(Form.QDQ,),
        choose_form=choose_form,
        resolve=resolve,
        finish=finish,
        takes=STATIC_FLAGS if profile.shapes.static else ("--soc",),
        wants_samples=profile.shapes.static,
        online_rotation=not profile.linears.unit,
    )


def _finish(
    directory: Path, config: dict[str, Any], options: TargetOptions, stages: Stages, profile: Profile
) -> dict[str, Any]:
    model = onnx.load(directory / MODEL_NAME)
    made: dict[str, Any] = {"profile": {"name": profile.name, "socs": list(options.socs)}}
    if not profile.shapes.static:
        _refuse({"model": model}, config, options, profile)
        return made
    assert options.samples is not None
    form = _form(options, profile)
    with stages.stage("observe ranges", len(options.samples)) as advance:
        ranges = observe_ranges(model, tensors_to_observe(model), options.samples, advance)
    with stages.stage("static graphs"):
        graphs = static_graphs(model, form, ranges)
        _refuse(graphs.models, config, options, profile)
        (directory / FOLDER).mkdir()
        save_static(graphs, directory / FOLDER)
    paths = {name: f"{FOLDER}/{name}.onnx" for name in graphs.models}
    return {**made, "static": {"graphs": paths, "facts": f"{FOLDER}/static.json"}}


def _form(options: TargetOptions, profile: Profile) -> StaticForm:
    """Integers everywhere, unless the profile takes FP32 tensors."""
    assert options.prefill_len and options.cache_len
    floats = takes(profile.floats.types, "float32")
    return StaticForm(prefill_len=options.prefill_len, cache_len=options.cache_len, float_parts=floats)


def _refuse(
    models: dict[str, onnx.ModelProto], config: dict[str, Any], options: TargetOptions, profile: Profile
) -> None:
    """Raise if one of the chips does not take one of the graphs."""
    for soc in options.socs or (None,):
        refuse_findings(models, profile.for_soc(soc), config["prefix"]["length"])


STATIC = profile_target(find_profile(BASE))
