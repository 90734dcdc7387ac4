"""Tasks through lm-eval: one adapter for checkpoint, fake-quant model and bundle. Nothing needs a network."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from pq_export.bundle import Bundle, open_bundle
from pq_export.calib.checkpoint import load_checkpoint
from pq_export.calibration import load_calibration
from pq_export.errors import PqExportError, UsageError
from pq_export.evaluate import tasks as harness
from pq_export.evaluate.adapter import Adapter, padded
from pq_export.evaluate.subject import Subject, bundle_subject, calibration_subject, checkpoint_subject
from pq_export.runtime import OrtDecoder, session_options
from pq_export.simulate import simulated_decoder
from pq_export.stages import Stages
from pq_export.validate.greedy import torch_greedy
from tests.cli_runner import Runner
from tests.conftest import BOS, EOS, VOCAB, random_words, word_tokenizer

NAMES = ["tiny_choice", "tiny_answer", "tiny_text"]
PREFIX = ("w77", "<s>")

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{validation: "{data}", train: "{data}"}}, cache_dir: "{cache}"}}
output_type: multiple_choice
validation_split: validation
fewshot_split: train
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
ANSWER = """
task: tiny_answer
dataset_path: json
dataset_kwargs: {{data_files: {{validation: "{data}"}}, cache_dir: "{cache}"}}
output_type: generate_until
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["w1"], max_gen_toks: 12}}
metric_list:
  - metric: exact_match
"""
TEXT = """
task: tiny_text
dataset_path: json
dataset_kwargs: {{data_files: {{validation: "{data}"}}, cache_dir: "{cache}"}}
output_type: loglikelihood_rolling
validation_split: validation
doc_to_text: ""
doc_to_target: "{{{{passage}}}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""


