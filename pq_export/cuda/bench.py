"""``python -m pq_export.cuda.bench``: a whole W4A4 decoder beside FP16 on this machine's GPU, in one process.

Random weights of a real model's sizes. Prefill of one sequence, and one decode step behind a full context. Variants of
a workload take turns, so that temperature and whatever else drifts is the same for all; a model's weights pass the L2
cache every time by themselves. Ratios are to the fastest FP16 variant.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from pq_export import __version__
from pq_export.errors import PqExportError, UsageError

QUICK_LAYERS = 8


@click.command()
@click.option("--shape", default="llama-3-8b", show_default=True, help="Sizes of the model.")
@click.option("--layers", type=click.IntRange(min=1), help="Fewer layers than the model has; the table says so.")
@click.option("--quick", is_flag=True, help=f"{QUICK_LAYERS} layers.")
@click.option("--prefill", default="2048,8192", show_default=True, metavar="N,N,...", help="Prompt lengths.")
@click.option("--batch", default="1,4,16", show_default=True, metavar="N,N,...", help="Batches of decode.")
@click.option("--context", type=click.IntRange(min=1), default=2048, show_default=True, help="Tokens behind a step.")
@click.option("--rounds", type=click.IntRange(min=2), default=10, show_default=True, help="Turns of every variant.")
@click.option("--no-compile", is_flag=True, help="Leave out torch.compile, which takes most of the time.")
@click.option("--profile", is_flag=True, help="Also say which kernels a step and a prefill of ours consist of.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="FILE", help="Write everything measured.")
@click.option("--library", type=click.Path(path_type=Path), metavar="FILE", help="libpq.so (default: PQ_LIBRARY).")
def main(json_path: Path | None, **flags: Any) -> None:
    """Prefill, decode and peak memory of W4A4 beside FP16: SDPA, CUDA graph, torch.compile."""
    try:
        document = run(**flags)
        if json_path:
            from pq_export.files import write_atomically

            write_atomically(json_path, (json.dumps(document, indent=1) + "\n").encode())
    except PqExportError as error:
        raise click.ClickException(str(error)) from None


def run(
    shape: str,
    layers: int | None,
    quick: bool,
    prefill: str,
    batch: str,
    context: int,
    rounds: int,
    no_compile: bool,
    profile: bool,
    library: Path | None,
) -> dict[str, Any]:
    """Measure and print; returns the document that ``--json`` writes."""
    from pq_export.cuda.random_weights import SHAPES

    if shape not in SHAPES:
        raise UsageError(f"unknown shape '{shape}'", cure=f"Shapes: {', '.join(SHAPES)}.")
    prompts, batches = _numbers(prefill, "--prefill"), _numbers(batch, "--batch")
    import torch

    from pq_export.cuda import bench_tables
    from pq_export.cuda.bench_runs import Workload, measure_memory, measure_times, profile_kernels
    from pq_export.plugins.library import Library

    if not torch.cuda.is_available():
        raise PqExportError("needs a CUDA device")
    started = time.perf_counter()
    path = library or (Path(os.environ["PQ_LIBRARY"]) if os.environ.get("PQ_LIBRARY") else None)
    opened = Library(path) if path else Library.of_device()
    sizes = SHAPES[shape]
    count = layers or (QUICK_LAYERS if quick else sizes.num_layers)
    sizes = replace(sizes, num_layers=count)
    workloads = [Workload("prefill", 1, length) for length in prompts]
    workloads += [Workload("decode", size, context) for size in batches]
    document: dict[str, Any] = {
        "pq_export": __version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(),
        "library": str(opened.path),
        "shape": shape,
        "layers": count,
        "model_layers": SHAPES[shape].num_layers,
    }

    def note(text: str) -> None:
        print(f"[{time.perf_counter() - started:6.1f} s] {text}", file=sys.stderr, flush=True)

    with torch.no_grad():
        document["memory"] = measure_memory(sizes, opened, workloads, not no_compile, note)
        document["times"] = measure_times(sizes, opened, workloads, rounds, not no_compile, note)
        if profile:
            document["kernels"] = profile_kernels(sizes, opened, [workloads[0], workloads[len(prompts)]], note)
    document["seconds"] = round(time.perf_counter() - started, 1)
    bench_tables.print_tables(document)
    return document


def _numbers(text: str, flag: str) -> list[int]:
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise UsageError(f"'{text}' is no list of positive numbers", where=flag, cure="Such as 1,4,16.")
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
