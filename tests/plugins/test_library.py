"""The binding without a GPU: its signatures against the header, what it refuses to load, sizes it computes."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from pq_export.errors import PqExportError
from pq_export.plugins import abi
from pq_export.plugins.abi import Layout
from pq_export.plugins.library import SIGNATURES, Library, PackedWeights

C_TYPES = {"int": {ctypes.c_int}, "float": {ctypes.c_float}, "size_t": {ctypes.c_size_t}}
POINTERS = {ctypes.c_void_p, ctypes.POINTER(ctypes.c_int), ctypes.c_char_p}


def prototypes() -> dict[str, tuple[str, list[str]]]:
    """Name -> result and arguments, as they are written in pq_kernels.h."""
    header = re.sub(r"/\*.*?\*/", "", abi.HEADER.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = re.findall(r"^((?:const )?\w+\*?)\s+(pq_\w+)\(([^)]*)\);", header, flags=re.MULTILINE)
    return {name: (result, re.split(r",\s*", arguments)) for result, name, arguments in found}


def types_of(declaration: str) -> set[object]:
    return POINTERS if "*" in declaration else C_TYPES[declaration.split()[0]]


def test_signatures_are_the_headers() -> None:
    declared = prototypes()
    assert set(declared) == set(SIGNATURES)
    for name, (result, arguments) in declared.items():
        ours_result, ours = SIGNATURES[name]
        wanted = [] if arguments == ["void"] else arguments
        assert ours_result in types_of(result), name
        assert len(ours) == len(wanted), name
        for kind, declaration in zip(ours, wanted, strict=True):
            assert kind in types_of(declaration), (name, declaration)


def test_what_is_no_library_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "libpq.so"
    with pytest.raises(PqExportError, match="cannot be loaded"):
        Library(path)
    path.write_text("text")
    with pytest.raises(PqExportError, match="pq-export plugin build"):
        Library(path)


def stub(directory: Path, version: int = abi.ABI_VERSION, functions: bool = True) -> Path:
    """A library that does nothing."""
    source = f"int pq_abi_version(void) {{ return {version}; }}\n"
    if functions:
        source += "".join(f"void {name}(void) {{}}\n" for name in SIGNATURES if name != "pq_abi_version")
    (directory / "stub.c").write_text(source)
    library = directory / "libpq.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(directory / "stub.c")], check=True)
    return library


def test_other_versions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PqExportError, match="has interface version 2, not 1"):
        Library(stub(tmp_path, version=2))


def test_a_library_that_lacks_functions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PqExportError, match="undefined symbol: pq_"):
        Library(stub(tmp_path, functions=False))


def test_weights_must_be_on_a_gpu() -> None:
    with pytest.raises(PqExportError, match="on a GPU"):
        PackedWeights.of(np.zeros((16, 64), np.int8), 1.0, None, Layout.S8, device="cpu")


def test_wrong_scales_are_refused() -> None:
    for scale, bias, name in ((np.zeros(3), None, "scale"), (1.0, np.zeros(3), "bias")):
        with pytest.raises(PqExportError, match=rf"{name}: has shape \[3\]; N is 16"):
            PackedWeights.of(np.zeros((16, 64), np.int8), scale, bias, Layout.S8, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_nothing_is_launched_on_cpu_tensors(tmp_path: Path) -> None:
    with pytest.raises(PqExportError, match=r"x: is torch\.float16 \[2, 32\] on cpu"):
        Library(stub(tmp_path)).quantize(torch.zeros(2, 32, dtype=torch.float16), 1.0, 8)
