"""The machine code of the kernels: the instruction that was meant, no emulation, no spills, shared memory that fits."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path

import pytest

from pq_export.errors import PqExportError
from pq_export.plugins import sass
from pq_export.plugins.sass import Kernel, find_tools, kernels
from tests.plugins.libraries import BUILT_SMS, INT4_SMS, LATER_SMS, built_library

STATIC_SHARED_LIMIT = 48 * 1024 + 1024  # what a kernel may declare on every GPU, and what sm_90 keeps for itself


@functools.cache
def kernels_of(sm: int) -> tuple[Kernel, ...]:
    library = built_library(sm).path
    if find_tools() is None:
        pytest.skip("cuobjdump and nvdisasm are not here")
    return tuple(kernels(library))


@pytest.mark.slow
@pytest.mark.parametrize("sm", BUILT_SMS)
class TestBuilt:
    def test_kernels_are_there_for_this_gpu_only(self, sm: int) -> None:
        assert {kernel.arch for kernel in kernels_of(sm)} == {"sm_90a" if sm == 90 else f"sm_{sm}"}
        names = " ".join(kernel.name for kernel in kernels_of(sm))
        for family in ("gemm_mma", "decode", "elementwise", "rmsnorm", "silu_hadamard", "dynamic"):
            assert family in names, names

    def test_no_spills(self, sm: int) -> None:
        """But where int4 is emulated: those kernels are for correctness tests."""
        fast = [k for k in kernels_of(sm) if not k.emulated]
        assert not [(k.name, k.spills, k.stack, k.local) for k in fast if k.spills or k.stack or k.local]

    def test_static_shared_memory_fits(self, sm: int) -> None:
        assert not [(k.name, k.shared) for k in kernels_of(sm) if k.shared > STATIC_SHARED_LIMIT]

    def test_matrix_products_are_integer_ones(self, sm: int) -> None:
        """Floating-point ones only in R4's left factor, in prefill."""
        for kernel in kernels_of(sm):
            kinds = ("HMMA",) if "silu_hadamard_rows" in kernel.name else ("IMMA", "IGMMA")
            assert all(name.startswith(kinds) for name in kernel.tensor_core), kernel


@pytest.mark.slow
@pytest.mark.parametrize("sm", BUILT_SMS)
def test_who_lets_the_next_kernel_start_waits_itself(sm: int) -> None:
    """From sm_90 on. A kernel that did the one without the other would let results be read before they are there."""
    families = ("decode", "elementwise", "rmsnorm", "silu_hadamard", "dynamic", *(["sm90"] if sm == 90 else []))
    for kernel in kernels_of(sm):
        starts_early = sm >= 90 and any(family in kernel.name for family in families)
        lets_in, waits = kernel.count("PREEXIT"), kernel.count("ACQBULK")
        assert (lets_in > 0, waits > 0) == (starts_early, starts_early), (kernel.name, lets_in, waits)


@pytest.mark.slow
@pytest.mark.parametrize("sm", INT4_SMS)
def test_int4_tensor_cores(sm: int) -> None:
    s4 = [k for k in kernels_of(sm) if k.count(r"IMMA\.16864\.S4\.S4")]
    s8 = [k for k in kernels_of(sm) if k.count(r"IMMA\.16832\.S8\.S8")]
    assert s4 and s8 and not set(map(id, s4)) & set(map(id, s8))
    for kind in (s4, s8):
        assert {"gemm", "decode"} <= {family for k in kind for family in ("gemm", "decode") if family in k.name}
    assert not [k.name for k in kernels_of(sm) if k.emulated]


@pytest.mark.slow
def test_wgmma_on_sm_90() -> None:
    wgmma = [k for k in kernels_of(90) if k.count(r"IGMMA\.64x\d+x32\.S8\.S8")]
    assert wgmma and not [k.name for k in wgmma if k.emulated]
    assert not [k.name for k in wgmma if k.count("IMMA")]  # one kind of product a kernel


