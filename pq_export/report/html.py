"""The report of one export: a dict of numbers in, one self-contained HTML page out.

The page needs no network and no script, and the same dict gives the same bytes. Names and token texts
come from a model and are hostile until shown otherwise: the template escapes whatever it prints, and
:func:`_shown` replaces what HTML cannot hold or would reorder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import jinja2
from markupsafe import Markup

from pq_export.calibration import KV_SITES, OUTLIER_RATIO, SITE_OF_LINEAR, SITES
from pq_export.report import plots

NOTHING = "–"
WORST_SITES = 16  # rows of a site table that are shown before the rest folds away

Report = dict[str, Any]


def render(report: Report) -> str:
    """HTML of ``report``; sections that are absent, None or empty are left out. Only "title" is required.

    =====================  ===============================================================================
    section                content
    =====================  ===============================================================================
    title, pq_export       file name of the model; version of this program
    source, target         name, format, architecture, sha256; name and form
    precision, plan        such as ``W4A4KV4``; option -> value
    overrides              linear, input or cache of a layer -> bits
    rotation, prefix       mode, seed, offline, online; token_ids and tokens
    outliers_before|after  :meth:`OutlierStatistics.to_dict` and the token texts
    layers                 error [L], clip_factors [L], activation_scales, kv_scales
    sizes                  rows of part, bytes, parameters, bytes_per_parameter
    kv_cache               bits, bytes_per_token, fp16_bytes_per_token
    validation             text, blocks, exact, free_running, perplexity, speed, checks, passed
    stages, versions       rows of name, seconds, peak_rss (bytes), reused; package -> version
    notes                  sentences
    =====================  ===============================================================================
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pq_export.report", "."),
        autoescape=True,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": _count,
        "fixed": _fixed,
        "significant": _significant,
        "scientific": _scientific,
        "share": _share,
        "size": _size,
        "times": _times,
        "token": plots.token_text,
    }
    validation = report.get("validation") or {}
    stages, sizes = report.get("stages") or [], report.get("sizes") or []
    return environment.get_template("report.html.j2").render(
        r=report,
        v=validation,
        palette=plots.PALETTE,
        threshold=OUTLIER_RATIO,
        width=plots.WIDTH,
        headline=_headline(report),
        examples=_examples(report),
        figures=_figures(report),
        outlier_tokens=_outlier_tokens(report),
        equality=[e for e in (_equality(validation, key) for key in ("blocks", "exact")) if e],
        layer_rows=_layer_rows(report),
        overrides=_override_rows(report),
        worst_sites=WORST_SITES,
        sizes_total=_total(sizes, "bytes"),
        parameters_total=_total(sizes, "parameters"),
        sizes_largest=max((_number(row.get("bytes")) for row in sizes), default=0.0) or 1.0,
        seconds_total=_total(stages, "seconds"),
        seconds_longest=max((_number(row.get("seconds")) for row in stages), default=0.0) or 1.0,
        memory_peak=max((_number(row.get("peak_rss")) for row in stages), default=0.0) or 1.0,
    )


def _headline(report: Report) -> list[tuple[str, str, str]]:
    """Up to four of (what, number, its context), the most telling ones that are there."""
    validation = report.get("validation") or {}
    found = []
    rows = (validation.get("perplexity") or {}).get("rows") or []
    if rows:
        first, last = rows[0], rows[-1]
        note = f"{_times(last.get('ratio'))} of {first.get('model')} ({_fixed(first.get('perplexity'), 2)})"
        found.append((f"Perplexity, {last.get('model')}", _fixed(last.get("perplexity"), 2), note if rows[1:] else ""))
    before, after = (_peak(report.get(f"outliers_{when}")) for when in ("before", "after"))
    if before is not None:
        name = "Largest outlier ratio"
        if after is None:
            found.append((name, _significant(before, 3), "at down_proj inputs, no prefix"))
        else:
            found.append((name, _significant(after, 3), f"with the prefix; {_significant(before, 3)} without"))
    if sizes := report.get("sizes") or []:
        size, parameters = _total(sizes, "bytes"), _total(sizes, "parameters")
        note = f"{_fixed(size / (2 * parameters) * 100, 1)} % of FP16" if parameters else ""
        found.append(("Size of the model", _size(size), note))
    blocks = validation.get("blocks") or {}
    if "min_equal" in blocks:
        exact = (validation.get("exact") or {}).get("min_equal")
        note = "worst site in fp32" + (f"; {_share(exact)} in fp64" if exact is not None else "")
        found.append(("Integers equal", _share(blocks["min_equal"]), note))
    speed = (validation.get("speed") or {}).get("rows") or []
    if speed:
        found.append((f"Decode, {speed[-1].get('model')}", _fixed(speed[-1].get("decode"), 1), "tokens/s"))
    if cache := report.get("kv_cache"):
        found.append(("KV cache", _count(cache.get("bytes_per_token")), "bytes per token"))
    return found[:4]


