"""The references of the kernels against what the project ships: onnxruntime, the quantizer, the Hadamard module."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest
import torch

from pq_export import quantizer
from pq_export.errors import PqExportError
from pq_export.hadamard import HadamardTransform
from pq_export.plugins import abi, reference
from pq_export.plugins.abi import Layout, Status, Type
from pq_export.plugins.layouts import pack_rows, unpack_rows
from pq_export.rewrite.qlinear import Form
from tests.graph_runs import run
from tests.test_qlinear import KINDS, constants, linear_model

FLOATS = [np.float16, ml_dtypes.bfloat16, np.float32]


def random(shape: tuple[int, ...], dtype: type = np.float32, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, shape).astype(dtype)


@pytest.mark.parametrize("form", [Form.INTEGER, Form.PLUGIN])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("weight_bits", "activation_bits"), KINDS)
@pytest.mark.parametrize("shape", [(70, 33), (576, 130)])
def test_linear_is_what_onnxruntime_computes(
    shape: tuple[int, int], weight_bits: int, activation_bits: int, bias: bool, form: Form
) -> None:
    """quantize and gemm against ``pq::QLinear``'s integer body and its local function, bit for bit."""
    inner, out = shape
    c = constants("lin", inner, out, weight_bits, activation_bits, bias)
    x = random((2, 5, inner), scale=2.0)
    assert c.input_scale is not None
    codes = reference.quantize(x.reshape(10, inner), float(c.input_scale), activation_bits)
    y = reference.gemm(codes, np.ascontiguousarray(c.codes.T), c.input_scale * c.scale, Type.F32, bias=c.bias)
    for plain in (False, True):
        assert (
            run(linear_model([(c, "x", "site")], form), {"x": x}, plain=plain)["lin.y"] == y.reshape(2, 5, out)
        ).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_extremes_accumulate_exactly(bits: int) -> None:
    low, high = quantizer.code_range(bits)
    for x, w in ((low, low), (low, high), (high, high), (-128, low)):
        got = reference.accumulate(np.full((2, 28672), x, np.int8), np.full((3, 28672), w, np.int8))
        assert got.dtype == np.int32 and (got == 28672 * x * w).all()


def by_hand(accumulator: int, scale: float, row: float, bias: float, residual: float) -> np.float32:
    """One element, one operation after the other."""
    y = np.float32(accumulator) * np.float32(scale)
    y = y * np.float32(row)
    y = y + np.float32(bias)
    return y + np.float32(residual)


@pytest.mark.parametrize("y_type", [Type.F16, Type.BF16, Type.F32])
def test_epilogue_rounds_after_every_step(y_type: Type) -> None:
    rng = np.random.default_rng(0)
    m, n = 7, 11
    accumulator = rng.integers(-(2**30), 2**30, (m, n)).astype(np.int32)
    scale, bias = random((n,), scale=1e-6), random((n,), seed=1)
    row, residual = random((m,), seed=2), random((m, n), reference.NUMPY_TYPES[y_type].type, seed=3)
    y = reference.epilogue(accumulator, scale, y_type, row_scale=row, bias=bias, residual=residual)
    assert y.dtype == reference.NUMPY_TYPES[y_type]
    for i in range(m):
        for j in range(n):
            one = by_hand(int(accumulator[i, j]), scale[j], row[i], bias[j], float(residual[i, j]))
            assert y[i, j] == one.astype(y.dtype)


def test_epilogue_in_16ths_is_the_same_number() -> None:
    """Why kernels may accumulate 16 w: a power of two changes no rounding."""
    accumulator = np.random.default_rng(0).integers(-(2**27), 2**27, 4000).astype(np.int32)
    scale = random((4000,), scale=1e-3)
    times16 = (16 * accumulator).astype(np.float32) * (scale * np.float32(1 / 16))
    assert (times16 == accumulator.astype(np.float32) * scale).all()


@pytest.mark.parametrize(("y_type", "bits"), [(Type.S8, 8), (Type.S8, 4), (Type.S4, 4)])
def test_requantized_outputs(y_type: Type, bits: int) -> None:
    x, w = (np.random.default_rng(s).integers(-8, 8, (6, 64)).astype(np.int8) for s in (0, 1))
    scale = np.full(6, 0.01, np.float32)
    y = reference.gemm(x, w, scale, Type.F32)
    got = reference.gemm(x, w, scale, y_type, y_scale=0.31, y_bits=bits)
    expected = quantizer.quantize(torch.from_numpy(y), torch.tensor(0.31), bits).numpy().astype(np.int8)
    assert ((unpack_rows(got, 6) if y_type is Type.S4 else got) == expected).all()
    assert reference.gemm(x, w, scale, Type.S32).dtype == np.int32


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [4, 8])
def test_quantize_is_the_projects_rounding(bits: int, dtype: type) -> None:
    x, shift = random((9, 64), dtype, 3.0), random((64,), seed=1)
    for center in (None, shift):
        wide = torch.from_numpy(x.astype(np.float32) - (0 if center is None else center))
        expected = quantizer.quantize(wide, torch.tensor(0.37), bits).numpy().astype(np.int8)
        assert (reference.quantize(x, 0.37, bits, shift=center) == expected).all()
    if bits == 4:
        assert (reference.quantize(x, 0.37, 4, Type.S4) == pack_rows(reference.quantize(x, 0.37, 4))).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_rmsnorm(with_residual: bool, dtype: type) -> None:
    x, gain = random((5, 96), dtype, 2.0), 1 + 0.3 * random((96,), seed=1)
    residual = random((5, 96), dtype, seed=2) if with_residual else None
    v, total = reference.rmsnorm(x, 1e-5, residual=residual, gain=gain)
    assert total.dtype == x.dtype and v.dtype == np.float32
    h = x if residual is None else (x.astype(np.float32) + residual.astype(np.float32)).astype(dtype)
    assert (total == h).all()
    expected = torch.nn.functional.rms_norm(
        torch.from_numpy(h.astype(np.float32)), (96,), torch.from_numpy(gain), eps=1e-5
    )
    np.testing.assert_allclose(v, expected.numpy(), rtol=1e-5, atol=1e-6)


