"""What the commands do: the only place where calibration, build and validation meet."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pq_export.bundle import CONFIG_NAME, Bundle, open_bundle
from pq_export.calibration import JSON_NAME, Calibration, load_calibration, read_calibration_json
from pq_export.cli.console import bytes_text, output_console, print_json, seconds_text, table
from pq_export.cli.evaluation_text import refuse_contamination
from pq_export.cli.options import chosen_precision
from pq_export.cli.running import running_stages
from pq_export.cli.samples import sample_windows
from pq_export.cli.tables import print_report, print_validation
from pq_export.errors import IntegrityError, Interrupted, PqExportError, UsageError
from pq_export.files import check_output
from pq_export.plan import PREFIX_ROOM, Plan, resolve_plan
from pq_export.stages import Stages
from pq_export.targets import find_target
from pq_export.targets.base import TargetOptions

PLAN_FLAGS = ("prefix", "rotate", "calib_data", "calib_samples", "seq_len", "seed", "num_layers")
SAMPLE_PROMPT = "What is the capital of France?"
SAMPLE_TOKENS = 48


def run_export(model: str, flags: dict[str, Any]) -> bool:
    """``pq-export MODEL``; returns whether validation passed."""
    plan, target = _plan(flags), find_target(flags["target"])
    options = target_options(flags)
    target.refuse_online_rotation(("R3", "R4") if plan.rotate == "online" else ())
    target.form_for(plan.precision, False, flags["form"], target.resolved(options, None))
    path = Path(model)
    name = path.stem if path.suffix.lower() == ".gguf" else path.resolve().name
    output = flags["output"] or Path("out") / f"{name}-{str(plan.precision).lower()}"
    if flags["dry_run"]:
        return _dry_run(model, plan, output, flags)
    check_output(output, flags["force"], Path(model))
    check_device(flags["device"])
    calibration_directory = output.with_name(f"{output.name}.calib")
    if not (calibration_directory / JSON_NAME).is_file():
        check_output(calibration_directory, flags["force"])
    with running_stages(flags) as stages:
        checkpoint = _load(model, plan, flags, stages)
        plan = fit_context(plan, checkpoint, flags, stages)
        refuse_contamination(checkpoint.tokenizer, flags["text"], _evaluated(flags), plan.calib_data, stages)
        calibration = _calibrated(checkpoint, plan, calibration_directory, flags, stages)
        del checkpoint
        bundle = build_bundle(calibration, calibration_directory, target, output, flags, stages)
        try:
            fp = _load(model, plan, {**flags, "device": "cpu"}, stages, "load checkpoint again").decoder
            validation = _validated(bundle, calibration, fp, flags, stages)
        except KeyboardInterrupt:
            cure = f"Go on with: pq-export validate {output} --model {model}"
            raise Interrupted("interrupted; the bundle is whole but not validated", where=output, cure=cure) from None
        report = _write_report(bundle, calibration, stages.to_list(), validation)
    sample = "".join(_stream(bundle, SAMPLE_PROMPT, SAMPLE_TOKENS))
    if flags["as_json"]:
        print_json({**report, "bundle": str(output), "sample": {"prompt": SAMPLE_PROMPT, "text": sample}})
    else:
        console = output_console()
        print_report(console, report)
        console.print(f"\n> {SAMPLE_PROMPT}\n{sample}\n", highlight=False, markup=False)
        console.print(
            f"bundle: {output}   report: {output / 'report.html'}   calibration: {calibration_directory}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        _print_remaining(bundle)
    return bool(validation["passed"])


def run_calibrate(model: str, flags: dict[str, Any]) -> bool:
    """``pq-export calibrate``."""
    plan, output = _plan(flags), flags["output"]
    if flags["dry_run"]:
        return _dry_run(model, plan, output, flags)
    check_output(output, flags["force"], Path(model))
    check_device(flags["device"])
    with running_stages(flags) as stages:
        from pq_export.calib.pipeline import calibrate

        checkpoint = _load(model, plan, flags, stages)
        calibration = calibrate(checkpoint, fit_context(plan, checkpoint, flags, stages), output, stages)
    if flags["as_json"]:
        print_json({"calibration": str(output), **_calibration_facts(calibration), "stages": stages.to_list()})
    else:
        _print_facts(f"Calibration {output}", _calibration_facts(calibration))
    return True


def run_build(calibration_directory: Path, flags: dict[str, Any]) -> bool:
    """``pq-export build``."""
    target = find_target(flags["target"])
    target.resolved(target_options(flags), None)
    calibration = load_calibration(calibration_directory)
    check_output(flags["output"], flags["force"], calibration_directory)
    with running_stages(flags) as stages:
        bundle = build_bundle(calibration, calibration_directory, target, flags["output"], flags, stages)
        earlier = _read_stages(calibration_directory / "stages.json")
        report = _write_report(bundle, calibration, [*earlier, *stages.to_list()], None)
    if flags["as_json"]:
        print_json({**report, "bundle": str(flags["output"])})
    else:
        print_report(output_console(), report)
        _print_remaining(bundle)
    return True


def run_validate(bundle_directory: Path, flags: dict[str, Any]) -> bool:
    """``pq-export validate``; returns whether it passed."""
    bundle = open_bundle(bundle_directory)
    here = bundle_directory.resolve()
    calibration_directory = flags["calib"] or here.with_name(f"{here.name}.calib")
    check_device(flags["device"])
    calibration = load_calibration(calibration_directory)
    with running_stages(flags) as stages:
        fp = None
        if flags["model"]:
            layers = bundle.config["plan"]["num_layers"]
            checkpoint = _load_checkpoint(
                flags["model"], layers, "cpu", flags["trust_remote_code"], stages, "load checkpoint"
            )
            if checkpoint.source.sha256 != calibration.source.sha256:
                raise IntegrityError(
                    "is not the checkpoint that this calibration came from",
                    where=flags["model"],
                    cure="Give the same one with --model, or leave --model out.",
                )
            fp = checkpoint.decoder
        from pq_export.runtime import load_tokenizer

        calib_data = calibration.plan["calib_data"]
        refuse_contamination(load_tokenizer(bundle), flags["text"], _evaluated(flags), calib_data, stages)
        validation = _validated(bundle, calibration, fp, flags, stages)
        own = {record.name for record in stages.records}
        earlier = [s for s in _read_stages(bundle.directory / "report.json") if s["name"] not in own]
        _write_report(bundle, calibration, [*earlier, *stages.to_list()], validation)
    if flags["as_json"]:
        print_json(validation)
    else:
        print_validation(output_console(), validation)
    return bool(validation["passed"])


def run_generate(bundle_directory: Path, flags: dict[str, Any]) -> bool:
    """``pq-export generate``."""
    import time

    bundle = open_bundle(bundle_directory, verify_hashes=False)
    started, pieces = time.perf_counter(), []
    for piece in _stream(bundle, flags["prompt"], flags["max_new_tokens"], flags):
        pieces.append(piece)
        if not flags["as_json"]:
            sys.stdout.write(piece)
            sys.stdout.flush()
    if flags["as_json"]:
        print_json({"prompt": flags["prompt"], "text": "".join(pieces), "seconds": time.perf_counter() - started})
    else:
        sys.stdout.write("\n")
    return True


def run_inspect(what: str, flags: dict[str, Any]) -> bool:
    """``pq-export inspect``."""
    path = Path(what)
    if (path / CONFIG_NAME).is_file():
        facts = _bundle_facts(open_bundle(path))
    elif (path / JSON_NAME).is_file():
        facts = _calibration_facts(load_calibration(path))
    else:
        from pq_export.calib.checkpoint import describe_checkpoint

        facts = describe_checkpoint(what)
    if flags["as_json"]:
        print_json(facts)
    else:
        _print_facts(what, facts)
    return True


def build_bundle(
    calibration: Calibration, directory: Path, target: Any, output: Path, flags: dict[str, Any], stages: Stages
) -> Bundle:
    """Build with the options of the command line."""
    from pq_export.build import build

    options = target_options(flags)
    if target.wants_samples:
        options = replace(options, samples=sample_windows(calibration, directory, stages))
    return build(
        calibration,
        directory,
        target,
        output,
        stages,
        form=flags["form"],
        external_data=flags["external_data"],
        options=options,
    )


def _sm(text: str) -> int:
    """``87``, ``sm_87``, ``8.7`` or ``90a`` -> 87 or 90; the target knows which there are."""
    digits = text.lower().removeprefix("sm").removeprefix("_").removesuffix("a").replace(".", "")
    if not digits.isdecimal():
        raise UsageError(f"--sm {text} is no compute capability", cure="Write 87 for 8.7.")
    return int(digits)


def target_options(flags: dict[str, Any]) -> TargetOptions:
    """What the command line asks of the target."""
    names = ["jetpack", "max_batch_size", "max_input_len", "max_seq_len", "float_type"]
    names += ["prefill_len", "cache_len", "linears_only", "simulation"]
    sms = tuple(_sm(part) for text in flags["sm"] for part in text.replace(",", " ").split())
    socs = tuple(part for text in flags["soc"] for part in text.replace(",", " ").split())
    wide = flags["wide_outputs"]
    wide_outputs = None if wide in (None, "all") else () if wide == "none" else tuple(wide.replace(",", " ").split())
    return TargetOptions(sms=sms, socs=socs, wide_outputs=wide_outputs, **{name: flags[name] for name in names})


def _plan(flags: dict[str, Any]) -> Plan:
    from pq_export.calib.recipe import load_recipe

    kv = flags.pop("kv")
    options = {name: flags.pop(name) for name in PLAN_FLAGS}
    flags["long_crops_meant"] = options["seq_len"] is not None
    recipe = load_recipe(flags["recipe"])
    return resolve_plan(chosen_precision(flags), None if kv is None else int(kv), recipe, **options)


def fit_context(plan: Plan, checkpoint: Any, flags: dict[str, Any], stages: Stages) -> Plan:
    """``plan`` with crops that the model's context holds beside a prefix, unless their length was given by hand."""
    context = checkpoint.decoder.config.max_position_embeddings
    if flags["long_crops_meant"] or plan.seq_len <= context - PREFIX_ROOM:
        return plan
    fitting = context - PREFIX_ROOM
    stages.progress.warn(f"crops of {fitting} tokens, not {plan.seq_len}: the model's context is {context}")
    return replace(plan, seq_len=fitting)


