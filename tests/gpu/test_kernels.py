"""The GEMM kernels on a GPU: accumulators equal to the definition, for every shape, type and tile variant."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from pq_export.errors import PqExportError
from pq_export.plugins import reference
from pq_export.plugins.abi import Layout, Type
from pq_export.plugins.layouts import pack_rows
from pq_export.plugins.library import Library, PackedWeights
from pq_export.plugins.shapes import LARGE_M, LLAMA_3_8B, MID_M, ODD, SHAPES, SMALL_M, TEST_M, Shape
from pq_export.quantizer import code_range
from tests.gpu.conftest import Guarded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# (layout, activation bits): W4A4 with int4 tensor cores, W4A4 and W4A8 with int8 ones, W8A8.
KINDS = [(Layout.S4, 4), (Layout.S8, 4), (Layout.S8, 8), (Layout.W8, 8)]
kinds = pytest.mark.parametrize(("layout", "bits"), KINDS, ids=[f"{layout.name}-a{bits}" for layout, bits in KINDS])
REFERENCE_ROWS = 2048


@dataclasses.dataclass
class Problem:
    """Codes of one linear and their exact product. ``x``: int8 [M, K]; ``accumulator``: int32 [M, N]."""

    x: torch.Tensor
    weights: PackedWeights
    accumulator: torch.Tensor

    def rows(self, M: int) -> torch.Tensor:
        """The first M rows of x as the layout wants them, with guard bytes around."""
        x = self.x[:M]
        if self.weights.layout.x_type is Type.S4:
            x = (x[:, 0::2] & 0xF | x[:, 1::2] << 4).view(torch.uint8)
        return Guarded.copy(x).tensor


def random_codes(shape: tuple[int, int], bits: int, seed: int) -> np.ndarray:
    low, high = code_range(bits)
    return np.random.default_rng(seed).integers(low, high + 1, shape, dtype=np.int8)


def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Exact int32 [M, N] of int8 codes on the GPU: every partial sum fits fp64's 53 bits."""
    wide = w.double().T
    return torch.cat([(rows.double() @ wide).to(torch.int32) for rows in x.split(REFERENCE_ROWS)])


def problem(N: int, K: int, M: int, layout: Layout, bits: int, bias: np.ndarray | None = None) -> Problem:
    codes = random_codes((N, K), layout.weight_bits, seed=N + K)
    x = torch.from_numpy(random_codes((M, K), bits, seed=M)).cuda()
    scale = np.random.default_rng(1).uniform(1e-4, 3e-4, N)
    weights = PackedWeights.of(codes, scale, bias, layout)
    guarded = dataclasses.replace(weights, data=Guarded.copy(weights.data).tensor)
    return Problem(x, guarded, product(x, torch.from_numpy(codes).cuda()))


def check(library: Library, p: Problem, M: int, variant: int = -1, output: Guarded | None = None) -> None:
    N = p.weights.N
    output = output or Guarded((M, N), torch.int32)
    library.gemm(p.rows(M), p.weights, Type.S32, variant=variant, out=output.poison())
    what = f"M {M}, N {N}, K {p.weights.K}, {p.weights.layout.name}, variant {variant}"
    if not torch.equal(output.tensor, p.accumulator[:M]):
        wrong = (output.tensor != p.accumulator[:M]).nonzero()
        pytest.fail(f"{what}: {len(wrong)} of {M * N} accumulators differ, first at {wrong[0].tolist()}")
    output.assert_intact()


def all_variants(library: Library, p: Problem, M: int) -> list[int]:
    variants = library.variants(p.weights.layout, M, p.weights.N, p.weights.K)
    assert variants, "no kernel for this problem"
    assert len(set(variants)) == len(variants)
    return variants


@kinds
@pytest.mark.parametrize("shape", (*SHAPES, *ODD), ids=str)
def test_accumulators_over_the_shape_table(library: Library, shape: Shape, layout: Layout, bits: int) -> None:
    """With what the library chooses by itself."""
    p = problem(shape.N, shape.K, max(TEST_M), layout, bits)
    for M in TEST_M:
        check(library, p, M)


@kinds
@pytest.mark.parametrize("shape", (*ODD, *LLAMA_3_8B[:2], LLAMA_3_8B[-1]), ids=str)
def test_every_variant(library: Library, shape: Shape, layout: Layout, bits: int) -> None:
    p = problem(shape.N, shape.K, 2048, layout, bits)
    for M in (1, 2, 7, 8, 9, 16, 17, 33, 64, 127, 256, 2048):
        for variant in all_variants(library, p, M):
            assert library.variant_name(variant) != str(variant)
            check(library, p, M, variant)


