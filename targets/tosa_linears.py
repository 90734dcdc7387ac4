"""Static linears as TOSA 1.0 graphs: integers in, integers out, and not one floating-point operation between.

Before, in ``model.onnx`` of form ``qdq``::

    x codes -> DequantizeLinear(s_x) -> MatMul <- DequantizeLinear(s_w [N]) <- w codes [K, N]    [-> Add <- bias [N]]

After, a TOSA graph of its own for each linear and each number of tokens::

    x codes [1, 1, tokens, K] -> CONV2D(w codes [N, 1, 1, K], bias int32 [N]) -> RESCALE(multiplier [N], shift [N])
                              -> y codes [1, 1, tokens, N]

CONV2D with a kernel of 1x1 is the product: TOSA's MATMUL has neither INT4 weights nor a bias. The bias is in steps of
the accumulator, ``round(bias / (s_x s_w))``. RESCALE is ``(accumulator * multiplier + 2^(shift-1)) >> shift`` for each
output channel, with multiplier / 2^shift = s_x s_w / s_y to 31 bits (15 for 16-bit inputs, whose accumulator has 48).
Outputs of 32 bits are the accumulator itself, without RESCALE; its scale is s_x s_w.

A linear is a graph of its own since Vela estimates twice the cycles and more for two of them in one graph (5.2, U85).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from pq_export.errors import PqExportError
from pq_export.quantizer import code_range
from pq_export.targets.tosa_tools import tosa_module

OUTPUT_BITS = (8, 16, 32)
MIN_SHIFT, MAX_SHIFT = 2, 62  # of RESCALE, TOSA 1.0
TYPES: dict[int, np.dtype[Any]] = {
    8: np.dtype(np.int8),
    16: np.dtype(np.int16),
    32: np.dtype(np.int32),
    48: np.dtype(np.int64),
}
_INPUT_BITS = {TensorProto.INT4: 4, TensorProto.INT8: 8, TensorProto.INT16: 16}
# Moves data or makes shapes, masks and constants: no arithmetic of the model.
_NO_ARITHMETIC = {
    *("And", "Cast", "Concat", "Equal", "Expand", "LessOrEqual", "Not", "Pad", "Range", "Reshape", "Shape", "Slice"),
    *("Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where"),
}


@dataclass(frozen=True)
class StaticLinear:
    """One linear of a graph: y = (codes of x) @ ``codes`` * ``input_scale`` * ``weight_scale`` + ``bias``.

    ``codes`` int8 [K, N], ``weight_scale`` float32 [N], ``bias`` float32 [N] or None. ``weight_bits`` 4 or 8,
    ``input_bits`` 4, 8 or 16. ``output``: the tensor of the graph that holds y.
    """

    name: str
    output: str
    codes: np.ndarray
    weight_scale: np.ndarray
    bias: np.ndarray | None
    input_scale: float
    weight_bits: int
    input_bits: int

    @property
    def accumulator_scale(self) -> np.ndarray:
        """float64 [N]: value of one step of each channel's accumulator."""
        return self.input_scale * self.weight_scale.astype(np.float64)

    @property
    def largest_accumulator(self) -> np.ndarray:
        """int64 [N]: no input makes an accumulator larger, bias included."""
        products = -code_range(self.input_bits)[0] * np.abs(self.codes.astype(np.int64)).sum(axis=0)
        return products + np.abs(self.bias_steps)

    @property
    def largest_scale(self) -> float:
        """1 / 32767 of the largest output that any input can make: 16-bit outputs of this scale never saturate."""
        return float(np.max(self.largest_accumulator * self.accumulator_scale)) / code_range(16)[1]

    @property
    def bias_steps(self) -> np.ndarray:
        """int64 [N]: the bias in steps of the accumulator."""
        if self.bias is None:
            return np.zeros(self.codes.shape[1], np.int64)
        steps = np.rint(self.bias.astype(np.float64) / self.accumulator_scale)
        if not np.all(np.abs(steps) < 2**30):
            channel = int(np.argmax(np.abs(steps)))
            raise PqExportError(
                f"the bias of channel {channel} is {abs(steps[channel]):.3g} steps of its accumulator, more than 2^30",
                where=self.name,
                cure="Calibrate again: the scale of its weights or of its input is too small.",
            )
        return steps.astype(np.int64)


