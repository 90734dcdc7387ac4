"""Everything that ``validate`` measures, in order, and whether it passes.

Four models see the same tokens: the floating-point model, the same with the prefix in front, the
fake-quant model and the graph in onnxruntime. Three comparisons tell apart what could differ:

blocks
    the shipped graph, every block and quantizer on the fake-quant model's inputs: only ties may differ;
exact
    its fp64 twin against the fp64 fake-quant model, free running: the same function, code by code;
free_running
    the shipped graph as it runs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from pq_export.bundle import Bundle, calibration_sha256
from pq_export.calibration import Calibration
from pq_export.decoder import Decoder
from pq_export.errors import IntegrityError, PqExportError
from pq_export.execute import executable_model, open_decoder
from pq_export.runtime import OrtDecoder, decoder_of, session_options
from pq_export.simulate import simulated_decoder
from pq_export.stages import Stages
from pq_export.targets import find_target
from pq_export.validate.agreement import compare_logits
from pq_export.validate.codes import compare_blocks, compare_running
from pq_export.validate.greedy import agreeing, onnx_greedy, torch_greedy
from pq_export.validate.perplexity import onnx_logits, perplexity, torch_logits
from pq_export.validate.speed import compare_speed
from pq_export.validate.widen import widen

FP, FP_PREFIX, FAKE_QUANT, ONNX = "FP", "FP + prefix", "fake-quant", "ONNX"
PROMPT_TOKENS = 16
MAX_TWIN_PPL_DIFFERENCE = 1e-3
# With FP16 constants a code of 127 moves by 127 * 2^-11 = 0.06 for each of them: seldom at 4 bits, 2 % of codes at 8.
ROUNDED_CODE_SHARE = 0.95
SPEED_PROMPT, SPEED_STEPS = 512, 32


@dataclass(frozen=True)
class Limits:
    """What a bundle must reach. ``max_ppl_ratio`` is against FP; None does not judge."""

    min_code_share: float = 0.999
    min_greedy: int = 64
    max_ppl_difference: float = 0.03
    max_ppl_ratio: float | None = None


@dataclass(frozen=True)
class Workload:
    """How much to run. ``tokens``: the evaluation text. Lengths in tokens; ``window`` is cut to the context.

    ``device`` is where PyTorch measures perplexity; integers are compared on the CPU. ``threads`` are
    onnxruntime's; None is all cores.
    """

    tokens: np.ndarray
    text: str
    windows: int = 2
    window: int = 2048
    compare_tokens: int = 128
    greedy_steps: int = 64
    speed: bool = False
    device: str = "cpu"
    threads: int | None = None


def check_belongs(bundle: Bundle, calibration: Calibration) -> None:
    """Refuse a calibration that this bundle was not built from."""
    c, config = calibration, bundle.config
    ours = (config["source"], config["prefix"]["key"], config["precision"], bundle.overrides)
    same = ours == (asdict(c.source), c.prefix.key, str(c.precision), c.overrides)
    if same and "calibration_sha256" in config:  # older bundles do not have it
        same = config["calibration_sha256"] == calibration_sha256(c)
    if not same:
        raise IntegrityError(
            "was not built from this calibration", where=bundle.directory, cure="Give the right one with --calib."
        )


@torch.no_grad()
def validate(
    bundle: Bundle, calibration: Calibration, fp: Decoder | None, work: Workload, limits: Limits, stages: Stages
) -> dict[str, Any]:
    """Measure and judge ``bundle``. ``fp``: the untouched checkpoint, or None to leave its rows out."""
    check_belongs(bundle, calibration)
    window = min(work.window, calibration.decoder.max_position_embeddings - len(calibration.prefix.token_ids))
    needed = max(window * max(work.windows, 1), work.compare_tokens)
    if len(work.tokens) < needed:
        raise PqExportError(
            f"has {len(work.tokens)} tokens; {work.windows} windows of {window} need {needed}",
            where=work.text,
            cure="Give a longer --text or fewer --windows.",
        )
    head = torch.from_numpy(work.tokens[: work.compare_tokens])[None]
    model = executable_model(bundle)
    portable = onnx.ModelProto()
    portable.CopyFrom(model)
    find_target(bundle.config["target"]).portable(portable)
    simulated = simulated_decoder(calibration)
    bits = {site: calibration.activation_bits(site) for site in calibration.activation_scales}
    bits |= {site: calibration.kv_bits(site) for site in calibration.kv_scales}
    result: dict[str, Any] = {"text": work.text}
    with stages.stage("compare integers block by block"):
        result["blocks"] = compare_blocks(model, simulated, head, bits)
    with stages.stage("compare fp64 twin"):
        result["exact"] = _exact(portable, calibration, head, bits, work.greedy_steps)
    del model, portable
    graph = open_decoder(bundle, work.threads)
    with stages.stage("compare free running"):
        result["free_running"] = _free_running(graph, simulated, head, work.greedy_steps)
    simulated.to(work.device)
    rows = {FAKE_QUANT: torch_logits(simulated), ONNX: onnx_logits(graph)}
    if fp is not None:
        fp.to(work.device)
        rows = {FP: torch_logits(fp), FP_PREFIX: torch_logits(fp, calibration.prefix.token_ids), **rows}
    result["perplexity"] = _perplexities(rows, work, window, stages)
    del graph, rows
    if work.speed:
        with stages.stage("measure speed"):
            result["speed"] = _speed(bundle, calibration, fp, work.threads)
    result["checks"] = checks(result, limits, rounded=bundle.float_type == "fp16")
    result["limits"] = asdict(limits)
    result["passed"] = all(check["passed"] for check in result["checks"])
    return result


def _exact(
    model: onnx.ModelProto, calibration: Calibration, ids: Tensor, bits: dict[str, int], steps: int
) -> dict[str, Any]:
    twin, decoder = widen(model), simulated_decoder(calibration).double()
    result = compare_running(twin, decoder, ids, bits)
    prompt = ids[:, :PROMPT_TOKENS]
    graph = decoder_of(twin, session_options(fuse=False))
    tokens = onnx_greedy(graph, prompt, steps)
    values = [perplexity(logits_of, ids).value for logits_of in (torch_logits(decoder), onnx_logits(graph))]
    return {
        **result,
        "greedy_equal": agreeing(torch_greedy(decoder, prompt, steps), tokens),
        "greedy_steps": steps,
        "perplexity_difference": abs(values[1] / values[0] - 1.0),
    }


def _free_running(graph: OrtDecoder, simulated: Decoder, ids: Tensor, steps: int) -> dict[str, Any]:
    reference, logits = torch_logits(simulated)(ids).numpy(), onnx_logits(graph)(ids).numpy()
    a, b = reference.astype(np.float64).ravel(), logits.astype(np.float64).ravel()
    prompt = ids[:, :PROMPT_TOKENS]
    return {
        "tokens": ids.numel(),
        "logits_max_error": float(np.abs(a - b).max()),
        "logits_max": float(np.abs(a).max()),
        "logits_cosine": float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))),
        "top1_agreement": float((reference.argmax(-1) == logits.argmax(-1)).mean()),
        "greedy_equal": agreeing(torch_greedy(simulated, prompt, steps), onnx_greedy(graph, prompt, steps)),
        "greedy_steps": steps,
    }


def _perplexities(rows: dict[str, Any], work: Workload, window: int, stages: Stages) -> dict[str, Any]:
    windows = torch.from_numpy(work.tokens[: work.windows * window].reshape(work.windows, window))
    measured: list[dict[str, Any]]
    if FP in rows:
        with stages.stage("perplexity and divergence", work.windows) as advance:
            found = compare_logits(rows[FP], rows, windows, advance)
        measured = [{"model": name, **asdict(agreement)} for name, agreement in found.items()]
    else:
        measured = []
        for name, logits_of in rows.items():
            with stages.stage(f"perplexity, {name}", work.windows) as advance:
                value = perplexity(logits_of, windows, advance)
            measured.append({"model": name, "perplexity": value.value, "tokens_per_second": value.tokens_per_second})
    base = measured[0]["perplexity"] if measured[0]["model"] == FP else None
    for row in measured:
        row["ratio"] = None if base is None else row["perplexity"] / base
    return {"windows": work.windows, "window": window, "rows": measured}


def _speed(bundle: Bundle, calibration: Calibration, fp: Decoder | None, threads: int | None) -> dict[str, Any]:
    from pq_export.export.fp_graph import export_fp_graph
    from pq_export.rewrite.pipeline import float_model

    decoders: dict[str, Any] = {str(calibration.precision): lambda: open_decoder(bundle, threads)}
    if fp is not None:
        baseline = float_model(export_fp_graph(fp.config), fp)
        decoders = {"fp32 ONNX": lambda: decoder_of(baseline, session_options(threads=threads)), **decoders}
    room = calibration.decoder.max_position_embeddings - len(calibration.prefix.token_ids) - SPEED_STEPS
    return compare_speed(decoders, calibration.decoder.vocab_size, min(SPEED_PROMPT, room), SPEED_STEPS)


def _largest(result: dict[str, Any]) -> int:
    return max((site["max_difference"] for site in result["blocks"]["sites"].values()), default=0)


def checks(result: dict[str, Any], limits: Limits, rounded: bool = False) -> list[dict[str, Any]]:
    """Each judged figure with its limit.

    ``rounded``: the graph's constants are FP16. Then it is another function, which differs from the fake-quant model by
    2^-11 in front of every quantizer; free running that grows to other codes everywhere, and the twin judges nothing.
    """
    rows = {row["model"]: row for row in result["perplexity"]["rows"]}
    difference = abs(rows[ONNX]["perplexity"] / rows[FAKE_QUANT]["perplexity"] - 1.0)
    exact = result["exact"]
    twin = [
        ("equal codes, worst site, fp64 twin", exact["min_equal"], limits.min_code_share, True),
        ("equal greedy tokens, fp64 twin", exact["greedy_equal"], min(limits.min_greedy, exact["greedy_steps"]), True),
        ("perplexity difference, fp64 twin", exact["perplexity_difference"], MAX_TWIN_PPL_DIFFERENCE, False),
    ]
    share = min(limits.min_code_share, ROUNDED_CODE_SHARE) if rounded else limits.min_code_share
    found = [
        ("equal codes, worst site, block by block", result["blocks"]["min_equal"], share, True),
        *([("largest difference of codes, block by block", _largest(result), 1, False)] if rounded else twin),
        ("perplexity difference, ONNX to fake-quant", difference, limits.max_ppl_difference, False),
    ]
    if limits.max_ppl_ratio is not None and rows[ONNX]["ratio"] is not None:
        found.append(("perplexity ratio, ONNX to FP", rows[ONNX]["ratio"], limits.max_ppl_ratio, False))
    return [
        {
            "name": name,
            "value": value,
            "threshold": limit,
            "at_least": at_least,
            "passed": bool(value >= limit if at_least else value <= limit),
        }
        for name, value, limit, at_least in found
    ]
