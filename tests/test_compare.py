"""The harness of rival methods, its command, and its page."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pq_export.calib.baselines.dynamic import DynamicKVQuantizer, DynamicQuantizer
from pq_export.calib.baselines.harness import METHODS, Arena, Candidate, Row, compare, find_methods
from pq_export.calib.checkpoint import Checkpoint, load_checkpoint
from pq_export.calib.fake_quant import StaticQuantizer, site_quantizer
from pq_export.calib.pipeline import calibrate
from pq_export.calibration import KV_SITES, SITE_OF_LINEAR, SITES
from pq_export.errors import PqExportError, UsageError
from pq_export.plan import Plan
from pq_export.precision import Precision
from pq_export.report.compare import render
from pq_export.simulate import simulated_decoder
from pq_export.stages import Stages
from pq_export.validate.perplexity import perplexity, torch_logits
from tests.cli_runner import Runner
from tests.conftest import BOS, PLANTED_TOKEN, VOCAB, random_words

STEPS = (("clip_search", {}), ("gptq", {"refine": 1}), ("clip_search", {"weights": False, "kv": False}))
QUANTIZED = [name for name, method in METHODS.items() if method.static is not None]
WINDOWS = torch.randint(3, VOCAB, (2, 48), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def checkpoint(tiny_llama_dir: Path) -> Checkpoint:
    return load_checkpoint(str(tiny_llama_dir))


@pytest.fixture(scope="module")
def plan(small_plan: Callable[..., Plan]) -> Plan:
    return small_plan("w4a4", steps=STEPS)


@pytest.fixture(scope="module")
def candidates(checkpoint: Checkpoint, plan: Plan) -> dict[str, Candidate]:
    """What every method leaves of the tiny Llama at W4A4KV4, with GPTQ."""
    arena = Arena(checkpoint, plan, "gptq")
    with torch.no_grad():
        return {name: method.run(arena, Stages()) for name, method in METHODS.items()}


@pytest.fixture(scope="module")
def rows(checkpoint: Checkpoint, plan: Plan) -> dict[str, Row]:
    names = "fp,fp+prefix,quarot,prefixquant"
    found = compare(checkpoint, plan, find_methods(names, plan), WINDOWS, "rtn", Stages())
    return {row.method: row for row in found}


# --- what a method leaves --------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUANTIZED)
def test_every_weight_has_at_most_16_values_a_row(candidates: dict[str, Candidate], name: str) -> None:
    for layer in candidates[name].decoder.layers:
        for linear in SITE_OF_LINEAR:
            weight = layer.get_submodule(linear).weight
            assert max(len(row.unique()) for row in weight) <= 16
            assert max(len(row.unique()) for row in weight) > 4


@pytest.mark.parametrize("name", QUANTIZED)
def test_every_site_has_the_quantizer_of_its_kind(candidates: dict[str, Candidate], name: str) -> None:
    for layer in candidates[name].decoder.layers:
        for site in (*SITES, *KV_SITES):
            dynamic = DynamicKVQuantizer if site in KV_SITES else DynamicQuantizer
            module = site_quantizer(layer, site)
            assert type(module) is (StaticQuantizer if METHODS[name].static else dynamic)
            assert module.bits == 4


def test_prefixes_are_those_of_the_methods(candidates: dict[str, Candidate]) -> None:
    lengths = {name: candidate.decoder.prefix_length for name, candidate in candidates.items()}
    assert all(lengths[name] == 0 for name in ("fp", "rtn", "smoothquant", "outliertune", "static", "quarot"))
    for name in ("prefixquant", "prefixquant-rtn", "prefix+dynamic"):
        assert candidates[name].prefix == (PLANTED_TOKEN, BOS)
        assert lengths[name] == 2
    assert candidates["fp+prefix"].prefix == (PLANTED_TOKEN, BOS)
    assert candidates["qfep"].prefix[0] == BOS and lengths["qfep"] == 3
    assert lengths["cushioncache"] == len(candidates["cushioncache"].prefix)


def test_roundings(candidates: dict[str, Candidate]) -> None:
    assert {name: c.weights for name, c in candidates.items()} == {
        "fp": "",
        "fp+prefix": "",
        "rtn": "rtn",
        "smoothquant": "gptq",
        "outliertune": "gptq",
        "static": "clip_search + gptq + clip_search",
        "quarot": "gptq",
        "quarot+clip": "gptq",
        "qfep": "clip_search + gptq + clip_search",
        "cushioncache": "clip_search + gptq + clip_search",
        "prefix+dynamic": "gptq",
        "prefixquant-rtn": "clip_search",
        "prefixquant": "clip_search + gptq + clip_search",
    }


def test_quarot_searched_differs_from_fixed(candidates: dict[str, Candidate]) -> None:
    def clips(name: str) -> set[float]:
        modules = candidates[name].decoder.modules()
        return {m.clip for m in modules if isinstance(m, (DynamicQuantizer, DynamicKVQuantizer))}

    assert clips("quarot") == {0.9, 0.95}
    assert len(clips("quarot+clip")) > 2


# --- the table -------------------------------------------------------------------------------------


def test_floating_point_is_the_reference(rows: dict[str, Row], checkpoint: Checkpoint) -> None:
    fp = rows["fp"]
    assert (fp.ratio, fp.top1, fp.static, fp.online, fp.precision) == (1.0, 1.0, None, (), "FP32")
    assert fp.kl == pytest.approx(0.0, abs=1e-6)
    assert fp.perplexity == pytest.approx(perplexity(torch_logits(checkpoint.decoder), WINDOWS).value, rel=1e-4)
    prefixed = perplexity(torch_logits(checkpoint.decoder, (PLANTED_TOKEN, BOS)), WINDOWS).value
    assert rows["fp+prefix"].perplexity == pytest.approx(prefixed, rel=1e-4)
    assert rows["fp+prefix"].kl > 0
    assert rows["fp+prefix"].prefix == ("w77", "<s>")


def test_dynamic_is_who_has_token_scales(rows: dict[str, Row]) -> None:
    assert rows["quarot"].online == ("R3", "R4", "token scales")
    assert rows["quarot"].static is False
    assert rows["prefixquant"].online == ("R3", "R4")
    assert rows["prefixquant"].static is True
    assert all(row.ratio == row.perplexity / rows["fp"].perplexity for row in rows.values())
    assert all(row.seconds > 0 for row in rows.values() if row.static is not None)


def test_ours_is_what_calibrate_writes(
    checkpoint: Checkpoint, plan: Plan, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """The row of our own recipe is the exported calibration's, not that of a lookalike."""
    plan = dataclasses.replace(plan, precision=Precision(8, 8, 8))
    (row,) = compare(checkpoint, plan, find_methods("prefixquant", plan), WINDOWS, "gptq", Stages())
    calibration = calibrate(load_checkpoint(str(tiny_llama_dir)), plan, tmp_path / "calib", Stages())
    exported = perplexity(torch_logits(simulated_decoder(calibration)), WINDOWS).value
    assert math.log(row.perplexity) == pytest.approx(math.log(exported), rel=5e-3)


