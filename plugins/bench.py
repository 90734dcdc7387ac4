"""``python -m pq_export.plugins.bench``: our kernels beside PyTorch's, in one process, one table a run.

Every time is of CUDA graphs that take turns, over weights that do not fit the L2 cache, on random data. A
percentage is of what the measured ceilings allow: bytes at the speed of a copy, or products at the measured int8 rate,
whichever takes longer.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from pq_export import __version__
from pq_export.errors import PqExportError

FUSED_M = (1, 16, 256, 2048)


@click.command()
@click.option("--quick", is_flag=True, help="Four shapes and four M.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="FILE", help="Write everything measured.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), metavar="FILE", help="Write a roofline, PNG.")
@click.option("--tune", is_flag=True, help="Time every tile variant; say where the default is not the best.")
@click.option(
    "--library", type=click.Path(path_type=Path), metavar="FILE", help="libpq.so (default: built for this GPU)."
)
@click.option("--m", "m_list", metavar="M,M,...", help="Only these M.")
@click.option("--only", default="", metavar="TEXT", help="Only shapes whose name holds TEXT, such as 8B or 4096x14336.")
def main(**flags: Any) -> None:
    """Time the kernels on this machine's GPU beside cuBLAS fp16, cuBLASLt int8, fp8 and int4 weight-only."""
    try:
        document = run(**flags)
    except PqExportError as error:
        raise click.ClickException(str(error)) from None
    from pq_export.plugins.bench_tables import print_tables

    print_tables(document)
    if flags["json_path"]:
        flags["json_path"].write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if flags["plot_path"]:
        from pq_export.plugins.roofline import plot

        plot(document, flags["plot_path"])


def run(quick: bool, tune: bool, library: Path | None, m_list: str | None, only: str, **_: Any) -> dict[str, Any]:
    """Measure; returns the document that ``--json`` writes."""
    import torch

    from pq_export.plugins import shapes as table
    from pq_export.plugins.library import Library
    from pq_export.plugins.timing import measure_ceilings

    if not torch.cuda.is_available():
        raise PqExportError("needs a CUDA device")
    started = time.perf_counter()
    opened = Library(library) if library else Library.of_device()
    all_m = table.QUICK_M if quick else table.BENCH_M
    chosen_m = _numbers(m_list) if m_list else all_m
    chosen = [shape for shape in (table.QUICK_SHAPES if quick else table.SHAPES) if only in str(shape)]
    if not chosen:
        raise PqExportError(f"no shape's name holds '{only}'", cure=f"Shapes: {', '.join(map(str, table.SHAPES))}.")
    ceilings = measure_ceilings()
    document: dict[str, Any] = {
        "pq_export": __version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(),
        "library": str(opened.path),
        "ceilings": asdict(ceilings),
        "rows": [],
        "fused": [],
        "tuning": [],
        "absent": {},
    }
    for shape in chosen:
        _measure_shape(opened, shape, chosen_m, ceilings, tune, document)
    _measure_fused(opened, chosen_m, document)
    document["seconds"] = round(time.perf_counter() - started, 1)
    return document


def _numbers(text: str) -> tuple[int, ...]:
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise PqExportError(f"'{text}' is no list of positive numbers", where="--m", cure="Such as --m 1,16,2048.")
    return tuple(int(part) for part in text.split(","))


def _measure_shape(
    library: Any, shape: Any, chosen_m: tuple[int, ...], ceilings: Any, tune: bool, document: dict[str, Any]
) -> None:
    """Every contestant for every M, by turns."""
    import torch

    from pq_export.plugins.abi import Type
    from pq_export.plugins.contestants import BASELINES, OURS, Linear, traffic, works
    from pq_export.plugins.timing import time_by_turns

    linear = Linear(shape, library)
    packed_x = library.preferred_layout(4, 4).x_type is Type.S4
    for M in chosen_m:
        candidates, absent = works(linear, M, {**BASELINES, **OURS})
        times, failed = time_by_turns(candidates)
        del candidates
        operations = 2.0 * M * shape.weights
        for name, us in times.items():
            moved = traffic(name, shape, M, packed_x)
            tops = ceilings.int8_tops * (2 if name.startswith("w4a4") and packed_x else 1)
            if name in ("fp16", "w4a16"):
                tops = ceilings.fp16_tops
            least = max(moved / ceilings.copy_gbps / 1e3, operations / tops / 1e6)
            document["rows"].append(
                {
                    **asdict(shape),
                    "M": M,
                    "method": name,
                    "us": us,
                    "tops": operations / us / 1e6,
                    "gbps": moved / us / 1e3,
                    "bytes": moved,
                    "of_ceiling": least / us,
                    "to_fp16": times["fp16"] / us if "fp16" in times else None,
                }
            )
        for name, why in {**absent, **failed}.items():
            reasons = document["absent"].setdefault(name, [])
            if why not in reasons:
                reasons.append(why)
        if tune:
            document["tuning"] += _tune(linear, M)
    del linear
    torch.cuda.empty_cache()


def _tune(linear: Any, M: int) -> list[dict[str, Any]]:
    """Every variant of the layouts that the benchmark uses."""
    import functools

    from pq_export.plugins.contestants import ours, works
    from pq_export.plugins.timing import time_by_turns

    library, shape, found = linear.library, linear.shape, []
    kinds = {library.preferred_layout(4, bits): bits for bits in (8, 4)}
    for layout, bits in kinds.items():
        variants = library.variants(layout, M, shape.N, shape.K)
        if not variants:
            continue
        contestants = {str(v): functools.partial(ours, activation_bits=bits, variant=v) for v in variants}
        times, _ = time_by_turns(works(linear, M, contestants)[0])
        if str(variants[0]) not in times:
            continue
        best = min(times, key=times.__getitem__)
        found.append(
            {
                **asdict(shape),
                "M": M,
                "layout": layout.name,
                "default": library.variant_name(variants[0]),
                "default_us": times[str(variants[0])],
                "best": library.variant_name(int(best)),
                "best_us": times[best],
                "variants": {library.variant_name(int(v)): us for v, us in times.items()},
            }
        )
    return found


def _measure_fused(library: Any, chosen_m: tuple[int, ...], document: dict[str, Any]) -> None:
    """Before linears of Llama-3-8B: what reads a norm (gate and up, or the first that was measured), and down."""
    from pq_export.plugins.fused_bench import measure
    from pq_export.plugins.shapes import LLAMA_3_8B

    qkv, _, gate_up, up, down = LLAMA_3_8B
    timed = {(row["model"], row["name"], row["M"]): row["us"] for row in document["rows"] if row["method"] == "w4a4"}
    for M in (M for M in FUSED_M if M in chosen_m):
        norm = next((shape for shape in (gate_up, up, qkv) if (shape.model, shape.name, M) in timed), gate_up)
        gemm = {shape: timed.get((shape.model, shape.name, M)) for shape in (norm, down)}
        document["fused"] += [row.to_dict() for row in measure(library, norm, down, M, gemm)]


if __name__ == "__main__":
    main()
