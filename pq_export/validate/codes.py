"""Integer codes of the graph against those of the fake-quant model, at every quantizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from pq_export.decoder import Decoder
from pq_export.quantizer import code_range
from pq_export.rewrite.streams import block_output
from pq_export.runtime import decoder_of, session_options
from pq_export.simulate import tap_codes


@dataclass
class SiteComparison:
    """Codes of one quantizer: how many, how many differ, by how much at most.

    ``worst_tie_distance``: of the values whose codes differ, the largest distance (in steps) of the fake-quant
    value from the rounding boundary; None where it is not known or nothing differs.
    """

    count: int = 0
    different: int = 0
    max_difference: int = 0
    worst_tie_distance: float | None = None

    @property
    def equal(self) -> float:
        return 1.0 - self.different / self.count if self.count else 1.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "equal": self.equal,
            "count": self.count,
            "different": self.different,
            "max_difference": self.max_difference,
            "worst_tie_distance": self.worst_tie_distance,
        }


@dataclass
class Reference:
    """The fake-quant model's run over some tokens [1, S]."""

    logits: Tensor
    codes: dict[str, np.ndarray] = field(default_factory=dict)
    steps: dict[str, np.ndarray] = field(default_factory=dict)  # values in steps, before rounding
    inputs: dict[int, np.ndarray] = field(default_factory=dict)  # layer -> block input [1, S, hidden]
    outputs: dict[int, np.ndarray] = field(default_factory=dict)


@torch.no_grad()
def reference_run(decoder: Decoder, ids: Tensor) -> Reference:
    """Run the fake-quant decoder (fp32 or fp64) and keep what every quantizer and block made."""
    run = Reference(torch.empty(0))

    def tap(site: str, codes: Tensor, steps: Tensor) -> None:
        run.codes[site], run.steps[site] = codes.numpy().astype(np.int32), steps.numpy()

    handles = tap_codes(decoder, tap)
    for index, layer in enumerate(decoder.layers):

        def keep(module: object, args: tuple[Tensor, ...], out: tuple[Tensor, Any], i: int = index) -> None:
            run.inputs[i], run.outputs[i] = args[0].numpy(), out[0].numpy()

        handles.append(layer.register_forward_hook(keep))
    try:
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        run.logits = decoder(ids, torch.ones_like(ids), positions, decoder.empty_past(len(ids)))[0]
    finally:
        for handle in handles:
            handle.remove()
    return run


def code_outputs(model: onnx.ModelProto, sites: list[str]) -> dict[str, str]:
    """Site -> the tensor of ``model`` that holds its codes."""
    made = {name for node in model.graph.node for name in node.output}
    found = {}
    for site in sites:
        clamped, plain = f"{site}/codes_clamped", f"{site}/codes"
        found[site] = clamped if clamped in made else plain
        if found[site] not in made:
            raise AssertionError(f"the graph has no quantizer for {site}")
    return found


