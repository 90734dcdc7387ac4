"""Precision and Plan as values, recipe files, and the fingerprint."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest

from pq_export.calib.recipe import RECIPE_KEYS, read_recipe
from pq_export.errors import EXIT_USAGE, PqExportError, UsageError
from pq_export.plan import Plan, resolve_plan
from pq_export.precision import KV_BITS, WEIGHT_ACTIVATION, Precision

W4A4 = Precision(4, 4, 4)


@pytest.mark.parametrize(
    ("name", "bits"),
    [("w4a4", (4, 4, 4)), ("w4a8", (4, 8, 4)), ("w8a8", (8, 8, 8)), ("w4a16", (4, 16, 16))],
)
def test_default_kv_bits(name: str, bits: tuple[int, int, int]) -> None:
    assert dataclasses.astuple(Precision.named(name)) == bits


@pytest.mark.parametrize("kv", [4, 8, 16])
def test_explicit_kv_bits(kv: int) -> None:
    for name, (weights, activations) in WEIGHT_ACTIVATION.items():
        assert Precision.named(name, kv) == Precision(weights, activations, kv)


@pytest.mark.parametrize("kv", [0, 2, 3, 5, 32, "4"])
def test_impossible_kv_bits(kv: object) -> None:
    with pytest.raises(UsageError, match="--kv"):
        Precision.named("w4a4", kv)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "w4", "W4A4", "w4a4kv4", "w3a3", "w8a4", "fp16"])
def test_unknown_precision_names(name: str) -> None:
    with pytest.raises(UsageError, match="unknown precision"):
        Precision.named(name)


def test_kv_scales_are_per_head_at_four_bits_only() -> None:
    assert [Precision.named("w4a4", kv).kv_per_head for kv in KV_BITS] == [True, False, False]


def test_parse_is_the_inverse_of_str() -> None:
    for (weights, activations), kv in itertools.product(WEIGHT_ACTIVATION.values(), KV_BITS):
        precision = Precision(weights, activations, kv)
        assert Precision.parse(str(precision)) == precision
    assert str(W4A4) == "W4A4KV4" and str(Precision(4, 16, 16)) == "W4A16KV16"


@pytest.mark.parametrize("text", ["", "W4A4", "w4a4kv4", "W4A4KV4 ", "xW4A4KV4", "W-4A4KV4", "WaA4KV4"])
def test_parse_refuses_other_texts(text: str) -> None:
    with pytest.raises(UsageError, match="not a precision"):
        Precision.parse(text)


@pytest.mark.parametrize("text", ["W3A4KV4", "W4A5KV4", "W4A4KV2", "W0A0KV0"])
def test_parse_refuses_impossible_bits(text: str) -> None:
    """What a damaged calibration.json could hold: (4, 8), (4, 8, 16) and (4, 8, 16) bits are all there are."""
    with pytest.raises(PqExportError):
        Precision.parse(text)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rotate": "sideways"}, "--rotate sideways"),
        ({"calib_samples": 0}, "--calib-samples"),
        ({"seq_len": 15}, "--seq-len"),
        ({"search_samples": 0}, "--search-samples"),
        ({"search_seq_len": 15}, "--search-seq-len"),
        ({"prefix": ""}, "--prefix"),
    ],
)
def test_plan_refuses(changes: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        Plan(W4A4, **changes)  # type: ignore[arg-type]
    assert says in str(caught.value) and caught.value.exit_code == EXIT_USAGE


def test_plan_accepts_its_limits() -> None:
    plan = Plan(W4A4, calib_samples=1, seq_len=16, search_samples=1, search_seq_len=16)
    assert (plan.calib_samples, plan.seq_len) == (1, 16)


def test_search_crops_are_never_longer_than_calibration_crops() -> None:
    assert Plan(W4A4, seq_len=64, search_seq_len=256).search_length == 64
    assert Plan(W4A4, seq_len=512, search_seq_len=256).search_length == 256


@pytest.mark.parametrize(
    ("name", "rotate"), [("w4a4", "online"), ("w4a8", "online"), ("w8a8", "online"), ("w4a16", "offline")]
)
def test_default_rotation(name: str, rotate: str) -> None:
    assert resolve_plan(name, None, {}).rotate == rotate


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def recipe(tmp_path: Path, text: str) -> dict[str, Any]:
    return read_recipe(written(tmp_path, text))


def test_recipe_is_read(tmp_path: Path) -> None:
    content = recipe(tmp_path, "precision: W4A8\nkv: 8\ncalib-samples: 7\nsearch_seq_len: 64\nprefix: none\nseed: 3\n")
    assert resolve_plan(None, None, content) == Plan(
        Precision(4, 8, 8), prefix="none", rotate="online", calib_samples=7, search_seq_len=64, seed=3
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("calib_sample: 3\n", "unknown key 'calib_sample'"),
        ("num_layers: 2\n", "unknown key 'num_layers'"),
        ("1: 2\n", "unknown key '1'"),
        ("a: [1\n", "not YAML"),
        ("\tx: 1\n", "not YAML"),
        ("- precision\n- w4a4\n", "not a mapping"),
        ("w4a4\n", "not a mapping"),
        ("", "not a mapping"),
    ],
)
def test_recipe_refused(tmp_path: Path, text: str, says: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(PqExportError) as caught:
        read_recipe(path)
    message = str(caught.value)
    assert says in message and str(path) in message and "\n" not in message


def test_recipe_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"prefix: \xff\xfe\n")
    with pytest.raises(PqExportError, match="not YAML"):
        read_recipe(path)


def test_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PqExportError, match=r"no\.yaml: cannot be read"):
        read_recipe(tmp_path / "no.yaml")


def test_every_recipe_key_is_an_option_of_the_plan() -> None:
    assert set(RECIPE_KEYS) - {"kv"} == {f.name for f in dataclasses.fields(Plan)} - {"num_layers"}


def test_explicit_beats_recipe_beats_default(tmp_path: Path) -> None:
    content = recipe(tmp_path, "precision: w8a8\nkv: 16\nseq_len: 128\nseed: 5\nrotate: offline\n")
    plan = resolve_plan("w4a4", 8, content, seq_len=64, seed=None, calib_samples=None, num_layers=2)
    assert plan.precision == Precision(4, 4, 8)  # explicit
    assert (plan.seq_len, plan.num_layers) == (64, 2)  # explicit
    assert (plan.seed, plan.rotate) == (5, "offline")  # recipe
    assert plan.calib_samples == Plan(W4A4).calib_samples  # default
    assert resolve_plan(None, None, content).precision == Precision(8, 8, 16)


def test_explicit_zero_beats_the_recipe(tmp_path: Path) -> None:
    assert resolve_plan(None, None, recipe(tmp_path, "precision: w4a4\nseed: 5\n"), seed=0).seed == 0


def test_no_precision_anywhere(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no precision"):
        resolve_plan(None, None, recipe(tmp_path, "seed: 1\n"))


@pytest.mark.parametrize(
    "line",
    [
        "calib_samples: many",
        "seq_len: [1, 2]",
        "calib_samples: 2.5",
        "seed: abc",
        "prefix: 5",
        "calib_data: 3",
        "rotate: 1",
    ],
)
def test_recipe_values_of_the_wrong_type(tmp_path: Path, line: str) -> None:
    with pytest.raises(PqExportError):
        resolve_plan("w4a4", None, recipe(tmp_path, line + "\n"))


CHANGES = {
    "precision": Precision(4, 4, 8),
    "prefix": "none",
    "rotate": "offline",
    "calib_data": "other",
    "calib_samples": 33,
    "seq_len": 511,
    "search_samples": 9,
    "search_seq_len": 255,
    "seed": 1,
    "num_layers": 3,
    "steps": (("clip_search", {"passes": 2}),),
}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Plan)])
def test_fingerprint_changes_with_each_field(field: str) -> None:
    plan = Plan(W4A4)
    assert dataclasses.replace(plan, **{field: CHANGES[field]}).fingerprint("c0ffee") != plan.fingerprint("c0ffee")


def test_fingerprint_changes_with_the_checkpoint_and_with_nothing_else() -> None:
    assert Plan(W4A4).fingerprint("a") != Plan(W4A4).fingerprint("b")
    assert Plan(W4A4).fingerprint("a") == Plan(Precision.named("w4a4")).fingerprint("a")


def test_fingerprint_follows_the_content_of_a_text_file(tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("one text", encoding="utf-8")
    second.write_text("one text", encoding="utf-8")
    plan = Plan(W4A4, calib_data=str(first))
    before = plan.fingerprint("x")
    assert dataclasses.replace(plan, calib_data=str(second)).fingerprint("x") == before
    first.write_text("one texu", encoding="utf-8")
    assert plan.fingerprint("x") != before