def _examples(report: Report) -> list[dict[str, Any]]:
    """What the main figure shows, in numbers: a row for each crop, without and with prefix."""
    rows = []
    for key, title in (("outliers_before", "without prefix"), ("outliers_after", "with prefix")):
        example = (report.get(key) or {}).get("example") or {}
        ratio = [_number(value) for value in example.get("ratio") or ()]
        if not ratio:
            continue
        position = max(range(len(ratio)), key=ratio.__getitem__)
        texts = example.get("tokens") or ()
        rows.append(
            {
                "title": title,
                "example": example,
                "layer": example.get("layer"),
                "length": len(ratio),
                "outliers": sum(value > OUTLIER_RATIO for value in ratio),
                "largest": ratio[position],
                "position": position,
                "token": texts[position] if position < len(texts) else None,
            }
        )
    return rows


def _figures(report: Report) -> dict[str, Markup]:
    """Name -> SVG, for those whose numbers are there."""
    figures: dict[str, Markup] = {}
    if examples := _examples(report):
        panels = [(f"{e['title']}, layer {e['layer']}: max / median of each token", e["example"]) for e in examples]
        figures["token_ratios"] = plots.token_ratios(panels)
    before, after = report.get("outliers_before"), report.get("outliers_after")
    if any((side or {}).get(key) for side in (before, after) for key in ("max_ratio", "max_value", "mean_count")):
        figures["layer_outliers"] = plots.layer_outliers(before, after)
    layers = report.get("layers") or {}
    activation, kv = layers.get("activation_scales") or {}, layers.get("kv_scales") or {}
    if activation or kv or layers.get("error"):
        series = _by_site(activation, math.nan)
        heads = _by_site({name: _heads(scales) for name, scales in kv.items()}, [])
        figures["layer_scales"] = plots.layer_scales(series, heads, layers.get("error"))
    if factors := _clip_rows(layers.get("clip_factors") or ()):
        label = "Clipping factor of every linear, input and cache over layers"
        figures["clip_factors"] = plots.strip("clip-factors", factors, plots.CLIP_LEVELS, label)
    return figures


def _clip_rows(layers: Iterable[dict[str, float]]) -> dict[str, list[float]]:
    """Site or linear -> 1 - factor of every layer, in the order of the search: cache, weights, inputs."""
    found = list(layers)
    names = _ordered((*KV_SITES, *SITE_OF_LINEAR, *SITES), [name for layer in found for name in layer])
    return {name: [1.0 - layer.get(name, math.nan) for layer in found] for name in names}


def _outlier_tokens(report: Report) -> list[dict[str, Any]]:
    """Tokens found outliers outside position 0: id, text and counts without and with the prefix."""
    found: dict[int, dict[str, Any]] = {}
    for key in ("before", "after"):
        statistics = report.get(f"outliers_{key}") or {}
        texts = statistics.get("tokens") or ()
        for index, (token, count) in enumerate(statistics.get("token_counts") or ()):
            row = found.setdefault(token, {"id": token, "text": None, "before": 0, "after": 0})
            row[key] = count
            row["text"] = texts[index] if index < len(texts) else row["text"]
    return list(found.values())


def _equality(validation: Report, part: str) -> dict[str, Any] | None:
    """Numbers of "blocks" or "exact": the strip, and the sites with differing integers, worst first."""
    content = validation.get(part) or {}
    sites = content.get("sites") or {}
    if not sites:
        return None
    details = {name: site if isinstance(site, dict) else {"equal": site} for name, site in sites.items()}
    differing = [{"site": name, **site} for name, site in details.items() if _number(site.get("equal"), 1.0) < 1.0]
    by_site = _by_site({name: 1.0 - _number(site.get("equal"), math.nan) for name, site in details.items()}, math.nan)
    label = f"Share of differing integers by site and layer, {part}"
    drawn = bool(by_site and differing)
    distances = [_number(site.get("worst_tie_distance"), math.nan) for site in details.values()]
    cosine = [_number(value, math.nan) for value in content.get("cosine") or ()]
    return {
        "part": part,
        "content": content,
        "sites": len(sites),
        "differing": sorted(differing, key=lambda row: (row["equal"], row["site"])),
        "strip": plots.strip(f"equal-{part}", by_site, plots.DIFFERENCE_LEVELS, label) if drawn else None,
        "decimals": max((_decimals(row["equal"]) for row in differing), default=0),
        "worst_tie_distance": max((d for d in distances if not math.isnan(d)), default=None),
        "min_cosine": min((c for c in cosine if not math.isnan(c)), default=None),
    }


