"""The figure of a comparison, in the style of :mod:`pq_export.report.plots`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

from pq_export.report import plots

# Kind of a method -> its label, colour and marker; the marker tells them apart in grey.
KINDS = {
    "float": ("floating point", "muted", "D"),
    "static": ("static", "cool", "o"),
    "dynamic": ("dynamic", "warm", "s"),
}
LABELS, ROW, TOP, BOTTOM, GAP, NUMBERS = 132.0, 22.0, 46.0, 34.0, 26.0, 64.0


def kind(static: bool | None) -> str:
    """Name of a row's kind in :data:`KINDS`."""
    return "float" if static is None else "static" if static else "dynamic"


@plots.styled
def methods(rows: Sequence[dict[str, Any]]) -> Markup:
    """Perplexity and KL divergence of each method, a line of the figure for each, both on log axes.

    ``rows``: method, static, perplexity, kl. A value that a log axis cannot show is left out.
    """
    height = ROW * len(rows)
    figure = plots._figure(TOP + height + BOTTOM)
    width = (plots.WIDTH - LABELS - GAP) / 2 - NUMBERS
    panels = (
        ("perplexity", "perplexity", "{:.2f}"),
        ("kl", "KL divergence from floating point (nats a token)", "{:.3f}"),
    )
    for index, (key, title, form) in enumerate(panels):
        ax = plots._axes(figure, LABELS + index * (width + NUMBERS + GAP), TOP, width, height)
        ax.set_title(title)
        values = plots._positive(row[key] for row in rows)
        _log_x(ax, values)
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.set_yticks(range(len(rows)), [plots.printable(row["method"]) for row in rows] if index == 0 else [])
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.grid(axis="x", color=plots.COLOUR["rule"], linewidth=0.6)
        ax.set_axisbelow(True)
        for name, (label, colour, marker) in KINDS.items():
            chosen = [i for i, row in enumerate(rows) if kind(row["static"]) == name and math.isfinite(values[i])]
            if chosen:
                ax.plot(values[chosen], chosen, marker, color=plots.COLOUR[colour], markersize=6, label=label)
        for i, value in enumerate(values):
            if math.isfinite(value):
                ax.text(1.02, i, _number(value, form), transform=ax.get_yaxis_transform(), va="center")
        if index == 0:
            ax.legend(loc="lower left", bbox_to_anchor=(0, 1 + 22 / height), ncols=3, handlelength=0.8)
    return plots._svg(figure, "methods", "Perplexity and KL divergence of every method")


def _log_x(ax: Axes, values: np.ndarray) -> None:
    """Log axis with plain numbers, wide enough for one value alone."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (1.0, 10.0)
    margin = max((high / low) ** 0.06, 1.15)
    low, high = low / margin, high * margin
    subs = (1.0, 2.0, 5.0) if math.log10(high / low) < 2 else (1.0,)
    ticks = [v for v in LogLocator(subs=subs, numticks=6).tick_values(low, high) if low <= v <= high]
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    ax.set_xticks(ticks, [plots._tick(v) for v in ticks])
    ax.xaxis.set_minor_locator(NullLocator())


def _number(value: float, form: str) -> str:
    return form.format(value) if 1e-3 <= value < 1e5 else f"{value:.1e}"
