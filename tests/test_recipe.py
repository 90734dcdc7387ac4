"""Recipes: the shipped ones resolve, and each mistake in a file is said with the line it stands on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from pq_export.calib.recipe import kinds_and_options, load_recipe, read_recipe, recipe_names
from pq_export.calib.steps import STEPS, Phase
from pq_export.errors import PqExportError
from pq_export.plan import Plan, resolve_plan
from pq_export.precision import WEIGHT_ACTIVATION, Precision
from tests.cli_runner import Runner


@pytest.fixture
def pq(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(monkeypatch, capsys)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# --- shipped recipes -------------------------------------------------------------------------------


def test_the_recipes_that_ship() -> None:
    assert {"fast", "short", "default", "best", "npu", "npu-w8a8", "npu-w8a8-tuned"} == set(recipe_names())


@pytest.mark.parametrize("precision", WEIGHT_ACTIVATION)
@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_resolves_to_a_plan(name: str, precision: str) -> None:
    content = load_recipe(name)
    plan = resolve_plan(precision, None, content)
    assert plan.precision == Precision.named(precision, content.get("kv"))
    steps = kinds_and_options(plan)
    assert steps and all(isinstance(options, kind.options) for kind, options in steps)
    assert [kind.phase for kind, _ in steps] == sorted(kind.phase for kind, _ in steps)
    assert json.loads(json.dumps(plan.to_dict())) == plan.to_dict()


def test_no_name_is_the_default_recipe() -> None:
    assert load_recipe(None) == load_recipe("default")
    assert ("gptq" in dict(load_recipe(None)["steps"])) and "gptq" not in dict(load_recipe("fast")["steps"])


@pytest.mark.parametrize(("name", "weight_bits"), [("npu", 4), ("npu-w8a8", 8), ("npu-w8a8-tuned", 8)])
def test_npu_has_nothing_online(name: str, weight_bits: int) -> None:
    plan = resolve_plan(None, None, load_recipe(name))
    assert (plan.rotate, plan.precision) == ("offline", Precision(weight_bits, 8, 8))
    assert "center" not in dict(plan.steps)  # a vector that is added is an operation too


def test_npu_w8a8_tuned_is_npu_w8a8_and_a_step_more() -> None:
    plain, tuned = load_recipe("npu-w8a8"), load_recipe("npu-w8a8-tuned")
    assert tuned["steps"][:-1] == plain["steps"] and tuned["steps"][-1][0] == "tune_model"
    assert {**tuned, "steps": ()} == {**plain, "steps": ()}


def test_a_file_may_be_called_by_a_name_without_suffix_only_if_it_is_there(tmp_path: Path) -> None:
    path = tmp_path / "mine"
    with pytest.raises(PqExportError) as caught:
        load_recipe(str(path))
    assert "neither a recipe nor a file" in str(caught.value) and "fast" in str(caught.value)
    path.write_text("steps: [clip_search]\n")
    assert load_recipe(str(path)) == {"steps": (("clip_search", {}),)}
    with pytest.raises(PqExportError, match="cannot be read"):
        load_recipe(str(tmp_path / "absent.yaml"))


# --- what a file may say ---------------------------------------------------------------------------


def test_steps_with_and_without_options(tmp_path: Path) -> None:
    text = """\
    # a comment
    precision: w4a4
    calib-samples: 5
    steps:
      - keep_8bit: {by: ratio, linears: [layers.1.mlp.down_proj]}
      - clip_search
      - gptq:
          damping: 1
          samples: null
          act_order: false
      - tune_blocks:
      - clip_search: {weights: false}
    """
    content = read_recipe(written(tmp_path, text))
    plan = resolve_plan(None, None, content)
    assert plan.calib_samples == 5
    assert [name for name, _ in plan.steps] == ["keep_8bit", "clip_search", "gptq", "tune_blocks", "clip_search"]
    options = [options for _, options in kinds_and_options(plan)]
    assert options[0].by == "ratio" and options[0].linears == ["layers.1.mlp.down_proj"]
    assert (options[2].damping, options[2].samples, options[2].act_order) == (1, None, False)
    assert options[3] == STEPS["tune_blocks"].options()
    assert options[4].weights is False


@pytest.mark.parametrize("name", STEPS)
def test_defaults_of_every_step_are_what_it_accepts(tmp_path: Path, name: str) -> None:
    """Each option of each step, written out with its default, is the step without options."""
    kind = STEPS[name]
    defaults = {f.name: f.default for f in dataclasses.fields(kind.options)}
    lines = [f"      {key}: {json.dumps(value)}" for key, value in defaults.items()]
    own = [f"  - {name}:" + "" if lines else f"  - {name}", *lines]
    text = "\n".join(["steps:", *(["  - clip_search"] if kind.phase >= Phase.BLOCKS else []), *own])
    if kind.phase < Phase.BLOCKS:
        text += "\n  - clip_search"
    plan = resolve_plan("w4a4", None, read_recipe(written(tmp_path, text)))
    (options,) = [o for k, o in kinds_and_options(plan) if k is kind][-1:]
    for field in dataclasses.fields(kind.options):
        value = getattr(options, field.name)
        assert (tuple(value) if isinstance(value, list) else value) == field.default


# --- mistakes --------------------------------------------------------------------------------------

SEARCH = "steps:\n  - clip_search\n"
MISTAKES: dict[str, tuple[str, int, tuple[str, ...]]] = {  # text, line, what is said
    "unknown step": (SEARCH + "  - gtpq\n", 3, ("unknown step 'gtpq'", "Did you mean 'gptq'?")),
    "unknown step like no other": ("steps:\n  - xyzzy\n", 2, ("unknown step 'xyzzy'", "There are: ", "clip_search")),
    "step that is a number": ("steps:\n  - 5\n", 2, ("unknown step '5'",)),
    "step that is empty": ("steps:\n  - clip_search\n  -\n", 3, ("unknown step 'None'",)),
    "a step twice in one item": (
        SEARCH + "  - {gptq: {damping: 0.5}, gptq: {damping: 0.1}}\n",
        3,
        ("a step stands twice in one item",),
    ),
    "a date that is none": ("seed: 2024-02-31\n", 1, ("is not YAML",)),
    "a number that is none": ("prefix: none\ncalib_samples: !!int abc\n", 2, ("is not YAML",)),
    "a site twice": ("steps:\n  - center: {sites: [self_attn.key, self_attn.key]}\n", 2, ("stands twice",)),
    "a negative threshold": ("steps:\n  - keep_8bit: {threshold: -3}\n", 2, ("threshold must be at least 0",)),
    "two steps in one item": ("steps:\n  - {clip_search: {}, gptq: {}}\n", 2, ("unknown step",)),
    "unknown option": (
        SEARCH + "  - gptq:\n      dampning: 0.1\n",
        4,
        ("step 'gptq' has no option 'dampning'", "Did you mean 'damping'?"),
    ),
    "unknown option, inline": (SEARCH + "  - gptq: {\n      block: 64,\n      x: 1}\n", 5, ("no option 'x'",)),
    "options that are a list": (SEARCH + "  - gptq: [1, 2]\n", 3, ("options of step 'gptq' are no mapping",)),
    "options that are a word": (SEARCH + "  - gptq: fast\n", 3, ("options of step 'gptq' are no mapping",)),
    "text for a number": (SEARCH + "  - gptq:\n      damping: much\n", 4, ("damping is 'much', not a number",)),
    "true for a number": (SEARCH + "  - gptq: {block: true}\n", 3, ("block is True, not a whole number",)),
    "fraction for a whole number": (SEARCH + "  - gptq: {block: 1.5}\n", 3, ("block is 1.5, not a whole number",)),
    "number for true or false": (SEARCH + "  - gptq: {act_order: 1}\n", 3, ("act_order is 1, not true or false",)),
    "text for a number or null": (
        SEARCH + "  - gptq: {samples: all}\n",
        3,
        ("samples is 'all', not a whole number or null",),
    ),
    "no such choice": (
        "steps:\n  - keep_8bit: {by: luck}\n  - clip_search\n",
        2,
        ("by is 'luck', not ratio or error",),
    ),
    "list of the wrong things": (
        "steps:\n  - keep_8bit:\n      linears: [1]\n  - clip_search\n",
        3,
        ("linears is [1], not a list",),
    ),
    "share above 1": ("steps:\n  - keep_8bit:\n      budget: 2\n  - clip_search\n", 3, ("budget must be between",)),
    "no samples": (
        SEARCH + "  - tune_blocks:\n      epochs: 3\n      samples: 0\n",
        5,
        ("samples must be at least 1",),
    ),
    "negative rate": (
        SEARCH + "  - tune_model:\n      weight_lr: -1\n",
        4,
        ("weight_lr must be 0 or a positive number",),
    ),
    "rate that is no number": (SEARCH + "  - tune_blocks: {scale_lr: .nan}\n", 3, ("scale_lr must be",)),
    "all rates 0": (
        SEARCH + "  - tune_model:\n      weight_lr: 0\n      scale_lr: 0\n      norm_lr: 0\n",
        3,
        ("all are 0",),
    ),
    "no clipping at all": (SEARCH + "  - tune_blocks: {grad_clip: 0}\n", 3, ("grad_clip must be positive",)),
    "negative damping": (SEARCH + "  - gptq: {damping: -0.1}\n", 3, ("damping must be between 0 and 1",)),
    "infinite damping": (SEARCH + "  - gptq: {damping: .inf}\n", 3, ("damping must be between 0 and 1",)),
    "blocks of no columns": (SEARCH + "  - gptq: {block: 0}\n", 3, ("block must be at least 1",)),
    "too much propagation": (SEARCH + "  - gptq: {propagation: 1.5}\n", 3, ("propagation must be between 0 and 1",)),
    "no passes": ("steps:\n  - clip_search: {passes: 0}\n", 2, ("passes must be at least 1",)),
    "negative penalty": (SEARCH + "  - learned_rounding: {penalty: -1}\n", 3, ("penalty must be 0 or",)),
    "option twice": (SEARCH + "  - gptq:\n      block: 8\n      block: 9\n", 5, ("'block' stands here a second time",)),
    "phases in the wrong order": (
        SEARCH + "  - gptq\n  - smooth_attention\n",
        4,
        ("step 'smooth_attention' cannot come after 'gptq'", "Order: "),
    ),
    "bits after blocks": (SEARCH + "  - key_bits\n", 3, ("step 'key_bits' cannot come after 'clip_search'",)),
    "blocks after the model": (
        SEARCH + "  - tune_model\n  - gptq\n",
        4,
        ("step 'gptq' cannot come after 'tune_model'",),
    ),
    "nothing before gptq": ("steps:\n  - gptq\n  - clip_search\n", 2, ("step 'gptq' needs clip_search before it",)),
    "nothing before tune_model": (
        "seed: 3\nsteps:\n  - tune_model\n",
        3,
        ("'tune_model' needs clip_search before it",),
    ),
    "no step that finds scales": ("seed: 3\nsteps:\n  - smooth_attention\n", 3, ("no step finds scales",)),
    "no steps": ("seed: 3\nsteps: []\n", 2, ("no step finds scales",)),
    "steps that are a mapping": ("seed: 3\nsteps:\n  gptq: {}\n", 3, ("'steps' is not a list",)),
    "steps that are a word": ("seed: 3\nsteps: gptq\n", 2, ("'steps' is not a list",)),
    "key twice": ("seed: 1\nprefix: none\nseed: 2\n", 3, ("'seed' stands here a second time",)),
    "key twice, spelt differently": ("seq_len: 64\nseq-len: 32\n", 2, ("'seq_len' stands here a second time",)),
    "unknown key": ("seed: 1\ncalib_sample: 3\n", 2, ("unknown key 'calib_sample'", "Did you mean 'calib_samples'?")),
    "text for a plan's number": ("seed: 1\ncalib_samples: many\n", 2, ("calib_samples is 'many', not a whole number",)),
    "plan's number too small": ("seed: 1\nseq_len: 3\n", 2, ("seq-len must be at least 16",)),
    "no such rotation": ("rotate: sideways\n", 1, ("sideways is not possible", "online, offline or none")),
    "no such precision": ("seed: 1\nprecision: w3a3\n", 2, ("unknown precision 'w3a3'",)),
    "no such bits": ("seed: 1\nkv: 5\n", 2, ("5 is not possible",)),
    "python object": ("seed: 1\nprefix: !!python/object/apply:os.system [touch pwned]\n", 2, ("is not YAML",)),
    "python object as a step": (SEARCH + "  - !!python/object/apply:os.system [touch pwned]\n", 3, ("is not YAML",)),
    "python object as an option": (SEARCH + "  - gptq:\n      block: !!python/name:os.system\n", 3, ("is not YAML",)),
    "tab": ("seed: 1\n\tprefix: none\n", 2, ("is not YAML",)),
    "open bracket": ("seed: 1\nsteps: [gptq\n", 3, ("is not YAML",)),
    "two documents": ("seed: 1\n---\nseed: 2\n", 2, ("is not YAML",)),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_said_with_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.chdir(tmp_path)
    text, line, says = MISTAKES[what]
    path = written(tmp_path, text)
    with pytest.raises(PqExportError) as caught:
        read_recipe(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: "), message
    assert "\n" not in message and all(part in message for part in says), message
    assert not (tmp_path / "pwned").exists()


WHOLE_FILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not a mapping of options"),
    "only a comment": (b"# nothing\n", "is not a mapping of options"),
    "a list": (b"- gptq\n", "is not a mapping of options"),
    "a word": (b"gptq\n", "is not a mapping of options"),
    "not UTF-8": (b"prefix: \xff\xfe\n", "not UTF-8"),
    "a control character": (b"prefix: \x01\n", "is not YAML"),
}


@pytest.mark.parametrize("what", WHOLE_FILE)
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, what: str) -> None:
    content, says = WHOLE_FILE[what]
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(PqExportError) as caught:
        read_recipe(path)
    assert str(caught.value).startswith(f"{path}: ") and says in str(caught.value)
    assert "\n" not in str(caught.value)


# --- command line ----------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["unknown step", "option twice", "blocks after the model", "no such bits", "tab"])
def test_the_command_says_it_in_one_line_and_writes_nothing(
    pq: Runner, tiny_llama_dir: Path, tmp_path: Path, what: str
) -> None:
    text, line, says = MISTAKES[what]
    path, empty = written(tmp_path, text), tmp_path / "empty"
    empty.mkdir()
    for command in ((tiny_llama_dir, "--w4a4"), ("calibrate", tiny_llama_dir, "--w4a4")):
        pq.refuses(*command, "--recipe", path, "-o", empty / "out", says=(f"mine.yaml:{line}:", *says))
        pq.refuses(*command, "--recipe", path, "--dry-run", "-o", empty / "out", says=(f"mine.yaml:{line}:",))
    assert not list(empty.iterdir())


def test_the_command_refuses_a_recipe_that_is_not_there(pq: Runner, tiny_llama_dir: Path, tmp_path: Path) -> None:
    pq.refuses(tiny_llama_dir, "--w4a4", "--recipe", "fats", "-o", tmp_path / "o", says=("fats", "fast"))
    pq.refuses(tiny_llama_dir, "--w4a4", "--recipe", tmp_path / "no.yaml", says=("no.yaml", "cannot be read"))
    assert not list(tmp_path.iterdir())


def planned(pq: Runner, *args: object) -> dict[str, Any]:
    result = pq(*args, "--dry-run", "--json")
    assert result.code == 0, result.err
    plan = json.loads(result.out)["plan"]
    assert isinstance(plan, dict)
    return plan


def test_flags_override_the_recipe(pq: Runner, tiny_llama_dir: Path, tmp_path: Path) -> None:
    path = written(tmp_path, "precision: w4a8\nkv: 8\nrotate: offline\nseed: 5\ncalib-samples: 9\n" + SEARCH)
    plan = planned(pq, tiny_llama_dir, "--recipe", path)
    assert (plan["precision"], plan["rotate"], plan["seed"], plan["calib_samples"]) == ("W4A8KV8", "offline", 5, 9)
    assert plan["steps"] == [["clip_search", {}]]
    plan = planned(pq, tiny_llama_dir, "--recipe", path, "--w4a4", "--kv", 4, "--rotate", "none", "--seed", 0)
    assert (plan["precision"], plan["rotate"], plan["seed"], plan["calib_samples"]) == ("W4A4KV4", "none", 0, 9)


def test_a_recipe_by_name_and_the_default(pq: Runner, tiny_llama_dir: Path) -> None:
    def steps(*args: object) -> list[str]:
        return [name for name, _ in planned(pq, tiny_llama_dir, "--w4a4", *args)["steps"]]

    assert steps("--recipe", "fast") == ["center", "clip_search"]
    assert steps() == steps("--recipe", "default") == [name for name, _ in load_recipe("default")["steps"]]
    assert Plan(Precision(4, 4, 4)).steps == (("clip_search", {}),)  # for those who build a plan by hand
