"""onnxruntime on a CPU: the reference target.

Every precision runs, and quantized activations run in integers, bit for bit the ones that calibration
simulated. Facts behind the choice of form (onnxruntime 1.31, x86 with VNNI): ``qdq`` with 8-bit codes on
both sides is fused to the same integer kernel as ``integer`` and is as fast; with 4-bit codes anywhere,
onnxruntime leaves ``qdq`` as fp32 products of dequantized values, which is neither fast nor exact; with a
bias, ``qdq`` becomes an fp32 Gemm.
"""

from __future__ import annotations

from pq_export.precision import Precision
from pq_export.rewrite.qlinear import Form
from pq_export.targets.base import Target


def _choose_form(precision: Precision, has_bias: bool) -> tuple[Form, str]:
    if precision.activation_bits == 16:
        return Form.INTEGER, "weight-only: integers are unpacked and scaled once, when the session loads"
    if precision.weight_bits == 8 and precision.activation_bits == 8 and not has_bias:
        return Form.QDQ, "8-bit codes on both sides: onnxruntime fuses Q/DQ to its integer kernel, exactly"
    return Form.INTEGER, "onnxruntime would run Q/DQ of 4-bit codes in fp32: slower and not exact"


ORT = Target(
    name="ort",
    title="onnxruntime, CPU (reference)",
    executes="int8 VNNI kernels for every quantized linear; 4-bit codes in 8-bit containers",
    forms=(Form.QDQ, Form.INTEGER),
    choose_form=_choose_form,
)
