"""NVIDIA TensorRT for RTX: desktop GPUs, engines built on any machine, also without a GPU.

What its builder was seen to take (1.7.1, SmolLM2-135M): Q/DQ of W8A8, W4A8, W4A16 and, with activations clipped and
then int8, W4A4; the plugin's nodes; an int8 cache. INT4 activations and an INT4 cache build for some GPUs and crash
the builder for others.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from pq_export.errors import PqExportError, UsageError
from pq_export.plugins.build import find_library
from pq_export.plugins.toolchain import ARCHITECTURES, local_sms
from pq_export.precision import Precision
from pq_export.rewrite.kv_cache import CacheForm
from pq_export.rewrite.qlinear import Form
from pq_export.stages import Stages
from pq_export.targets.base import Target, TargetOptions
from pq_export.targets.rtx_engines import SMS, EngineRecord, build_engines, check_sms, find_rtx
from pq_export.targets.tensorrt_deploy import copy_sources, deploy_facts, write_text_files
from pq_export.targets.tensorrt_form import TensorRTForm, executable, lower
from pq_export.targets.tensorrt_levels import NEWEST, check
from pq_export.targets.tensorrt_options import profiles, resolve_lengths
from pq_export.targets.trt import choose_form as choose_trt_form

DEFAULT_SMS = (86, 89, 120)


def _resolve(options: TargetOptions, context: int | None) -> TargetOptions:
    if options.jetpack is not None:
        raise PqExportError("TensorRT for RTX does not run on a Jetson", cure="Use --target trt for --jetpack.")
    sms = options.sms or tuple(sm for sm in local_sms() if sm in SMS) or DEFAULT_SMS
    check_sms(sms)
    find_rtx()
    return resolve_lengths(replace(options, sms=tuple(sorted(set(sms)))), context)


def _choose_form(precision: Precision, has_bias: bool, options: TargetOptions) -> tuple[Form, str]:
    if without := [sm for sm in options.sms if sm not in ARCHITECTURES]:
        return Form.QDQ, f"the plugin has no kernels for SM {without[0]}"
    form, reason = choose_trt_form(precision, has_bias, options)
    _check_form(form, options)  # before anything is calibrated
    return form, reason


def _check_form(form: Form, options: TargetOptions) -> None:
    if form is not Form.PLUGIN:
        return
    for sm in options.sms:
        if sm not in ARCHITECTURES:
            raise UsageError(f"the plugin has no kernels for SM {sm}", cure="Use --form qdq there.")
        find_library(sm, plugin=True)


def _lower(model: onnx.ModelProto, options: TargetOptions) -> onnx.ModelProto:
    model = lower(model, TensorRTForm(max(options.sms), half=options.float_type == "fp16", opset=20))
    if findings := check(model, NEWEST, int4_per_channel=True):
        raise PqExportError(f"TensorRT for RTX does not take this graph: {findings[0]} ({len(findings)} findings)")
    return model


def _finish(directory: Path, config: dict[str, Any], options: TargetOptions, stages: Stages) -> dict[str, Any]:
    (directory / "deploy").mkdir()
    write_text_files(directory, stages)
    copy_sources(directory / "plugin")
    libraries: dict[int, Path | None] = dict.fromkeys(options.sms)
    if config["form"] == Form.PLUGIN.value:
        for sm in options.sms:
            libraries[sm] = directory / "deploy" / f"libpq-sm{sm}.so"
            shutil.copy2(find_library(sm, plugin=True), str(libraries[sm]))
    records: list[EngineRecord] = []
    with stages.stage("build engines", len(options.sms)) as advance:
        for sm in options.sms:
            records += build_engines(
                directory / "model.onnx",
                directory,
                [sm],
                profiles(config, options),
                libraries[sm],
                stages.progress.note,
                failed_logs=directory.parent,
            )
            advance()
    found: dict[str, Any] = {
        "engines": [record.to_dict() for record in records],
        "deploy": deploy_facts(config, options, f"for RTX {records[0].tensorrt}", None),
    }
    if config["form"] == Form.PLUGIN.value and len(options.sms) == 1:
        found["plugin"] = f"deploy/libpq-sm{options.sms[0]}.so"
    return found


TRT_RTX = Target(
    name="trt-rtx",
    title="NVIDIA TensorRT for RTX: Ampere, Ada and Blackwell desktop GPUs",
    executes="W4A4 and W4A8 in pq-export's plugin, W8A8 and W4A16 in its own kernels; engines are built here",
    forms=(Form.QDQ, Form.PLUGIN),
    choose_form=_choose_form,
    check_form=_check_form,
    cache=CacheForm.SIGNED,
    native=False,
    resolve=_resolve,
    lower=_lower,
    executable=executable,
    finish=_finish,
)
