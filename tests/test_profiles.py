"""Profiles: those that we ship, those of users, and every mistake of a file as one line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from pq_export.bundle import open_bundle
from pq_export.errors import PqExportError, UsageError
from pq_export.execute import open_decoder
from pq_export.precision import Precision
from pq_export.targets import TARGETS, find_target
from pq_export.targets.base import TargetOptions
from pq_export.targets.lint import RULES, lint_bundle
from pq_export.targets.profile import PROFILES, SECTIONS, Profile, find_profile, profile_names, takes, takes_pair
from pq_export.targets.profiled import GRAPH_OPSET
from pq_export.targets.vela import ACCELERATORS
from tests.cli_runner import Runner


@pytest.fixture
def pq(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(monkeypatch, capsys)


def write(folder: Path, text: str, name: str = "my-npu.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", profile_names())
def test_a_shipped_profile_is_whole(name: str) -> None:
    profile = find_profile(name)
    assert profile.name == name and profile.title and profile.executes and profile.precisions
    for soc in (None, *profile.socs):
        assert profile.for_soc(soc).name == name
    assert json.loads(json.dumps(profile.to_dict()))["name"] == name


def test_every_target_has_a_profile() -> None:
    assert set(TARGETS) <= set(profile_names())
    assert {"static", "qnn-htp", "ethos-u", "rknn", "openvino", "intel-npu", "ort", "trt"} <= set(profile_names())


def test_a_target_and_its_profile_agree_on_precisions() -> None:
    """What a profile lists is what ``choose_form`` takes."""
    for name in ("ort", "trt", "static"):
        target, profile = find_target(name), find_profile(name)
        options = TargetOptions(sms=(87,))
        for precision in ("w4a4", "w4a8", "w8a8", "w4a16"):
            if precision in profile.precisions:
                target.choose_form(Precision.named(precision, 8), False, options)
            else:
                with pytest.raises(PqExportError, match=precision):
                    target.choose_form(Precision.named(precision, 8), False, options)


def test_4_bit_keys_are_refused_before_any_work() -> None:
    with pytest.raises(UsageError, match="--kv 8"):
        find_target("static").choose_form(Precision.named("w4a8"), False, TargetOptions())


@pytest.mark.parametrize(("opset", "says"), [("max = 21", "13 to 21"), ("min = 24", "24 to 24")])
def test_a_profile_that_reads_other_opsets_is_refused_before_any_work(opset: str, says: str, tmp_path: Path) -> None:
    other = find_target(str(write(tmp_path, f"[opset]\n{opset}")))
    with pytest.raises(UsageError, match=f"opsets {says}; graphs of fixed shapes have 23"):
        other.resolve(TargetOptions(), None)


def test_precisions_that_graphs_with_float_parts_do_not_have_are_refused_before_any_work(tmp_path: Path) -> None:
    target = find_target(str(write(tmp_path, '[floats]\ntypes = ["float32"]\n[activations]\ntypes = ["any"]')))
    target.choose_form(Precision.named("w4a8", 8), False, TargetOptions())
    with pytest.raises(UsageError, match="8-bit linears then, not w4a16"):
        target.choose_form(Precision.named("w4a16"), False, TargetOptions())
    with pytest.raises(UsageError, match="--kv 8"):
        target.choose_form(Precision.named("w4a8", 4), False, TargetOptions())


def test_lengths_that_do_not_fit() -> None:
    resolve = find_target("static").resolve
    resolved = resolve(TargetOptions(), 100)
    assert (resolved.prefill_len, resolved.cache_len) == (64, 100)
    for options, says in (
        (TargetOptions(cache_len=101), "--cache-len 101 is longer than the model's context"),
        (TargetOptions(prefill_len=101), "--prefill-len 101 is longer than the model's context"),
        (TargetOptions(prefill_len=64, cache_len=32), "longer than the cache of 32 tokens"),
        (TargetOptions(socs=("x",)), "no SoC 'x'"),
    ):
        with pytest.raises(UsageError, match=says):
            resolve(options, 100)


def test_lengths_are_no_flags_where_shapes_are_not_fixed(tmp_path: Path) -> None:
    target = find_target(str(write(tmp_path, "[shapes]\nstatic = false\n[socs.x]")))
    for options in (TargetOptions(prefill_len=8), TargetOptions(cache_len=64)):
        with pytest.raises(UsageError, match="is not for this target"):
            target.resolved(options, None)
    assert target.resolved(TargetOptions(socs=("x",)), 32).socs == ("x",)  # a context of 32 tokens is long enough


def test_the_documentation_names_every_rule_and_key() -> None:
    text = (Path(__file__).parent.parent / "docs" / "profiles.md").read_text(encoding="utf-8")
    keys = [f"{table}.{field.name}" for table, kind in SECTIONS.items() for field in dataclasses.fields(kind)]
    for name in (*RULES, *keys, *profile_names()):
        assert f"`{name}`" in text, name


def test_htp_rules_are_those_that_were_measured() -> None:
    htp = find_profile("qnn-htp")
    assert not takes_pair(htp.linears.pairs, "int8", "int4")
    assert takes_pair(htp.linears.pairs, "uint8", "int4") and takes_pair(htp.linears.pairs, "uint16", "int4")
    assert htp.linears.max_multiplier == 1.0 and htp.linears.same_type and htp.shapes.static
    assert htp.for_soc("sm8350").floats.types == () and takes(htp.for_soc("sm8650").floats.types, "float16")
    assert {name: soc.number for name, soc in htp.socs.items() if name in ("sm8650", "sm8750", "sm8550")} == {
        "sm8650": 57,
        "sm8750": 69,
        "sm8550": 43,
    }


def test_every_accelerator_of_vela_can_be_checked_against() -> None:
    socs = find_profile("ethos-u").socs
    assert {soc.architecture for soc in socs.values()} == set(ACCELERATORS)
    assert all(soc.architecture == f"ethos-{name}" for name, soc in socs.items())


def test_a_child_states_what_differs(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        title = "My NPU"
        default_soc = "v1"
        [opset]
        max = 21
        [weights]
        granularity_by_type = { int4 = ["block"] }
        [socs.v1]
        number = 7
        architecture = "one"
        floats = { types = ["float16"] }
        [socs.v2]
        """,
    )
    profile, parent = find_profile(path), find_profile("static")
    assert (profile.name, profile.title, profile.built_by) == ("my-npu", "My NPU", str(path))
    assert (profile.opset.min, profile.opset.max) == (parent.opset.min, 21)
    assert profile.activations == parent.activations and profile.operators == parent.operators
    assert profile.weights.types == parent.weights.types
    assert profile.floats.types == () and profile.for_soc().floats.types == ("float16",)
    assert profile.for_soc("V2").floats.types == ()
    grandchild = find_profile(write(tmp_path, 'inherits = "my-npu.toml"\n[socs.v1]\nnumber = 8', "new.toml"))
    assert grandchild.for_soc().soc is not None
    assert (grandchild.for_soc().soc.number, grandchild.for_soc().soc.architecture) == (8, "one")  # type: ignore[union-attr]
    assert grandchild.for_soc().floats.types == ("float16",) and grandchild.title == "new"