@dataclass(frozen=True)
class Rescale:
    """Factors multiplier / 2^shift of the output channels, both int64 [N]."""

    multiplier: np.ndarray
    shift: np.ndarray

    def __call__(self, accumulator: np.ndarray) -> np.ndarray:
        """int64 [..., N] times the factors, halves rounded up."""
        return (accumulator * self.multiplier + (np.int64(1) << (self.shift - 1))) >> self.shift


@dataclass(frozen=True)
class LoweredLinear:
    """A linear in integers, as its TOSA graph has it.

    ``weight`` int8 [N, K] of ``weight_bits``, ``bias`` int64 [N]. ``rescale`` is None where the output is the
    accumulator. Output codes of ``output_bits`` bits and zero point 0 have the scale
    ``output_scale``: of the tensor, float64 [], or of accumulators, float64 [N].
    """

    name: str
    weight: np.ndarray
    bias: np.ndarray
    rescale: Rescale | None
    weight_bits: int
    input_bits: int
    output_bits: int
    input_scale: float
    output_scale: np.ndarray

    @property
    def input_type(self) -> np.dtype[Any]:
        return TYPES[self.input_bits]

    @property
    def output_type(self) -> np.dtype[Any]:
        return TYPES[self.output_bits]

    @property
    def weight_type_bits(self) -> int:
        """4 or 8, of the file's weights. TOSA's INT4 has no -8, and no product with 16-bit inputs.

        Vela stores 4-bit codes as small in either type: 0.43 bytes a weight for codes of normal weights (5.2).
        """
        return 4 if self.weight_bits == 4 and self.input_bits == 8 and self.weight.min() > -8 else 8

    @property
    def accumulator_bits(self) -> int:
        return 48 if self.input_bits == 16 else 32

    def integer_output(self, x: np.ndarray) -> np.ndarray:
        """What TOSA defines for input codes [..., K]: output codes [..., N], in int64 arithmetic."""
        product = x.astype(np.float64) @ self.weight.astype(np.float64).T  # exact and fast: all sums are below 2^53
        y = product.astype(np.int64) + self.bias
        if self.rescale is not None:
            y = self.rescale(y)
        low, high = code_range(self.output_bits)
        return np.clip(y, low, high).astype(self.output_type)


def find_linears(model: onnx.ModelProto) -> list[StaticLinear]:
    """The quantized linears of ``model``, of form ``qdq``, in the order of its nodes.

    Raises PqExportError for one whose constants are not what this module's docstring shows.
    """
    graph = _Graph(model)
    return [graph.linear(node) for node in model.graph.node if graph.is_linear(node)]


def not_lowered(model: onnx.ModelProto) -> dict[str, int]:
    """Operators of ``model`` that compute something and are no part of :func:`find_linears`: name -> how many."""
    graph = _Graph(model)
    covered: set[str] = set()
    for node in model.graph.node:
        if graph.is_linear(node):
            covered |= {node.output[0], *node.input, graph.linear_output(node)}
    counts: Counter[str] = Counter()
    for node in model.graph.node:
        if node.op_type not in _NO_ARITHMETIC and node.output[0] not in covered:
            counts[node.op_type] += 1
    return dict(sorted(counts.items()))


def floating_linears(model: onnx.ModelProto) -> list[str]:
    """Linears that multiply floating-point activations with quantized weights, as at W4A16: their names."""
    graph = _Graph(model)
    codes = {tensor.name for tensor in model.graph.initializer if tensor.name.endswith("_proj.codes")}
    found = {graph.producer[n.input[1]].input[0] for n in model.graph.node if graph.is_linear(n)}
    return sorted(name.removesuffix(".codes") for name in codes - found)


