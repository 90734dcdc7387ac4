"""The quantizer against ONNX's own definition of QuantizeLinear, DequantizeLinear and packed INT4."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from pq_export.quantizer import code_range, fake_quantize, pack_int4, quantize, scale_from_max, unpack_int4

ONNX_TYPE = {4: TensorProto.INT4, 8: TensorProto.INT8}
SCALES = {"tensor": np.float32(0.37), "channel": np.array([0.01, 0.37, 1.0, 5.5, 1e-6], np.float32)}


def onnx_quantize(x: np.ndarray, scale: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and dequantized values by onnx.reference; a 1-d scale is for axis 0."""
    axis = {"axis": 0} if np.ndim(scale) else {}
    zero = helper.make_tensor("zero", ONNX_TYPE[bits], np.shape(scale), np.zeros(np.size(scale), np.int8))
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"], **axis),
            helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["values"], **axis),
        ],
        "quantize",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape),
            helper.make_tensor_value_info("scale", TensorProto.FLOAT, np.shape(scale)),
        ],
        [
            helper.make_tensor_value_info("codes", ONNX_TYPE[bits], x.shape),
            helper.make_tensor_value_info("values", TensorProto.FLOAT, x.shape),
        ],
        [zero],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    codes, values = ReferenceEvaluator(model).run(None, {"x": x, "scale": np.asarray(scale, np.float32)})
    return codes.astype(np.int64), values


def ours(x: np.ndarray, scale: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    s = torch.from_numpy(np.asarray(scale, np.float32)).reshape(-1, *([1] * (x.ndim - 1)) if np.ndim(scale) else ())
    t = torch.from_numpy(x)
    return quantize(t, s, bits).numpy().astype(np.int64), fake_quantize(t, s, bits).numpy()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("which", SCALES)
def test_equals_onnx_on_random_numbers(which: str, bits: int) -> None:
    x = np.random.default_rng(bits).normal(0, 30, (5, 4000)).astype(np.float32)
    codes, values = onnx_quantize(x, SCALES[which], bits)
    our_codes, our_values = ours(x, SCALES[which], bits)
    assert (our_codes == codes).all()
    assert (our_values == values).all()
    low, high = code_range(bits)
    assert (codes.min(), codes.max()) == (low, high)  # both ends were reached


@pytest.mark.parametrize("bits", [4, 8])
def test_ties_go_to_even_as_in_onnx(bits: int) -> None:
    low, high = code_range(bits)
    halves = np.arange(low - 2, high + 3, 0.5, dtype=np.float32)[None]
    codes, _ = onnx_quantize(halves * 0.25, np.float32(0.25), bits)
    our_codes, _ = ours(halves * 0.25, np.float32(0.25), bits)
    assert (our_codes == codes).all()
    by_hand = {0.5: 0, 1.5: 2, 2.5: 2, -0.5: 0, -1.5: -2, -2.5: -2, 3.5: 4}
    for half, code in by_hand.items():
        assert our_codes[0, np.flatnonzero(halves[0] == half)[0]] == code


@pytest.mark.parametrize(("bits", "low", "high"), [(4, -8, 7), (8, -128, 127)])
def test_saturates_at_both_ends(bits: int, low: int, high: int) -> None:
    assert code_range(bits) == (low, high)
    x = torch.tensor(
        [-1e30, low - 1.0, low - 0.51, low, high, high + 0.51, high + 1.0, 1e30, float("inf"), -float("inf")]
    )
    assert quantize(x, torch.tensor(1.0), bits).tolist() == [low, low, low, low, high, high, high, high, high, low]


def test_does_not_change_its_input() -> None:
    x = torch.linspace(-9, 9, 50)
    before = x.clone()
    quantize(x, torch.tensor(1.0), 4)
    fake_quantize(x, torch.tensor(0.1), 8)
    assert torch.equal(x, before)


@given(
    x=hnp.arrays(np.float32, (3, 7), elements=st.floats(-1e6, 1e6, width=32)),
    scale=st.floats(2.0**-10, 2.0**10, width=32),  # onnx.reference overflows where x / scale > 2^31
    bits=st.sampled_from([4, 8]),
)
@settings(max_examples=60, deadline=None)
def test_equals_onnx_on_any_numbers(x: np.ndarray, scale: float, bits: int) -> None:
    codes, values = onnx_quantize(x, np.float32(scale), bits)
    our_codes, our_values = ours(x, np.float32(scale), bits)
    assert (our_codes == codes).all()
    assert (our_values == values).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_scale_from_max(bits: int) -> None:
    peak = torch.tensor([0.0, 1.0, 7.5, 127.5, 3e-3])
    scale = scale_from_max(peak, bits)
    assert scale.dtype == torch.float32
    levels = {4: 15, 8: 255}[bits]
    assert scale.tolist() == [1.0, *(np.float32(2.0 * m / levels) for m in peak.tolist()[1:])]


def test_scale_spans_the_range_with_all_levels() -> None:
    """[-max, max] is 2^b levels wide: half a step beyond the outermost codes, 7.5 / 1 at 4 bits."""
    assert scale_from_max(torch.tensor(7.5), 4).item() == 1.0
    assert scale_from_max(torch.tensor(127.5), 8).item() == 1.0


def test_scale_is_positive_and_finite_for_denormals() -> None:
    scale = scale_from_max(torch.tensor([1e-44, 1e-39, 1e-38, 0.0]), 4)
    assert (scale > 0).all() and torch.isfinite(scale).all()
    assert torch.isfinite(quantize(torch.tensor([1e-44] * 4), scale, 4)).all()


CODES = hnp.arrays(np.int8, hnp.array_shapes(max_dims=3, max_side=9), elements=st.integers(-8, 7))


@given(codes=CODES)
@settings(max_examples=100, deadline=None)
def test_pack_round_trip(codes: np.ndarray) -> None:
    packed = pack_int4(codes)
    assert packed.dtype == np.uint8 and packed.shape == ((codes.size + 1) // 2,)
    unpacked = unpack_int4(packed, codes.shape)
    assert unpacked.dtype == np.int8 and unpacked.shape == codes.shape
    assert (unpacked == codes).all()


@given(codes=CODES)
@settings(max_examples=60, deadline=None)
def test_pack_is_the_layout_of_onnx_int4(codes: np.ndarray) -> None:
    tensor = onnx.numpy_helper.from_array(codes.astype(ml_dtypes.int4), "codes")
    assert tensor.data_type == TensorProto.INT4
    assert pack_int4(codes).tobytes() == tensor.raw_data
    back = TensorProto(data_type=TensorProto.INT4, dims=codes.shape, raw_data=pack_int4(codes).tobytes())
    assert (onnx.numpy_helper.to_array(back).astype(np.int8) == codes).all()


def test_pack_by_hand() -> None:
    assert pack_int4(np.array([1, -1, -8, 7, 3], np.int8)).tolist() == [0xF1, 0x78, 0x03]


@given(packed=hnp.arrays(np.uint8, st.integers(1, 40)))
@settings(max_examples=60, deadline=None)
def test_every_byte_unpacks_and_packs_back(packed: np.ndarray) -> None:
    assert (pack_int4(unpack_int4(packed, (2 * packed.size,))) == packed).all()
