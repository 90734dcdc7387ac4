"""Compile the runner's sources for the tests; objects stay in the checkout's cache, by a hash of what made them."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pq_export.plugins.abi import SOURCE_DIRECTORY
from tests.plugins.libraries import CACHE

RUNNER = SOURCE_DIRECTORY / "runner"
SOURCES = RUNNER / "src"
FAKE = Path(__file__).with_name("fake")
PROGRAM = ("main", "engine", "tensorrt_library")  # what needs TensorRT or CUDA
TOKENIZERS = ("tokenizer_none", "tokenizer_pytorch")
CORE = sorted(p for p in SOURCES.glob("*.cpp") if p.stem not in (*PROGRAM, *TOKENIZERS))
OURS = (FAKE, SOURCES, SOURCE_DIRECTORY / "csrc")
FLAGS = ["-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror"]


def compiler() -> str:
    """The C++ compiler; skips the test without one, or without OpenSSL's headers."""
    found = shutil.which(os.environ.get("CXX", "g++"))
    if not found:
        pytest.skip("no C++ compiler")
    probe = subprocess.run(
        [found, "-E", "-x", "c++", "-"], input="#include <openssl/evp.h>\n", capture_output=True, text=True, check=False
    )
    if probe.returncode:
        pytest.skip("no OpenSSL headers (libssl-dev)")
    return found


def program(name: str, sources: Sequence[Path], json_include: Path, libraries: Sequence[str] = ()) -> Path:
    """A program of ``sources``, or a shared library (name.so); CUDA's and TensorRT's headers are those in ``fake``."""
    cxx, shared = compiler(), name.endswith(".so")
    flags = [*FLAGS, *(f"-I{d}" for d in OURS), "-isystem", str(json_include), *(["-fPIC"] if shared else [])]
    with ThreadPoolExecutor(max_workers=2) as pool:
        objects = list(pool.map(lambda source: _object(cxx, source, flags), sources))
    link = [cxx, *(["-shared"] if shared else []), *map(str, objects), *libraries]
    return _made(_key([name, *link]), Path(name).suffix, lambda to: _run([*link, "-o", str(to)]))


def _object(cxx: str, source: Path, flags: list[str]) -> Path:
    headers = [header for directory in OURS for header in sorted(directory.glob("*.h"))]
    texts = [path.read_text(encoding="utf-8") for path in (source, *headers)]
    command = [cxx, *flags, "-c", str(source)]
    return _made(_key([*command, *texts]), ".o", lambda to: _run([*command, "-o", str(to)]))


def _key(parts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _made(key: str, suffix: str, make: Callable[[Path], None]) -> Path:
    directory = CACHE / "pq-runner-tests"
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{key}{suffix}"
    with open(directory / f".{key}.lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may be at it
        if not path.exists():
            part = directory / f".{key}{suffix}"
            make(part)
            part.rename(path)
    return path


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
