"""The linter: any graph or bundle against any profile, before a compiler sees it.

A compiler that accepts a graph proves little: Qualcomm's accepts dynamic quantization and drops it, and reads some
types wrongly without a word. So the graph is compared with the target's profile (:mod:`pq_export.targets.profile`) by
rules of its own; each finding names node, layer, rule and cure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from pq_export.bundle import MODEL_NAME, open_bundle
from pq_export.errors import IntegrityError, PqExportError
from pq_export.targets.lint.finding import RULES, Finding, Findings
from pq_export.targets.lint.rules_cache import cache, prefix
from pq_export.targets.lint.rules_floats import floats
from pq_export.targets.lint.rules_graph import GRAPH_RULES, opset
from pq_export.targets.lint.rules_linears import LINEAR_RULES, linears
from pq_export.targets.lint.rules_quantizers import QUANTIZER_RULES, weights
from pq_export.targets.lint.rules_static import RULES_OF_EVERY_TARGET, constants, dynamic, run_time_ranges, scale_shapes
from pq_export.targets.lint.view import GraphView
from pq_export.targets.profile import Profile

__all__ = ["RULES", "Finding", "graphs_of", "lint_bundle", "lint_file", "lint_model", "refuse_findings"]

_RULES: tuple[Callable[[GraphView, Profile], Findings], ...] = (
    *RULES_OF_EVERY_TARGET,
    *GRAPH_RULES,
    *QUANTIZER_RULES,
    *LINEAR_RULES,
    cache,
    floats,
)
# What holds of a linear that is lowered by itself: its output gets a scale then.
_RULES_OF_LINEARS = (dynamic, run_time_ranges, constants, scale_shapes, opset, weights, linears)


def lint_model(
    model: onnx.ModelProto,
    profile: Profile,
    *,
    name: str = "model",
    directory: Path | None = None,
    prefix_length: int | None = None,
    linears_only: bool = False,
) -> list[Finding]:
    """What in ``model`` the target does not take, causes first; empty if nothing.

    ``profile``: of one chip, see :meth:`Profile.for_soc`. ``directory``: of external data. ``prefix_length``: tokens
    whose keys and values the graph must hold; None where it is not known. ``linears_only``: only the linears go to the
    target, one by one; the rest of the graph is the host's.
    """
    view = GraphView(model, name, directory)
    if linears_only:
        alone = replace(profile, linears=replace(profile.linears, unit=False, same_type=False, max_multiplier=0.0))
        return [found for rule in _RULES_OF_LINEARS for found in rule(view, alone)]
    findings = [found for rule in _RULES for found in rule(view, profile)]
    return [*findings, *prefix(view, profile, prefix_length)]


def refuse_findings(
    models: Mapping[str, onnx.ModelProto],
    profile: Profile,
    prefix_length: int | None = None,
    *,
    linears_only: bool = False,
) -> None:
    """Raise :class:`PqExportError` with the first finding on ``models``, name -> graph, and their number.

    For targets, before their compiler sees a graph. ``profile``: of one chip; the rest as in :func:`lint_model`.
    """
    findings: list[Finding] = []
    for name, model in models.items():
        findings += lint_model(model, profile, name=name, prefix_length=prefix_length, linears_only=linears_only)
    if findings:
        chip = f" ({profile.soc.name})" if profile.soc else ""
        raise PqExportError(
            f"{profile.name}{chip} does not take this graph: {findings[0]} ({len(findings)} findings)",
            cure=findings[0].cure,
        )


def lint_bundle(directory: Path, profile: Profile) -> list[Finding]:
    """All findings on the graphs of a bundle that ``profile`` is about.

    Those are the fixed-shape ones where the target wants fixed shapes and the bundle has them, else ``model.onnx``.
    Raises :class:`IntegrityError` where the bundle is not whole.
    """
    bundle = open_bundle(directory, verify_hashes=False)
    findings = []
    length = int(bundle.config["prefix"]["length"])
    # A target that lowers linears alone lists in its part of the configuration what it leaves to the host.
    lowered = bundle.config.get(profile.name.replace("-", "_"))
    alone = isinstance(lowered, dict) and "not_lowered" in lowered
    for name in graphs_of(bundle.config, profile):
        findings += lint_file(directory / name, profile, prefix_length=length, linears_only=alone)
    return findings


def lint_file(
    path: Path, profile: Profile, *, prefix_length: int | None = None, linears_only: bool = False
) -> list[Finding]:
    """All findings on one ONNX file; its external data is read only where a rule asks for a value."""
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError:
        raise  # a file that is not there is no broken one
    except Exception as error:  # protobuf raises its own DecodeError
        raise IntegrityError(f"is not an ONNX model ({type(error).__name__})", where=path) from None
    return lint_model(
        model,
        profile,
        name=path.stem,
        directory=path.parent,
        prefix_length=prefix_length,
        linears_only=linears_only,
    )


def graphs_of(config: dict[str, Any], profile: Profile) -> list[str]:
    """Files of the graphs that ``profile`` is compared with. ``config``: of the bundle."""
    static = config.get("static")
    listed = static.get("graphs") if profile.shapes.static and isinstance(static, dict) else None
    names = list(listed.values()) if isinstance(listed, dict) else []
    return [name for name in names if name in config.get("files", {})] or [MODEL_NAME]
