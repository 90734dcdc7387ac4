"""The quantizers on a GPU. The plain one is exact; where means, exponentials and Hadamard sums come before it, codes
may differ from the reference where the value lies at a rounding boundary, and nowhere else.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pq_export.errors import PqExportError
from pq_export.plugins import reference
from pq_export.plugins.abi import Type
from pq_export.plugins.layouts import unpack_rows
from pq_export.plugins.library import Library
from pq_export.quantizer import code_range
from tests.gpu.conftest import Guarded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
CODES = [(Type.S8, 8), (Type.S8, 4), (Type.S4, 4)]
codes_types = pytest.mark.parametrize(("codes_type", "bits"), CODES, ids=[f"{t.name}-{b}" for t, b in CODES])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16", "fp32"])
SIZES = [(1, 32), (3, 96), (17, 4096), (5, 28672), (257, 576)]
sizes = pytest.mark.parametrize(("M", "K"), SIZES)
# In steps of the quantizer, whose largest value is 128: what fp32 loses in a norm, and in a transform of 28672 terms.
NORM_TIE, TRANSFORM_TIE = 5e-4, 2e-3


def random(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    """CUDA values with guard bytes around."""
    values = np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)
    return Guarded.copy(torch.from_numpy(values).to(dtype).cuda()).tensor


def wide(x: torch.Tensor) -> np.ndarray:
    """As NumPy, in its own type (bf16 through ml_dtypes)."""
    if x.dtype == torch.bfloat16:
        return x.cpu().view(torch.int16).numpy().view(reference.NUMPY_TYPES[Type.BF16])
    return x.cpu().numpy()


def output(M: int, K: int, codes_type: Type) -> Guarded:
    guarded = Guarded((M, K // 2), torch.uint8) if codes_type is Type.S4 else Guarded((M, K), torch.int8)
    guarded.poison()
    return guarded


def codes_in(guarded: Guarded, codes_type: Type, K: int) -> np.ndarray:
    guarded.assert_intact()
    stored = guarded.tensor.cpu().numpy()
    return unpack_rows(stored, K) if codes_type is Type.S4 else stored


def assert_equal_up_to_ties(codes: np.ndarray, v: np.ndarray, scale: float, bits: int, tie: float) -> None:
    """``v``: the reference's values before quantization."""
    expected = reference.quantize(v, scale, bits)
    different = codes != expected
    assert np.abs(codes.astype(int) - expected)[different].max(initial=0) <= 1
    assert reference.ties(v, scale, bits)[different].max(initial=0) < tie
    assert different.sum() <= 1 + 2 * tie * different.size


@dtypes
@codes_types
@sizes
@pytest.mark.parametrize("centered", [False, True])
def test_quantize_is_exact(
    library: Library, centered: bool, M: int, K: int, codes_type: Type, bits: int, dtype: torch.dtype
) -> None:
    x = random((M, K), dtype, 5.0)
    x.view(-1)[:8] = torch.tensor([0.185, 0.555, -0.185, 0.0, -0.0, 1e4, -1e4, 1e-7])  # ties of 0.37, and ends
    shift = random((K,), torch.float32, seed=1) if centered else None
    out = output(M, K, codes_type)
    library.quantize(x, 0.37, bits, codes_type, shift=shift, out=out.tensor)
    expected = reference.quantize(wide(x), 0.37, bits, shift=None if shift is None else wide(shift))
    assert (codes_in(out, codes_type, K) == expected).all()


@dtypes
def test_quantize_rounds_half_to_even_and_saturates(library: Library, dtype: torch.dtype) -> None:
    for bits in (4, 8):
        low, high = code_range(bits)
        steps = np.arange(low - 8, high + 8, 0.5)
        steps = np.concatenate([steps, np.zeros(-len(steps) % 32)])
        x = torch.from_numpy(steps * 0.25).to(dtype).cuda()[None]
        expected = np.clip(np.rint(steps), low, high)
        assert (library.quantize(x, 0.25, bits)[0].cpu().numpy() == expected).all()


