"""What a build needs from the machine: nvcc, CMake, TensorRT's headers, and which GPUs are here."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pq_export.errors import PqExportError, UsageError

# Compute capabilities with kernels of their own, and what CMake calls them: wgmma is in sm_90a only.
ARCHITECTURES = {
    80: "80-real",
    86: "86-real",
    87: "87-real",
    89: "89-real",
    90: "90a-real",
    100: "100-real",
    110: "110-real",
    120: "120-real",
}
JETSON_ORIN = 87
TENSORRT_PLACES = ("/usr/include/x86_64-linux-gnu", "/usr/include/aarch64-linux-gnu", "/usr/include")
CU_MAJOR, CU_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


def parse_sm(text: str) -> int:
    """``87``, ``sm_87``, ``8.7`` or ``90a`` -> 87 or 90."""
    digits = text.lower().removeprefix("sm_").removesuffix("a").replace(".", "")
    if not digits.isdecimal() or int(digits) not in ARCHITECTURES:
        raise UsageError(f"unknown SM '{text}'", cure=f"SMs: {', '.join(map(str, ARCHITECTURES))}.")
    return int(digits)


def local_sms() -> list[int]:
    """Compute capabilities of this machine's GPUs, by the driver; empty without one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    found = set()
    for device in range(count.value):
        driver.cuDeviceGetAttribute(ctypes.byref(major), CU_MAJOR, device)
        driver.cuDeviceGetAttribute(ctypes.byref(minor), CU_MINOR, device)
        found.add(10 * major.value + minor.value)
    return sorted(found)


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler. ``version``: such as 13.0.88."""

    path: Path
    version: str

    @property
    def major(self) -> int:
        return int(self.version.split(".")[0])

    def check(self, sms: Iterable[int]) -> None:
        """Refuse what this release cannot compile for."""
        known = _output([str(self.path), "--list-gpu-code"]).split()
        for sm in sms:
            if f"sm_{sm}" not in known:
                raise PqExportError(
                    f"CUDA {self.version} does not compile for sm_{sm}, only for {', '.join(known)}",
                    where=self.path,
                    cure="Use another CUDA release: put its bin directory first on PATH.",
                )


def toolkit_directories() -> list[Path]:
    """Where a CUDA toolkit's programs may be, beside PATH."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return [Path(home) / "bin" for home in (*homes, "/usr/local/cuda")]


def find_nvcc() -> Nvcc:
    """From CUDACXX, PATH, CUDA_HOME or the usual place."""
    candidates = [
        os.environ.get("CUDACXX"),
        shutil.which("nvcc"),
        *(str(directory / "nvcc") for directory in toolkit_directories()),
    ]
    path = next((found for name in candidates if name and (found := shutil.which(name))), None)
    if path is None:
        raise PqExportError(
            "no CUDA compiler (nvcc) found",
            cure="Install the CUDA toolkit, and put its bin directory on PATH or its root in CUDA_HOME.",
        )
    match = re.search(r"V(\d+\.\d+\.\d+)", _output([path, "--version"]))
    if match is None:
        raise PqExportError("does not answer --version as nvcc does", where=path)
    return Nvcc(Path(path), match.group(1))


def find_cmake() -> Path:
    """From this Python's environment (PyPI has a newer one than JetPack), or from PATH."""
    path = shutil.which(str(Path(sys.executable).parent / "cmake")) or shutil.which("cmake")
    if path is None:
        raise PqExportError(
            "no CMake found", cure="Install it: from your system's packages, or with pip install cmake."
        )
    return Path(path)


@dataclass(frozen=True)
class TensorRTHeaders:
    """A directory with NvInfer.h. ``version``: such as 10.3.0."""

    path: Path
    version: str


def find_tensorrt(option: Path | None) -> TensorRTHeaders | None:
    """From ``--tensorrt-include``, TENSORRT_INCLUDE or the usual places; None where there are none."""
    environment = os.environ.get("TENSORRT_INCLUDE")
    for name, given in (("--tensorrt-include", option), ("TENSORRT_INCLUDE", environment)):
        if given:
            if not (Path(given) / "NvInfer.h").is_file():
                raise UsageError(
                    "holds no NvInfer.h", where=f"{name} {given}", cure="Give TensorRT's include directory."
                )
            return _headers(Path(given))
    return next((_headers(Path(p)) for p in TENSORRT_PLACES if (Path(p) / "NvInfer.h").is_file()), None)


def _headers(path: Path) -> TensorRTHeaders:
    """Releases name the numbers NV_TENSORRT_MAJOR 10, or TRT_MAJOR_ENTERPRISE 10 and an alias."""
    text = (path / "NvInferVersion.h").read_text(encoding="utf-8", errors="replace")
    pattern = r"#define (?:NV_TENSORRT|TRT)_(MAJOR|MINOR|PATCH)(?:_ENTERPRISE)?\s+(\d+)"
    numbers = dict(re.findall(pattern, text))
    return TensorRTHeaders(path, ".".join(numbers.get(part, "?") for part in ("MAJOR", "MINOR", "PATCH")))


def machine() -> str:
    """Processor of this machine, such as x86_64: the library's host code is for it."""
    return platform.machine()


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise PqExportError(f"cannot be run ({error})", where=command[0], cure="Repair this CUDA toolkit.") from None
