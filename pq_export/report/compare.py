"""The page of a comparison of methods: a table, a figure, and how it was measured.

As the report of an export it is self-contained and deterministic, and escapes whatever it prints.
"""

from __future__ import annotations

from typing import Any

import jinja2

from pq_export.report import compare_plots, html, plots


def render(document: dict[str, Any]) -> str:
    """HTML of a comparison.

    ==================  ======================================================================================
    key                 content
    ==================  ======================================================================================
    title, pq_export    name of the model; version of this program
    precision, plan     such as ``W4A4KV4``; option -> value
    rounding, device    of the weights: gptq or rtn; where it ran
    text                name of the evaluation text, with windows and window (tokens of each)
    rows                method, title, paper, precision, static, online, prefix, weights, perplexity, ratio, kl,
                        top1, seconds, tokens_per_second of each method
    ==================  ======================================================================================
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pq_export.report", "."),
        autoescape=True,
        finalize=html._shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"fixed": html._fixed, "count": html._count, "token": plots.token_text}
    rows = document["rows"]
    return environment.get_template("compare.html.j2").render(
        d=document,
        rows=[{**row, "kind": compare_plots.KINDS[compare_plots.kind(row["static"])][0]} for row in rows],
        figure=compare_plots.methods(rows) if rows else None,
        palette=plots.PALETTE,
        width=plots.WIDTH,
    )
