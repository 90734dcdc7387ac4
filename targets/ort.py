"""onnxruntime on a CPU: the reference target.

Every precision runs, and quantized activations run in integers, bit for bit the ones that calibration
simulated. Facts behind the choice of form (onnxruntime 1.31, x86 with VNNI): ``integer`` is exact at
every optimization level. ``qdq`` with 8-bit codes on both sides is fused to the same integer kernel, but
only at the extended level, and with a bias it becomes an fp32 Gemm; with 4-bit codes anywhere it stays an
fp32 product of dequantized values, which is neither fast nor exact.
"""

from __future__ import annotations

import onnx

from pq_export.precision import Precision
from pq_export.rewrite.qlinear import Form
from pq_export.targets.base import Target, TargetOptions
from pq_export.targets.ort_kernels import fuse_integer_products, unfuse_integer_products


def _choose_form(precision: Precision, has_bias: bool, options: TargetOptions) -> tuple[Form, str]:
    if precision.activation_bits == 16:
        return Form.INTEGER, "weight-only: integers are unpacked and scaled once, when the session loads"
    return Form.INTEGER, "exact int32 products in VNNI kernels at every optimization level"


def _lower(model: onnx.ModelProto, options: TargetOptions) -> onnx.ModelProto:
    fuse_integer_products(model)
    return model


ORT = Target(
    name="ort",
    title="onnxruntime, CPU (reference)",
    executes="int8 VNNI kernels for every quantized linear; 4-bit codes in 8-bit containers",
    forms=(Form.QDQ, Form.INTEGER),
    choose_form=_choose_form,
    lower=_lower,
    portable=unfuse_integer_products,
)