def _layer_rows(report: Report) -> list[dict[str, Any]]:
    """The figures' numbers, a row for each layer."""
    layers = report.get("layers") or {}
    blocks = (report.get("validation") or {}).get("blocks") or {}
    before, after = report.get("outliers_before") or {}, report.get("outliers_after") or {}
    sites = {name: _number(site.get("equal"), math.inf) for name, site in (blocks.get("sites") or {}).items()}
    worst = [min(layer) for layer in zip(*_by_site(sites, math.inf).values(), strict=True)]
    columns: dict[str, list[Any]] = {
        "ratio_before": before.get("max_ratio") or [],
        "ratio_after": after.get("max_ratio") or [],
        "count_before": before.get("mean_count") or [],
        "count_after": after.get("mean_count") or [],
        "error": layers.get("error") or [],
        "cosine": [1.0 - _number(value, math.nan) for value in blocks.get("cosine") or ()],
        "different": [None if math.isinf(share) else 1.0 - share for share in worst],
    }
    columns = {name: values for name, values in columns.items() if values}
    length = max((len(values) for values in columns.values()), default=0)
    return [{name: v[i] if i < len(v) else None for name, v in columns.items()} for i in range(length)]


def _override_rows(report: Report) -> list[dict[str, Any]]:
    """A row for each site and bits: which layers have them."""
    rows = []
    for site, bits in _by_site(report.get("overrides") or {}, None).items():
        for own in sorted({b for b in bits if b is not None}):
            layers = [index for index, b in enumerate(bits) if b == own]
            rows.append({"site": site, "bits": own, "layers": layers})
    return rows


def _by_site(values: dict[str, Any], gap: Any) -> dict[str, list[Any]]:
    """``layers.N.<site>`` -> value as site -> [L], in order of execution; other names are left out."""
    found: dict[str, dict[int, Any]] = {}
    for name, value in values.items():
        if match := re.fullmatch(r"layers\.(\d{1,4})\.(.+)", name, re.DOTALL):
            found.setdefault(match[2], {})[int(match[1])] = value
    layers = 1 + max((index for site in found.values() for index in site), default=-1)
    order = _ordered((SITES[0], *KV_SITES, *SITES[1:]), found)
    return {site: [found[site].get(index, gap) for index in range(layers)] for site in order}


def _ordered(known: Iterable[str], names: Iterable[str]) -> list[str]:
    """``names`` without repetition: the known ones in their order, then the others in theirs."""
    given = dict.fromkeys(names)
    return [name for name in known if name in given] + [name for name in given if name not in set(known)]


def _heads(scales: Any) -> list[float]:
    return list(scales) if isinstance(scales, (list, tuple)) else [scales]


def _peak(statistics: dict[str, Any] | None) -> float | None:
    return max((_number(value) for value in (statistics or {}).get("max_ratio") or ()), default=None)


def _total(rows: Iterable[dict[str, Any]], key: str) -> float:
    return sum(_number(row.get(key)) for row in rows)


def _number(value: Any, otherwise: float = 0.0) -> float:
    return float(value) if isinstance(value, (int, float)) and not math.isnan(value) else otherwise


def _shown(value: Any) -> Any:
    """What the template prints for a value; autoescape comes after this. SVG passes unchanged."""
    if isinstance(value, Markup):
        return value
    if value is None or isinstance(value, jinja2.Undefined):
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    return plots.printable(value if isinstance(value, str) else str(value))


def _numeric(form: Callable[..., str]) -> Callable[..., str]:
    """Let a number format cope with what is missing, not finite, or not a number at all."""

    def formatted(value: Any, *args: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return str(_shown(value))
        if not math.isfinite(value):
            return "nan" if math.isnan(value) else ("∞" if value > 0 else "−∞")
        return form(value, *args).replace("-", "−") if value < 0 else form(value, *args)

    return formatted


# The number formats of the template, each for a column: equal decimals make digits stand in line.


@_numeric
def _count(value: float) -> str:
    return f"{value:,.0f}"


@_numeric
def _fixed(value: float, decimals: int) -> str:
    return f"{value:,.{decimals}f}"


@_numeric
def _significant(value: float, digits: int = 4) -> str:
    """Plain digits where they stay readable, ``1.2e-7`` elsewhere."""
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        decimals = digits - 1 - (math.floor(math.log10(abs(value))) if value else 0)
        return f"{value:,.{max(decimals, 0)}f}" if value else "0"
    return _scientific(value)


@_numeric
def _scientific(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}" if value else "0"


@_numeric
def _share(value: float) -> str:
    """A share that never rounds up to 1: as many nines as there are, and two digits of what is missing."""
    return f"{value:.{_decimals(value)}f}" if 0.0 < value < 1.0 else f"{value:g}"


def _decimals(share: float) -> int:
    missing = 1.0 - share
    return min(max(1 - math.floor(math.log10(missing)), 3), 16) if 0.0 < missing < 1.0 else 3


@_numeric
def _size(value: float) -> str:
    """Bytes in decimal units."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= factor:
            return f"{value / factor:,.{2 if unit == 'GB' else 1}f} {unit}"
    return f"{value:,.0f} B"


@_numeric
def _times(value: float) -> str:
    return f"{value:.3f}×"