def test_the_checkpoint_stays_as_it_is(checkpoint: Checkpoint, plan: Plan) -> None:
    before = copy.deepcopy(checkpoint.decoder.state_dict())
    compare(checkpoint, plan, find_methods("outliertune,prefix+dynamic", plan), WINDOWS, "rtn", Stages())
    after = checkpoint.decoder.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert checkpoint.decoder.prefix_length == 0


def test_a_failing_method_is_named(checkpoint: Checkpoint, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(decoder: object, *rest: Tensor) -> None:
        raise PqExportError("is broken", where="layer 3", cure="Mend it.")

    monkeypatch.setattr("pq_export.calib.baselines.harness.smooth", fail)
    with pytest.raises(PqExportError, match=r"method smoothquant, layer 3: is broken\. Mend it\."):
        compare(checkpoint, plan, find_methods("smoothquant", plan), WINDOWS, "rtn", Stages())


def test_choice_of_methods(small_plan: Callable[..., Plan]) -> None:
    w4a4, w4a16 = small_plan("w4a4"), small_plan("w4a16")
    assert [m.name for m in find_methods(None, w4a4)] == list(METHODS)
    assert {"smoothquant", "outliertune"}.isdisjoint(m.name for m in find_methods(None, w4a16))
    assert [m.name for m in find_methods(" RTN,fp, rtn", w4a4)] == ["rtn", "fp"]
    with pytest.raises(UsageError, match="smoothquant"):
        find_methods("smoothquant", w4a16)
    with pytest.raises(UsageError, match="names no method"):
        find_methods(" , ", w4a4)


# --- the command -----------------------------------------------------------------------------------


@pytest.fixture
def pq(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(monkeypatch, capsys)


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluation") / "other-words.txt"
    path.write_text(random_words(200, seed=11), encoding="utf-8")
    return path


def arguments(model: Path, calibration: Path, evaluation: Path, output: Path, *more: object) -> tuple[object, ...]:
    small = ("--calib-samples", 4, "--seq-len", 32, "--window", 48)
    return ("compare", model, "--w4a4", "--calib-data", calibration, *small, "--text", evaluation, "-o", output, *more)


def test_command_writes_table_json_and_page(
    pq: Runner, tiny_llama_dir: Path, text_file: Path, evaluation: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    common = ("--methods", "fp,rtn,quarot", "--rounding", "rtn", "--recipe", "fast")
    result = pq(*arguments(tiny_llama_dir, text_file, evaluation, output, *common))
    assert result.code == 0, result
    document = json.loads((output / "compare.json").read_text())
    assert [row["method"] for row in document["rows"]] == ["fp", "rtn", "quarot"]
    assert (document["windows"], document["window"], document["rounding"]) == (2, 48, "rtn")
    page = (output / "compare.html").read_text()
    for row in document["rows"]:
        assert row["method"] in result.out and row["method"] in page
        assert f"{row['kl']:.4f}" in result.out and f"{row['kl']:.4f}" in page
    again = pq(*arguments(tiny_llama_dir, text_file, evaluation, output, *common, "--force", "--json"))
    printed = json.loads(again.out)

    def measured(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows]

    assert measured(printed["rows"]) == measured(document["rows"])  # one seed, one table


def test_unknown_method_lists_the_names(pq: Runner, tiny_llama_dir: Path, tmp_path: Path) -> None:
    line = pq.refuses(
        "compare", tiny_llama_dir, "--w4a4", "--methods", "fp,gtpq", "-o", tmp_path / "out", code=2, says=("'gtpq'",)
    )
    assert all(name in line for name in METHODS)
    assert not (tmp_path / "out").exists()


def test_help_lists_every_method(pq: Runner) -> None:
    listed = " ".join(pq("compare", "--help").out.split())
    assert f"Which to run: {', '.join(name for name in METHODS)}" in listed


def test_calibration_text_is_no_evaluation_text(
    pq: Runner, tiny_llama_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    arguments_ = arguments(tiny_llama_dir, text_file, text_file, tmp_path / "out", "--methods", "fp")
    pq.refuses(*arguments_, code=2, says=(text_file.name, "13-grams"))
    assert not (tmp_path / "out").exists()


def test_short_evaluation_text(
    pq: Runner, tiny_llama_dir: Path, text_file: Path, evaluation: Path, tmp_path: Path
) -> None:
    arguments_ = arguments(tiny_llama_dir, text_file, evaluation, tmp_path / "out", "--methods", "fp", "--windows", 9)
    pq.refuses(*arguments_, says=("200 tokens", "need 432", "--windows"))


def test_existing_output_is_kept(
    pq: Runner, tiny_llama_dir: Path, text_file: Path, evaluation: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").write_text("x")
    pq.refuses(*arguments(tiny_llama_dir, text_file, evaluation, tmp_path, "--methods", "fp"), says=("exists",))
    assert (tmp_path / "mine").read_text() == "x"


# --- the page --------------------------------------------------------------------------------------


def document_of(found: dict[str, Row], **changes: Any) -> dict[str, Any]:
    return {
        "title": "model",
        "pq_export": "0.1.0",
        "precision": "W4A4KV4",
        "plan": {"prefix": "auto", "seed": 0},
        "rounding": "gptq",
        "device": "cpu",
        "text": "words.txt",
        "windows": 2,
        "window": 48,
        "rows": [vars(row) for row in found.values()],
        **changes,
    }


def test_page_is_whole_and_repeatable(rows: dict[str, Row]) -> None:
    page = render(document_of(rows))
    assert page == render(document_of(rows))
    assert page.count("<svg") == 1
    assert "http" not in page and "<script" not in page and "None" not in page
    text = re.sub(r"<[^>]*>", " ", page)
    for row in rows.values():
        assert f"{row.top1:.3f}" in text and row.title in text
    assert re.search(r"quarot\s+W4A4KV4\s+dynamic\s+R3, R4, token scales", " ".join(text.split()))


def test_page_without_values_and_with_hostile_names(rows: dict[str, Row]) -> None:
    hostile = "<script>alert(1)</script>$x_1$\n"
    plain = [{**vars(row), "method": hostile, "title": hostile, "prefix": (hostile,)} for row in rows.values()]
    for row in plain[1:]:
        row |= {"perplexity": None, "kl": math.nan, "ratio": math.inf}
    page = render(document_of(rows, title=hostile, text=hostile, plan={hostile: hostile}, rows=plain))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert render(document_of(rows, rows=[])).count("<svg") == 0