# 92 has no Paley factor (23 blocks), 14336 is Llama-3's, 11008 Llama-2's with the largest core, 64 a power of two.
@pytest.mark.parametrize("order", [64, 92, 96, 11008, 14336])
def test_silu_mul_hadamard_is_the_torch_module(order: int) -> None:
    gate, up = random((3, order)), random((3, order), seed=1)
    arguments = reference.online_hadamard(order)
    assert arguments.left_order * arguments.right_order == order
    assert arguments.right_order & (arguments.right_order - 1) == 0
    product = torch.nn.functional.silu(torch.from_numpy(gate)) * torch.from_numpy(up)
    np.testing.assert_allclose(reference.silu_mul(gate, up), product.numpy(), rtol=1e-5, atol=1e-6)
    expected = HadamardTransform(order)(product)
    np.testing.assert_allclose(reference.silu_mul(gate, up, arguments.left), expected.numpy(), rtol=1e-4, atol=1e-5)


def test_a_hadamard_whose_power_of_two_is_too_small_is_refused() -> None:
    """736 is 368 x 2: the kernel's fast transform starts at 4."""
    with pytest.raises(PqExportError, match="R4 of size 736 is 368 x 2"):
        reference.online_hadamard(736)


@pytest.mark.parametrize(
    ("order", "says"),
    [
        (32768, "R4 of size 32768 is 1 x 32768, and the kernel needs a power of two from 4 to 16384 on the right"),
        (49152, "R4 of size 49152 is larger than the kernel's 32768"),
    ],
)
def test_a_hadamard_beyond_the_kernels_limits_is_refused(order: int, says: str) -> None:
    with pytest.raises(PqExportError, match=says):
        reference.online_hadamard(order)
    largest = reference.online_hadamard(16384)
    assert (largest.left_order, largest.right_order) == (1, 16384)


def test_limits_of_the_hadamard_are_the_kernels() -> None:
    kernel, plugin = ((abi.HEADER.parent / name).read_text() for name in ("silu_hadamard.cu", "plugin_quantize.cpp"))
    for source in (kernel, plugin):
        found = {name: int(value) for name, value in re.findall(r"\b(k(?:Min|Max)(?:Right|Order)) = (\d+)", source)}
        assert found == {
            "kMinRight": reference.SMALLEST_RIGHT,
            "kMaxRight": reference.LARGEST_RIGHT,
            "kMaxOrder": reference.LARGEST_ORDER,
        }


@pytest.mark.parametrize("bits", [4, 8])
def test_dynamic_scales_are_per_row(bits: int) -> None:
    x = random((5, 64)) * np.array([1, 1e3, 1e-3, 0, 1], np.float32)[:, None]
    codes, scale = reference.quantize_dynamic(x, bits)
    high = quantizer.code_range(bits)[1]
    assert (scale[[0, 1, 2, 4]] == np.abs(x[[0, 1, 2, 4]]).max(1) / np.float32(high)).all()
    assert scale[3] == 1 and not codes[3].any()
    assert (np.abs(codes[[0, 1, 2, 4]]).max(1) == high).all()


def test_distance_from_ties() -> None:
    v = np.array([[0.0, 0.49, 0.5, 1.5, 7.5, -8.5, -7.5, 30.0]], np.float32)
    np.testing.assert_allclose(reference.ties(v, 1.0, 4), [[0.5, 0.01, 0, 0, 1, 1, 0, 23.5]], atol=1e-6)


def test_enumerations_are_the_headers() -> None:
    """``PQ_NAME = value`` and ``#define PQ_ABI_VERSION`` of pq_kernels.h."""
    header = abi.HEADER.read_text(encoding="utf-8")
    named = {name: int(value) for name, value in re.findall(r"\bPQ_([A-Z0-9_]+) = (\d+)", header)}
    ours = {
        **{status.name: status.value for status in Status},
        **{kind.name: kind.value for kind in Type},
        **{f"LAYOUT_{layout.name}": layout.value for layout in Layout},
    }
    assert named == ours
    assert f"#define PQ_ABI_VERSION {abi.ABI_VERSION}\n" in header
