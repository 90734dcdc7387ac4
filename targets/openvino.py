"""OpenVINO on a CPU: real integer execution by another compiler than onnxruntime's; the IR also feeds Intel's NPUs.

What its CPU plugin was seen to do with form ``qdq`` (2026.4.1, x86 with VNNI): linears of W8A8 run as int8 products,
the quantizers fused into what stands in front of them. With 4-bit codes on either side the weights stay INT4 in memory,
are unpacked to fp32, and activations that went through a quantizer are multiplied in fp32: the numbers are those of
the static scales, and 4-bit activations gain no speed. Constants beside an activation in a sum or product (norm gains,
1/sqrt(d)) must not be quantized: OpenVINO's low-precision passes crash on them. Form ``qdq`` leaves them as they are.

Nothing is compiled for an Intel NPU here: its compiler is in no package for Linux. See docs/openvino-rknn.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pq_export.errors import PqExportError
from pq_export.precision import Precision
from pq_export.rewrite.qlinear import Form
from pq_export.runtime import OrtDecoder, session_options
from pq_export.stages import Stages
from pq_export.targets.base import Target, TargetOptions
from pq_export.targets.openvino_compile import find_openvino, make_ir
from pq_export.targets.openvino_decoder import open_ir

CHECK_TOKENS = 16  # of the prompt that both runtimes are compared on
# Two fp32 programs of one formula differ by round-off, and a quantizer turns a difference at a rounding boundary into a
# step: with 4-bit steps much of the logits follows. Below these it is no round-off.
MIN_COSINE = {4: 0.9, 8: 0.99, 16: 0.999}


def _choose_form(precision: Precision, has_bias: bool, options: TargetOptions) -> tuple[Form, str]:
    if (precision.weight_bits, precision.activation_bits) == (8, 8):
        return Form.QDQ, "what OpenVINO turns into int8 products"
    return Form.QDQ, "OpenVINO unpacks INT4 weights to fp32; 4-bit activations gain nothing there"


def _resolve(options: TargetOptions, context: int | None) -> TargetOptions:
    find_openvino()  # before anything is calibrated
    return options


def _finish(directory: Path, config: dict[str, Any], options: TargetOptions, stages: Stages) -> dict[str, Any]:
    with stages.stage("make OpenVINO IR"):
        model = directory / "model.onnx"

        def reference(input_ids: list[int], next_id: int) -> dict[str, np.ndarray]:
            decoder = OrtDecoder(model, session_options())
            prefill, state, _ = decoder.step(np.array([input_ids], np.int64), decoder.empty(), last_only=True)
            decode, state, _ = decoder.step(np.array([[next_id]], np.int64), state, last_only=True)
            cache = {name.replace("past_key_values", "present"): codes for name, codes in state.past.items()}
            return {"prefill": prefill, "decode": decode, **cache}

        ids = _check_ids(directory)
        record = make_ir(model, directory, reference, ids[:-1], ids[-1], failed_logs=directory.parent)
        bits = Precision.parse(config["precision"]).activation_bits
        if record.agreement.cosine < MIN_COSINE[bits]:
            raise PqExportError(
                f"OpenVINO's logits are not those of onnxruntime: cosine {record.agreement.cosine:.4f}, at least "
                f"{MIN_COSINE[bits]} is expected at {bits}-bit activations",
                where="OpenVINO IR",
                cure="This is a defect of one of the two; please report it.",
            )
        stages.progress.note(
            f"{record.int8_linears} of {record.quantized_linears} linears in int8, cosine {record.agreement.cosine:.6f}"
        )
    return {"openvino": record.to_dict()}


def _check_ids(directory: Path) -> list[int]:
    """Ids of CHECK_TOKENS + 1 tokens, the same for the same model: its first ones would be special."""
    import onnx

    logits = next(o for o in onnx.load(directory / "model.onnx", load_external_data=False).graph.output)
    vocab = logits.type.tensor_type.shape.dim[-1].dim_value
    return [int(i) for i in np.random.default_rng(0).integers(0, vocab, CHECK_TOKENS + 1)]


OPENVINO = Target(
    name="openvino",
    title="OpenVINO, CPU; IR for Intel NPUs",
    executes="int8 kernels for W8A8; 4-bit weights unpacked to fp32",
    forms=(Form.QDQ,),
    choose_form=_choose_form,
    resolve=_resolve,
    finish=_finish,
    takes=(),
    open_runtime=open_ir,
)
