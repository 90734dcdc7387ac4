"""The figures of the report, as inline SVG that takes its colours and fonts from the page.

matplotlib draws with the light palette; afterwards every colour becomes a CSS variable, so that one
figure is legible on screen (light and dark) and on paper. One SVG unit is one CSS pixel.

Text stays text: the browser has the glyphs of token texts, matplotlib's own font does not. It is never
parsed as mathtext, and characters that cannot be printed are shown as escapes (:func:`printable`).
"""

from __future__ import annotations

import io
import math
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib.style
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from pq_export.calibration import OUTLIER_RATIO

# name -> (light, dark). The template makes CSS variables of these; figures refer to them by name.
PALETTE = {
    "paper": ("#ffffff", "#16181b"),
    "ink": ("#1b1d1f", "#e3e5e8"),
    "muted": ("#5c6167", "#a0a6ad"),
    "rule": ("#d3d6da", "#3b4046"),
    "warm": ("#b03a14", "#f2895c"),
    "cool": ("#1c5d99", "#72b2ee"),
    "green": ("#4c7a12", "#a5c963"),
    "violet": ("#74489c", "#c49fea"),
}
COLOUR = {name: light for name, (light, _) in PALETTE.items()}
SERIES = (("cool", "o"), ("warm", "s"), ("green", "^"), ("violet", "D"))  # the marker tells them apart in grey

WIDTH = 860  # of every figure and of the page's text, in px
FONT, MONO, FONT_SIZE = "DejaVu Sans", "DejaVu Sans Mono", 11.0  # fonts that come with matplotlib, to measure with
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": FONT,
    "font.size": FONT_SIZE,
    "text.color": COLOUR["ink"],
    "axes.edgecolor": COLOUR["muted"],
    "axes.labelcolor": COLOUR["ink"],
    "axes.titlecolor": COLOUR["ink"],
    "axes.titlesize": FONT_SIZE,
    "axes.titlelocation": "left",
    "axes.titlepad": 6.0,
    "axes.labelsize": FONT_SIZE,
    "axes.linewidth": 0.8,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": COLOUR["muted"],
    "ytick.color": COLOUR["muted"],
    "xtick.labelcolor": COLOUR["ink"],
    "ytick.labelcolor": COLOUR["ink"],
    "figure.facecolor": "none",
    "lines.linewidth": 1.2,
    "lines.markersize": 3.2,
    "legend.frameon": False,
    "legend.borderaxespad": 0.0,
    "legend.borderpad": 0.0,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.4,
    "path.simplify": False,
}
# "default" first: the user's own matplotlibrc must not change the report.
styled = matplotlib.style.context(["default", STYLE])

# Token labels: font size, rows above the data, row height in px, longest text, and how many are tried.
LABEL_SIZE, LABEL_ROWS, LABEL_HEIGHT, LABEL_LENGTH, LABEL_LIMIT = 10.5, 4, 14.0, 18, 40
SVG = "{http://www.w3.org/2000/svg}"
XLINK = "{http://www.w3.org/1999/xlink}"

# Lower bound of 1 - equal -> opacity and legend, for the strips of integer equality.
DIFFERENCE_LEVELS = (
    (-math.inf, 0.07, "all equal"),
    (1e-12, 0.28, "< 1e-5 differ"),
    (1e-5, 0.46, "< 1e-4"),
    (1e-4, 0.64, "< 1e-3"),
    (1e-3, 0.82, "< 1e-2"),
    (1e-2, 1.0, "≥ 1e-2"),
)
# Lower bound of 1 - factor, just off the finest search step (0.025) so that no grid value sits on a bound.
CLIP_LEVELS = (
    (-math.inf, 0.07, "≥ 0.975"),
    (0.0251, 0.28, "0.9"),
    (0.1251, 0.46, "0.8"),
    (0.2251, 0.64, "0.7"),
    (0.3251, 0.82, "0.6"),
    (0.4251, 1.0, "< 0.575"),
)
Levels = Sequence[tuple[float, float, str]]


