"""The benchmark's picture: each product over its operations a byte, under the measured ceilings; and speed over M."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

LABELS = {
    "fp16": "fp16 (cuBLAS)",
    "int8": "int8 (cuBLASLt)",
    "fp8": "fp8 (cuBLASLt)",
    "w4a16": "int4 weights, bf16 (PyTorch)",
    "w4a4": "W4A4 (ours)",
    "w4a8": "W4A8 (ours)",
    "w4a4 dynamic": "W4A4, per-token scales (ours)",
    "w4a4 static": "W4A4, static scale (ours)",
}
POINTS = ("fp16", "int8", "fp8", "w4a16", "w4a4")
LINES = ("int8", "fp8", "w4a16", "w4a4", "w4a8", "w4a4 static", "w4a4 dynamic")
COLORS = {
    "fp16": "#7f7f7f",
    "int8": "#1f77b4",
    "fp8": "#9467bd",
    "w4a16": "#8c564b",
    "w4a4": "#d62728",
    "w4a8": "#ff7f0e",
    "w4a4 static": "#e377c2",
    "w4a4 dynamic": "#bcbd22",
}


def plot(document: dict[str, Any], path: Path) -> None:
    """``document``: what ``bench --json`` writes. A PNG of 1600 x 700."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 7), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _roofline(left, document)
    _speed(right, document)
    figure.suptitle(f"{document['device']}, PyTorch {document['torch']}")
    figure.savefig(path, format="png")


def _roofline(axes: Any, document: dict[str, Any]) -> None:
    ceilings = document["ceilings"]
    bandwidth = ceilings["copy_gbps"] / 1e3  # TB/s: TOP/s at one operation a byte
    intensities = [2.0 * row["M"] * row["K"] * row["N"] / row["bytes"] for row in document["rows"]]
    low, high = min(intensities) / 2, max(intensities) * 2
    for name, peak in (("int8", ceilings["int8_tops"]), ("fp16", ceilings["fp16_tops"])):
        corner = peak / bandwidth
        axes.plot([low, corner, max(high, corner)], [low * bandwidth, peak, peak], color=COLORS[name], lw=1, ls="--")
        axes.annotate(f"{name} {peak:.0f} TOP/s", (high, peak), ha="right", va="bottom", color=COLORS[name])
    axes.annotate(f"copy {1e3 * bandwidth:.0f} GB/s", (low, 1.6 * low * bandwidth), va="bottom")
    for name in POINTS:
        rows = [row for row in document["rows"] if row["method"] == name]
        x = [2.0 * row["M"] * row["K"] * row["N"] / row["bytes"] for row in rows]
        axes.scatter(x, [row["tops"] for row in rows], s=14, color=COLORS[name], label=LABELS[name], alpha=0.8)
    axes.set(
        xscale="log", yscale="log", xlabel="operations a byte", ylabel="TOP/s", title="Roofline, measured ceilings"
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")


def _speed(axes: Any, document: dict[str, Any]) -> None:
    """Median over the shapes, and the range for our W4A4."""
    for name in LINES:
        by_m: dict[int, list[float]] = {}
        for row in document["rows"]:
            if row["method"] == name and row["to_fp16"]:
                by_m.setdefault(row["M"], []).append(row["to_fp16"])
        sizes = sorted(by_m)
        if not sizes:
            continue
        middle = [statistics.median(by_m[m]) for m in sizes]
        axes.plot(sizes, middle, marker="o", ms=4, color=COLORS[name], label=LABELS[name])
        if name == "w4a4":
            axes.fill_between(
                sizes, [min(by_m[m]) for m in sizes], [max(by_m[m]) for m in sizes], color=COLORS[name], alpha=0.15
            )
    sizes = sorted({row["M"] for row in document["rows"]})
    axes.axhline(1.0, color=COLORS["fp16"], lw=1, ls="--")
    axes.set(
        xscale="log",
        xlabel="M (tokens)",
        ylabel="times cuBLAS fp16",
        title="Speed, median over the shapes",
        ylim=(0, None),
    )
    axes.minorticks_off()
    axes.set_xticks(sizes, [str(m) for m in sizes])
    axes.grid(alpha=0.3)
    axes.legend()
