"""Targets: one module each, with what it accepts and how it is built. Nothing here knows calibration."""

from __future__ import annotations

from pq_export.errors import UsageError
from pq_export.targets.base import Target
from pq_export.targets.ort import ORT
from pq_export.targets.trt import TRT
from pq_export.targets.trt_rtx import TRT_RTX

TARGETS: dict[str, Target] = {target.name: target for target in (ORT, TRT, TRT_RTX)}


def find_target(name: str) -> Target:
    """The target called ``name``; an error that lists them otherwise."""
    if name not in TARGETS:
        raise UsageError(f"unknown target '{name}'", cure=f"Targets: {', '.join(TARGETS)}.")
    return TARGETS[name]