def printable(text: str) -> str:
    """``text`` with line breaks, control characters, direction marks and lone surrogates as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def token_text(text: str, length: int | None = None) -> str:
    """A token between double quotes, unambiguous; cut to ``length`` characters."""
    shown = printable(text.replace("\\", "\\\\"))
    if length is not None and len(shown) > length:
        shown = shown[: length - 1] + "…"
    return f'"{shown}"'


@styled
def token_ratios(panels: Sequence[tuple[str, dict[str, Any]]]) -> Markup:
    """Token-wise max/median along a crop, one panel for each (title, example), all on one log axis.

    ``example``: see the report's ``outliers_before``. Tokens above the threshold are labelled.
    """
    data, gap, left, top, bottom = 124.0, 44.0, 40.0, 26.0, 40.0
    ratios = [_positive(example["ratio"]) for _, example in panels]
    outliers = [np.flatnonzero(np.nan_to_num(ratio) > OUTLIER_RATIO) for ratio in ratios]
    # Labels have the top of a panel to themselves, so that they never cover data.
    heights = [data + (LABEL_ROWS * LABEL_HEIGHT + 2 if len(positions) else 0) for positions in outliers]
    figure = _figure(top + sum(heights) + (len(panels) - 1) * gap + bottom)
    finite = [r[np.isfinite(r)] for r in ratios]
    low = min([0.5, *(float(r.min()) for r in finite if r.size)]) / 1.3
    high = 1.6 * max([OUTLIER_RATIO, *(float(r.max()) for r in finite if r.size)])
    for (title, example), ratio, positions, height in zip(panels, ratios, outliers, heights, strict=True):
        ax = _axes(figure, left, top, WIDTH - left - 2, height)
        top += height + gap
        ax.set_title(printable(title))
        ax.set_title(f"dashed: threshold {OUTLIER_RATIO:g}", loc="right", color=COLOUR["muted"])
        ax.set(xlim=(-0.012 * len(ratio), 1.006 * len(ratio)))
        _log(ax, low, high, low * (high / low) ** (height / data))
        ax.spines["left"].set_bounds(low, high)
        _threshold(ax)
        ordinary = np.ones(len(ratio), bool)
        ordinary[positions] = False
        _stems(ax, ratio, ordinary, "cool", 1.0)
        _stems(ax, ratio, ~ordinary, "warm", 1.6)
        ax.plot(positions, ratio[positions], "o", color=COLOUR["warm"], markersize=4.5)
        texts = example.get("tokens") or [f"id {i}" for i in example.get("token_ids", ())]
        order = sorted((int(p) for p in positions if p < len(texts)), key=lambda p: (-ratio[p], p))
        labels = [(p, float(ratio[p]), token_text(str(texts[p]), LABEL_LENGTH)) for p in order[:LABEL_LIMIT]]
        _label_tokens(ax, labels, height)
    ax.set_xlabel("position in the sequence (tokens)")
    return _svg(figure, "token-ratios", "Token-wise maximum over median of the down_proj input along one sequence")


@styled
def layer_outliers(before: dict[str, Any] | None, after: dict[str, Any] | None) -> Markup:
    """Largest ratio, largest magnitude and mean outlier count of every layer, without and with the prefix."""
    panels = [
        ("max_ratio", "largest max / median", True),
        ("max_value", "largest magnitude", True),
        ("mean_count", "outlier tokens per sequence", False),
    ]
    panels = [panel for panel in panels if any(panel[0] in side for side in (before, after) if side)]
    figure = _figure(206)
    boxes = _columns(len(panels))
    for (key, title, log), (left, width) in zip(panels, boxes, strict=True):
        ax = _axes(figure, left, 40, width, 126)
        ax.set_title(title)
        shown = []
        for side, label, (name, marker) in (
            (before, "without prefix", ("warm", "s")),
            (after, "with prefix", ("cool", "o")),
        ):
            if side and key in side:
                values = _positive(side[key]) if log else _floats(side[key])
                shown.append(values)
                ax.plot(values, marker=marker, color=COLOUR[name], label=label)
        values = np.concatenate(shown)
        if key == "max_ratio":
            values = np.append(values, OUTLIER_RATIO)
        _layer_axis(ax, len(shown[0]))
        _value_axis(ax, values, log)
        if key == "max_ratio":
            _threshold(ax)
            ax.legend(loc="lower left", bbox_to_anchor=(0, 1.17), ncols=2)
    return _svg(figure, "layer-outliers", "Outlier statistics of every layer without and with the prefix")


@styled
def layer_scales(
    activation: dict[str, list[float]], kv: dict[str, list[list[float]]], error: list[float] | None
) -> Markup:
    """Static scales and block errors over layers, one panel for each that is there.

    ``activation``: site -> [L]. ``kv``: site -> [L][heads]. ``error`` [L].
    """
    drawers: list[tuple[str, Callable[[Axes], None]]] = []
    if activation:
        drawers.append(("scale of linear inputs", lambda ax: _draw_series(ax, activation)))
    if kv:
        drawers.append(("scale of cached keys and values, by head", lambda ax: _draw_heads(ax, kv)))
    if error:
        drawers.append(("error of the block output", lambda ax: _draw_series(ax, {"relative MSE": error})))
    figure = _figure(232)
    for (title, draw), (left, width) in zip(drawers, _columns(len(drawers)), strict=True):
        ax = _axes(figure, left, 62, width, 130)
        ax.set_title(title, pad=38)
        draw(ax)
    return _svg(figure, "layer-scales", "Scales of linear inputs, keys and values, and the block error over layers")


@styled
def strip(name: str, rows: dict[str, list[float]], levels: Levels, label: str) -> Markup:
    """A cell for each row and layer, the stronger the larger its value. ``rows``: name -> [L], NaN leaves a gap."""
    layers = max(len(values) for values in rows.values())
    left, top, cell = 150, 24, 15
    figure = _figure(top + cell * len(rows) + 42)
    ax = _axes(figure, left, top, WIDTH - left - 2, cell * len(rows))
    values = np.full((len(rows), layers), np.nan)
    for row, content in enumerate(rows.values()):
        values[row, : len(content)] = _floats(content)
    bounds = np.array([low for low, _, _ in levels])
    level = np.where(np.isnan(values), -1, np.searchsorted(bounds, np.nan_to_num(values), side="right") - 1)
    square = Path.unit_rectangle()
    corners = np.asarray(square.vertices) * (0.9, 0.84) - (0.45, 0.42)
    for index, (_, opacity, _) in enumerate(levels):
        cells = [Path(corners + cell[::-1], square.codes) for cell in np.argwhere(level == index)]
        if cells:  # one path for a level: one for each cell makes the file large
            path = Path.make_compound_path(*cells)
            ax.add_patch(PathPatch(path, facecolor=COLOUR["cool"], alpha=opacity, edgecolor="none"))
    ax.set(xlim=(-0.6, layers - 0.4), ylim=(len(rows) - 0.5, -0.5), xlabel="layer")
    ax.set_yticks(range(len(rows)), [printable(row) for row in rows])
    ax.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    x, total = float(left), _height(figure)
    for _, opacity, text in levels:
        key = Rectangle((x / WIDTH, 1 - 14 / total), 12 / WIDTH, 10 / total, facecolor=COLOUR["cool"], edgecolor="none")
        key.set_alpha(opacity)
        figure.add_artist(key)
        figure.text((x + 17) / WIDTH, 1 - 9 / total, text, va="center")
        x += 17 + 6.6 * len(text) + 20
    return _svg(figure, name, label)


def _draw_series(ax: Axes, series: dict[str, list[float]]) -> None:
    for index, (label, values) in enumerate(series.items()):
        name, marker = SERIES[index % len(SERIES)]
        ax.plot(_positive(values), marker=marker, color=COLOUR[name], label=printable(label))
    _layer_axis(ax, max(len(values) for values in series.values()))
    _value_axis(ax, np.concatenate([_positive(values) for values in series.values()]), log=True)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1.03), ncols=2)


def _draw_heads(ax: Axes, sites: dict[str, list[list[float]]]) -> None:
    """A dot for each head, keys left of the layer's tick and values right of it."""
    everything: list[float] = []
    for index, (label, layers) in enumerate(sites.items()):
        name, marker = SERIES[index % len(SERIES)]
        offset = 0.2 * (2 * index - len(sites) + 1)
        x = [layer + offset for layer, heads in enumerate(layers) for _ in heads]
        y = [scale for heads in layers for scale in heads]
        ax.plot(x, _positive(y), marker, color=COLOUR[name], label=printable(label), markersize=2.6)
        everything += y
    _layer_axis(ax, max(len(layers) for layers in sites.values()))
    _value_axis(ax, _positive(everything), log=True)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1.03), ncols=2, handlelength=0.8)


