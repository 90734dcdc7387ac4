"""The runner against the real headers of TensorRT and CUDA, and as CMake builds it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from pq_export.errors import PqExportError
from pq_export.plugins.toolchain import find_cmake, toolkit_directories
from tests.plugins.conftest import cached, pip
from tests.plugins.libraries import CACHE
from tests.runner.compiling import FLAGS, PROGRAM, RUNNER, SOURCES, compiler
from tests.runner.test_text import write_bundle

# The only release with its source, and that of all it needs, on PyPI. Exact for tokenizers of GPT-2's kind; those of
# Llama 3 and Qwen need 1.5, which the runner's CMake file fetches.
TOKENIZERS_PACKAGE = "pytorch-tokenizers==1.0.1"
TOKENIZERS_SHA256 = "19938c0efd5348fb0589610094c1c6bf6e055b20889f6250068d2b552a0b137b"


def cuda_include() -> Path:
    for directory in toolkit_directories():
        if (directory.parent / "include" / "cuda_runtime_api.h").is_file():
            return directory.parent / "include"
    pytest.skip("no headers of the CUDA runtime")


@pytest.mark.parametrize("name", PROGRAM)
def test_compiles_with_the_real_headers(name: str, tensorrt_include: Path, json_include: Path) -> None:
    system = [word for path in (tensorrt_include, cuda_include(), json_include) for word in ("-isystem", str(path))]
    includes = [f"-I{SOURCES}", f"-I{RUNNER.parent / 'csrc'}"]
    command = [compiler(), *FLAGS, "-fsyntax-only", *includes, *system, str(SOURCES / f"{name}.cpp")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def built(name: str, tensorrt_include: Path, *options: str) -> Path:
    """pq-run by CMake, in the checkout's cache."""
    compiler(), cuda_include()
    try:
        cmake = str(find_cmake())
    except PqExportError as error:
        pytest.skip(str(error))
    directory = CACHE / name
    options = (f"-DPQ_TENSORRT_INCLUDE={tensorrt_include}", "-DCMAKE_BUILD_TYPE=Debug", *options)
    for command in (
        [cmake, "-S", str(RUNNER), "-B", str(directory), *options],
        [cmake, "--build", str(directory), "--target", "pq-run", "-j2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return directory / "pq-run"


def pq_run(program: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program), *words], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_cmake_without_a_tokenizer(tensorrt_include: Path, json_include: Path, tmp_path: Path) -> None:
    source = f"-DFETCHCONTENT_SOURCE_DIR_PQ_NLOHMANN={json_include.parent}"
    program = built("pq-runner-plain", tensorrt_include, "-DPQ_RUNNER_TOKENIZER=OFF", source)
    bundle = str(write_bundle(tmp_path / "bundle"))
    assert pq_run(program, bundle, "--prompt-ids", "1,5,6", "--dry-run").stdout == "5,6\n"
    done = pq_run(program, bundle, "-p", "Hi", "--dry-run")
    assert done.returncode == 1 and "was built without a tokenizer" in done.stderr
    needed = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=False).stdout
    assert "libcrypto" in needed and "nvinfer" not in needed and "libcuda" not in needed


@pytest.fixture(scope="session")
def tokenizers_source() -> Path:
    def make(directory: Path) -> None:
        pip("download", TOKENIZERS_PACKAGE, "--no-binary", ":all:", "--no-build-isolation", "--dest", str(directory))
        (archive,) = directory.glob("*.tar.gz")
        assert hashlib.sha256(archive.read_bytes()).hexdigest() == TOKENIZERS_SHA256
        with tarfile.open(archive) as tar:
            tar.extractall(directory, filter="data")
        archive.unlink()

    return cached("pytorch-tokenizers-1.0.1", make) / "pytorch_tokenizers-1.0.1"


@pytest.mark.slow
@pytest.mark.skipif(
    "PQ_EXPORT_TEST_TOKENIZERS" not in os.environ,
    reason="PQ_EXPORT_TEST_TOKENIZERS is not set: compiling the tokenizers' source takes five minutes",
)
def test_token_ids_are_hugging_faces(tensorrt_include: Path, tokenizers_source: Path, tmp_path: Path) -> None:
    """SmolLM2's tokenizer, from its GGUF: texts through the program's own checks, a prompt through --dry-run."""
    model = os.environ.get("PQ_EXPORT_DEMO_MODEL")
    if not model:
        pytest.skip("PQ_EXPORT_DEMO_MODEL does not name the demo model")
    from transformers import AutoTokenizer

    path = Path(model)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    bundle = write_bundle(tmp_path / "bundle", max_position_embeddings=8192)
    tokenizer.save_pretrained(bundle)
    program = built("pq-runner", tensorrt_include, f"-DPQ_TOKENIZERS_SOURCE={tokenizers_source}")

    texts = [
        Path(json.__file__).read_text(encoding="utf-8"),
        "naïve 日本語 🙂👩‍👩‍👧 العربية ½ ①\u00a0\u2003",
        "  two \n\n\t x ",
        "",
    ]
    texts += ["1234567890 12.5", "don't I'LL", "<|im_start|>user\nHi<|im_end|>\n", "e\u0301 İstanbul", "a" * 300]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    (bundle / "deploy").mkdir()
    checks = [{"text": text, "ids": i} for text, i in zip(texts, ids, strict=True)]
    (bundle / "deploy" / "tokenizer_checks.json").write_text(json.dumps(checks))
    done = pq_run(program, str(bundle), "-p", "Tell me a story", "--dry-run", "--raw")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert [int(i) for i in done.stdout.split(",")] == tokenizer("Tell me a story", add_special_tokens=False)[
        "input_ids"
    ]

    checks[0]["ids"] = checks[0]["ids"][:-1]
    (bundle / "deploy" / "tokenizer_checks.json").write_text(json.dumps(checks))
    done = pq_run(program, str(bundle), "-p", "Tell me a story", "--dry-run")
    assert done.returncode == 1 and "gives other ids than Hugging Face's" in done.stderr
