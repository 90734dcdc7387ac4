"""The benchmark on the terminal: every product, multiples of fp16 by M, fused quantizers, tile variants."""

from __future__ import annotations

import statistics
from typing import Any

from rich.console import Console

from pq_export.cli.console import output_console, seconds_text, table

BASELINES = ("int8", "fp8", "w4a16")
OURS = ("w4a4", "w4a8", "w8a8")
MEMORY_BOUND_M = 16  # up to here a rate is one of bytes
QUANTIZED = ("w4a4 static", "w4a4 dynamic", "w4a8 static", "w4a8 dynamic")


def print_tables(document: dict[str, Any]) -> None:
    """``document``: what :func:`pq_export.plugins.bench.run` returns."""
    console = output_console()
    ceilings = document["ceilings"]
    console.print(
        f"{document['device']}, PyTorch {document['torch']}: copy {ceilings['copy_gbps']:.0f} GB/s, "
        f"fp16 {ceilings['fp16_tops']:.0f} TFLOP/s, int8 ceiling {ceilings['int8_tops']:.0f} TOP/s; "
        f"{seconds_text(document['seconds'])}",
        highlight=False,
    )
    _print_products(console, document["rows"])
    _print_by_m(console, document["rows"])
    _print_fused(console, document["fused"])
    _print_tuning(console, document["tuning"])
    for name, reasons in document["absent"].items():
        console.print(f"{name}: {'; '.join(reasons)}", highlight=False, markup=False, soft_wrap=True)


def _print_products(console: Console, found: list[dict[str, Any]]) -> None:
    points: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in found:
        points.setdefault((row["model"], row["name"], row["K"], row["N"], row["M"]), {})[row["method"]] = row
    rows = []
    for (model, name, K, N, M), methods in points.items():
        w4a4 = methods.get("w4a4", {})
        rate = (
            f"{w4a4['gbps']:.0f} GB/s" if M <= MEMORY_BOUND_M and w4a4 else _number(w4a4.get("tops"), ".0f") + " TOP/s"
        )
        rows.append(
            [
                f"{model} {name} {K}x{N}",
                str(M),
                _number(methods.get("fp16", {}).get("us"), ".1f"),
                *(_number(methods.get(b, {}).get("to_fp16"), ".2f") for b in BASELINES),
                _number(w4a4.get("us"), ".1f"),
                rate,
                _number(w4a4.get("of_ceiling"), ".0%"),
                *(_number(methods.get(c, {}).get("to_fp16"), ".2f") for c in ("w4a4", "w4a8")),
            ]
        )
    columns = ["linear KxN", "M", "fp16 us", *BASELINES, "w4a4 us", "rate", "%", "w4a4", "w4a8"]
    title = "GEMM alone. Without a unit: speed as a multiple of cuBLAS fp16's. %: of what the ceilings allow W4A4"
    console.print(table(title, columns, rows))


def _print_by_m(console: Console, found: list[dict[str, Any]]) -> None:
    """Each method for each M, and what quantizing x adds."""
    sizes = sorted({row["M"] for row in found})
    rows = []
    for name in (*BASELINES, *OURS, *QUANTIZED):
        ratios = [[r["to_fp16"] for r in found if r["method"] == name and r["M"] == M and r["to_fp16"]] for M in sizes]
        rows.append([name, *(f"{statistics.median(values):.2f}" if values else "-" for values in ratios)])
        if name in OURS:
            rows.append([f"{name}, worst", *(f"{min(values):.2f}" if values else "-" for values in ratios)])
    title = "Multiples of fp16, median of the shapes. static, dynamic: fp16 x is quantized first, in a pass of its own"
    console.print(table(title, ["", *(f"M {M}" for M in sizes)], rows))


def _print_fused(console: Console, fused: list[dict[str, Any]]) -> None:
    rows = [
        [
            f"{row['what']} -> {row['linear']}",
            str(row["M"]),
            *(_number(row[part], ".1f") for part in ("producer", "quantize", "separate", "fused", "gemm")),
            _number(row["cost"], "+.1%"),
        ]
        for row in fused
    ]
    if rows:
        columns = ["producer -> linear", "M", "producer us", "quantize", "both apart", "fused", "GEMM", "fused adds"]
        console.print(table("Quantizing fused with its producer (W4A4); 'adds' is a share of the GEMM", columns, rows))


def _print_tuning(console: Console, tuning: list[dict[str, Any]]) -> None:
    rows = [
        [
            f"{row['model']} {row['name']} {row['K']}x{row['N']} {row['layout']}",
            str(row["M"]),
            row["default"],
            f"{row['default_us']:.1f}",
            row["best"],
            f"{row['best_us']:.1f}",
            f"{row['default_us'] / row['best_us'] - 1:.0%}",
        ]
        for row in tuning
    ]
    if rows:
        columns = ["linear", "M", "default", "us", "best", "us", "slower by"]
        console.print(table("Tile variants", columns, rows))


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