@pytest.fixture
def pq(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    """Without lm-eval's own tasks: their index takes seconds."""
    monkeypatch.setattr(harness, "Tasks", partial(harness.Tasks, defaults=False))
    return Runner(monkeypatch, capsys)


@pytest.fixture(scope="module")
def model_dir(checkpoint_dir: Callable[[str], Path]) -> Path:
    """With an lm_head of its own: a tied one would answer with the prompt's last word for ever."""
    return checkpoint_dir("llama-mha")


def own_tasks(directory: Path) -> harness.Tasks:
    return harness.Tasks(directory, defaults=False)


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks over 24 documents: questions of 1 to 40 words, answers of 1 to 3."""
    directory = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)
    with open(directory / "documents.jsonl", "w", encoding="utf-8") as file:
        for index in range(24):
            words = [random_words(int(rng.integers(1, high)), 10 * index + i) for i, high in enumerate((41, 4, 4, 4))]
            document = {"question": words[0], "choices": words[1:], "label": index % 3}
            file.write(json.dumps({**document, "passage": random_words(90, 1000 + index)}) + "\n")
    names = {"data": directory / "documents.jsonl", "cache": directory / "cache"}
    for name, text in zip(NAMES, (CHOICE, ANSWER, TEXT), strict=True):
        (directory / f"{name}.yaml").write_text(text.format(**names), encoding="utf-8")
    missing = CHOICE.replace("tiny_choice", "tiny_missing").format(**{**names, "data": directory / "missing.jsonl"})
    (directory / "tiny_missing.yaml").write_text(missing, encoding="utf-8")
    sampled = ANSWER.replace("tiny_answer", "tiny_sampled").replace("until:", "do_sample: true, until:")
    (directory / "tiny_sampled.yaml").write_text(sampled.format(**names), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def exported(
    model_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Path]]:
    """``exported("w8a8")`` -> bundle of the tiny Llama with a prefix that ends in BOS; beside it ``.calib``."""
    from pq_export.build import build
    from pq_export.calib.pipeline import calibrate
    from pq_export.plan import Plan
    from pq_export.precision import Precision
    from pq_export.targets import find_target

    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            output = tmp_path_factory.mktemp("exported") / name
            plan = Plan(Precision.named(name), calib_data=str(text_file), calib_samples=4, seq_len=32)
            plan = replace(plan, prefix=" ".join(PREFIX))
            calibration = output.with_name(f"{name}.calib")
            calibrate(load_checkpoint(str(model_dir)), plan, calibration, Stages())
            build(load_calibration(calibration), calibration, find_target("ort"), output, Stages())
            made[name] = output
        return made[name]

    yield make


def fake_quant(exported: Path) -> Subject:
    directory = exported.with_name(f"{exported.name}.calib")
    calibration = load_calibration(directory)
    return calibration_subject("calib", simulated_decoder(calibration), calibration, directory)


def onnx(exported: Path) -> Subject:
    bundle: Bundle = open_bundle(exported)
    options = session_options(int(bundle.config["precision"][1]), 1)
    return bundle_subject("bundle", OrtDecoder(bundle.model_path, options), bundle)


@pytest.fixture(scope="module")
def fp(model_dir: Path) -> Subject:
    checkpoint = load_checkpoint(str(model_dir))
    return checkpoint_subject("fp", checkpoint.decoder, checkpoint.tokenizer, EOS)


def score_requests(*pairs: tuple[str, str]) -> list[Instance]:
    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]


def answer_requests(*prompts: str, **options: Any) -> list[Instance]:
    return [Instance("generate_until", {}, (prompt, options), i) for i, prompt in enumerate(prompts)]


PAIRS = [
    ("w5 w6 w7", " w8 w9"),
    ("w5", " w8"),
    ("w5", " w10"),
    ("w5", " w8 w9 w10"),
    ("", "w11 w12"),
    ("w5 ", "w8"),
    (" ".join(f"w{i}" for i in range(10, 60)), " w7"),
]


# ---- the same figures as lm-eval's own class -----------------------------------------------------------


def test_results_are_those_of_lm_evals_own_class(fp: Subject, model_dir: Path, task_dir: Path) -> None:
    """Multiple choice, generation and whole texts; every document, with examples in front, score for score."""
    theirs_model = HFLM(str(model_dir), device="cpu", batch_size=5, dtype="float32")
    options: dict[str, Any] = {"num_fewshot": 2, "log_samples": True}
    ours, theirs = (
        simple_evaluate(m, tasks=names, task_manager=own_tasks(task_dir), **options)
        for names in (NAMES,)
        for m in (Adapter(fp, 3), theirs_model)
    )
    for name in NAMES:
        for a, b in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            assert a["arguments"] == b["arguments"]
            for one, other in zip(a["resps"], b["resps"], strict=True):
                assert_same(one[0], other[0])
    for name in NAMES:
        for metric, value in theirs["results"][name].items():
            if isinstance(value, float) and "stderr" not in metric:
                assert ours["results"][name][metric] == pytest.approx(value, rel=1e-5), (name, metric)
    answers = {a["resps"][0][0] for a in ours["samples"]["tiny_answer"]}
    assert len(answers) > 12 and 0 < ours["results"]["tiny_choice"]["acc,none"] < 1


def assert_same(a: Any, b: Any) -> None:
    """An answer, a log likelihood, or a pair of log likelihood and whether it is greedy."""
    if isinstance(a, (str, float)):
        assert a == (b if isinstance(a, str) else pytest.approx(b, rel=1e-5))
    else:
        assert a[0] == pytest.approx(b[0], rel=1e-5, abs=1e-5) and a[1] == b[1]


def test_requests_are_scored_as_by_lm_evals_own_class(fp: Subject, model_dir: Path) -> None:
    theirs = HFLM(str(model_dir), device="cpu", batch_size=1, dtype="float32")
    for a, b in zip(
        Adapter(fp).loglikelihood(score_requests(*PAIRS)), theirs.loglikelihood(score_requests(*PAIRS)), strict=True
    ):
        assert_same(a, b)


# ---- by hand ---------------------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(subject: Subject, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    ids = torch.tensor([context + continuation])
    logits = subject.logits_of(ids)[0].double()
    log_probabilities = logits.log_softmax(-1)
    places = [(len(context) - 1 + i, token) for i, token in enumerate(continuation)]
    total = sum(log_probabilities[place, token].item() for place, token in places)
    return total, all(int(logits[place].argmax()) == token for place, token in places)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_log_likelihoods_are_those_computed_by_hand(fp: Subject, batch_size: int) -> None:
    best = int(fp.logits_of(torch.tensor([[5, 6, 7]]))[0, -1].argmax())
    pairs = [*PAIRS, ("w5 w6 w7", f" w{best}")]
    found = Adapter(fp, batch_size).loglikelihood(score_requests(*pairs))
    for (context, continuation), result in zip(pairs, found, strict=True):
        ids = [int(w[1:]) for w in context.split()] or [BOS]
        assert_same(result, by_hand(fp, ids, [int(w[1:]) for w in continuation.split()]))
    assert found[-1][1] and not found[0][1]


def test_a_long_text_is_predicted_in_windows(fp: Subject) -> None:
    """Every token once: the first from BOS, a window's first from the last token of the one before."""
    short = replace(fp, context=10)
    ids = list(range(20, 45))
    (found,) = Adapter(short).loglikelihood_rolling([Instance("r", {}, (" ".join(f"w{i}" for i in ids),), 0)])
    expected = by_hand(fp, [BOS], ids[:10])[0] + by_hand(fp, [ids[9]], ids[10:20])[0]
    expected += by_hand(fp, ids[14:20], ids[20:])[0]  # the last window is filled with context
    assert found == pytest.approx(expected, rel=1e-5)


def test_what_does_not_fit_is_cut_and_counted_or_refused(fp: Subject) -> None:
    adapter = Adapter(replace(fp, context=4))
    pairs = [("w5 w6 w7 w8 w9", " w10"), ("w5 w6 w7 w8", " w10"), ("w3 w5 w6 w7", " w8 w9")]
    found = adapter.loglikelihood(score_requests(*pairs))
    assert_same(found[0], by_hand(fp, [6, 7, 8, 9], [10]))
    assert_same(found[1], by_hand(fp, [5, 6, 7, 8], [10]))
    assert_same(found[2], by_hand(fp, [5, 6, 7], [8, 9]))
    assert adapter.truncated == 2
    with pytest.raises(PqExportError, match="continuation of 5 tokens does not fit in the context of 4"):
        adapter.loglikelihood(score_requests(("w3", " w5 w6 w7 w8 w9")))
    assert adapter.generate_until(answer_requests("w4 w5 w6 w7", max_gen_toks=2, until=[])) == Adapter(
        fp
    ).generate_until(answer_requests("w6 w7", max_gen_toks=2, until=[]))
    assert adapter.truncated == 3
    with pytest.raises(PqExportError, match="asks for 4 new tokens; the context holds 4"):
        adapter.generate_until(answer_requests("w4", max_gen_toks=4))


def test_choices_that_differ_in_their_last_token_run_once(fp: Subject) -> None:
    shapes = []

    def counted(ids: torch.Tensor, mask: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        shapes.append(tuple(ids.shape))
        return fp.step(ids, mask, state)

    pairs = [("w5 w6", f" w{i}") for i in range(7, 11)] + [("w9", " w5")]
    Adapter(replace(fp, step=counted)).loglikelihood(score_requests(*pairs))
    assert shapes == [(2, 2)]


# ---- generation -------------------------------------------------------------------------------------------

PROMPTS = ("w5 w6 w7", "w8", "w9 w10 w11 w12 w13", "w100 w101")


def words(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_answers_in_a_batch_are_those_of_each_prompt_alone(
    fp: Subject, model_dir: Path, exported: Callable[[str], Path], batch_size: int
) -> None:
    """Padding in front changes nothing, in PyTorch and in the graph."""
    calibration = load_calibration(exported("w4a16").with_name("w4a16.calib"))
    for subject, decoder in (
        (fp, load_checkpoint(str(model_dir)).decoder),
        (fake_quant(exported("w4a16")), simulated_decoder(calibration)),
        (onnx(exported("w4a16")), simulated_decoder(calibration)),
    ):
        subject = replace(subject, stop_ids=frozenset())
        found = Adapter(subject, batch_size).generate_until(answer_requests(*PROMPTS, max_gen_toks=8, until=[]))
        for prompt, answer in zip(PROMPTS, found, strict=True):
            ids = torch.tensor([[int(w[1:]) for w in prompt.split()]])
            expected = [i for i in torch_greedy(decoder, ids, 8) if i not in (BOS, EOS, 0)]
            assert answer == words(expected), subject.name


def test_an_answer_ends_at_a_stop_token_or_before_a_stop_sequence(fp: Subject) -> None:
    free = replace(fp, stop_ids=frozenset())
    (whole,) = Adapter(free).generate_until(answer_requests(PROMPTS[0], max_gen_toks=8, until=[]))
    ids = [int(w[1:]) for w in whole.split()]
    assert len(ids) > 4
    for until in (f"w{ids[2]} w{ids[3]}", ["never", f"w{ids[2]} w{ids[3]}"]):
        (cut,) = Adapter(free).generate_until(answer_requests(PROMPTS[0], max_gen_toks=8, until=until))
        assert cut == words(ids[:2]) + " "
    stopped = replace(fp, stop_ids=frozenset({ids[3]}))
    (ended,) = Adapter(stopped).generate_until(answer_requests(PROMPTS[0], max_gen_toks=8))
    assert ended == words(ids[: ids.index(ids[3])])
    with pytest.raises(PqExportError, match="answers are greedy here"):
        Adapter(fp).generate_until(answer_requests("w5", do_sample=True, temperature=0.7))


# ---- the prefix -------------------------------------------------------------------------------------------


def test_the_prefix_takes_room_and_its_bos_is_not_given_twice(exported: Callable[[str], Path], fp: Subject) -> None:
    calibration = load_calibration(exported("w8a8").with_name("w8a8.calib"))
    assert calibration.prefix.token_ids == (77, BOS)
    for subject in (fake_quant(exported("w8a8")), onnx(exported("w8a8"))):
        assert subject.bos_in_prefix and subject.context == calibration.decoder.max_position_embeddings - 2
        adapter = Adapter(subject)
        plain, with_bos = adapter.loglikelihood(score_requests(("w5 w6", " w7"), ("<s> w5 w6", " w7")))
        assert plain == with_bos
        assert_same(plain, by_hand(subject, [5, 6], [7]))
        answers = adapter.generate_until(answer_requests("w5 w6", "<s> w5 w6", max_gen_toks=4, until=[]))
        assert answers[0] == answers[1]
        # A word tokenizer has no line break: a text begins after EOS, not after a second BOS.
        assert subject.start_id() == EOS
        assert_same(adapter.loglikelihood(score_requests(("", "w5 w6")))[0], by_hand(subject, [EOS], [5, 6]))
        for nothing in ("<s>", "   "):  # only the BOS that is taken away, only spaces
            assert_same(adapter.loglikelihood(score_requests((nothing, "w5")))[0], by_hand(subject, [EOS], [5]))
        # More than one: the chat template's role marker.
        assert subject.without_second_bos([BOS, 5, BOS, 6]) == [BOS, 5, BOS, 6]
    assert not fp.bos_in_prefix and fp.start_id() == BOS and fp.without_second_bos([BOS, 5]) == [BOS, 5]
    plain, with_bos = Adapter(fp).loglikelihood(score_requests(("w5 w6", " w7"), ("<s> w5 w6", " w7")))
    assert plain != with_bos


def test_a_text_begins_after_a_line_break_where_the_tokenizer_has_one(exported: Callable[[str], Path]) -> None:
    class Tokenizer:
        bos_token_id, eos_token_id = 1, 2

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [198]}

    subject = replace(fake_quant(exported("w8a8")), tokenizer=Tokenizer())
    assert subject.start_id() == 198 and replace(subject, bos_in_prefix=False).start_id() == 1


def test_a_bos_that_the_tokenizer_adds_is_given_once_or_not_at_all(
    exported: Callable[[str], Path], fp: Subject
) -> None:
    """Llama's tokenizers put BOS in front by themselves."""
    from tokenizers.processors import TemplateProcessing

    adding = word_tokenizer()
    template = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    adding.backend_tokenizer.post_processor = template
    assert adding.encode("w5") == [BOS, 5]
    text = Instance("r", {}, ("w5 w6",), 0)
    for subject, before in ((fp, [BOS]), (fake_quant(exported("w8a8")), [])):
        adapter = Adapter(replace(subject, tokenizer=adding))
        found = adapter.loglikelihood(score_requests(("w5", " w6"), ("<s> w5", " w6")))
        for result in found:
            assert_same(result, by_hand(subject, [*before, 5], [6]))
        expected = by_hand(subject, before or [EOS], [5, 6])[0]
        assert adapter.loglikelihood_rolling([text]) == [pytest.approx(expected, rel=1e-5)]


# ---- fake-quant model and bundle --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w8a8", "w4a16"])
def test_fake_quant_model_and_bundle_agree(exported: Callable[[str], Path], task_dir: Path, name: str) -> None:
    options: dict[str, Any] = {"tasks": NAMES, "task_manager": own_tasks(task_dir), "limit": 12}
    a, b = (simple_evaluate(Adapter(s(exported(name)), 4), **options) for s in (fake_quant, onnx))
    tolerance = 1e-3 if name == "w4a16" else 0.02  # at 8 bits a tie may round the other way and move a code
    for task in NAMES[::2]:
        for one, other in zip(a["samples"][task], b["samples"][task], strict=True):
            for (x,), (y,) in zip(one["resps"], other["resps"], strict=True):
                x, y = (x[0], y[0]) if isinstance(x, tuple) else (x, y)
                assert x == pytest.approx(y, rel=tolerance)
    answers = [[s["resps"][0][0] for s in r["samples"]["tiny_answer"]] for r in (a, b)]
    assert sum(x == y for x, y in zip(*answers, strict=True)) >= (12 if name == "w4a16" else 9)


# ---- tasks by name, and what goes wrong -------------------------------------------------------------------


def test_scores_name_metric_samples_and_shots(fp: Subject, task_dir: Path) -> None:
    tasks = own_tasks(task_dir)
    names = tasks.named(["tiny_choice", "tiny_te*"])
    assert set(names) == {"tiny_choice", "tiny_text"}
    scores, truncated = harness.evaluate(fp, tasks, names, Stages(), limit=6, num_fewshot=1)
    found = {(s.task, s.metric): s for s in scores}
    assert set(found) == {
        ("tiny_choice", "acc"),
        ("tiny_choice", "acc_norm"),
        ("tiny_text", "word_perplexity"),
        ("tiny_text", "bits_per_byte"),
    }
    accuracy = found["tiny_choice", "acc"]
    assert (accuracy.samples, accuracy.num_fewshot, accuracy.filter) == (6, 1, "none")
    assert accuracy.value * 6 == pytest.approx(round(accuracy.value * 6)) and accuracy.stderr is not None
    assert truncated == 0
    words_per_text = 90
    total = Adapter(fp).loglikelihood_rolling(
        [Instance("r", {}, (random_words(words_per_text, 1000 + i),), i) for i in range(6)]
    )
    perplexity = math.exp(-sum(total) / (6 * words_per_text))
    assert found["tiny_text", "word_perplexity"].value == pytest.approx(perplexity, rel=1e-5)


def test_unknown_tasks_and_datasets_out_of_reach_are_one_line(fp: Subject, task_dir: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown task 'tiny_choise'\. Near it: tiny_choice"):
        own_tasks(task_dir).named(["tiny_choise"])
    with pytest.raises(UsageError, match="is not a directory"):
        own_tasks(task_dir / "nowhere")
    with pytest.raises(PqExportError, match=r"tiny_missing: the task or its dataset cannot be loaded \(FileNotFound"):
        harness.evaluate(fp, own_tasks(task_dir), ["tiny_missing"], Stages())
    with pytest.raises(PqExportError, match="answers are greedy here"):
        harness.evaluate(fp, own_tasks(task_dir), ["tiny_sampled"], Stages())


def test_without_a_network_it_is_one_line(fp: Subject, task_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(**options: Any) -> None:
        raise ConnectionError("Couldn't reach 'some/data' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(PqExportError, match=r"tiny_choice: .* \(ConnectionError: Couldn't reach .* Check the network"):
        harness.evaluate(fp, own_tasks(task_dir), ["tiny_choice"], Stages())


def test_lm_evals_own_tasks_and_yours_are_found(task_dir: Path) -> None:
    names = ["tiny_choice", "arc_easy", "hellaswag", "winogrande", "piqa", "wikitext", "mmlu"]
    assert sorted(harness.Tasks(task_dir).named(names)) == sorted(names)


def test_padding_is_masked() -> None:
    ids, mask = padded([[5, 6], [7]], behind=True)
    assert ids.tolist() == [[5, 6], [7, 0]] and mask.tolist() == [[1, 1], [1, 0]]
    ids, mask = padded([[5, 6], [7]], behind=False)
    assert ids.tolist() == [[5, 6], [0, 7]] and mask.tolist() == [[1, 1], [0, 1]]


# ---- command line ----------------------------------------------------------------------------------------


def test_command_scores_all_three_kinds(
    pq: Runner, exported: Callable[[str], Path], model_dir: Path, task_dir: Path, other_text_file: Path
) -> None:
    bundle = exported("w8a8")
    common = ("--tasks", "tiny_choice,tiny_answer", "--include-path", task_dir, "--limit", 8, "--json")
    text = ("--text", other_text_file, "--windows", 3, "--window", 64)
    documents = {}
    for what in (model_dir, bundle, f"{bundle}.calib"):
        model = () if what == model_dir else ("--model", model_dir)
        result = pq("evaluate", what, *common, *text, *model)
        assert result.code == 0, result.err
        document = json.loads(result.out)
        documents[document["kind"]] = document
        assert {s["task"] for s in document["tasks"]["scores"]} == {"tiny_choice", "tiny_answer"}
        assert all(s["samples"] == 8 for s in document["tasks"]["scores"])
    rows = {kind: {row["model"]: row for row in d["text"]["rows"]} for kind, d in documents.items()}
    assert list(rows["checkpoint"]) == ["checkpoint"]
    assert list(rows["bundle"]) == ["FP", "FP + prefix", "bundle"]
    assert rows["calibration"]["FP"]["perplexity"] == pytest.approx(rows["checkpoint"]["checkpoint"]["perplexity"])
    for kind in ("bundle", "calibration"):
        assert rows[kind]["FP"]["kl"] == 0.0 and rows[kind]["FP"]["top1"] == 1.0
        assert rows[kind][kind]["kl"] > rows[kind]["FP + prefix"]["kl"] > 0
    assert rows["bundle"]["bundle"]["kl"] == pytest.approx(rows["calibration"]["calibration"]["kl"], rel=0.02)


def test_command_prints_one_table(pq: Runner, model_dir: Path, task_dir: Path, text_file: Path) -> None:
    text = ("--text", text_file, "--windows", 1, "--window", 64)
    result = pq("evaluate", model_dir, "--tasks", "tiny_choice", "--include-path", task_dir, *text)
    assert result.code == 0, result.err
    lines = [line for line in result.out.splitlines() if line.strip()]
    assert "(checkpoint)" in lines[0] and "± stderr" in result.out
    for word in ("tiny_choice", "acc_norm", "perplexity", "words.txt", "1 x 64"):
        assert word in result.out
    assert "WARNING" not in result.err


def test_bad_input_is_one_line(
    pq: Runner,
    exported: Callable[[str], Path],
    checkpoint_dir: Callable[[str], Path],
    model_dir: Path,
    task_dir: Path,
    other_text_file: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle, text = exported("w8a8"), ("--text", other_text_file, "--windows", 1, "--window", 64)
    pq.refuses("evaluate", bundle, code=2, says=("nothing to evaluate", "--tasks"))
    pq.refuses("evaluate", bundle, "--tasks", "no_such_task", code=2, says=("unknown task 'no_such_task'",))
    pq.refuses("evaluate", bundle, "--tasks", "tiny_choice", code=2, says=("--include-path",))
    included = ("--include-path", task_dir)
    pq.refuses("evaluate", bundle, "--tasks", "tiny_missing", *included, says=("tiny_missing", "cannot be loaded"))
    pq.refuses("evaluate", bundle, "--text", other_text_file, "--windows", 999, says=("999 windows of 510 need",))
    pq.refuses("evaluate", bundle, "--text", text_file, code=2, says=("is the calibration text itself",))
    with text_file.open() as calibrated, (tmp_path / "mixed.txt").open("w") as mixed:  # its beginning is evaluated
        mixed.write(calibrated.read() + other_text_file.read_text() * 200)
    small = ("--windows", 1, "--window", 64)
    pq.refuses("evaluate", bundle, "--text", tmp_path / "mixed.txt", *small, code=2, says=("occur in the calibration",))
    pq.refuses("evaluate", bundle, "--text", "nowhere.txt", says=("nowhere.txt", "cannot be read"))
    pq.refuses("evaluate", "nowhere", *text, says=("no such path",))
    pq.refuses("evaluate", bundle, *text, "--model", checkpoint_dir("llama"), says=("is not the checkpoint",))
    pq.refuses("evaluate", model_dir, *text, "--model", model_dir, code=2, says=("calibration or a bundle",))
    pq.refuses("evaluate", bundle, "--tasks", "tiny_choice", *included, "--model", model_dir, code=2, says=("--text",))
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    pq.refuses("evaluate", bundle, "--tasks", "tiny_choice", says=("lm-eval", "pip install 'pq-export[eval]'"))


def test_scores_are_finite_for_a_family_without_bos(checkpoint_dir: Callable[[str], Path]) -> None:
    checkpoint = load_checkpoint(str(checkpoint_dir("qwen3")))
    subject = checkpoint_subject("qwen3", checkpoint.decoder, checkpoint.tokenizer, [EOS, 7])
    assert subject.stop_ids == {EOS, 7} and subject.start_id() == EOS
    value, _ = Adapter(subject).loglikelihood(score_requests(("", "w5 w6")))[0]
    assert_same((value, False), (*by_hand(subject, [EOS], [5, 6])[:1], False))
    assert value < 0 and len(checkpoint.tokenizer) == VOCAB