def _stems(ax: Axes, ratio: np.ndarray, chosen: np.ndarray, name: str, width: float) -> None:
    """Vertical lines from the median, as one path with gaps: a line for each token makes the file large."""
    x = np.flatnonzero(chosen).astype(float)
    xs = np.column_stack((x, x, np.full_like(x, np.nan))).ravel()
    ys = np.column_stack((np.ones_like(x), ratio[chosen], np.full_like(x, np.nan))).ravel()
    ax.plot(xs, ys, color=COLOUR[name], linewidth=width, solid_capstyle="butt")


def _label_tokens(ax: Axes, labels: Iterable[tuple[int, float, str]], height: float) -> None:
    """Put (x, y, text) into rows above the data, the first ones first; what finds no room stays without."""
    start, end = ax.get_xlim()
    unit = (end - start) / (ax.get_position().width * WIDTH)  # tokens a pixel
    rows: dict[int, int] = {}
    spans: dict[int, tuple[float, float]] = {}
    shown = []
    for x, y, text in labels:
        width = (0.61 * LABEL_SIZE * _cells(text) + 8) * unit
        span = (x - width, x + unit) if x + width > end else (x - unit, x + width)
        if (trial := _label_rows({**spans, x: span})) is not None:
            rows, spans = trial, {**spans, x: span}
            shown.append((x, y, text))
    transform = ax.get_xaxis_transform()
    for x, y, text in shown:
        bottom = 1 - LABEL_HEIGHT * (LABEL_ROWS - rows[x]) / height
        foot = float(ax.transAxes.inverted().transform(ax.transData.transform((x, y)))[1])
        ax.plot([x, x], [foot, bottom + 11 / height], transform=transform, color=COLOUR["muted"], linewidth=0.7)
        where, align = (x - 3 * unit, "right") if spans[x][0] < x - unit else (x + 3 * unit, "left")
        ax.text(where, bottom + 2 / height, text, transform=transform, ha=align, size=LABEL_SIZE, family=MONO)