@dtypes
@codes_types
@sizes
@pytest.mark.parametrize("extras", [False, True])
def test_rmsnorm(
    library: Library, extras: bool, M: int, K: int, codes_type: Type, bits: int, dtype: torch.dtype
) -> None:
    """With and without residual, gain and shift. The sum is exact."""
    x, scale = random((M, K), dtype, 2.0), 7.0 / code_range(bits)[1] / 2
    residual = random((M, K), dtype, seed=1) if extras else None
    gain = 1 + random((K,), torch.float32, 0.2, seed=2) if extras else None
    shift = random((K,), torch.float32, 0.1, seed=3) if extras else None
    out = output(M, K, codes_type)
    _, total = library.rmsnorm_quantize(
        x, scale, bits, codes_type, eps=1e-5, residual=residual, gain=gain, shift=shift, out=out.tensor
    )
    v, expected_total = reference.rmsnorm(
        wide(x), 1e-5, residual=None if residual is None else wide(residual), gain=None if gain is None else wide(gain)
    )
    assert (wide(total) == expected_total).all()
    if shift is not None:
        v = v - wide(shift)
    assert_equal_up_to_ties(codes_in(out, codes_type, K), v, scale, bits, NORM_TIE)


@dtypes
@codes_types
@sizes
def test_silu_mul(library: Library, M: int, K: int, codes_type: Type, bits: int, dtype: torch.dtype) -> None:
    """Halves of one product [M, 2 K], and two tensors; gates from where silu is 0 to where it is the gate."""
    both, scale = random((M, 2 * K), dtype, 6.0), 40.0 / code_range(bits)[1]
    gate, up = both[:, :K], both[:, K:]
    v = reference.silu_mul(wide(gate), wide(up))
    for halves in ((gate, up), (gate.contiguous(), up.contiguous())):
        out = output(M, K, codes_type)
        library.silu_mul_quantize(*halves, scale, bits, codes_type, out=out.tensor)
        assert_equal_up_to_ties(codes_in(out, codes_type, K), v, scale, bits, NORM_TIE)


# Llama-3, Llama-2 (the largest core), 13B, Qwen, SmolLM and powers of two.
@pytest.mark.parametrize("order", [64, 96, 1024, 1536, 4864, 8192, 8960, 11008, 13824, 14336, 18944, 28672])
@codes_types
def test_online_hadamard(library: Library, codes_type: Type, bits: int, order: int) -> None:
    arguments = reference.online_hadamard(order)
    left = torch.from_numpy(arguments.left).cuda()
    for M, dtype in ((1, torch.float16), (9, torch.bfloat16), (3, torch.float32)):
        both = random((M, 2 * order), dtype, 2.0)
        gate, up = both[:, :order], both[:, order:]
        shift = random((order,), torch.float32, 0.1, seed=5) if M == 3 else None
        v = reference.silu_mul(wide(gate), wide(up), arguments.left)
        v = v if shift is None else v - wide(shift)
        scale = float(np.abs(v).max()) / (code_range(bits)[1] + 0.5)
        out = output(M, order, codes_type)
        library.silu_mul_quantize(gate, up, scale, bits, codes_type, left=left, shift=shift, out=out.tensor)
        assert_equal_up_to_ties(codes_in(out, codes_type, order), v, scale, bits, TRANSFORM_TIE)