class _Graph:
    """A model with its producers, readers and constants by tensor name."""

    def __init__(self, model: onnx.ModelProto):
        self.producer = {output: node for node in model.graph.node for output in node.output}
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def is_linear(self, node: onnx.NodeProto) -> bool:
        if node.op_type != "MatMul":
            return False
        made = [self.producer.get(name) for name in node.input]
        return all(n is not None and n.op_type == "DequantizeLinear" for n in made) and (
            made[1] is not None and made[1].input[0] in self.constants
        )

    def linear_output(self, matmul: onnx.NodeProto) -> str:
        """Of the MatMul, or of the Add of a constant vector that alone reads it."""
        add = self._bias_node(matmul)
        return matmul.output[0] if add is None else add.output[0]

    def linear(self, matmul: onnx.NodeProto) -> StaticLinear:
        name = matmul.name.removesuffix("/product")
        x, w = (self.producer[tensor] for tensor in matmul.input)
        add = self._bias_node(matmul)
        weight, codes_type = self._value(w.input[0], name), self.constants[w.input[0]].data_type
        scale = np.atleast_1d(self._value(w.input[1], name))
        input_scale, input_type = self._value(x.input[1], name), TensorProto.INT8
        if len(x.input) > 2:
            input_type = self.constants[x.input[2]].data_type
        wrong = _first(
            (codes_type not in (TensorProto.INT4, TensorProto.INT8), "its weights are not INT4 or INT8"),
            (input_type not in _INPUT_BITS, "its input is not INT8 or INT16"),
            (input_scale.ndim != 0, "its input has more than one scale"),
            (any(np.any(self._value(zero, name)) for n in (x, w) for zero in n.input[2:]), "a zero point is not 0"),
            (len(scale) not in (1, weight.shape[1]), "its weights have no scale for each output channel"),
            (not np.all(np.isfinite(scale) & (scale > 0)), "a scale of its weights is not positive"),
            (not np.all(np.isfinite(input_scale) & (input_scale > 0)), "the scale of its input is not positive"),
        )
        if wrong:
            raise PqExportError(f"cannot become integers: {wrong}", where=name, cure="Build the bundle again.")
        return StaticLinear(
            name=name,
            output=self.linear_output(matmul),
            codes=np.asarray(weight, np.int8),
            weight_scale=np.broadcast_to(scale, weight.shape[1:]),
            bias=None if add is None else self._value(self._bias_constant(add), name),
            input_scale=float(input_scale),
            weight_bits=4 if codes_type == TensorProto.INT4 else 8,
            input_bits=_INPUT_BITS[input_type],
        )

    def _bias_node(self, matmul: onnx.NodeProto) -> onnx.NodeProto | None:
        readers = self.readers.get(matmul.output[0], [])
        if len(readers) != 1 or readers[0].op_type != "Add" or self._bias_constant(readers[0]) is None:
            return None
        return readers[0]

    def _bias_constant(self, add: onnx.NodeProto) -> str | None:
        return next((n for n in add.input if n in self.constants and len(self.constants[n].dims) == 1), None)

    def _value(self, name: str | None, linear: str) -> np.ndarray:
        if name not in self.constants:
            raise PqExportError(f"'{name}' is no constant", where=linear, cure="Build the bundle again.")
        return numpy_helper.to_array(self.constants[name])


def _first(*findings: tuple[bool, str]) -> str:
    return next((text for wrong, text in findings if wrong), "")


def lower_linear(linear: StaticLinear, output_bits: int = 16, output_scale: float | None = None) -> LoweredLinear:
    """``linear`` in integers, with output codes of 8, 16 or 32 bits (32: the accumulator).

    ``output_scale`` of 8- and 16-bit codes; None is the scale that no input can exceed, which suits 16 bits only.
    Raises PqExportError where TOSA has no such operator.
    """
    if output_bits not in OUTPUT_BITS or (linear.input_bits == 16 and output_bits == 32):
        raise ValueError(f"{output_bits}-bit outputs of {linear.input_bits}-bit inputs")
    if linear.input_bits == 4:
        raise PqExportError(
            "its input has 4 bits, which an Ethos-U multiplies no faster than 8 and stores no smaller",
            where=linear.name,
            cure="Calibrate with --w4a8.",
        )
    rescale, scale = None, linear.accumulator_scale
    if output_bits != 32:
        step = output_scale
        if step is None:
            step = linear.largest_scale * code_range(16)[1] / code_range(output_bits)[1]
        if not (np.isfinite(step) and step > 0):
            raise PqExportError(f"the scale of its output is {step}", where=linear.name)
        rescale = rescale_by(scale / step, 15 if linear.input_bits == 16 else 31)
        # What RESCALE requires of its input, and of its result before that is clamped.
        largest = linear.largest_accumulator if linear.input_bits < 16 else linear.largest_accumulator * scale / step
        if np.any(largest >= np.float64(2) ** (rescale.shift - 1 if linear.input_bits < 16 else 31)):
            raise PqExportError(
                f"the scale of its output, {step:.3g}, is too small for its accumulator",
                where=linear.name,
                cure="Observe its range on more tokens.",
            )
        scale = np.asarray(step)
    return LoweredLinear(
        name=linear.name,
        weight=np.ascontiguousarray(linear.codes.T),
        bias=linear.bias_steps,
        rescale=rescale,
        weight_bits=linear.weight_bits,
        input_bits=linear.input_bits,
        output_bits=output_bits,
        input_scale=linear.input_scale,
        output_scale=np.asarray(scale, np.float64),
    )