def _label_rows(spans: dict[int, tuple[float, float]]) -> dict[int, int] | None:
    """Row (0 is the lowest) of each label, given x -> [from, to]; None if they do not all fit.

    A label stands right of its leader, so from right to left every label clears those below it.
    """
    rows: dict[int, int] = {}
    for x in sorted(spans, reverse=True):
        start, end = spans[x]
        for row in range(LABEL_ROWS):
            if not any(
                (rows[o] == row and start < spans[o][1] and spans[o][0] < end)
                or (rows[o] > row and start <= o <= end)
                or (rows[o] < row and spans[o][0] <= x <= spans[o][1])
                for o in rows
            ):
                rows[x] = row
                break
        else:
            return None
    return rows


def _cells(text: str) -> int:
    """Columns that ``text`` takes in a monospaced font."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _threshold(ax: Axes) -> None:
    ax.axhline(OUTLIER_RATIO, color=COLOUR["ink"], linewidth=0.9, dashes=(4, 3))


def _layer_axis(ax: Axes, layers: int) -> None:
    ax.set(xlim=(-0.7, max(layers, 2) - 0.3), xlabel="layer")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _value_axis(ax: Axes, values: np.ndarray, log: bool) -> None:
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if values.size else (1.0, 10.0)
    if log:
        _log(ax, low / 1.3, high * 1.3, high * 1.3)
    else:
        ax.set_ylim(min(0.0, low), 1.08 * high if high > 0 else 1.0)
    ax.grid(axis="y", color=COLOUR["rule"], linewidth=0.6)
    ax.set_axisbelow(True)


def _log(ax: Axes, low: float, high: float, ceiling: float) -> None:
    """Log axis up to ``ceiling`` with plain numbers up to ``high``: matplotlib's own labels are mathtext."""
    subs = (1.0, 2.0, 5.0) if math.log10(high / low) < 2 else (1.0,)
    ticks = [v for v in LogLocator(subs=subs, numticks=6).tick_values(low, high) if low <= v <= high]
    ax.set_yscale("log")
    ax.set_ylim(low, ceiling)
    ax.set_yticks(ticks, [_tick(v) for v in ticks])
    ax.yaxis.set_minor_locator(NullLocator())