def _load(model: str, plan: Plan, flags: dict[str, Any], stages: Stages, title: str = "load checkpoint") -> Any:
    return _load_checkpoint(model, plan.num_layers, flags["device"], flags["trust_remote_code"], stages, title)


def _load_checkpoint(model: str, layers: int | None, device: str, trust: bool, stages: Stages, title: str) -> Any:
    with stages.stage(title):
        from pq_export.calib.checkpoint import load_checkpoint

        return load_checkpoint(model, num_layers=layers, device=device, trust_remote_code=trust)


def _calibrated(checkpoint: Any, plan: Plan, directory: Path, flags: dict[str, Any], stages: Stages) -> Calibration:
    """The calibration in ``directory`` if it is this plan's of this checkpoint, else a new one."""
    from pq_export.calib.pipeline import calibrate

    if (directory / JSON_NAME).is_file():
        try:
            document = read_calibration_json(directory)
            if document.get("fingerprint") == plan.fingerprint(checkpoint.source.sha256):
                with stages.stage("calibrate", reused=True):
                    return load_calibration(directory)
            source = document.get("source") or {}
            if source.get("sha256") != checkpoint.source.sha256:
                raise IntegrityError(
                    f"belongs to another checkpoint ({source.get('name')})",
                    where=directory,
                    cure="Give another -o, or --force to replace it.",
                )
        except IntegrityError:
            if not flags["force"]:
                raise
    return calibrate(checkpoint, plan, directory, stages)