def rescale_by(factors: np.ndarray, bits: int) -> Rescale:
    """Multipliers below 2^``bits`` and shifts that are nearest to the positive ``factors`` [N]."""
    fraction, exponent = np.frexp(np.asarray(factors, np.float64))
    shift = bits - exponent.astype(np.int64)
    multiplier = np.rint(np.ldexp(fraction, bits)).astype(np.int64)
    carried = multiplier == 1 << bits
    multiplier, shift = np.where(carried, multiplier >> 1, multiplier), np.where(carried, shift - 1, shift)
    small = np.clip(shift - MAX_SHIFT, 0, 62)  # of channels that are almost zero
    multiplier, shift = multiplier >> small, shift - small
    if np.any(shift < MIN_SHIFT):
        raise PqExportError("an output scale is so small that RESCALE cannot express its factor")
    return Rescale(multiplier, shift)


def tosa_graph(linear: LoweredLinear, tokens: int) -> bytes:
    """The TOSA 1.0 flatbuffer of ``linear`` for ``tokens`` tokens: input ``x``, output ``y``."""
    ts = tosa_module("tosa_serializer")
    types = {4: ts.DType.INT4, 8: ts.DType.INT8, 16: ts.DType.INT16, 32: ts.DType.INT32, 48: ts.DType.INT48}
    out_channels, in_channels = linear.weight.shape
    builder = ts.TosaSerializer("", ts.ConstMode.EMBED, 1, 0, 0, False)  # version 1.0.0, no draft
    block = builder.currRegion.currBasicBlock

    def constant(name: str, values: np.ndarray, bits: int) -> str:
        stored = values.astype(TYPES[max(bits, 8)])
        return str(builder.addConst(list(values.shape), types[bits], stored, name).name)

    def zero(name: str, bits: int) -> str:
        return constant(name, np.zeros(1, np.int64), bits)

    wide = linear.accumulator_bits
    block.addTensor("x", [1, 1, tokens, in_channels], types[linear.input_bits])
    block.addInput("x")
    weight = constant("weight", linear.weight.reshape(out_channels, 1, 1, in_channels), linear.weight_type_bits)
    operands = ["x", weight, constant("bias", linear.bias, wide)]
    operands += [zero("x_zero_point", linear.input_bits), zero("weight_zero_point", linear.weight_type_bits)]
    block.addTensor("y", [1, 1, tokens, out_channels], types[linear.output_bits])
    block.addOutput("y")
    attribute = ts.TosaSerializerAttribute()
    attribute.Conv2dAttribute([0, 0, 0, 0], [1, 1], [1, 1], False, types[wide])
    if linear.rescale is None:
        builder.addOperator(ts.Op.CONV2D, operands, ["y"], attribute)
        return bytes(builder.serialize())
    block.addTensor("accumulator", [1, 1, tokens, out_channels], types[wide])
    builder.addOperator(ts.Op.CONV2D, operands, ["accumulator"], attribute)
    operands = ["accumulator", constant("multiplier", linear.rescale.multiplier, 32 if wide == 32 else 16)]
    operands += [constant("shift", linear.rescale.shift, 8)]
    operands += [zero("accumulator_zero_point", wide), zero("y_zero_point", linear.output_bits)]
    attribute = ts.TosaSerializerAttribute()
    # 32-bit multipliers, rounding of halves up, one for each channel, nothing unsigned
    attribute.RescaleAttribute(wide == 32, ts.RoundingMode.SINGLE_ROUND, True, False, False)
    builder.addOperator(ts.Op.RESCALE, operands, ["y"], attribute)
    return bytes(builder.serialize())


def sample_codes(linears: Iterable[LoweredLinear], tokens: int, seed: int = 0) -> list[np.ndarray]:
    """Input codes [1, 1, tokens, K] for each of ``linears``.

    Every other token makes the accumulator of some channel as large as it can be; the others are random.
    """
    rng = np.random.default_rng(seed)
    samples = []
    for linear in linears:
        low, high = code_range(linear.input_bits)
        codes = rng.integers(low, high + 1, (1, 1, tokens, linear.weight.shape[1]))
        channels = rng.integers(0, len(linear.weight), tokens)
        codes[0, 0, 1::2] = np.where(linear.weight[channels] > 0, high, low)[1::2]
        samples.append(codes.astype(linear.input_type))
    return samples