def _tick(value: float) -> str:
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:g}"
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _positive(values: Iterable[float | None]) -> np.ndarray:
    """float64 with NaN for what a log axis cannot show (a gap in the line)."""
    array = _floats(values)
    return np.where(np.isfinite(array) & (array > 0), array, np.nan)


def _floats(values: Iterable[float | None]) -> np.ndarray:
    return np.array([math.nan if v is None else float(v) for v in values])


def _columns(count: int) -> list[tuple[float, float]]:
    """(left, width) of panels side by side; a single one is not stretched over the whole figure."""
    left, gap = 44, 50
    shares = max(count, 2)
    width = (WIDTH - left - 4 - (shares - 1) * gap) / shares
    return [(left + i * (width + gap), width) for i in range(count)]


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
    FigureCanvasSVG(figure)
    return figure


def _height(figure: Figure) -> float:
    return float(figure.get_figheight() * 72)


def _axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place given in px from the top left corner."""
    total = _height(figure)
    return figure.add_axes((left / WIDTH, 1 - (top + height) / total, width / WIDTH, height / total))


def _svg(figure: Figure, name: str, label: str) -> Markup:
    """The figure as an ``<svg>`` element for an HTML page: no namespaces, no fixed colours, no loose ids."""
    buffer = io.BytesIO()
    # The salt makes ids reproducible, and different from those of the page's other figures.
    with matplotlib.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root = ElementTree.fromstring(buffer.getvalue())
    used = set(re.findall(rb"(?:url\(|href=\")#([\w-]+)", buffer.getvalue()))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{SVG}metadata", f"{SVG}style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
        if XLINK + "href" in element.attrib:
            element.set("href", element.attrib.pop(XLINK + "href"))
        if element.get("id", "").encode() not in used:
            element.attrib.pop("id", None)
        if "style" in element.attrib:
            element.set("style", _page_style(element.attrib["style"]))
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.attrib |= {"class": "plot", "role": "img", "aria-label": label}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _page_style(style: str) -> str:
    """Colours and fonts of a style attribute as the page's CSS variables."""
    for name, colour in COLOUR.items():
        style = style.replace(colour, f"var(--{name})")
    # Quoted or not, alone or in a list: matplotlib's way of writing families has changed before.
    style = re.sub(rf"'?{MONO}'?(, *[\w' -]+)*", "var(--mono)", style)
    return re.sub(rf"'?{FONT}'?(, *[\w' -]+)*", "var(--sans)", style)
