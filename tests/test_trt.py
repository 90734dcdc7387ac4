"""``--target trt``: what the bundle holds, and what is refused before any work."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from pq_export.build import build
from pq_export.bundle import open_bundle
from pq_export.calib.checkpoint import load_checkpoint
from pq_export.calib.pipeline import calibrate
from pq_export.calibration import load_calibration
from pq_export.cli.app import cli
from pq_export.errors import PqExportError, UsageError
from pq_export.execute import open_decoder
from pq_export.plan import Plan
from pq_export.precision import Precision
from pq_export.rewrite.qlinear import Form
from pq_export.runtime import Sampling, generate
from pq_export.stages import Stages
from pq_export.targets import find_target
from pq_export.targets.base import TargetOptions
from pq_export.targets.rtx_engines import needed_memory
from pq_export.targets.tensorrt_options import profiles
from pq_export.targets.trt import choose_form
from tests.cli_runner import Runner
from tests.conftest import hf_model, word_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def pq(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(monkeypatch, capsys)


@pytest.fixture(scope="module")
def calibration_directory(small_plan: Callable[..., Plan], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trt")
    hf_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(folder / "checkpoint")
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "checkpoint")
    plan = small_plan("w4a4", prefix="w77 w8 w9")
    calibrate(load_checkpoint(str(folder / "checkpoint")), plan, folder / "calibration", Stages())
    return folder / "calibration"


@pytest.fixture(scope="module")
def bundle_directory(calibration_directory: Path) -> Path:
    output = calibration_directory.with_name("orin")
    options = TargetOptions(sms=(87,), jetpack="6.2", max_batch_size=2, max_input_len=16, max_seq_len=48)
    build(
        load_calibration(calibration_directory),
        calibration_directory,
        find_target("trt"),
        output,
        Stages(),
        options=options,
    )
    return output


def test_the_bundle_is_whole(bundle_directory: Path) -> None:
    bundle = open_bundle(bundle_directory)
    files = set(bundle.config["files"])
    assert {
        *("model.onnx", "tokenizer.json", "config.json", "deploy/build_engine.sh"),
        *("deploy/chat.json", "deploy/tokenizer_checks.json", "plugin/CMakeLists.txt", "plugin/csrc/plugin.cpp"),
        *("plugin/runner/CMakeLists.txt", "plugin/runner/src/main.cpp"),
    } <= files
    assert not [name for name in files if name.endswith(".py")]
    deploy = bundle.config["deploy"]
    assert (deploy["jetpack"], deploy["tensorrt"], deploy["sms"]) == ("6.2", "10.3", [87])
    assert bundle.config["form"] == "plugin" and "int4 tensor cores" in bundle.config["form_reason"]
    assert bundle.config["kv_cache"]["container"] == "int8"
    assert (
        deploy["cache_copied_bytes"] == 2 * 2 * 2 * 16 * 47 * 2
    )  # layers, keys and values, heads, head_dim, past, batch
    linears = next(part for part in bundle.config["sizes"] if part["part"] == "quantized linears")
    assert linears["parameters"] == 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128)


def test_the_plugin_gets_every_linear_packed_for_the_gpu(bundle_directory: Path) -> None:
    model = onnx.load(bundle_directory / "model.onnx")
    layouts = [
        {a.name: onnx.helper.get_attribute_value(a) for a in n.attribute}["layout"]
        for n in model.graph.node
        if n.op_type == "QLinear"
    ]
    assert layouts == [b"s4"] * 14 and not model.functions
    assert {i.name for i in model.graph.input} == {
        *("input_ids", "attention_mask", "position_ids"),
        *(f"past_key_values.{i}.{kind}" for i in range(2) for kind in ("key", "value")),
    }


def test_the_script_builds_what_the_flags_say(bundle_directory: Path) -> None:
    script = bundle_directory / "deploy" / "build_engine.sh"
    text = script.read_text()
    assert script.stat().st_mode & stat.S_IXUSR
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    shapes = re.findall(r"--(min|opt|max)Shapes=(\S+)", text)
    assert [kind for kind, _ in shapes] == ["min", "opt", "max"] * 2
    prefill, decode = (dict(part.split(":") for part in shapes[i][1].split(",")) for i in (2, 5))
    assert prefill["input_ids"] == "2x16" and prefill["past_key_values.1.value"] == "2x2x32x16"
    assert prefill["attention_mask"] == "2x48"
    assert decode["input_ids"] == "2x1" and decode["attention_mask"] == "2x48"
    assert decode["past_key_values.0.key"] == "2x2x47x16"
    assert "--dynamicPlugins=deploy/libpq.so" in text and "--stronglyTyped" in text and "87-real" in text


def test_the_script_says_what_is_missing(bundle_directory: Path) -> None:
    script = bundle_directory / "deploy" / "build_engine.sh"
    done = subprocess.run([str(script)], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr == "build_engine.sh: no trtexec. Install TensorRT, or set TRTEXEC.\n"


def test_the_script_compiles_the_plugin_and_calls_trtexec(bundle_directory: Path, tmp_path: Path) -> None:
    """With stand-ins for CMake and trtexec that write down what they were called with."""
    bundle, tools, log = tmp_path / "bundle", tmp_path / "tools", tmp_path / "log"
    shutil.copytree(bundle_directory, bundle)
    tools.mkdir()
    for name in ("cmake", "trtexec"):
        (tools / name).write_text(
            f"""#!/usr/bin/env bash