@kinds
def test_extremes(library: Library, layout: Layout, bits: int) -> None:
    """The largest sums: every code at an end of its range, and ends that alternate."""
    N, K = 129, 28672
    (low, high), ends = code_range(layout.weight_bits), code_range(bits)
    for w_first, w_second in ((low, low), (high, high), (low, high)):
        codes = np.full((N, K), w_first, np.int8)
        codes[:, 1::2] = w_second
        weights = PackedWeights.of(codes, 1.0, None, layout)
        for x_first, x_second in ((ends[0], ends[0]), (ends[1], ends[1]), (ends[1], ends[0])):
            for M in (1, 16, 33, 256):
                x = torch.full((M, K), x_first, dtype=torch.int8, device="cuda")
                x[:, 1::2] = x_second
                expected = K // 2 * (x_first * w_first + x_second * w_second)
                check(library, Problem(x, weights, torch.full((M, N), expected, dtype=torch.int32, device="cuda")), M)


@kinds
@pytest.mark.parametrize("M", [1, 5, 16, 17, 64, 256])
def test_a_thousand_repeats_give_one_result(library: Library, M: int, layout: Layout, bits: int) -> None:
    """Whatever lies in the outputs and in the workspace beforehand: sums across blocks must not depend on order."""
    for N, K in ((4096, 4096), (1536, 576), (4096, 14336)):
        p = problem(N, K, M, layout, bits)
        x, out = p.rows(M), torch.empty((M, N), dtype=torch.int32, device="cuda")
        variants = all_variants(library, p, M)
        repeats = {variant: 1000 if i == 0 else 50 for i, variant in enumerate(variants)}
        for variant, count in repeats.items():
            size = library.workspace(variant, layout, M, N, K)
            workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
            different = torch.zeros((), dtype=torch.bool, device="cuda")
            for i in range(count):
                workspace.fill_(i % 251)
                out.fill_(-i)
                library.gemm(x, p.weights, Type.S32, variant=variant, out=out, workspace=workspace)
                different |= (out != p.accumulator).any()
            assert not different, f"variant {variant}, N {N}, K {K}"


def epilogue_arguments(M: int, N: int, y_type: Type) -> dict[str, Any]:
    rng = np.random.default_rng(2)
    residual = None
    if y_type in (Type.F16, Type.BF16, Type.F32):
        residual = rng.normal(0, 3, (M, N)).astype(np.float32).astype(reference.NUMPY_TYPES[y_type])
    return {"row_scale": rng.uniform(0.5, 2.0, M).astype(np.float32), "residual": residual}


def to_cuda(values: np.ndarray | None) -> torch.Tensor | None:
    if values is None:
        return None
    if values.dtype == reference.NUMPY_TYPES[Type.BF16]:  # torch does not read NumPy's bfloat16
        return torch.from_numpy(values.view(np.int16)).cuda().view(torch.bfloat16)
    return torch.from_numpy(values).cuda()


OUTPUTS = [(Type.F16, 8), (Type.BF16, 8), (Type.F32, 8), (Type.S8, 8), (Type.S8, 4), (Type.S4, 4)]


@kinds
@pytest.mark.parametrize(("y_type", "y_bits"), OUTPUTS, ids=[f"{kind.name}-{bits}" for kind, bits in OUTPUTS])
@pytest.mark.parametrize(("N", "K"), [(1, 32), (17, 32), (129, 576), (130, 576), (1536, 576), (4096, 4096)])
def test_outputs_are_bit_exact(
    library: Library, N: int, K: int, y_type: Type, y_bits: int, layout: Layout, bits: int
) -> None:
    """Scale, row scale, bias, residual, conversion: the reference's bytes, from every variant."""
    if y_type is Type.S4 and N % 2:
        pytest.skip("packed rows hold an even N")
    M_max, bias = 256, np.random.default_rng(3).normal(0, 3, N).astype(np.float32)
    p = problem(N, K, M_max, layout, bits, bias)
    bare = dataclasses.replace(p.weights, bias=None)
    scale = p.weights.scale.cpu().numpy()
    for M in (1, 8, 13, 16, 17, 64, 250):
        given = epilogue_arguments(M, N, y_type)
        accumulator = p.accumulator[:M].cpu().numpy()
        for weights, arguments in ((p.weights, given), (p.weights, {}), (bare, {}), (bare, given)):
            y_scale = 0.037
            expected = reference.epilogue(
                accumulator,
                scale,
                y_type,
                bias=bias if weights.bias is not None else None,
                y_scale=y_scale,
                y_bits=y_bits,
                **arguments,
            )
            tensors = {name: to_cuda(values) for name, values in arguments.items()}
            wanted = to_cuda(expected)
            assert wanted is not None
            for variant in all_variants(library, p, M):
                output = Guarded(tuple(wanted.shape), wanted.dtype)
                library.gemm(
                    p.rows(M),
                    weights,
                    y_type,
                    variant=variant,
                    y_scale=y_scale,
                    y_bits=y_bits,
                    out=output.poison(),
                    **tensors,
                )
                output.assert_intact()
                same = torch.equal(output.tensor.view(torch.uint8), wanted.view(torch.uint8))  # -0 is not 0
                assert same, f"M {M}, variant {library.variant_name(variant)}, {sorted(arguments)}"


