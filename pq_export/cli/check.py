"""``pq-export check`` and ``pq-export targets``: capability profiles and the linter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pq_export.cli.console import output_console, print_json
from pq_export.errors import EXIT_ERROR
from pq_export.targets import TARGETS
from pq_export.targets.lint import RULES, Finding, graphs_of, lint_bundle, lint_file
from pq_export.targets.profile import SECTIONS, Profile, find_profile, profile_names

SHOWN = 4  # findings of one rule in the table; --json has all


def run_check(bundle: Path, flags: dict[str, Any]) -> int:
    """``pq-export check``: 0, or 1 if there are findings."""
    profile = find_profile(flags["target"]).for_soc(flags["soc"])
    findings = lint_file(bundle, profile) if bundle.suffix == ".onnx" else lint_bundle(bundle, profile)
    if flags["as_json"]:
        soc = profile.soc.name if profile.soc else None
        print_json({"target": profile.name, "soc": soc, "findings": [asdict(found) for found in findings]})
    elif findings:
        _print_findings(output_console(), bundle, profile, findings)
    else:
        graphs = bundle.name if bundle.suffix == ".onnx" else _graphs(bundle, profile)
        print_line(output_console(), f"{bundle}: {graphs}: nothing that {_called(profile)} does not take")
    return EXIT_ERROR if findings else 0


def run_targets(flags: dict[str, Any]) -> bool:
    """``pq-export targets``: the table."""
    names = [*TARGETS, *(name for name in profile_names() if name not in TARGETS)]
    rows = [_row(find_profile(name) if name in profile_names() else Profile(name)) for name in names]
    if flags["as_json"]:
        print_json(rows)
        return True
    table = _table("Targets", ["name", "what", "precision", "granularity", "floats", "status"])
    for row in rows:
        table.add_row(*(escape(row[key]) for key in ("name", "title", "precision", "granularity", "floats", "status")))
    output_console().print(table)
    return True


def run_profile(name: str, flags: dict[str, Any]) -> bool:
    """``pq-export targets NAME``: one profile."""
    profile = find_profile(name)
    if flags["as_json"]:
        print_json(profile.to_dict())
        return True
    table = _table(f"{profile.name}: {profile.title}", ["table", "key", "value"])
    for key in ("executes", "status", "precisions", "built_by", "default_soc", "notes"):
        if value := getattr(profile, key):
            table.add_row("", key, escape(_text(value)))
    for section, kind in SECTIONS.items():
        values = getattr(profile, section)
        for index, field in enumerate(fields(kind)):
            table.add_row("" if index else section, field.name, escape(_text(getattr(values, field.name))))
    for index, soc in enumerate(profile.socs.values()):
        number = [f"number {soc.number}"] if soc.number else []
        changes = [
            f"{table}.{key} = {_text(v)}" for table, values in soc.overrides.items() for key, v in values.items()
        ]
        facts = ", ".join([*filter(None, (soc.title, soc.architecture)), *number, *changes])
        table.add_row("" if index else "socs", soc.name, escape(facts))
    output_console().print(table)
    return True


def _row(profile: Profile) -> dict[str, str]:
    """What the table says of a target."""
    target = TARGETS.get(profile.name)
    granularity = f"{_text(profile.activations.granularity)} x {_text(profile.weights.granularity)}"
    return {
        "name": profile.name,
        "title": target.title if target else profile.title,
        "executes": target.executes if target else profile.executes,
        "forms": ", ".join(form.value for form in target.forms) if target else "",
        "precision": " ".join(profile.precisions),
        "granularity": granularity,
        "floats": _text(profile.floats.types),
        "status": profile.status if target else "lint-only",
    }


def _print_findings(console: Console, bundle: Path, profile: Profile, findings: list[Finding]) -> None:
    """A table a rule: where, why, and what mends it."""
    counts = Counter(found.rule for found in findings)
    for rule in sorted(counts, key=list(RULES).index):
        own = [found for found in findings if found.rule == rule]
        table = _table(f"{rule} ({counts[rule]}): {RULES[rule]}", ["graph", "node", "layer", "reason"])
        for found in own[:SHOWN]:
            layer = "" if found.layer is None else str(found.layer)
            table.add_row(escape(found.graph), escape(found.node), layer, escape(found.reason))
        if counts[rule] > SHOWN:
            table.add_row("", f"and {counts[rule] - SHOWN} more (--json has all)", "", "")
        console.print(table)
        for cure in dict.fromkeys(found.cure for found in own[:SHOWN]):
            print_line(console, f"  cure: {cure}")
    print_line(console, f"{bundle}: {len(findings)} findings; {_called(profile)} does not take it")


def _graphs(bundle: Path, profile: Profile) -> str:
    from pq_export.bundle import open_bundle

    return ", ".join(graphs_of(open_bundle(bundle, verify_hashes=False).config, profile))


def _called(profile: Profile) -> str:
    return f"{profile.name} ({profile.soc.name})" if profile.soc else profile.name


def _text(value: Any) -> str:
    """A value of a profile in words."""
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {_text(item)}" for key, item in value.items()) or "-"
    if isinstance(value, tuple):
        if value and isinstance(value[0], tuple):
            return ", ".join(" x ".join(pair) for pair in value)
        return ", ".join(map(str, value)) or "none"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _table(title: str, columns: list[str]) -> Table:
    result = Table(title=escape(title), title_justify="left", title_style="bold")
    for column in columns:
        result.add_column(column, overflow="fold")
    return result


def print_line(console: Console, text: str) -> None:
    """One line, never wrapped, so that scripts can read it."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