echo "{name} $*" >> {log}
case "$*" in
  *plugin/runner*) mkdir -p plugin/runner/build; : > plugin/runner/build/pq-run ;;
  *"--build plugin/build"*) mkdir -p plugin/build; : > plugin/build/libpq.so ;;
esac
[ {name} = cmake ] || echo engine > deploy/model.engine.part
[ {name} = cmake ] || echo "${{BANNER:-}}"
"""
        )
        (tools / name).chmod(0o755)
    environment = {"PATH": f"{tools}:/usr/bin:/bin", "TENSORRT_INCLUDE": "/headers"}
    script = bundle / "deploy" / "build_engine.sh"

    def start(**more: str) -> subprocess.CompletedProcess[str]:
        command, env = [str(script), "--verbose"], {**environment, **more}
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    done = start(BANNER="&&&& RUNNING TensorRT.trtexec [TensorRT v101401] [b48]")
    assert done.returncode == 0, done.stderr
    configure, compiled, trtexec, *_ = log.read_text().splitlines()
    assert configure.startswith("cmake -S plugin -B plugin/build") and "-DPQ_TENSORRT_INCLUDE=/headers" in configure
    assert compiled.startswith("cmake --build plugin/build")
    assert trtexec.startswith("trtexec --onnx=model.onnx") and trtexec.endswith("--skipInference --verbose")
    digest = hashlib.sha256(b"engine\n").hexdigest()
    assert (bundle / "deploy" / "model.engine.sha256").read_text().split()[0] == digest
    assert (bundle / "deploy" / "libpq.so").is_file() and (bundle / "deploy" / "pq-run").is_file()
    version = bundle / "deploy" / "model.engine.tensorrt"
    assert version.read_text() == "10.14.1\n"
    assert start().returncode == 0 and not version.exists()  # built again by one that does not name itself

    text = script.read_text()
    needed = next(line for line in text.splitlines() if line.startswith("needed_kb="))
    assert int(needed.removeprefix("needed_kb=")) == needed_memory(bundle / "model.onnx") // 1024
    script.write_text(text.replace(needed, "needed_kb=1000000000000"))
    done = start()
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "MiB of memory and swap are free and about 976562500 are needed" in done.stderr
    assert (bundle / "deploy" / "model.engine").is_file()  # the old one stays
    assert start(PQ_IGNORE_MEMORY="1").returncode == 0


def test_profiles_are_of_the_graphs_inputs(bundle_directory: Path) -> None:
    options = TargetOptions(sms=(87,), max_batch_size=2, max_input_len=16, max_seq_len=48)
    graph = onnx.load(bundle_directory / "model.onnx").graph
    fixed = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in graph.input}
    for profile in profiles(open_bundle(bundle_directory).config, options):
        assert profile.shapes.keys() == fixed.keys()
        for name, shapes in profile.shapes.items():
            for shape in shapes:
                assert all(want in (0, got) for want, got in zip(fixed[name], shape, strict=True)), name


def test_it_generates_what_the_onnxruntime_bundle_generates(
    bundle_directory: Path, calibration_directory: Path, tmp_path: Path
) -> None:
    """In FP32: FP16 constants move values."""
    calibration = load_calibration(calibration_directory)
    tokens = []
    for name, options in (("ort", TargetOptions()), ("trt", TargetOptions(sms=(90,), float_type="fp32"))):
        made = build(calibration, calibration_directory, find_target(name), tmp_path / name, Stages(), options=options)
        tokens.append(list(generate(open_decoder(made), [5, 17, 40, 9], 24, set(), Sampling())))
    assert tokens[0] == tokens[1] and len(set(tokens[0])) > 1


def test_it_validates(pq: Runner, bundle_directory: Path, calibration_directory: Path) -> None:
    """FP16: blocks and perplexity are judged, the twin is not."""
    arguments = ("--calib", calibration_directory, "--windows", "1", "--window", "64", "--max-ppl-difference", "0.2")
    result = pq("validate", bundle_directory, *arguments, "--json")
    assert result.code == 0, result.err
    names = [check["name"] for check in json.loads(result.out)["checks"]]
    assert names == [
        "equal codes, worst site, block by block",
        "largest difference of codes, block by block",
        "perplexity difference, ONNX to fake-quant",
    ]


def test_chat_pieces_are_the_template(bundle_directory: Path) -> None:
    pieces = json.loads((bundle_directory / "deploy" / "chat.json").read_text())
    assert pieces["user"] == ["<user>", "</s>"] and pieces["generation"] == "<assistant>"
    assert pieces["system"] == ["<system>", "</s>"]


@pytest.mark.parametrize(
    ("precision", "sm", "form"),
    [
        ("w4a4", 87, Form.PLUGIN),
        ("w4a4", 110, Form.PLUGIN),
        ("w4a8", 87, Form.PLUGIN),
        ("w8a8", 87, Form.QDQ),
        ("w4a16", 120, Form.QDQ),
    ],
)
def test_who_multiplies(precision: str, sm: int, form: Form) -> None:
    chosen, reason = choose_form(Precision.named(precision), False, TargetOptions(sms=(sm,)))
    assert chosen is form and reason


def test_a_form_that_was_asked_for_is_checked_early(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Before anything is calibrated or exported."""
    target, w4a4 = find_target("trt-rtx"), Precision.named("w4a4")
    with pytest.raises(UsageError, match=r"the plugin has no kernels for SM 75\. Use --form qdq there"):
        target.form_for(w4a4, False, "plugin", TargetOptions(sms=(75,)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(PqExportError, match="plugin build"):
        target.form_for(w4a4, False, "plugin", TargetOptions(sms=(86,)))
    assert target.form_for(w4a4, False, "qdq", TargetOptions(sms=(75, 86)))[0] is Form.QDQ


def test_build_says_what_remains(pq: Runner, calibration_directory: Path, tmp_path: Path) -> None:
    result = pq("build", calibration_directory, "--target", "trt", "--jetpack", "6.2", "-o", tmp_path / "out")
    assert result.code == 0
    assert "no engine yet for SM 87" in result.out
    assert "to such a machine and run deploy/build_engine.sh on the board" in result.out


@pytest.mark.parametrize("spelling", ["86,89,120", "86 89 120", "86,89 120"])
def test_several_gpus_may_stand_one_after_the_other(spelling: str) -> None:
    arguments = ["calibration", "--target", "trt-rtx", "--sm", *spelling.split(), "-o", "out"]
    flags = cli.commands["build"].make_context("build", arguments).params
    assert flags["sm"] == ("86,89,120",)
    assert flags["calibration"] == Path("calibration")


def test_a_model_may_be_called_by_digits() -> None:
    arguments = ["--target", "trt", "--sm", "87", "./120", "-o", "out"]
    assert cli.commands["build"].make_context("build", arguments).params["calibration"] == Path("./120")


REFUSED = [
    (("--target", "trt", "--jetpack", "6.2", "--form", "qdq"), 1, "4-bit weights have blocks of 64 or 128"),
    (("--target", "trt", "--sm", "88"), 2, "unknown SM '88'"),
    (("--target", "trt", "--sm", "orin"), 2, "--sm orin is no compute capability"),
    (("--target", "trt", "--jetpack", "5.1"), 2, "unknown JetPack '5.1'"),
    (("--target", "trt", "--jetpack", "6.2", "--sm", "110"), 2, "--jetpack 6.2 is for Orin, SM 87, not 110"),
    (("--target", "trt", "--max-input-len", "64", "--max-seq-len", "64"), 2, "leaves no room for an answer"),
    (("--target", "trt", "--max-seq-len", "100000"), 2, "is longer than the model's context beside the prefix, 509"),
    (("--target", "ort", "--sm", "87"), 2, "--sm is not for this target"),
    (("--target", "trt", "--form", "integer"), 1, "target trt does not run form 'integer'"),
    (("--target", "trt-rtx", "--jetpack", "6.2"), 1, "TensorRT for RTX does not run on a Jetson"),
    (("--target", "trt-rtx", "--sm", "87"), 2, "--sm 87 is no GPU of --target trt-rtx"),
]


@pytest.mark.parametrize(("arguments", "code", "says"), REFUSED)
def test_refusals(
    pq: Runner, calibration_directory: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, says: str
) -> None:
    pq.refuses("build", calibration_directory, *arguments, "-o", tmp_path / "out", code=code, says=(says,))
    assert not (tmp_path / "out").exists()


def test_a_context_that_is_known_bounds_the_lengths() -> None:
    target = find_target("trt")
    resolved = target.resolve(TargetOptions(sms=(87,)), 300)
    assert (resolved.max_seq_len, resolved.max_input_len, resolved.float_type) == (300, 299, "fp16")
    with pytest.raises(UsageError, match="unknown --float-type 'fp8'"):
        target.resolve(TargetOptions(sms=(87,), float_type="fp8"), 300)