def _validated(
    bundle: Bundle, calibration: Calibration, fp: Any, flags: dict[str, Any], stages: Stages
) -> dict[str, Any]:
    from pq_export.calib.text import builtin_text, read_text, tokenize
    from pq_export.runtime import load_tokenizer
    from pq_export.validate.pipeline import Limits, Workload, validate

    text = builtin_text(held_out=True) if flags["text"] is None else read_text(str(flags["text"]))
    name = "held-out built-in text" if flags["text"] is None else flags["text"].name
    tokens = tokenize(load_tokenizer(bundle), text)
    work = Workload(
        tokens,
        name,
        flags["windows"],
        flags["window"],
        speed=flags["speed"],
        device=flags["device"],
        threads=flags["threads"],
    )
    limits = Limits(flags["min_code_share"], flags["min_greedy"], flags["max_ppl_difference"], flags["max_ppl_ratio"])
    return validate(bundle, calibration, fp, work, limits, stages)


def _evaluated(flags: dict[str, Any]) -> int:
    """Tokens that are evaluated."""
    return int(flags["windows"] * flags["window"])


def _print_remaining(bundle: Bundle) -> None:
    """What is left to do, where a target cannot finish here."""
    deploy = bundle.config.get("deploy", {})
    if deploy.get("remaining"):
        built = {engine["sm"] for engine in bundle.config.get("engines", [])}
        gpus = ", ".join(str(sm) for sm in deploy["sms"] if sm not in built)
        text = f"no engine yet for SM {gpus}: copy {bundle.directory} to such a machine and {deploy['remaining']}"
        output_console().print(text, highlight=False, markup=False, soft_wrap=True)


