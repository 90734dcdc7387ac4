"""What :mod:`pq_export.cuda.bench` prints."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

WIDTH = 150
GIB = 1024.0**3


def print_tables(document: dict[str, Any]) -> None:
    """Times, ratios, memory and, where asked for, kernels."""
    console = Console(width=WIDTH)
    layers, whole = document["layers"], document["model_layers"]
    what = (
        f"{document['shape']}, {layers} of {whole} layers"
        if layers != whole
        else f"{document['shape']}, {layers} layers"
    )
    console.print(f"{document['device']}, torch {document['torch']}, {what}, random weights, {document['seconds']} s")
    times = document["times"]
    names = list(dict.fromkeys(name for row in times for name in row["ms"]))
    _print(
        console,
        "Milliseconds (multiple of the fastest FP16)",
        ["workload", *names, "static over dynamic", "SDPA of fp16, ours"],
        [
            [
                row["workload"],
                *(_time(row, name) for name in names),
                _number(row["static_over_dynamic"], ".2f"),
                ", ".join(dict.fromkeys(row["sdpa"].values())),
            ]
            for row in times
        ],
    )
    _print(
        console,
        "Tokens per second",
        ["workload", *names],
        [[row["workload"], *(_number(row["tokens_per_second"].get(name), ",.0f") for name in names)] for row in times],
    )
    _print(
        console,
        "Peak GiB, each alone",
        ["workload", "fp16", "variant", "w4a4", "ratio"],
        [
            [
                row["workload"],
                _gib(row["fp16"]),
                row["fp16_variant"],
                _gib(row["w4a4"]),
                _number(row["ratio"], ".3f"),
            ]
            for row in document["memory"]
        ],
    )
    for table in document.get("kernels", []):
        total = sum(kernel["us"] for kernel in table["kernels"])
        _print(
            console,
            f"Kernels of w4a4 static, {table['workload']}: {total:,.0f} us",
            ["us", "share", "calls", "us a call", "kernel"],
            [
                [
                    f"{k['us']:,.0f}",
                    f"{k['us'] / total:.1%}",
                    str(k["calls"]),
                    f"{k['us'] / k['calls']:.1f}",
                    k["kernel"][:90],
                ]
                for k in table["kernels"][:20]
            ],
        )
    for row in times:
        for name, why in row["failed"].items():
            console.print(f"{row['workload']}: {name} did not run: {why}")


def _print(console: Console, title: str, columns: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 or column == "kernel" else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _time(row: dict[str, Any], name: str) -> str:
    if name not in row["ms"]:
        return "-"
    ratio = row["ratios"].get(name)
    return f"{row['ms'][name]:.3f}" + ("" if ratio is None else f" ({ratio:.2f})")


def _gib(value: int | str) -> str:
    return value if isinstance(value, str) else f"{value / GIB:.2f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