def test_without_a_parent_everything_static_is_taken(tmp_path: Path) -> None:
    profile = find_profile(write(tmp_path, 'inherits = "none"'))
    assert {name: getattr(profile, name) for name in SECTIONS} == {
        name: getattr(Profile("x"), name) for name in SECTIONS
    }


MISTAKES = {
    "no TOML": ("[opset\nmax = 1", ("is not TOML", "line 1")),
    "unknown key": ("colour = 1", ("colour", "is no key", "There are: inherits")),
    "misspelt key": ("[opset]\nmaximum = 1\n[weights]\ntype = []", ("opset.maximum", "max")),
    "close key": ("[weights]\nzero_points = 'zero'", ("weights.zero_points", "Did you mean 'zero_point'?")),
    "unknown table": ("[opsets]\nmax = 1", ("opsets", "Did you mean 'opset'?")),
    "table that is a value": ("opset = 21", ("opset is no table", "[opset]")),
    "text for a number": ('[opset]\nmax = "21"', ("opset.max is '21', not a whole number",)),
    "number with a point": ("[opset]\nmax = 21.5", ("opset.max", "not a whole number")),
    "yes for a number": ("[opset]\nmax = true", ("opset.max", "not a whole number")),
    "number for yes": ("[shapes]\nstatic = 1", ("shapes.static is 1, not true or false",)),
    "text for a list": ('[floats]\ntypes = "float16"', ("floats.types", "not a list", "types = [ ... ]")),
    "number in a list": ("[floats]\ntypes = [16]", ("floats.types[0] is 16, not a text",)),
    "unknown type": ('[weights]\ntypes = ["int7"]', ("weights.types[0] is 'int7'", "int4")),
    "unknown word": ('[weights]\nzero_point = "never"', ("weights.zero_point is 'never'", "zero-by-channel")),
    "unknown precision": ('precisions = ["w2a2"]', ("precisions[0] is 'w2a2'", "w4a4")),
    "half a pair": ('[linears]\npairs = [["int8"]]', ("linears.pairs[0] has 1 entries, not 2",)),
    "pair of an unknown type": ('[linears]\npairs = [["int8", "i4"]]', ("linears.pairs[0] is 'i4'",)),
    "negative limit": ("[linears]\nmax_multiplier = -1", ("linears.max_multiplier is -1",)),
    "limit that is no number": ("[linears]\nmax_multiplier = nan", ("linears.max_multiplier is nan",)),
    "zero point of no type": ("[activations]\nzero_points = { i8 = [0] }", ("activations.zero_points.i8",)),
    "zero points without a list": ("[activations]\nzero_points = { int8 = 0 }", ("zero_points.int8", "not a list")),
    "rank without a table": ("[operators]\nmax_rank = 4", ("operators.max_rank is 4, not a table",)),
    "ends crossed": ("[opset]\nmin = 22\nmax = 21", ("opset.min is 22, above opset.max, which is 21",)),
    "unknown parent": ('inherits = "qnn"', ("inherits names 'qnn'", "qnn-htp")),
    "parent that is no name": ("inherits = 1", ("inherits is 1, not a name",)),
    "parent file that is not there": ('inherits = "other.toml"', ("other.toml", "no such profile")),
    "its own parent": ('inherits = "my-npu.toml"', ("inherits goes in a circle", "my-npu.toml -> my-npu.toml")),
    "default SoC that is none": ('default_soc = "x"\n[socs.y]', ("default_soc names 'x'", "SoCs: y")),
    "SoC that is a value": ("[socs]\nx = 1", ("socs.x is no table",)),
    "SoC with an unknown key": ("[socs.x]\nnumbers = 1", ("socs.x.numbers", "Did you mean 'number'?")),
    "SoC with a wrong override": ("[socs.x.floats]\ntypes = [1]", ("socs.x.floats.types[0] is 1",)),
    "any status": ('status = "any"', ("status is 'any'", "lint-only")),
    "any precision": ('precisions = ["any"]', ("precisions[0] is 'any'", "w4a4")),
    "too deep": ("a = " + 20_000 * "[", ("nested too deeply",)),
    "SoC with an unknown override": ("[socs.x.floats]\ntype = []", ("socs.x.floats.type", "Did you mean 'types'?")),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_that_names_file_table_and_key(case: str, tmp_path: Path) -> None:
    text, says = MISTAKES[case]
    path = write(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        find_profile(path)
    line = str(caught.value)
    assert line.startswith(str(tmp_path)) and "\n" not in line
    for part in says:
        assert part in line, line


def test_a_circle_over_two_files(tmp_path: Path) -> None:
    write(tmp_path, 'inherits = "b.toml"', "a.toml")
    path = write(tmp_path, 'inherits = "a.toml"', "b.toml")
    with pytest.raises(UsageError, match=r"b.toml -> a.toml -> b.toml"):
        find_profile(path)


def test_a_mistake_of_the_parent_names_the_parent(tmp_path: Path) -> None:
    write(tmp_path, "[opset]\nmaxi = 1", "a.toml")
    path = write(tmp_path, 'inherits = "a.toml"', "b.toml")
    with pytest.raises(UsageError, match=r"a\.toml: opset\.maxi"):
        find_profile(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b'title = "\xe9"')
    with pytest.raises(UsageError, match="UTF-8"):
        find_profile(tmp_path / "latin.toml")
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(UsageError, match="cannot be read"):
        find_profile(tmp_path / "folder.toml")
    with pytest.raises(UsageError, match=r"docs/profiles\.md"):
        find_profile(tmp_path / "nothing.toml")
    with pytest.raises(UsageError, match="unknown target"):
        find_profile("../static")


def test_names_are_those_of_files() -> None:
    assert profile_names() == sorted(path.stem for path in PROFILES.glob("*.toml"))


def test_the_table_of_targets(pq: Runner) -> None:
    rows = json.loads(pq("targets", "--json").out)
    assert {row["name"] for row in rows} == set(profile_names())
    assert {row["name"]: row["status"] for row in rows}["intel-npu"] == "lint-only"
    shown = pq("targets").out
    for word in ("qnn-htp", "precision", "granularity", "floats", "status"):
        assert word in shown


def test_the_profile_of_a_target(pq: Runner, tmp_path: Path) -> None:
    shown = pq("targets", "qnn-htp").out
    for word in ("sm8650", "v75", "max_multiplier", "uint16 x int4", "TensorScatter"):
        assert word in shown
    document = json.loads(pq("targets", "qnn-htp", "--json").out)
    assert document["default_soc"] == "sm8650" and document["linears"]["unit"] is True
    path = write(tmp_path, 'title = "My NPU"')
    assert "My NPU" in pq("targets", path).out
    pq.refuses("targets", "qnn", code=2, says=("unknown target 'qnn'", "qnn-htp"))


def test_a_profile_without_a_compiler_cannot_be_built_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="profile only"):
        find_target("intel-npu")
    with pytest.raises(UsageError, match="your own FILE"):
        find_target("nowhere")


def test_a_user_adds_an_npu_without_code(tiny_llama_dir: Path, text_file: Path, pq: Runner, tmp_path: Path) -> None:
    """A profile file, ``build``, ``check``: fixed-shape graphs, and the portable one that says what they compute."""
    profile = write(tmp_path, 'title = "My NPU"\nprecisions = ["w8a8"]\n[socs.v1]\n[io]\ntypes = ["int32", "uint16"]')
    calibration = tmp_path / "calibration"
    arguments = ("--calib-samples", 4, "--seq-len", 32, "--num-layers", 1, "--calib-data", text_file)
    result = pq(
        *("calibrate", tiny_llama_dir, "--w8a8", "--recipe", "fast", "--rotate", "none", *arguments, "-o", calibration)
    )
    assert result.code == 0, result.err
    output = tmp_path / "bundle"
    lengths = ("--prefill-len", 8, "--cache-len", 16)
    result = pq("build", calibration, "--target", profile, *lengths, "--soc", "V1", "-o", output)
    assert result.code == 0, result.err
    bundle = open_bundle(output)
    assert bundle.config["target"] == "static"
    assert bundle.config["profile"] == {"name": "my-npu", "socs": ["v1"]}
    assert set(bundle.config["static"]["graphs"]) == {"prefill", "decode"}
    assert {"static/prefill.onnx", "static/decode.onnx", "static/weights.data"} <= set(bundle.config["files"])
    shape = onnx.load(output / "static/prefill.onnx").graph.input[0].type.tensor_type.shape
    assert [d.dim_value for d in shape.dim] == [1, 8]
    assert onnx.load(output / "static/prefill.onnx").opset_import[0].version == GRAPH_OPSET
    assert pq("check", output, "--target", profile).code == 0
    assert lint_bundle(output, find_profile("qnn-htp").for_soc()) == []
    decoder = open_decoder(bundle)  # the reference
    logits, _, _ = decoder.step(np.array([[3, 4, 5]], np.int64), decoder.empty())
    assert np.isfinite(logits).all()

    narrow = write(tmp_path, '[activations]\ntypes = ["uint8"]', "narrow.toml")
    line = pq.refuses("build", calibration, "--target", narrow, *lengths, "-o", tmp_path / "no")
    assert "narrow" in line and "activation-type" in line and "findings" in line
    assert not (tmp_path / "no").exists()
    other = write(tmp_path, 'precisions = ["w4a8"]', "other.toml")
    pq.refuses("build", calibration, "--target", other, "-o", tmp_path / "no", code=2, says=("other", "w8a8", "--w4a8"))
