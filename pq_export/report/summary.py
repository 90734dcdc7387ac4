"""``report.json``: everything that was done and measured, as data; the HTML report draws it."""

from __future__ import annotations

import json
from typing import Any

from pq_export import __version__
from pq_export.bundle import Bundle
from pq_export.calibration import Calibration
from pq_export.files import write_atomically


def report_of(
    bundle: Bundle, calibration: Calibration, stages: list[dict[str, Any]], validation: dict[str, Any] | None
) -> dict[str, Any]:
    """Collect the report. ``stages``: records of all stages, in order."""
    config, statistics = bundle.config, calibration.statistics
    return {
        "title": calibration.source.name,
        "pq_export": __version__,
        "source": config["source"],
        "target": {"name": config["target"], "form": config["form"], "reason": config["form_reason"]},
        "precision": config["precision"],
        "overrides": bundle.overrides,
        "plan": config["plan"],
        "rotation": config["rotation"],
        "prefix": config["prefix"],
        "outliers_before": statistics.get("outliers_before"),
        "outliers_after": statistics.get("outliers_after"),
        "layers": {
            "error": statistics.get("layer_error", []),
            "clip_factors": statistics.get("clip_factors", []),
            "activation_scales": calibration.activation_scales,
            "kv_scales": calibration.kv_scales,
        },
        "sizes": config["sizes"],
        "kv_cache": config["kv_cache"],
        "validation": validation,
        "stages": stages,
        "versions": config["versions"],
        "notes": [],
    }


def write_report(bundle: Bundle, report: dict[str, Any]) -> None:
    """Put ``report.json`` and ``report.html`` into the bundle."""
    from pq_export.report.html import render

    document = json.dumps(report, indent=1) + "\n"
    write_atomically(bundle.directory / "report.json", document.encode())
    write_atomically(bundle.directory / "report.html", render(report).encode())
