"""Arm Ethos-U: NPUs of microcontrollers that compute in integers only, reached by TOSA and Vela.

What is lowered are the linears, each to a TOSA graph for every number of tokens and to a file that Vela compiled. The
rest of a model is not, and nothing is put on a CPU in silence: without ``--linears-only`` the export ends, and with it
``pq_config.json`` lists every operator that is left to the host. ``ethos_u/`` in the bundle then holds::

    tosa/layers.0.mlp.gate_proj.64.tosa             the linear for 64 tokens, for any compiler of TOSA 1.0
    ethos-u85-256/layers.0.mlp.gate_proj.64.tflite  the same, compiled: a custom operator with a command stream

Outputs are 16-bit codes with the scale that no input can exceed: they never saturate, no range has to be observed, and
Vela estimates as many cycles as for 8 bits.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from pq_export.errors import PqExportError, UsageError
from pq_export.precision import Precision
from pq_export.rewrite.qlinear import Form
from pq_export.stages import Stages
from pq_export.targets.base import Target, TargetOptions
from pq_export.targets.lint import refuse_findings
from pq_export.targets.profile import find_profile
from pq_export.targets.tosa_linears import (
    LoweredLinear,
    find_linears,
    floating_linears,
    lower_linear,
    not_lowered,
    tosa_graph,
)
from pq_export.targets.tosa_reference import count_differences
from pq_export.targets.tosa_tools import find_tools
from pq_export.targets.vela import DEFAULT_ACCELERATOR, VelaRecord, check_accelerators, compile_tosa

FOLDER = "ethos_u"
PREFILL_LEN = 64
OUTPUT_BITS = 16
LEFT_TO_HOST = (
    "embedding, RMSNorm, rotary embedding, attention (both products and the softmax), SiLU, sums of the residual "
    "stream, lm_head"
)


def _resolve(options: TargetOptions, context: int | None) -> TargetOptions:
    if not options.linears_only:
        raise PqExportError(
            f"an Ethos-U has no floating point, and of a model only the linears become integers; not lowered: "
            f"{LEFT_TO_HOST}",
            cure="Use --linears-only for the linears alone, with the rest on your host.",
        )
    find_tools()
    names = tuple(dict.fromkeys(accelerator(soc) for soc in options.socs)) or (DEFAULT_ACCELERATOR,)
    check_accelerators(names)
    length = options.prefill_len or PREFILL_LEN
    if context is not None and length > context:
        raise UsageError(
            f"--prefill-len {length} is longer than the model's context beside the prefix, {context}",
            cure=f"Use {context} or less.",
        )
    return replace(options, socs=names, prefill_len=length)


def accelerator(soc: str) -> str:
    """Vela's name of ``--soc``: "u85-256" and "ethos-u85-256" are the same."""
    name = soc.lower()
    return name if name.startswith("ethos-") else f"ethos-{name}"


def _choose_form(precision: Precision, has_bias: bool, options: TargetOptions) -> tuple[Form, str]:
    if precision.activation_bits == 16:
        raise PqExportError(
            f"{precision} has linears with floating-point inputs, which an Ethos-U cannot compute",
            cure="Use --w8a8 or --w4a8.",
        )
    if precision.activation_bits == 4:
        raise PqExportError(
            f"{precision} has 4-bit activations, which an Ethos-U multiplies no faster than 8-bit ones",
            cure="Use --w4a8: the same weights, more accurate.",
        )
    return Form.QDQ, "TOSA graphs of the linears are made from Q/DQ"


def _finish(directory: Path, config: dict[str, Any], options: TargetOptions, stages: Stages) -> dict[str, Any]:
    tools = find_tools()
    assert options.prefill_len is not None
    token_counts = sorted({1, options.prefill_len})
    with stages.stage("lower linears to TOSA"):
        model = onnx.load(directory / "model.onnx")
        if floating := floating_linears(model):
            raise PqExportError("its input is in floating point", where=floating[0], cure="Use --w8a8 or --w4a8.")
        for name in options.socs:
            refuse_findings(
                {"model": model}, find_profile("ethos-u").for_soc(name.removeprefix("ethos-")), linears_only=True
            )
        linears = [lower_linear(linear, OUTPUT_BITS) for linear in find_linears(model)]
        left = not_lowered(model)
        del model
        jobs = _write_tosa(directory / FOLDER, linears, token_counts)
    with stages.stage("compare with TOSA's reference model"):
        check_exact(linears, token_counts, failed_logs=directory.parent)
    with stages.stage("compile with Vela", len(jobs) * len(options.socs)) as advance:
        compiled = _compile(directory / FOLDER, jobs, options.socs, directory.parent, advance)
    stages.progress.warn(f"left to the host: {LEFT_TO_HOST}")
    return {
        FOLDER: {
            "vela": tools.vela,
            "tosa_tools": tools.tosa_tools,
            "token_counts": token_counts,
            "accelerators": list(options.socs),
            "exact": "every TOSA graph gave the integers of its definition in Arm's reference model",
            "totals": [_total(compiled, name, tokens) for name in options.socs for tokens in token_counts],
            "not_lowered": left,
            "linears": {linear.name: _describe(linear, compiled, token_counts, options.socs) for linear in linears},
        }
    }


