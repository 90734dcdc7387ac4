"""NVIDIA TensorRT: Jetson and data-centre GPUs, from 10.3 (JetPack 6.2) on.

Engines are built where they run. A bundle holds the graph as TensorRT's parser reads it, the plugin's sources and what
turns both into an engine (:mod:`pq_export.targets.tensorrt_deploy`); on a machine with such a GPU and TensorRT also the
engine (:mod:`pq_export.targets.trt_engine`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from pq_export.errors import PqExportError
from pq_export.precision import Precision
from pq_export.rewrite.kv_cache import CacheForm
from pq_export.rewrite.qlinear import Form
from pq_export.stages import Stages
from pq_export.targets.base import Target, TargetOptions
from pq_export.targets.tensorrt_deploy import write_deployment
from pq_export.targets.tensorrt_form import TensorRTForm, executable, lower
from pq_export.targets.tensorrt_levels import check
from pq_export.targets.tensorrt_options import level_of, profiles, resolve_gpu
from pq_export.targets.trt_engine import build_here

INT4_TENSOR_CORES = range(80, 90)
INT4_BLOCK = 64  # the smallest block of TensorRT's 4-bit weights


@dataclass(frozen=True)
class Choice:
    """Who multiplies, for a precision and a range of compute capabilities."""

    weight_bits: int
    activation_bits: int
    sms: range
    form: Form
    reason: str


ANY = range(1000)
UNPACKED = "int4 weights, unpacked in registers for int8 tensor cores; TensorRT's own kernels unpack them in memory"
CHOICES = (
    Choice(8, 8, ANY, Form.QDQ, "TensorRT's own int8 kernels, quantizers fused into what is in front of them"),
    Choice(4, 16, ANY, Form.QDQ, "TensorRT's own: the plugin has no kernel for 4-bit weights alone"),
    Choice(4, 4, INT4_TENSOR_CORES, Form.PLUGIN, "int4 tensor cores, which TensorRT's own kernels do not use"),
    Choice(4, 4, ANY, Form.PLUGIN, UNPACKED),
    Choice(4, 8, ANY, Form.PLUGIN, UNPACKED),
)


def choose_form(precision: Precision, has_bias: bool, options: TargetOptions) -> tuple[Form, str]:
    """One choice for the whole file, that of the newest GPU asked for: its packed weights are read by all."""
    sm = max(options.sms)
    for choice in CHOICES:
        bits = (choice.weight_bits, choice.activation_bits)
        if bits == (precision.weight_bits, precision.activation_bits) and sm in choice.sms:
            return choice.form, choice.reason
    raise PqExportError(f"TensorRT has no linear for {precision}", cure="Choose --w4a4, --w4a8, --w8a8 or --w4a16.")


def _lower(model: onnx.ModelProto, options: TargetOptions) -> onnx.ModelProto:
    level = level_of(options)
    form = TensorRTForm(
        max(options.sms), half=options.float_type == "fp16", opset=min(level.opset, 20), block=INT4_BLOCK
    )
    model = lower(model, form)
    if findings := check(model, level):
        raise PqExportError(
            f"TensorRT {level.name} does not take this graph: {findings[0]} ({len(findings)} findings)",
            cure="Choose another --form, --jetpack or precision.",
        )
    return model


def _finish(directory: Path, config: dict[str, Any], options: TargetOptions, stages: Stages) -> dict[str, Any]:
    level = level_of(options)
    found = write_deployment(directory, config, options, profiles(config, options), level, stages)
    engine = build_here(directory, config, options, level, stages)
    if engine is not None:
        found["engines"] = [engine.to_dict()]
        if {engine.sm} == set(options.sms):
            found["deploy"]["remaining"] = None
    return found


TRT = Target(
    name="trt",
    title="NVIDIA TensorRT 10.3 and later: Jetson, data-centre and workstation GPUs",
    executes="W4A4 and W4A8 in pq-export's plugin, W8A8 and W4A16 in TensorRT's own kernels",
    forms=(Form.QDQ, Form.PLUGIN),
    choose_form=choose_form,
    cache=CacheForm.SIGNED,
    native=False,
    resolve=resolve_gpu,
    lower=_lower,
    executable=executable,
    finish=_finish,
)