@kinds
@pytest.mark.parametrize("M", [16, 2048])
def test_large_fp16_output(library: Library, M: int, layout: Layout, bits: int) -> None:
    """The epilogue in torch, one kernel a step, so that nothing is contracted."""
    N, K = 14336, 4096
    p = problem(N, K, M, layout, bits)
    expected = (p.accumulator.float() * p.weights.scale).half()
    output = Guarded((M, N), torch.float16)
    library.gemm(p.rows(M), p.weights, Type.F16, out=output.poison())
    assert torch.equal(output.tensor, expected)
    output.assert_intact()


@kinds
def test_batches_and_inner_sizes_that_are_padded(library: Library, layout: Layout, bits: int) -> None:
    """[batch, sequence, K] in and out, and a K that is no multiple of 32."""
    for K in (48, 80, 100):
        p = problem(40, K, 15, layout, bits)
        y = library.gemm(p.rows(15).view(3, 5, -1), p.weights, Type.S32)
        assert y.shape == (3, 5, 40)
        assert torch.equal(y.view(15, 40), p.accumulator)


def test_graphs_and_streams(library: Library) -> None:
    for M, N, K in ((1, 4096, 4096), (64, 4096, 4096), (300, 1536, 576)):
        p = problem(N, K, M, Layout.S8, 8)
        x, out = p.rows(M), torch.zeros((M, N), dtype=torch.int32, device="cuda")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            library.gemm(x, p.weights, Type.S32, out=out)
        torch.cuda.current_stream().wait_stream(side)
        assert torch.equal(out, p.accumulator)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(3):
                library.gemm(x, p.weights, Type.S32, out=out)
        for _ in range(5):
            out.fill_(-1)
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(out, p.accumulator)


def test_wrong_arguments_are_refused(library: Library) -> None:
    """By the binding with the argument's name, by the library with its own words; nothing is launched."""
    small = problem(64, 64, 4, Layout.S8, 8)
    x, weights = small.rows(4), small.weights
    for wrong in (x.float(), x[:, :32], x.cpu(), x.T):
        with pytest.raises(PqExportError, match="x: is torch"):
            library.gemm(wrong, weights)
    with pytest.raises(PqExportError, match="residual: is torch"):
        library.gemm(x, weights, residual=torch.zeros(4, 63, dtype=torch.float16, device="cuda"))
    with pytest.raises(PqExportError, match="row_scale: is torch"):
        library.gemm(x, weights, row_scale=torch.zeros(3, device="cuda"))
    with pytest.raises(PqExportError, match="out: is torch"):
        library.gemm(x, weights, out=torch.zeros(4, 64, device="cuda"))
    with pytest.raises(PqExportError, match="pq_gemm: "):
        library.gemm(x, weights, variant=99999, workspace=torch.empty(0, dtype=torch.uint8, device="cuda"))
    with pytest.raises(PqExportError, match="pq_gemm: "):
        library.gemm(x, weights, Type.S8, residual=torch.zeros(4, 64, dtype=torch.int8, device="cuda"))
    with pytest.raises(PqExportError, match="pq_gemm: "):
        library.gemm(x[:0], weights)
    odd = problem(63, 64, 4, Layout.S8, 8)
    with pytest.raises(PqExportError, match=r"out: is torch|pq_gemm: "):
        library.gemm(x, odd.weights, Type.S4, y_bits=4)
    torch.cuda.synchronize()


def test_sizes_agree_with_the_packer(library: Library) -> None:
    for layout in Layout:
        for N, K in ((1, 32), (17, 96), (4096, 14336)):
            weights = PackedWeights.of(np.zeros((N, K), np.int8), 1.0, None, layout)
            assert library.packed_bytes(layout, N, K) == weights.data.numel()


def test_preferred_layouts(library: Library) -> None:
    """int4 tensor cores where they are native, int8 ones elsewhere."""
    major, minor = torch.cuda.get_device_capability()
    native = 80 <= 10 * major + minor < 90
    assert library.preferred_layout(4, 4) is (Layout.S4 if native else Layout.S8)
    assert library.preferred_layout(4, 8) is Layout.S8
    assert library.preferred_layout(8, 8) is Layout.W8


def test_packed_rows_are_the_packers() -> None:
    codes = random_codes((5, 64), 4, 0)
    p = Problem(torch.from_numpy(codes).cuda(), PackedWeights.of(codes, 1.0, None, Layout.S4), torch.empty(0))
    assert (p.rows(5).cpu().numpy() == pack_rows(codes)).all()


def test_table_covers_what_was_promised() -> None:
    assert set(SMALL_M) == set(range(1, 18)) and {31, 33, 64, 127, 256} <= set(MID_M) and {2048, 8192} <= set(LARGE_M)
    assert any(shape.N % 2 for shape in ODD)