def _write_report(
    bundle: Bundle, calibration: Calibration, stages: list[dict[str, Any]], validation: dict[str, Any] | None
) -> dict[str, Any]:
    from pq_export.report.summary import report_of, write_report

    report = report_of(bundle, calibration, stages, validation)
    write_report(bundle, report)
    return report


def _read_stages(path: Path) -> list[dict[str, Any]]:
    """Stage records of an earlier command, from its ``stages.json`` or ``report.json``."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return list(document["stages"] if isinstance(document, dict) else document)
    except (OSError, ValueError, KeyError, TypeError):  # only the report's table of times would show them
        return []


def check_device(name: str) -> None:
    """Refuse a PyTorch device that is not there, before any work. From here on no fp32 product is taken in TF32."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False  # whatever the environment says: results are those of a CPU
    try:
        if torch.device(name).type not in ("cpu", "cuda"):
            raise RuntimeError("pq-export works on cpu and cuda")
        torch.zeros(1, device=name)
        if torch.device(name).index is not None:  # graphs and memory statistics are the current device's
            torch.cuda.set_device(name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {name} cannot be used ({reason})", cure="Use cpu.") from None


def _stream(bundle: Bundle, prompt: str, limit: int, flags: dict[str, Any] | None = None) -> Any:
    """Pieces of text as they are generated; a piece ends where its bytes form whole characters."""
    from pq_export.execute import running_decoder
    from pq_export.runtime import Sampling, generate, load_tokenizer, prompt_ids, stop_tokens

    if flags is None:  # the sample of an export
        flags = {"temperature": 0.0, "top_p": 1.0, "seed": 0, "chat": None, "threads": None, "device": "cpu"}
        flags |= {"run_on": "model", "soc": None}
    tokenizer = load_tokenizer(bundle)
    chat = bool(tokenizer.chat_template) if flags["chat"] is None else flags["chat"]
    if chat and not tokenizer.chat_template:
        raise PqExportError("has no chat template", where=bundle.directory, cure="Use --raw.")
    ids = prompt_ids(bundle, tokenizer, prompt, chat)
    sampling = Sampling(flags["temperature"], flags["top_p"], flags["seed"])
    room = bundle.config["max_position_embeddings"] - bundle.config["prefix"]["length"] - len(ids)
    new, stop = min(limit, room), stop_tokens(bundle, tokenizer)
    if flags["device"] == "cpu":
        with running_decoder(bundle, flags["run_on"], flags["soc"], flags["threads"]) as decoder:
            yield from _pieces(tokenizer, generate(decoder, ids, new, stop, sampling))
    else:
        if flags["run_on"] or flags["soc"]:
            raise UsageError("--on and --soc are for --device cpu", cure="Leave them out, or leave --device out.")
        check_device(flags["device"])
        from pq_export.cuda.generate import generate_on_cuda

        yield from _pieces(tokenizer, generate_on_cuda(bundle, ids, new, stop, sampling))


def _pieces(tokenizer: Any, tokens: Iterator[int]) -> Iterator[str]:
    """Text of ``tokens`` in pieces that are whole characters."""
    shown: list[int] = []  # the tokens just printed: some tokenizers strip the space of a text's first token
    pending: list[int] = []
    for token in tokens:
        pending.append(token)
        piece = _piece(tokenizer, shown, pending)
        if not piece.endswith("\ufffd"):
            yield piece
            shown, pending = pending, []
    if pending:
        yield _piece(tokenizer, shown, pending)


def _piece(tokenizer: Any, shown: list[int], new: list[int]) -> str:
    """Text that ``new`` tokens add behind ``shown`` ones."""
    before = tokenizer.decode(shown, skip_special_tokens=True)
    return str(tokenizer.decode([*shown, *new], skip_special_tokens=True)[len(before) :])


def _dry_run(model: str, plan: Plan, output: Path, flags: dict[str, Any]) -> bool:
    from pq_export.calib.checkpoint import describe_checkpoint
    from pq_export.calib.recipe import kinds_and_options
    from pq_export.estimate import estimate

    facts = describe_checkpoint(model, flags["trust_remote_code"])
    tokens = sum(kind.tokens(options, plan) for kind, options in kinds_and_options(plan))
    expected = estimate(facts, plan, tokens)
    document = {"model": facts, "plan": plan.to_dict(), "output": str(output), "expected": asdict(expected)}
    if flags["as_json"]:
        print_json(document)
        return True
    _print_facts(
        "Plan", {"model": facts["name"], "architecture": facts["architecture"], "output": str(output), **plan.to_dict()}
    )
    _print_facts(
        "Expected",
        {
            "bundle weights": bytes_text(expected.bundle_bytes),
            "peak memory": bytes_text(expected.peak_bytes),
            "calibration": seconds_text(expected.calibrate_seconds),
        },
    )
    return True


def _calibration_facts(calibration: Calibration) -> dict[str, Any]:
    c = calibration
    return {
        "kind": "calibration",
        "name": c.source.name,
        "architecture": c.source.architecture,
        "precision": str(c.precision),
        "overrides": c.overrides,
        "layers": c.decoder.num_layers,
        "prefix": list(c.prefix.tokens),
        "prefix_ids": list(c.prefix.token_ids),
        "rotation": c.rotation.mode,
        "online": list(c.rotation.online),
        "checkpoint_sha256": c.source.sha256,
    }


def _bundle_facts(bundle: Bundle) -> dict[str, Any]:
    c = bundle.config
    size = sum(record["bytes"] for record in c["files"].values())
    return {
        "kind": "bundle",
        "name": c["source"]["name"],
        "target": c["target"],
        "form": c["form"],
        "precision": c["precision"],
        "overrides": bundle.overrides,
        "layers": c["num_layers"],
        "prefix": c["prefix"]["tokens"],
        "prefix_ids": c["prefix"]["token_ids"],
        "bytes": size,
        "kv_bytes_per_token": c["kv_cache"]["bytes_per_token"],
        "versions": c["versions"],
    }


def _print_facts(title: str, facts: dict[str, Any]) -> None:
    rows = [
        [name.replace("_", " "), value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)]
        for name, value in facts.items()
    ]
    output_console().print(table(title, ["", "value"], rows))
