"""Every way a user can go wrong: one line, the right exit code, nothing half-written."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch

from pq_export import bundle as bundle_module
from pq_export.bundle import CONFIG_NAME, DATA_NAME, MODEL_NAME, file_record
from pq_export.calibration import JSON_NAME, TENSORS_NAME, load_calibration, save_calibration
from tests.cli_runner import Runner

SMALL = ("--calib-samples", 2, "--seq-len", 32, "--num-layers", 1)


@pytest.fixture
def pq(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(monkeypatch, capsys)


@pytest.fixture
def checkpoint(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


@pytest.fixture(scope="module")
def finished(tiny_llama_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``calib`` and, built from it with external data, ``bundle``."""
    directory = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        import sys

        from pq_export.cli import main

        for args in (
            ["calibrate", tiny_llama_dir, "--w4a4", "--calib-data", text_file, *SMALL, "-o", directory / "calib"],
            ["build", directory / "calib", "--external-data", "-o", directory / "bundle"],
        ):
            patch.setattr(sys, "argv", ["pq-export", *map(str, args)])
            main.__globals__["os"].environ.setdefault("TQDM_DISABLE", "1")
            main()  # returns: only failures exit
    return directory


@pytest.fixture
def made(finished: Path, tmp_path: Path) -> Path:
    """A copy of ``finished`` that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "finished"))


# --- the model -------------------------------------------------------------------------------------


def test_no_such_path(pq: Runner, tmp_path: Path) -> None:
    pq.refuses(tmp_path / "nowhere", "--w4a4", "-o", tmp_path / "out", says=("nowhere", "no such file or directory"))
    assert not (tmp_path / "out").exists()


def test_hub_id_without_network(pq: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def no_network(*args: object, **options: object) -> str:
        raise LocalEntryNotFoundError("cannot reach the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    pq.refuses(
        "some-org/some-model", "--w4a4", "-o", tmp_path / "out", says=("some-org/some-model", "hub cannot be reached")
    )


def test_directory_without_config(pq: Runner, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    pq.refuses(tmp_path / "model", "--w4a4", says=("no config.json",))


def test_file_that_is_no_gguf(pq: Runner, text_file: Path) -> None:
    pq.refuses(text_file, "--w4a4", says=("not a .gguf",))


def test_unsupported_architecture_is_named_and_supported_ones_listed(pq: Runner, checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    pq.refuses(checkpoint, "--w4a4", says=("GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM"))


def test_pickled_weights_are_refused_with_the_way_to_convert(pq: Runner, checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(b"\x80\x04not opened")
    pq.refuses(checkpoint, "--w4a4", says=("pytorch_model.bin", "refused", "save_pretrained"))


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_truncated_safetensors(pq: Runner, checkpoint: Path, keep: float) -> None:
    file = checkpoint / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])
    pq.refuses(checkpoint, "--w4a4", says=("model.safetensors", "truncated or corrupt"))


def test_corrupt_gguf(pq: Runner, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(40))
    pq.refuses(tmp_path / "bad.gguf", "--w4a4", says=("bad.gguf", "truncated"))


@pytest.mark.parametrize("value, kind", [(float("nan"), "NaN"), (float("inf"), "Inf")])
def test_nan_and_inf_weights_name_the_tensor(pq: Runner, checkpoint: Path, value: float, kind: str) -> None:
    file = checkpoint / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = value
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    pq.refuses(checkpoint, "--w4a4", says=("layers.0.mlp.up_proj.weight", kind))


def test_missing_tokenizer(pq: Runner, checkpoint: Path) -> None:
    for file in checkpoint.glob("tokenizer*"):
        file.unlink()
    pq.refuses(checkpoint, "--w4a4", says=("tokenizer", "tokenizer.json"))


def test_missing_shard(pq: Runner, checkpoint: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    pq.refuses(checkpoint, "--w4a4", says=("model-00002-of-00002.safetensors",))


def test_missing_tensor(pq: Runner, checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    pq.refuses(checkpoint, "--w4a4", says=("layers.0.mlp.up_proj.weight", "missing"))


# --- options ---------------------------------------------------------------------------------------


def test_calibration_text_too_short(pq: Runner, tiny_llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("w3 w4 w5")
    pq.refuses(
        tiny_llama_dir, "--w4a4", "--calib-data", tmp_path / "short.txt", says=("short.txt", "3 tokens", "too few")
    )


def test_calibration_text_not_utf8(pq: Runner, tiny_llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9 " * 100)
    pq.refuses(tiny_llama_dir, "--w4a4", "--calib-data", tmp_path / "latin1.txt", says=("latin1.txt", "not UTF-8"))


def test_sequence_longer_than_the_context(pq: Runner, tiny_llama_dir: Path, tmp_path: Path) -> None:
    pq.refuses(tiny_llama_dir, "--w4a4", "--seq-len", 513, "-o", tmp_path / "out", says=("513", "512"))
    assert not list(tmp_path.iterdir())


def test_conflicting_and_impossible_flags(pq: Runner, tiny_llama_dir: Path, tmp_path: Path) -> None:
    pq.refuses(tiny_llama_dir, "--w4a4", "--w8a8", code=2, says=("--w4a4", "--w8a8"))
    pq.refuses(tiny_llama_dir, code=2, says=("no precision",))
    pq.refuses(tiny_llama_dir, "--w4a4", "--target", "toaster", code=2, says=("toaster", "ort"))
    pq.refuses(tiny_llama_dir, "--w4a4", "--seq-len", 1, code=2, says=("--seq-len",))
    pq.refuses(tiny_llama_dir, "--w4a4", "--num-layers", 99, "-o", tmp_path / "o", code=2, says=("99", "3"))
    assert pq(tiny_llama_dir, "--w4a4", "--kv", 5).code == 2
    assert pq(tiny_llama_dir, "--w4a4", "--rotate", "sideways").code == 2
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("precision: w4a4\nspeed_of_light: 3\n")
    pq.refuses(tiny_llama_dir, "--recipe", recipe, says=("recipe.yaml", "speed_of_light"))


def test_output_exists_or_is_a_file_or_cannot_be_written(
    pq: Runner, tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "precious").write_text("data")
    file.write_text("data")
    pq.refuses(tiny_llama_dir, "--w4a4", "-o", full, says=("already exists", "--force"))
    pq.refuses(tiny_llama_dir, "--w4a4", "-o", file, says=("is a file",))
    pq.refuses(tiny_llama_dir, "--w4a4", "-o", file / "below", says=("is a file",))
    assert (full / "precious").read_text() == "data"
    monkeypatch.setattr("os.access", lambda *args, **options: False)
    pq.refuses(tiny_llama_dir, "--w4a4", "-o", tmp_path / "locked", says=("not writable",))


def test_disk_full_while_writing(pq: Runner, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle_module, "save_model", full)
    pq.refuses("build", finished / "calib", "-o", tmp_path / "out", says=("No space left", "out"))
    assert not list(tmp_path.iterdir())


# --- calibrations and bundles ----------------------------------------------------------------------


def test_calibration_altered_newer_or_absent(pq: Runner, made: Path, tmp_path: Path) -> None:
    calib, out = made / "calib", tmp_path / "out"
    pq.refuses("build", tmp_path, "-o", out, says=("not a calibration",))
    tensors = bytearray((calib / TENSORS_NAME).read_bytes())
    tensors[-1] ^= 1
    (calib / TENSORS_NAME).write_bytes(tensors)
    pq.refuses("build", calib, "-o", out, says=(TENSORS_NAME, "does not match"))
    document = json.loads((calib / JSON_NAME).read_text())
    document["schema_version"] = 99
    (calib / JSON_NAME).write_text(json.dumps(document))
    pq.refuses("build", calib, "-o", out, says=("schema version 99",))
    assert not out.exists()


def test_calibration_of_another_checkpoint(
    pq: Runner, made: Path, checkpoint_dir: Callable[[str], Path], text_file: Path, other_text_file: Path
) -> None:
    shutil.copytree(made / "calib", made / "other.calib")
    pq.refuses(
        checkpoint_dir("llama"),
        "--w4a4",
        "--calib-data",
        text_file,
        *SMALL,
        "-o",
        made / "other",
        says=("other.calib", "another checkpoint"),
    )
    pq.refuses(
        "validate",
        made / "bundle",
        "--calib",
        made / "calib",
        "--model",
        checkpoint_dir("llama"),
        "--text",
        other_text_file,
        says=("not the checkpoint",),
    )


def test_bundle_of_another_calibration(
    pq: Runner, made: Path, tiny_llama_dir: Path, text_file: Path, other_text_file: Path, tmp_path: Path
) -> None:
    assert pq("calibrate", tiny_llama_dir, "--w8a8", "--calib-data", text_file, *SMALL, "-o", tmp_path / "c8").code == 0
    pq.refuses(
        "validate",
        made / "bundle",
        "--calib",
        tmp_path / "c8",
        "--text",
        other_text_file,
        "--windows",
        1,
        "--window",
        32,
        says=("not built from this calibration",),
    )


def test_bundle_of_another_prefix_kv(pq: Runner, made: Path, other_text_file: Path) -> None:
    """As two calibrations have that differ only in how long the prefix was tuned."""
    calibration = load_calibration(made / "calib")
    name, *_ = [name for name in calibration.tensors if name.endswith(".prefix.value")]
    changed = {**calibration.tensors, name: calibration.tensors[name] + np.float16(0.5)}
    save_calibration(dataclasses.replace(calibration, tensors=changed), made / "calib")
    pq.refuses(
        "validate",
        made / "bundle",
        "--calib",
        made / "calib",
        "--text",
        other_text_file,
        "--windows",
        1,
        "--window",
        32,
        says=("not built from this calibration",),
    )


@pytest.mark.parametrize("damage", ["missing", "altered", "truncated"])
def test_bundle_with_damaged_data_file(pq: Runner, made: Path, damage: str) -> None:
    data = made / "bundle" / DATA_NAME
    content = bytearray(data.read_bytes())
    if damage == "missing":
        data.unlink()
    elif damage == "altered":
        content[100] ^= 0xFF
        data.write_bytes(content)
    else:
        data.write_bytes(content[:-1])
    pq.refuses("inspect", made / "bundle", says=(DATA_NAME, "missing" if damage == "missing" else "altered"))


@pytest.mark.parametrize("location", ["../outside.data", "/etc/passwd", "sub/../../outside.data", "not-listed.data"])
def test_external_data_that_escapes_the_bundle(pq: Runner, made: Path, location: str) -> None:
    path = made / "bundle" / MODEL_NAME
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(model.SerializeToString())
    config = json.loads((made / "bundle" / CONFIG_NAME).read_text())
    config["files"][MODEL_NAME] = file_record(path)
    (made / "bundle" / CONFIG_NAME).write_text(json.dumps(config))
    pq.refuses("generate", made / "bundle", "-p", "w3", says=("external data", location))


def test_bundle_that_lists_a_file_outside(pq: Runner, made: Path) -> None:
    config = json.loads((made / "bundle" / CONFIG_NAME).read_text())
    config["files"]["../calib/calibration.json"] = file_record(made / "calib" / JSON_NAME)
    (made / "bundle" / CONFIG_NAME).write_text(json.dumps(config))
    pq.refuses("inspect", made / "bundle", says=("outside the bundle",))


ENTRIES = ("target", "form", "precision", "prefix", "kv_cache", "files", "source")
DAMAGED = [(entry, value) for entry in ENTRIES for value in (None, 3)]


@pytest.mark.parametrize(("entry", "value"), [*DAMAGED, ("prefix", {}), ("files", {"model.onnx": None})])
def test_bundle_whose_description_was_damaged(pq: Runner, made: Path, entry: str, value: object) -> None:
    path = made / "bundle" / CONFIG_NAME
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {entry: value}))
    commands = (("inspect",), ("generate", "-p", "w3"), ("check", "--target", "static"))
    for command, *flags in commands:
        pq.refuses(command, made / "bundle", *flags, says=(CONFIG_NAME,))


def test_not_a_bundle_and_newer_bundle(pq: Runner, made: Path, tmp_path: Path) -> None:
    pq.refuses("generate", tmp_path, "-p", "hi", says=("not a bundle",))
    config = json.loads((made / "bundle" / CONFIG_NAME).read_text())
    config["schema_version"] = 99
    (made / "bundle" / CONFIG_NAME).write_text(json.dumps(config))
    pq.refuses("inspect", made / "bundle", says=("schema version 99",))


def test_prompt_longer_than_the_context(pq: Runner, made: Path) -> None:
    pq.refuses("generate", made / "bundle", "-p", "w5 " * 600, says=("600 tokens",))
    pq.refuses("generate", made / "bundle", "-p", "", says=("empty",))


def test_evaluation_text_too_short(pq: Runner, made: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("w3 w4 w5")
    pq.refuses(
        "validate",
        made / "bundle",
        "--calib",
        made / "calib",
        "--text",
        tmp_path / "short.txt",
        says=("short.txt", "3 tokens"),
    )


def test_a_damaged_graph_fails_validation_with_exit_code_3(pq: Runner, made: Path, other_text_file: Path) -> None:
    """One weight scale 2 % off: the file is consistent, but it is not what calibration simulated."""
    path = made / "bundle" / MODEL_NAME
    model = onnx.load(path)
    scale = next(t for t in model.graph.initializer if t.name == "layers.0.self_attn.v_proj.combined_scale")
    scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * np.float32(1.02), scale.name))
    onnx.save(model, path)
    (made / "bundle" / DATA_NAME).unlink()
    config = json.loads((made / "bundle" / CONFIG_NAME).read_text())
    del config["files"][DATA_NAME]
    config["files"][MODEL_NAME] = file_record(path)
    (made / "bundle" / CONFIG_NAME).write_text(json.dumps(config))
    result = pq(
        "validate",
        made / "bundle",
        "--calib",
        made / "calib",
        "--text",
        other_text_file,
        "--windows",
        1,
        "--window",
        64,
    )
    assert result.code == 3
    assert "FAIL" in result.out


def test_weights_above_fp16_are_refused_by_name(pq: Runner, checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    file = checkpoint / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 1e7)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    pq.refuses(
        "calibrate",
        checkpoint,
        "--w4a16",
        "--calib-data",
        text_file,
        *SMALL,
        "-o",
        tmp_path / "out",
        says=("lm_head.weight", "FP16"),
    )
    assert not (tmp_path / "out").exists()


def test_force_never_deletes_the_input(pq: Runner, checkpoint: Path, made: Path) -> None:
    pq.refuses(checkpoint, "--w4a4", "-o", checkpoint, "--force", says=("holds the input",))
    pq.refuses("build", made / "calib", "-o", made, "--force", says=("holds the input",))
    assert (checkpoint / "config.json").is_file() and (made / "calib" / JSON_NAME).is_file()


def test_a_directory_in_the_place_of_the_calibration_is_kept(pq: Runner, tiny_llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "out.calib").mkdir()
    (tmp_path / "out.calib" / "precious").write_text("data")
    pq.refuses(tiny_llama_dir, "--w4a4", "-o", tmp_path / "out", says=("out.calib", "already exists"))
    assert (tmp_path / "out.calib" / "precious").read_text() == "data"


def test_device_and_seed_that_cannot_be(pq: Runner, tiny_llama_dir: Path, tmp_path: Path) -> None:
    pq.refuses(
        tiny_llama_dir, "--w4a4", "--device", "toaster", "-o", tmp_path / "o", code=2, says=("--device toaster",)
    )
    pq.refuses(tiny_llama_dir, "--w4a4", "--seed", -1, "-o", tmp_path / "o", code=2, says=("--seed",))


def test_force_replaces_a_damaged_calibration(
    pq: Runner, made: Path, tiny_llama_dir: Path, text_file: Path, other_text_file: Path
) -> None:
    (made / "bundle.calib").mkdir()
    (made / "bundle.calib" / JSON_NAME).write_text("{}")
    arguments = (tiny_llama_dir, "--w4a4", "--calib-data", text_file, *SMALL, "--text", other_text_file, "--windows", 2)
    end = ("--window", 64, "-o", made / "bundle")
    assert pq(*arguments, *end, "--force").code == 0