def expose(model: onnx.ModelProto, tensors: list[str], float_type: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """A copy of ``model`` with more outputs: codes come out as int32, streams as they are."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for name in tensors:
        if name.endswith(("/codes", "/codes_clamped")):
            copy.graph.node.append(helper.make_node("Cast", [name], [f"{name}/seen"], to=TensorProto.INT32))
            copy.graph.output.append(helper.make_tensor_value_info(f"{name}/seen", TensorProto.INT32, None))
        else:
            copy.graph.output.append(helper.make_tensor_value_info(name, float_type, None))
    return copy


def seen(name: str) -> str:
    """Output name under which :func:`expose` shows a tensor."""
    return f"{name}/seen" if name.endswith(("/codes", "/codes_clamped")) else name


def replace_readers(model: onnx.ModelProto, tensor: str, forced: str, elem_type: int) -> None:
    """Give the readers of ``tensor`` the new graph input ``forced``; what :func:`expose` shows stays computed."""
    for node in model.graph.node:
        if node.output[0] != seen(tensor):
            for position, name in enumerate(node.input):
                if name == tensor:
                    node.input[position] = forced
    model.graph.input.append(helper.make_tensor_value_info(forced, elem_type, None))


def compare_blocks(model: onnx.ModelProto, decoder: Decoder, ids: Tensor, bits_of: dict[str, int]) -> dict[str, Any]:
    """Every quantizer of the graph on what the fake-quant model had in front of it.

    Each block gets the fake-quant model's block input, and behind each quantizer the graph goes on with the
    fake-quant model's codes. A code that differs therefore differs by what lies between two quantizers, and
    not by an earlier difference. INT4-typed codes (``qdq`` form) cannot be fed and go on as computed.

    ``bits_of``: site -> bits, which fixes the zero point of the graph's codes.
    """
    reference = reference_run(decoder, ids)
    layers, signed = len(decoder.layers), _signed_codes(model)
    names = code_outputs(model, list(reference.codes))
    exposed = expose(model, [*names.values(), *(block_output(i) for i in range(layers))])
    feeds: dict[str, np.ndarray] = {}
    for layer in range(1, layers):
        feeds[f"layers.{layer}/input"] = reference.inputs[layer]
        replace_readers(exposed, block_output(layer - 1), f"layers.{layer}/input", TensorProto.FLOAT)
    for site, name in names.items():
        if signed.get(site) != TensorProto.INT4:
            is_signed = site in signed
            codes = reference.codes[site] - (0 if is_signed else code_range(bits_of[site])[0])
            feeds[f"{site}/forced"] = codes.astype(np.int8 if is_signed else np.uint8)
            replace_readers(exposed, name, f"{site}/forced", TensorProto.INT8 if is_signed else TensorProto.UINT8)
    session = decoder_of(exposed)
    wanted = [seen(n) for n in names.values()] + [block_output(i) for i in range(layers)]
    _, _, values = session.step(ids.numpy(), session.empty(len(ids)), extra=wanted, feeds=feeds)
    sites = _compare(reference, dict(zip(names, values, strict=False)), bits_of, model)
    cosine = [_cosine(reference.outputs[i], values[len(names) + i]) for i in range(layers)]
    return {
        "tokens": ids.numel(),
        "sites": {s: c.to_dict() for s, c in sites.items()},
        "cosine": cosine,
        "min_equal": min((c.equal for c in sites.values()), default=1.0),
    }


def compare_running(model: onnx.ModelProto, decoder: Decoder, ids: Tensor, bits_of: dict[str, int]) -> dict[str, Any]:
    """The whole graph free running; used on the fp64 twin with the fp64 decoder."""
    reference = reference_run(decoder, ids)
    names = code_outputs(model, list(reference.codes))
    session = decoder_of(expose(model, list(names.values())), session_options(fuse=False))
    logits, _, values = session.step(ids.numpy(), session.empty(len(ids)), extra=[seen(n) for n in names.values()])
    sites = _compare(reference, dict(zip(names, values, strict=True)), bits_of, model)
    return {
        "tokens": ids.numel(),
        "sites": {s: c.equal for s, c in sites.items()},
        "min_equal": min((c.equal for c in sites.values()), default=1.0),
        "logits_max_error": float(np.abs(logits - reference.logits.numpy()).max()),
    }


def _compare(
    reference: Reference, graph: dict[str, np.ndarray], bits_of: dict[str, int], model: onnx.ModelProto
) -> dict[str, SiteComparison]:
    signed = _signed_codes(model)
    result = {}
    for site, codes in reference.codes.items():
        offset = 0 if site in signed else -code_range(bits_of[site])[0]
        difference = np.abs(graph[site] - offset - codes)
        comparison = SiteComparison(codes.size, int(np.count_nonzero(difference)), int(difference.max(initial=0)))
        if comparison.different:
            steps = reference.steps[site][difference > 0]
            comparison.worst_tie_distance = float(np.abs(np.abs(steps - np.floor(steps)) - 0.5).max())
        result[site] = comparison
    return result


def _signed_codes(model: onnx.ModelProto) -> dict[str, int]:
    """Site -> ONNX type, for sites whose codes are signed: those whose zero point is, as in the qdq form."""
    types = {t.name: t.data_type for t in model.graph.initializer}
    return {
        node.output[0].removesuffix("/codes"): types[node.input[2]]
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and types[node.input[2]] in (TensorProto.INT8, TensorProto.INT4)
    }


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b / max(norms, 1e-30))