@pytest.mark.slow
@pytest.mark.parametrize("sm", LATER_SMS)
def test_int4_is_emulated_only_where_int4_was_asked_for(sm: int) -> None:
    """mma.s4 compiles to calls there. Those kernels serve correctness tests; nothing else may depend on it."""
    emulated = {k.name for k in kernels_of(sm) if k.emulated}
    native = {k.name for k in kernels_of(86) if k.count(r"IMMA\.16864\.S4\.S4")}
    assert emulated and emulated <= native
    portable = {k.name for k in kernels_of(sm) if k.count(r"IMMA\.16832\.S8\.S8")} - emulated
    assert portable == {k.name for k in kernels_of(86) if k.count(r"IMMA\.16832\.S8\.S8")}


# --- the reader itself -----------------------------------------------------------------------------

SASS = """
\tcode for sm_86
\t\tFunction : _Z1kv
\t.headerflags\t@"EF_CUDA_SM86"
        /*0000*/                   MOV R1, c[0x0][0x28] ;      /* 0x00000a0000017a02 */
                                                               /* 0x000fe40000000f00 */
        /*0110*/              @!P0 IMMA.16864.S4.S4 R8, R8.ROW, R12.COL, RZ ;   /* 0x0000000c08087237 */
        /*0120*/             @UP0  UIADD3 UR4, UR4, 0x1, URZ ;  /* 0x0 */
        /*0130*/                   STL [R1], R2 ;   /* 0x0 */
        /*0140*/                   CALL.REL.NOINC 0x1e0 ;   /* 0x0 */
Fatbin elf code:
\tcode for sm_90a
\t\tFunction : _Z1kv
        /*0000*/                   IGMMA.64x256x32.S8.S8 R24, R4, gdesc[UR8], R24, gsb0 ;   /* 0x0 */
"""
USAGE = """
Fatbin elf code:
================
arch = sm_86
 Function _Z1kv:
  REG:18 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:376 TEXTURE:0 SURFACE:0 SAMPLER:0
arch = sm_90a
 Function _Z1kv:
  REG:168 STACK:0 SHARED:0 LOCAL:4 CONSTANT[0]:376 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


ELF = """
arch = sm_86
.section .symtab
   0x8  0x4120  0x760  FUNC  WEAK    DEFAULT  -      0x9b  $__internal_0_$__cuda_sm3x_div_f32_slowpath
   0x9       0  0xf00  FUNC  GLOBAL  DEFAULT  ENTRY  0x9b  _Z1kv
arch = sm_90a
   0x9       0  0xf00  FUNC  GLOBAL  DEFAULT  ENTRY  0x9b  _Z1kv
   0xa  0x4120  0xf00  FUNC  WEAK    DEFAULT  -      0x9b  $_Z1kv$__cuda_sm_9x_mma_sub_byte_internal
"""
LISTINGS = {"-sass": SASS, "-res-usage": USAGE, "-elf": ELF}


@pytest.fixture
def listing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(sass, "_cuobjdump", lambda option, library: LISTINGS[option])
    (tmp_path / "libpq.so").write_text("")
    return tmp_path / "libpq.so"


def test_reads_instructions_and_resources(listing: Path) -> None:
    first, second = kernels(listing)
    assert (first.arch, first.registers, first.stack, first.shared) == ("sm_86", 18, 8, 1024)
    assert first.instructions == Counter({"MOV": 1, "IMMA.16864.S4.S4": 1, "UIADD3": 1, "STL": 1, "CALL.REL.NOINC": 1})
    assert (first.spills, first.tensor_core) == (1, {"IMMA.16864.S4.S4": 1})
    assert first.functions == {"__cuda_sm3x_div_f32_slowpath"} and not first.emulated
    assert (second.arch, second.registers, second.local) == ("sm_90a", 168, 4)
    assert second.emulated == {"__cuda_sm_9x_mma_sub_byte_internal"}
    assert second.tensor_core == {"IGMMA.64x256x32.S8.S8": 1}


def test_prints_a_table(listing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sass.main([str(listing)], standalone_mode=False)
    out = capsys.readouterr().out
    assert "sm_86" in out and "sm_90a" in out
    assert "1 IMMA.16864.S4.S4" in out and "IGMMA.64x256x32.S8.S8 (emulation)" in out


def test_missing_library_and_tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(PqExportError, match="does not exist"):
        kernels(tmp_path / "libpq.so")
    (tmp_path / "libpq.so").write_text("")
    monkeypatch.setattr(sass, "find_tools", lambda: None)
    with pytest.raises(PqExportError, match="pip install nvidia-cuda-cuobjdump"):
        kernels(tmp_path / "libpq.so")
