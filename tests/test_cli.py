"""The command line from end to end on tiny models."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pq_export.calibration import read_calibration_json
from pq_export.cli import commands
from pq_export.decoder import DecoderConfig
from pq_export.plan import PREFIX_ROOM
from tests.cli_runner import Runner

FAST = ("--calib-samples", 4, "--seq-len", 32)
CHECK = ("--windows", 2, "--window", 64)


@pytest.fixture
def pq(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(monkeypatch, capsys)


def digests(directory: Path) -> dict[str, str]:
    """Every file but the report, which holds times."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in ("report.json", "report.html", "stages.json")
    }


def test_help_is_instant_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['pq-export', '--help']\n"
        "from pq_export.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'numpy', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.5
    assert "calibrate + build + validate" in done.stdout


@pytest.fixture(scope="module")
def exported(
    tiny_llama_dir: Path, text_file: Path, other_text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """``out`` and ``out.calib`` of one whole run."""
    directory = tmp_path_factory.mktemp("exported")
    arguments = [
        tiny_llama_dir,
        "--w4a4",
        *FAST,
        *CHECK,
        "--calib-data",
        text_file,
        "--text",
        other_text_file,
        "-o",
        directory / "out",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pq_export", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as in this process: small models only lose by threads
    )
    assert done.returncode == 0, done.stderr
    (directory / "stdout.txt").write_text(done.stdout)
    return directory


def test_one_command_writes_a_whole_bundle(exported: Path) -> None:
    files = {path.name for path in (exported / "out").iterdir()}
    assert files >= {
        "model.onnx",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "pq_config.json",
        "report.json",
        "report.html",
    }
    assert {path.name for path in exported.iterdir()} == {"out", "out.calib", "stdout.txt"}
    report = json.loads((exported / "out" / "report.json").read_text())
    assert report["validation"]["passed"]
    assert [stage["name"] for stage in report["stages"]][:5] == [
        "load checkpoint",
        "rewrite weights",
        "find outlier tokens",
        "center",
        "collect ranges",
    ]
    assert all(stage["seconds"] > 0 and stage["peak_rss"] > 2**20 for stage in report["stages"])
    text = (exported / "stdout.txt").read_text()
    assert "Perplexity" in text and "Checks" in text and "What is the capital of France?" in text


def test_two_runs_give_byte_identical_bundles_and_calibrations(
    exported: Path,
    pq: Runner,
    tiny_llama_dir: Path,
    text_file: Path,
    other_text_file: Path,
    tmp_path: Path,
    exports: dict[DecoderConfig, bytes],
) -> None:
    exports.clear()
    again = pq(
        tiny_llama_dir,
        "--w4a4",
        *FAST,
        *CHECK,
        "--calib-data",
        text_file,
        "--text",
        other_text_file,
        "-o",
        tmp_path / "again",
    )
    assert again.code == 0, again.err
    first, second = digests(exported / "out"), digests(tmp_path / "again")
    assert first == second and len(first) >= 6
    assert digests(exported / "out.calib") == digests(tmp_path / "again.calib")


def test_a_second_run_keeps_the_calibration(
    exported: Path, pq: Runner, tiny_llama_dir: Path, text_file: Path, other_text_file: Path
) -> None:
    before = digests(exported / "out")
    result = pq(
        tiny_llama_dir,
        "--w4a4",
        *FAST,
        *CHECK,
        "--calib-data",
        text_file,
        "--text",
        other_text_file,
        "--force",
        "-o",
        exported / "out",
    )
    assert result.code == 0
    assert "calibrate (kept from an earlier run)" in result.err
    assert "quantize blocks" not in result.err
    assert digests(exported / "out") == before


def test_json_output_is_one_document(exported: Path, pq: Runner, other_text_file: Path) -> None:
    result = pq("validate", exported / "out", "--text", other_text_file, *CHECK, "--json")
    assert result.code == 0
    validation = json.loads(result.out)
    assert validation["passed"] and validation["exact"]["min_equal"] == 1.0
    assert [row["model"] for row in validation["perplexity"]["rows"]] == ["fake-quant", "ONNX"]
    assert json.loads(pq("targets", "--json").out)[0]["name"] == "ort"
    assert json.loads(pq("inspect", exported / "out", "--json").out)["kind"] == "bundle"


def test_validate_with_model_adds_the_floating_point_rows_and_judges_the_ratio(
    exported: Path, pq: Runner, tiny_llama_dir: Path, other_text_file: Path
) -> None:
    arguments = ("validate", exported / "out", "--text", other_text_file, *CHECK, "--model", tiny_llama_dir)
    result = pq(*arguments, "--json", "--speed")
    rows = json.loads(result.out)["perplexity"]["rows"]
    assert [row["model"] for row in rows] == ["FP", "FP + prefix", "fake-quant", "ONNX"]
    assert [row["model"] for row in json.loads(result.out)["speed"]["rows"]] == ["fp32 ONNX", "W4A4KV4"]
    assert pq(*arguments, "--max-ppl-ratio", "0.01").code == 3


def test_inspect_tells_what_things_are(exported: Path, pq: Runner, tiny_llama_dir: Path) -> None:
    assert "LlamaForCausalLM" in pq("inspect", tiny_llama_dir).out
    assert "W4A4KV4" in pq("inspect", exported / "out.calib").out
    assert "integer" in pq("inspect", exported / "out").out


def test_generate_streams_the_tokens_of_the_runtime(exported: Path, pq: Runner) -> None:
    plain = pq("generate", exported / "out", "-p", "w5 w6 w7", "-n", 8)
    document = json.loads(pq("generate", exported / "out", "-p", "w5 w6 w7", "-n", 8, "--json").out)
    assert plain.code == 0 and plain.out.strip() == document["text"].strip() != ""
    sampled = [
        pq("generate", exported / "out", "-p", "w5", "-n", 8, "--temperature", 30.0, "--seed", s).out for s in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    pq.refuses("generate", exported / "out", "-p", "w5", "--chat", says=("no chat template",))


def test_dry_run_prints_the_plan_and_writes_nothing(pq: Runner, tiny_llama_dir: Path, tmp_path: Path) -> None:
    result = pq(tiny_llama_dir, "--w8a8", "--seed", 7, "-o", tmp_path / "out", "--dry-run", "--json")
    document = json.loads(result.out)
    assert document["plan"]["precision"] == "W8A8KV8" and document["plan"]["seed"] == 7
    assert document["expected"]["bundle_bytes"] > 0 and document["expected"]["calibrate_seconds"] > 0
    assert not list(tmp_path.iterdir())


def test_recipe_file_and_flags(pq: Runner, tiny_llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("precision: w4a8\nkv: 8\nrotate: offline\ncalib-samples: 9\n")
    plan = json.loads(
        pq(tiny_llama_dir, "--recipe", tmp_path / "recipe.yaml", "--rotate", "none", "--dry-run", "--json").out
    )["plan"]
    assert (plan["precision"], plan["rotate"], plan["calib_samples"]) == ("W4A8KV8", "none", 9)


def test_interrupted_it_says_how_to_go_on(
    pq: Runner, tiny_llama_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pq_export.calib import steps

    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    arguments = ("calibrate", tiny_llama_dir, "--w4a4", *FAST, "--calib-data", text_file, "-o", tmp_path / "calib")
    with monkeypatch.context() as patch:
        patch.setattr(steps, "clip_search", interrupted)
        result = pq(*arguments)
    assert result.code == 130 and "same command goes on" in result.err
    assert not (tmp_path / "calib").exists() and (tmp_path / "calib.work").is_dir()
    result = pq(*arguments)
    assert result.code == 0 and "find outlier tokens (kept" in result.err
    assert not (tmp_path / "calib.work").exists()


@pytest.mark.parametrize("name, kv", [("w4a8", "4"), ("w8a8", "8"), ("w4a16", "16"), ("w8a8", "16"), ("w4a4", "8")])
def test_every_precision_validates(
    pq: Runner, tiny_llama_dir: Path, text_file: Path, other_text_file: Path, tmp_path: Path, name: str, kv: str
) -> None:
    result = pq(
        tiny_llama_dir,
        f"--{name}",
        "--kv",
        kv,
        *FAST,
        *CHECK,
        "--num-layers",
        2,
        "--calib-data",
        text_file,
        "--text",
        other_text_file,
        "-o",
        tmp_path / "out",
        "--json",
    )
    assert result.code == 0, result.err
    validation = json.loads(result.out)["validation"]
    assert validation["exact"]["min_equal"] == 1.0 and validation["exact"]["greedy_equal"] == 64


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "llama-bias"])
def test_every_family_validates(
    pq: Runner,
    checkpoint_dir: Callable[[str], Path],
    text_file: Path,
    other_text_file: Path,
    tmp_path: Path,
    family: str,
) -> None:
    result = pq(
        checkpoint_dir(family),
        "--w4a4",
        *FAST,
        *CHECK,
        "--calib-data",
        text_file,
        "--text",
        other_text_file,
        "-o",
        tmp_path / "out",
        "--json",
    )
    assert result.code == 0, result.err
    assert json.loads(result.out)["validation"]["exact"]["min_equal"] == 1.0


def test_qdq_form_runs_and_is_named_in_the_bundle(exported: Path, pq: Runner, text_file: Path, tmp_path: Path) -> None:
    result = pq("build", exported / "out.calib", "--form", "qdq", "-o", tmp_path / "qdq", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["target"]["form"] == "qdq"
    assert pq("generate", tmp_path / "qdq", "-p", "w5", "-n", 2).code == 0


def test_only_the_command_line_imports_both_halves() -> None:
    """pq_export and its targets must not know calibration: the command line brings the halves together."""
    package = Path(commands.__file__).parent.parent
    top = package.parent
    files = [*package.rglob("*.py"), *(top / "targets").rglob("*.py")]
    offenders = []
    for path in files:
        tree = ast.parse(path.read_text())
        names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, path  # what is written here is the whole name
                names += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        if any(f"{name}.".startswith("pq_export.calib.") for name in names):
            offenders.append(path.relative_to(top).as_posix())
    assert len(files) > 30 and "pq_export/cli/commands.py" in offenders
    assert [p for p in offenders if not p.startswith("pq_export/cli/")] == []


def test_interrupted_while_validating_it_names_the_command_that_goes_on(
    pq: Runner, tiny_llama_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "_validated", interrupted)
    result = pq(tiny_llama_dir, "--w4a4", *FAST, "--num-layers", 1, "--calib-data", text_file, "-o", tmp_path / "out")
    assert result.code == 130
    assert f"pq-export validate {tmp_path / 'out'} --model {tiny_llama_dir}" in result.err
    assert (tmp_path / "out" / "model.onnx").is_file()


def test_text_comes_out_with_its_spaces(exported: Path) -> None:
    """Tokens are shown one by one; a decoder that strips a first token's space must not join the words."""

    class Stripping:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return "".join(f" w{i}" for i in ids).lstrip(" ")

    pieces = [commands._piece(Stripping(), shown, [new]) for shown, new in (([], 1), ([1], 2), ([2], 3))]
    assert "".join(pieces) == "w1 w2 w3"


def test_no_command_takes_products_in_tf32() -> None:
    """An environment variable can have turned it on. Commands that compute with PyTorch check their device first."""
    import torch

    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        commands.check_device("cpu")
        assert torch.backends.cuda.matmul.allow_tf32 is False
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_a_recipes_crops_fit_the_models_context(
    pq: Runner, tiny_llama_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """The default recipe's are longer than this model's 512 tokens; what is given by hand is taken at its word."""
    out = tmp_path / "calibration"
    arguments = ("calibrate", tiny_llama_dir, "--w4a4", "--calib-data", text_file, "--calib-samples", "2")
    assert pq(*arguments, "-o", out).code == 0
    assert read_calibration_json(out)["plan"]["seq_len"] == 512 - PREFIX_ROOM
    pq.refuses(*arguments, "--seq-len", "2048", "-o", tmp_path / "b", says=("--seq-len 2048 is longer",))
