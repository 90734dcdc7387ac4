"""``pq-export evaluate``: tasks and text on a checkpoint, its fake-quant model or its bundle."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pq_export.bundle import CONFIG_NAME, open_bundle
from pq_export.calibration import JSON_NAME, load_calibration
from pq_export.cli.commands import check_device
from pq_export.cli.console import output_console, print_json, table
from pq_export.cli.evaluation_text import refuse_contamination
from pq_export.cli.running import running_stages
from pq_export.decoder import Decoder
from pq_export.errors import IntegrityError, PqExportError, UsageError
from pq_export.evaluate.subject import Subject, bundle_subject, calibration_subject, checkpoint_subject
from pq_export.stages import Stages
from pq_export.validate.agreement import compare_logits
from pq_export.validate.perplexity import perplexity, torch_logits

FP, FP_PREFIX = "FP", "FP + prefix"


@dataclass(frozen=True)
class Opened:
    """WHAT as it was found, and where it came from: hash and layers of its checkpoint, and its prefix."""

    kind: str
    subject: Subject
    sha256: str
    num_layers: int | None = None
    prefix_ids: tuple[int, ...] = ()
    calib_data: str | None = None


def run_evaluate(what: str, flags: dict[str, Any]) -> bool:
    """``pq-export evaluate``."""
    names = [name.strip() for name in (flags["tasks"] or "").split(",") if name.strip()]
    _check_flags(names, flags)
    harness, tasks = None, None
    if names:
        harness = _harness()
        tasks = harness.Tasks(flags["include_path"])
        names = tasks.named(names)
    check_device(flags["device"])
    with running_stages(flags) as stages, contextlib.ExitStack() as stack:
        opened = _open(what, flags, stages, stack)
        document: dict[str, Any] = {"model": opened.subject.name, "kind": opened.kind}
        if flags["text"] is not None:
            document["text"] = _text(opened, flags, stages)
        if harness is not None:
            options = {name: flags[name] for name in ("limit", "num_fewshot", "batch_size")}
            scores, truncated = harness.evaluate(opened.subject, tasks, names, stages, **options)
            document["tasks"] = {"scores": [asdict(score) for score in scores], "truncated": truncated, **options}
        document["stages"] = stages.to_list()
    if flags["as_json"]:
        print_json(document)
        return True
    console = output_console()
    console.print(table(f"{opened.subject.name} ({opened.kind})", list(COLUMNS), _rows(document)))
    if document.get("tasks", {}).get("truncated"):
        console.print(f"{document['tasks']['truncated']} requests did not fit and lost their beginning")
    return True


def _check_flags(names: list[str], flags: dict[str, Any]) -> None:
    if not names and flags["text"] is None:
        raise UsageError("there is nothing to evaluate", cure="Give --tasks, --text, or both.")
    if flags["model"] and flags["text"] is None:
        raise UsageError("--model adds the floating-point rows to a text", cure="Give --text too, or leave it out.")


def _harness() -> Any:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise PqExportError("--tasks needs the package lm-eval", cure="pip install 'pq-export[eval]'") from None
    from pq_export.evaluate import tasks

    return tasks


def _open(what: str, flags: dict[str, Any], stages: Stages, stack: contextlib.ExitStack) -> Opened:
    """A bundle, a calibration or a checkpoint: whichever ``what`` is. ``stack`` closes what runs it."""
    path = Path(what)
    if (path / CONFIG_NAME).is_file():
        from pq_export.execute import running_decoder

        bundle, run_on = open_bundle(path), flags["run_on"] or "model"
        with stages.stage("load bundle"):
            decoder = stack.enter_context(running_decoder(bundle, run_on, flags["soc"], flags["threads"]))
            subject = bundle_subject(what, decoder, bundle)
            if run_on in ("static", "simulator"):  # further back, results are those of a window
                subject = replace(subject, context=min(subject.context, decoder.facts.cache_len))
        prefix = tuple(bundle.config["prefix"]["token_ids"])
        layers = bundle.config["plan"]["num_layers"]
        data = bundle.config["plan"]["calib_data"]
        kind = "bundle" if run_on == "model" else f"bundle, {run_on}"
        return Opened(kind, subject, bundle.config["source"]["sha256"], layers, prefix, data)
    if flags["run_on"] or flags["soc"]:
        raise UsageError("--on and --soc are for a bundle", where=what, cure="Leave them out.")
    if (path / JSON_NAME).is_file():
        from pq_export.simulate import simulated_decoder

        with stages.stage("load calibration"):
            calibration = load_calibration(path)
            decoder = simulated_decoder(calibration).to(flags["device"])
        subject = calibration_subject(what, decoder, calibration, path)
        layers, prefix = calibration.plan["num_layers"], calibration.prefix.token_ids
        data = calibration.plan["calib_data"]
        return Opened("calibration", subject, calibration.source.sha256, layers, prefix, data)
    if flags["model"]:
        raise UsageError("--model is for a calibration or a bundle", where=what, cure="Leave it out.")
    checkpoint = _checkpoint(what, None, flags, stages)
    eos = checkpoint.generation_config.eos_token_id
    subject = checkpoint_subject(what, checkpoint.decoder, checkpoint.tokenizer, eos)
    return Opened("checkpoint", subject, checkpoint.source.sha256)


def _checkpoint(model: str, layers: int | None, flags: dict[str, Any], stages: Stages) -> Any:
    with stages.stage("load checkpoint"):
        from pq_export.calib.checkpoint import load_checkpoint

        return load_checkpoint(
            model, num_layers=layers, device=flags["device"], trust_remote_code=flags["trust_remote_code"]
        )


def _text(opened: Opened, flags: dict[str, Any], stages: Stages) -> dict[str, Any]:
    """Perplexity of ``--text``, and with ``--model`` the divergence from the floating-point model."""
    from pq_export.calib.text import read_text, tokenize, windows

    path, subject = flags["text"], opened.subject
    window = min(flags["window"], subject.context)
    if opened.calib_data is not None:
        count = flags["windows"] * window
        refuse_contamination(subject.tokenizer, path, count, opened.calib_data, stages)
    tokens = tokenize(subject.tokenizer, read_text(str(path)))
    chosen = windows(tokens, window, flags["windows"])
    if len(chosen) < flags["windows"]:
        raise PqExportError(
            f"has {len(tokens)} tokens; {flags['windows']} windows of {window} need {flags['windows'] * window}",
            where=path,
            cure="Give a longer --text or fewer --windows.",
        )
    if flags["model"]:
        rows = _beside_fp(_fp(opened, flags, stages), opened, chosen, stages)
    else:
        with stages.stage(f"perplexity of {path.name}", len(chosen)) as advance:
            value = perplexity(subject.logits_of, chosen, advance)
        rows = [{"model": opened.kind, "perplexity": value.value, "tokens_per_second": value.tokens_per_second}]
    return {"text": path.name, "windows": len(chosen), "window": window, "rows": rows}


def _fp(opened: Opened, flags: dict[str, Any], stages: Stages) -> Decoder:
    checkpoint = _checkpoint(flags["model"], opened.num_layers, flags, stages)
    if checkpoint.source.sha256 != opened.sha256:
        raise IntegrityError(
            f"is not the checkpoint that {opened.subject.name} came from",
            where=flags["model"],
            cure="Give the same one with --model, or leave --model out.",
        )
    decoder: Decoder = checkpoint.decoder
    return decoder


def _beside_fp(fp: Decoder, opened: Opened, windows: Tensor, stages: Stages) -> list[dict[str, Any]]:
    reference = torch_logits(fp)
    models: dict[str, Callable[[Tensor], Tensor]] = {FP: reference}
    if opened.prefix_ids:
        models[FP_PREFIX] = torch_logits(fp, opened.prefix_ids)
    models[opened.kind] = opened.subject.logits_of
    with stages.stage("compare logits with FP", len(windows)) as advance:
        found = compare_logits(reference, models, windows, advance)
    return [{"model": name, **asdict(agreement)} for name, agreement in found.items()]


COLUMNS = ("task or text", "model", "metric", "value", "± stderr", "samples", "shots")


def _rows(document: dict[str, Any]) -> list[list[str]]:
    rows = []
    if text := document.get("text"):
        size = f"{text['windows']} x {text['window']}"
        for row in text["rows"]:
            for metric in ("perplexity", "kl", "top1"):
                if metric in row:
                    rows.append([text["text"], row["model"], metric, f"{row[metric]:.4f}", "", size, ""])
    for score in document.get("tasks", {}).get("scores", []):
        metric = score["metric"] if score["filter"] == "none" else f"{score['metric']}, {score['filter']}"
        stderr = "" if score["stderr"] is None else f"{score['stderr']:.4f}"
        shots = "" if score["num_fewshot"] is None else str(score["num_fewshot"])
        rows.append(
            [score["task"], document["kind"], metric, f"{score['value']:.4f}", stderr, str(score["samples"]), shots]
        )
    return rows