def _write_tosa(folder: Path, linears: Sequence[LoweredLinear], token_counts: Sequence[int]) -> list[tuple[str, int]]:
    """A TOSA file for each linear and number of tokens; what was written."""
    (folder / "tosa").mkdir(parents=True)
    jobs = []
    for linear in linears:
        for tokens in token_counts:
            (folder / "tosa" / f"{linear.name}.{tokens}.tosa").write_bytes(tosa_graph(linear, tokens))
            jobs.append((linear.name, tokens))
    return jobs


def check_exact(linears: Sequence[LoweredLinear], token_counts: Sequence[int], *, failed_logs: Path) -> None:
    """Refuse a linear whose TOSA graph differs in one code from what its integers make."""
    for tokens in token_counts:
        differences = count_differences(linears, tokens, failed_logs=failed_logs)
        if wrong := [name for name, count in differences.items() if count]:
            raise PqExportError(
                f"its TOSA graph for {tokens} tokens differs in {differences[wrong[0]]} codes from the exact integers "
                f"({len(wrong)} linears): this is a defect, please report it",
                where=wrong[0],
            )


def _compile(
    folder: Path, jobs: Sequence[tuple[str, int]], accelerators: Sequence[str], logs: Path, advance: Any
) -> dict[tuple[str, int, str], VelaRecord]:
    for name in accelerators:
        (folder / name).mkdir()
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        futures = {
            pool.submit(
                compile_tosa,
                folder / "tosa" / f"{linear}.{tokens}.tosa",
                folder / name / f"{linear}.{tokens}.tflite",
                name,
                failed_logs=logs,
                where=f"{linear}, {tokens} tokens, {name}",
            ): (linear, tokens, name)
            for linear, tokens in jobs
            for name in accelerators
        }
        records = {}
        try:
            for future in as_completed(futures):
                records[futures[future]] = future.result()
                advance()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return records


def _describe(
    linear: LoweredLinear,
    compiled: dict[tuple[str, int, str], VelaRecord],
    token_counts: Sequence[int],
    accelerators: Sequence[str],
) -> dict[str, Any]:
    """What a host needs for one linear: value = code * scale, for input and output; and its files."""
    out_channels, in_channels = linear.weight.shape
    files = []
    for tokens in token_counts:
        files.append({"tokens": tokens, "tosa": f"{FOLDER}/tosa/{linear.name}.{tokens}.tosa"})
        for name in accelerators:
            record = compiled[linear.name, tokens, name]
            files[-1][name] = {
                "file": f"{FOLDER}/{name}/{linear.name}.{tokens}.tflite",
                "bytes": record.bytes,
                "estimated_cycles": record.estimated_cycles,
            }
    return {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "weight_bits": linear.weight_bits,
        "weight_dtype": f"int{linear.weight_type_bits}",
        "input": {"dtype": linear.input_type.name, "zero_point": 0, "scale": linear.input_scale},
        "output": {"dtype": linear.output_type.name, "zero_point": 0, "scale": float(linear.output_scale)},
        "files": files,
    }


def _total(compiled: dict[tuple[str, int, str], VelaRecord], name: str, tokens: int) -> dict[str, Any]:
    """Sums over the linears of one accelerator and number of tokens."""
    records = [record for (_, count, used), record in compiled.items() if (count, used) == (tokens, name)]
    if not records:
        return {"accelerator": name, "tokens": tokens, "graphs": 0}
    return {
        "accelerator": name,
        "tokens": tokens,
        "graphs": len(records),
        "npu_operators": sum(record.npu_operators for record in records),
        "cpu_operators": 0,
        "bytes": sum(record.bytes for record in records),
        "weight_bytes": sum(record.weight_bytes for record in records),
        "most_sram_bytes": max(record.sram_bytes for record in records),
        "estimated_cycles": sum(record.estimated_cycles for record in records),
        "clock_hz": records[0].clock_hz,
        "system_config": records[0].system_config,
        "memory_mode": records[0].memory_mode,
    }


ETHOS_U = Target(
    name="ethos-u",
    title="Arm Ethos-U55, U65 and U85: linears by TOSA and Vela",
    executes="integers only: linears of w8a8 and w4a8 on the NPU, the rest of a model is the host's (--linears-only)",
    forms=(Form.QDQ,),
    choose_form=_choose_form,
    resolve=_resolve,
    finish=_finish,
    takes=("--soc", "--prefill-len", "--linears-only"),
    online_rotation=False,
)
