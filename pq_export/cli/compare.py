"""``pq-export compare``: rival methods and ours on one model, as a table, JSON and a page."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pq_export import __version__
from pq_export.cli.commands import _load, _plan, check_device, fit_context
from pq_export.cli.console import output_console, print_json, seconds_text, table
from pq_export.cli.running import running_stages
from pq_export.errors import PqExportError, UsageError
from pq_export.files import check_output, new_directory
from pq_export.plan import PREFIX_ROOM
from pq_export.stages import Stages


def run_compare(model: str, flags: dict[str, Any]) -> bool:
    """``pq-export compare MODEL``."""
    from pq_export.calib.baselines.ablation import ablation
    from pq_export.calib.baselines.harness import compare, find_methods

    plan = _plan(flags)
    if flags["ablation"] and flags["methods"]:
        raise UsageError("--ablation and --methods exclude each other", cure="Give one of them.")
    methods = [*find_methods("fp,fp+prefix", plan), *ablation(plan)] if flags["ablation"] else []
    methods = methods or find_methods(flags["methods"], plan)
    path = Path(model)
    name = path.stem if path.suffix.lower() == ".gguf" else path.resolve().name
    output = flags["output"] or Path("out") / f"{name}-{str(plan.precision).lower()}-compare"
    check_output(output, flags["force"], path)
    check_device(flags["device"])
    with running_stages(flags) as stages:
        checkpoint = _load(model, plan, flags, stages)
        plan = fit_context(plan, checkpoint, flags, stages)
        window = min(flags["window"], checkpoint.decoder.config.max_position_embeddings - PREFIX_ROOM)
        text, windows = _windows(checkpoint, plan.calib_data, flags, window, stages)
        rows = compare(checkpoint, plan, methods, windows, flags["rounding"], stages)
    document = {
        "title": checkpoint.source.name,
        "pq_export": __version__,
        "source": asdict(checkpoint.source),
        "precision": str(plan.precision),
        "plan": plan.to_dict(),
        "rounding": flags["rounding"],
        "device": flags["device"],
        "text": text,
        "windows": len(windows),
        "window": window,
        "rows": [_finite(asdict(row)) for row in rows],
    }
    _write(document, output)
    if flags["as_json"]:
        print_json({**document, "output": str(output)})
    else:
        _print(document, output)
    return True


def _windows(checkpoint: Any, calib_data: str, flags: dict[str, Any], window: int, stages: Stages) -> tuple[str, Any]:
    """Name of the evaluation text and its first windows [N, S]; refuses a text that was calibrated on."""
    from pq_export.calib.text import builtin_text, read_text, read_texts, tokenize, windows
    from pq_export.validate.contamination import assert_uncontaminated

    name = "held-out built-in text" if flags["text"] is None else flags["text"].name
    text = builtin_text(held_out=True) if flags["text"] is None else read_text(str(flags["text"]))
    tokens = tokenize(checkpoint.tokenizer, text)
    needed = flags["windows"] * window
    if len(tokens) < needed:
        raise PqExportError(
            f"has {len(tokens)} tokens; {flags['windows']} windows of {window} need {needed}",
            where=name,
            cure="Give a longer --text, fewer --windows or a shorter --window.",
        )
    for source, calibration in read_texts(calib_data).items():
        assert_uncontaminated(
            tokenize(checkpoint.tokenizer, calibration),
            tokens[:needed],
            calibration=source,
            evaluation=name,
            note=stages.progress.note,
            decode=checkpoint.tokenizer.decode,
        )
    return name, windows(tokens, window, flags["windows"])


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """``row`` with None for what JSON has no number for."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}


def _write(document: dict[str, Any], output: Path) -> None:
    from pq_export.report.compare import render

    with new_directory(output) as directory:
        (directory / "compare.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        (directory / "compare.html").write_text(render(document), encoding="utf-8")


def _print(document: dict[str, Any], output: Path) -> None:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    rows = [
        [
            row["method"],
            row["precision"],
            "-" if row["static"] is None else "static" if row["static"] else "dynamic",
            ", ".join(row["online"]) or "-",
            number(row["perplexity"], ".3f"),
            number(row["ratio"], ".3f"),
            number(row["kl"], ".4f"),
            number(row["top1"], ".3f"),
            seconds_text(row["seconds"]),
        ]
        for row in document["rows"]
    ]
    columns = ["method", "precision", "scales", "online", "perplexity", "ratio", "KL", "top-1", "time"]
    title = f"{document['title']}: {document['windows']} windows of {document['window']}, {document['text']}"
    console = output_console()
    console.print(table(title, columns, rows))
    console.print(
        f"{output / 'compare.html'}   {output / 'compare.json'}", highlight=False, markup=False, soft_wrap=True
    )
