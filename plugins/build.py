"""Building ``libpq.so``: once for each set of sources, compiler and GPUs, kept in the user's cache.

A library's directory is named by a hash of everything that goes into it, and appears whole, by a rename.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pq_export.errors import PqExportError
from pq_export.files import errors_of, write_atomically
from pq_export.plugins.abi import SOURCE_DIRECTORY
from pq_export.plugins.toolchain import (
    ARCHITECTURES,
    Nvcc,
    TensorRTHeaders,
    find_cmake,
    find_nvcc,
    find_tensorrt,
    machine,
)

LIBRARY_NAME, FACTS_NAME, LOG_NAME = "libpq.so", "build.json", "build.log"
ERROR_LINES, ERROR_CHARACTERS = 3, 600
PROMPT = "$ "  # before the commands in the log


@dataclass(frozen=True)
class Built:
    """A library and what it was built from. ``tensorrt``: version of the headers, None without the plugin."""

    path: Path
    sms: tuple[int, ...]
    nvcc: str
    tensorrt: str | None
    machine: str
    seconds: float
    sources: str

    @property
    def current(self) -> bool:
        """Whether the sources are still the same."""
        return self.sources == sources_hash()


def cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "pq-export" / "plugins"


def sources_hash() -> str:
    """Of every file that is compiled, and of how."""
    files = [path for path in SOURCE_DIRECTORY.glob("csrc/*") if path.is_file()]
    files += [path for path in SOURCE_DIRECTORY.glob("CMake*") if path.is_file()]
    digest = hashlib.sha256()
    for path in sorted(files):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(SOURCE_DIRECTORY).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def build(
    sms: Sequence[int],
    *,
    tensorrt_include: Path | None = None,
    jobs: int | None = None,
    output: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Built:
    """One library for all of ``sms``, from the cache where it is already there.

    ``output``: a directory that gets a copy. ``jobs``: compilers at a time (default: one a core).
    """
    nvcc, cmake, tensorrt = find_nvcc(), find_cmake(), find_tensorrt(tensorrt_include)
    nvcc.check(sms)
    chosen = tuple(sorted(set(sms)))
    sources = sources_hash()
    key = json.dumps([sources, chosen, nvcc.version, machine(), tensorrt and [str(tensorrt.path), tensorrt.version]])
    directory = cache_directory() / hashlib.sha256(key.encode()).hexdigest()[:16]
    result = _read(directory)
    if result is None:
        started = time.perf_counter()
        with _new_entry(directory) as part:
            progress(f"compile for {', '.join(f'sm_{sm}' for sm in chosen)} with CUDA {nvcc.version}")
            _compile(part, directory, cmake, nvcc, chosen, tensorrt, jobs)
            if sources_hash() != sources:
                raise PqExportError("changed while it was compiled", where=SOURCE_DIRECTORY, cure="Build again.")
            facts = {
                "sms": chosen,
                "nvcc": nvcc.version,
                "tensorrt": tensorrt and tensorrt.version,
                "machine": machine(),
                "seconds": round(time.perf_counter() - started, 1),
                "sources": sources,
            }
            (part / FACTS_NAME).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        result = _read(directory)
        assert result is not None
    if output is not None:
        with errors_of(output):
            output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / LIBRARY_NAME, result.path.read_bytes())
    return result


def built() -> list[Built]:
    """Libraries in the cache, newest first."""
    directories = cache_directory().glob("*/")
    found = [entry for directory in directories if (entry := _read(directory)) is not None]
    return sorted(found, key=lambda entry: entry.path.stat().st_mtime, reverse=True)


def find_library(*sms: int, plugin: bool = False) -> Path:
    """The newest library of the present sources that holds kernels for all of ``sms``, and TensorRT's ``plugin``."""
    for entry in built():
        fits = set(sms) <= set(entry.sms) and (entry.tensorrt is not None or not plugin)
        if fits and entry.current and entry.machine == machine():
            return entry.path
    names = ", ".join(f"sm_{sm}" for sm in sms)
    flags = " ".join(f"--sm {sm}" for sm in sms) + (" --tensorrt-include DIR" if plugin else "")
    raise PqExportError(
        f"no library{' with the TensorRT plugin' if plugin else ''} is built for {names}",
        cure=f"Build it with: pq-export plugin build {flags}",
    )


def _read(directory: Path) -> Built | None:
    """The library in a directory of the cache; None where there is none, or an older version's."""
    try:
        facts = json.loads((directory / FACTS_NAME).read_text(encoding="utf-8"))
        entry = Built(path=directory / LIBRARY_NAME, **{**facts, "sms": tuple(facts["sms"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return entry if entry.path.is_file() else None


@contextlib.contextmanager
def _new_entry(directory: Path) -> Iterator[Path]:
    """A fresh directory that becomes ``directory``. Of two builds at a time the first one stays."""
    root = directory.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".building.", dir=root))
    except OSError as error:
        cure = "Set XDG_CACHE_HOME to a directory that you may write."
        raise PqExportError(f"cannot be written: {error.strerror}", where=root, cure=cure) from None
    try:
        yield part
        part.chmod(0o755)  # mkdtemp's is for its owner only; other directories are as the umask says
        if directory.exists() and _read(directory) is None:
            shutil.rmtree(directory)
        if not directory.exists():
            part.rename(directory)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _compile(
    part: Path,
    directory: Path,
    cmake: Path,
    nvcc: Nvcc,
    sms: Sequence[int],
    tensorrt: TensorRTHeaders | None,
    jobs: int | None,
) -> None:
    """``part``/libpq.so, and the log of making it."""
    work, log = part / "work", part / LOG_NAME
    configure = [
        *(str(cmake), "-S", str(SOURCE_DIRECTORY), "-B", str(work)),
        *(["-G", "Ninja"] if shutil.which("ninja") else []),
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_CUDA_COMPILER={nvcc.path}",
        f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(ARCHITECTURES[sm] for sm in sms)}",
        f"-DPQ_TENSORRT_INCLUDE={tensorrt.path if tensorrt else ''}",
    ]
    parallel = jobs or os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or os.cpu_count() or 1
    with log.open("w", encoding="utf-8") as stream:
        for command in (configure, [str(cmake), "--build", str(work), "--parallel", str(parallel)]):
            stream.write(f"{PROMPT}{' '.join(command)}\n")
            stream.flush()
            done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False)
            if done.returncode:
                stream.flush()
                kept = directory.with_suffix(".log")
                shutil.copyfile(log, kept)
                raise PqExportError(
                    f"CMake failed: {_last_words(log)}", where=SOURCE_DIRECTORY, cure=f"The whole log is {kept}"
                )
    libraries = sorted(work.rglob(LIBRARY_NAME))
    if not libraries:
        raise PqExportError(f"CMake made no {LIBRARY_NAME}", where=SOURCE_DIRECTORY)
    shutil.copy2(libraries[0], part / LIBRARY_NAME)
    shutil.rmtree(work)


def _last_words(log: Path) -> str:
    """The lines that say what is wrong: from the first 'error' on, else the last ones."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(PROMPT)]
    first = next((i for i, line in enumerate(lines) if re.search(r"\berror\b", line, re.IGNORECASE)), -ERROR_LINES)
    return " | ".join(lines[first:][:ERROR_LINES])[:ERROR_CHARACTERS]