@pytest.mark.parametrize("order", [14336, 28672])
@codes_types
def test_online_hadamard_of_many_rows(library: Library, codes_type: Type, bits: int, order: int) -> None:
    """The kernel for prefill, which 28 x 512 and 28 x 1024 have: rows for one round of CTAs, and for more."""
    arguments = reference.online_hadamard(order)
    left = torch.from_numpy(arguments.left).cuda()
    for M, dtype in ((301, torch.float16), (150, torch.bfloat16)):
        both = random((M, 2 * order), dtype, 2.0, seed=M)
        both[0, :order] = 200.0  # one large row of sums, and gates that are their own silu
        both[1, :order] = -200.0  # and 0
        gate, up = both[:, :order], both[:, order:]
        v = reference.silu_mul(wide(gate), wide(up), arguments.left)
        scale = float(np.abs(v[1:]).max()) / (code_range(bits)[1] + 0.5)
        for halves in ((gate, up), (gate.contiguous(), up.contiguous())):
            out = output(M, order, codes_type)
            library.silu_mul_quantize(*halves, scale, bits, codes_type, left=left, out=out.tensor)
            codes = codes_in(out, codes_type, order)
            assert_equal_up_to_ties(codes[1:], v[1:], scale, bits, TRANSFORM_TIE)
            assert (codes[0] != reference.quantize(v[:1], scale, bits)[0]).mean() < TRANSFORM_TIE


def test_rows_do_not_depend_on_how_many_there_are(library: Library) -> None:
    """Few rows and many take different kernels: codes agree but where a value lies at a rounding boundary."""
    both = random((200, 2 * 14336), torch.float16, 2.0)
    left = torch.from_numpy(reference.online_hadamard(14336).left).cuda()
    many = library.silu_mul_quantize(both[:, :14336], both[:, 14336:], 0.5, 4, left=left)
    few = library.silu_mul_quantize(both[:3, :14336], both[:3, 14336:], 0.5, 4, left=left)
    apart = (many[:3].int() - few.int()).abs()
    assert apart.max() <= 1 and apart.float().mean() < 1e-3


@dtypes
@codes_types
@sizes
def test_quantize_dynamic_is_exact(
    library: Library, M: int, K: int, codes_type: Type, bits: int, dtype: torch.dtype
) -> None:
    x = random((M, K), dtype, 3.0)
    out = output(M, K, codes_type)
    _, row_scale = library.quantize_dynamic(x, bits, codes_type, out=out.tensor)
    expected, expected_scale = reference.quantize_dynamic(wide(x), bits)
    assert (row_scale.cpu().numpy() == expected_scale).all()
    assert (codes_in(out, codes_type, K) == expected).all()


def test_dynamic_rows_of_zeros(library: Library) -> None:
    codes, row_scale = library.quantize_dynamic(torch.zeros(3, 64, dtype=torch.float16, device="cuda"), 8)
    assert not codes.any() and torch.isfinite(row_scale).all()


def test_repeats_give_one_result(library: Library) -> None:
    both = random((150, 2 * 14336), torch.float16, 2.0)
    left = torch.from_numpy(reference.online_hadamard(14336).left).cuda()
    x, first = random((33, 4096), torch.float16), []
    for _ in range(100):
        results = [
            library.silu_mul_quantize(both[:33, :14336], both[:33, 14336:], 0.1, 8, left=left),
            library.silu_mul_quantize(both[:, :14336], both[:, 14336:], 0.1, 8, left=left),
            library.rmsnorm_quantize(x, 0.03, 8)[0],
            library.quantize_dynamic(x, 8)[0],
        ]
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


def test_wrong_arguments_are_refused(library: Library) -> None:
    x = torch.zeros(2, 64, dtype=torch.float16, device="cuda")
    with pytest.raises(PqExportError, match=r"x: is torch\.int8"):
        library.quantize(x.to(torch.int8), 1.0, 8)
    with pytest.raises(PqExportError, match="shift: is torch"):
        library.quantize(x, 1.0, 8, shift=torch.zeros(63, device="cuda"))
    with pytest.raises(PqExportError, match="up: is torch"):
        library.silu_mul_quantize(x, x[:, :32], 1.0, 8)
    for bits, codes_type in ((5, Type.S8), (8, Type.S4)):
        with pytest.raises(PqExportError, match="pq_quantize: "):
            library.quantize(x, 1.0, bits, codes_type)
    with pytest.raises(PqExportError, match="pq_quantize: "):
        library.quantize(torch.zeros(2, 40, dtype=torch.float16, device="cuda"), 1.0, 8)
    torch.cuda.synchronize()
