"""The second half of the static form: Q and DQ around every floating-point tensor.

For a tensor ``t`` between two operators::

    op -> t                                  before
    op -> t -> Q -> t/codes -> DQ -> t/values        after; readers of t read t/values

A linear is one complete unit with one type on both sides, as compilers for integer units want it. ``narrow``, 8 bits in
and out, and a conversion to 16 where arithmetic goes on::

    x16 -> Q8 -> DQ ─► MatMul -> Q8 -> DQ [-> Q16 -> DQ]
    codes INT8/INT4 -> DQ ─┘

``wide``, the codes in a 16-bit container, which holds them exactly (a multiple of a finer scale), for 8 bits where the
output needs more than 256 levels, for 4 bits always, and without the first Q for linears of 16-bit activations::

    x16 -> Q8 or Q4 -> DQ -> Q16 -> DQ ─► MatMul -> Q16 -> DQ

The scale of an output is at least ``s_x · s_w`` of each channel: a requantization by more than 1 is silently wrong on
Hexagon. Weights have explicit zero points: without, the same compiler reads 4-bit codes as 8-bit ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from pq_export.errors import PqExportError
from pq_export.rewrite.edit import Int4Constant
from pq_export.rewrite.qlinear import OP
from pq_export.targets.static_float import BIAS, CACHE, F32, LM_HEAD, CacheTensor, FloatGraph
from pq_export.targets.static_plan import (
    CODES,
    MOVES,
    QParams,
    Range,
    cache_codes,
    has_narrow_output,
    narrowed,
    plan_scales,
    spread,
    widened,
)

MASKED = -30_000.0  # what hides a score among floating-point ones: FP16 holds it, and exp of it is 0
NUMPY: dict[str, np.dtype[Any]] = {
    "uint8": np.dtype(np.uint8),
    "uint16": np.dtype(np.uint16),
    "int8": np.dtype(np.int8),
    "int4": np.dtype(np.int8),
}


class Quantizer:
    """Rewrites the nodes of one :class:`FloatGraph` in order.

    ``params`` of each float variable; ``outputs``: parameters of graph outputs that are raw codes.
    """

    def __init__(
        self, fg: FloatGraph, ranges: Mapping[str, Range], wide_outputs: tuple[str, ...] | None, floats: bool = False
    ):
        self.fg, self.graph, self.wide_outputs, self.floats = fg, fg.graph, wide_outputs, floats
        self.params = plan_scales(fg, ranges, wide_outputs)
        self.nodes: list[gs.Node] = []
        self._constants: dict[str, gs.Constant] = {}
        self._values: dict[tuple[str, QParams], gs.Variable] = {}
        self.outputs: dict[str, QParams] = {}
        self._output_names = {t.name for t in self.graph.outputs}

    def run(self) -> None:
        """Quantize the whole graph in place."""
        nodes, outputs = list(self.graph.nodes), {t.name: t for t in self.graph.outputs}
        self._bias()
        for node in nodes:
            inner = list(node.inputs)
            results = list(node.outputs)
            node.inputs.clear()
            node.outputs.clear()
            if node.op == CACHE:
                self._cache(node, inner, results)
            elif node.op == OP:
                self._linear(node, inner, results)
            elif self.floats:
                self._add(node.op, [self._read(t) for t in inner], results, node.name or results[0].name, **node.attrs)
            else:
                self._plain(node, inner, results)
        self.graph.nodes.clear()
        self.graph.nodes.extend(self.nodes)
        for name, tensor in outputs.items():
            tensor.dtype = NUMPY[self.outputs[name].dtype] if name in self.outputs else F32

    def _bias(self) -> None:
        """``attention_bias`` comes in as codes, two of them: 16 bits among 16-bit scores, else 8."""
        tensor = next(t for t in self.graph.inputs if t.name == BIAS)
        if self.floats:
            self.params[BIAS] = QParams(-MASKED / 255, 255, "uint8")
        params = self.params[BIAS]
        tensor.dtype = NUMPY[params.dtype]
        self.outputs[BIAS] = params
        self._values[BIAS, params] = self._dequantize(tensor, params, f"{BIAS}/values")

    # -- building blocks

    def _add(self, op: str, inputs: list[gs.Tensor], outputs: list[gs.Variable], name: str, **attrs: Any) -> None:
        self.nodes.append(gs.Node(op, name=name, attrs=attrs, inputs=inputs, outputs=outputs))

    def _constant(self, name: str, values: np.ndarray, int4: bool = False) -> gs.Constant:
        if name not in self._constants:
            self._constants[name] = (Int4Constant if int4 else gs.Constant)(name, values)
        return self._constants[name]

    def _qparams(self, params: QParams, name: str) -> list[gs.Tensor]:
        zero = np.asarray(params.zero_point, NUMPY[params.dtype])
        return [
            self._constant(f"{name}.scale", np.asarray(params.scale, np.float32)),
            self._constant(f"{name}.zero_point", zero, params.dtype == "int4"),
        ]

    def _quantize(self, x: gs.Tensor, params: QParams, output: str | gs.Variable) -> gs.Variable:
        codes = output if isinstance(output, gs.Variable) else gs.Variable(output, dtype=NUMPY[params.dtype])
        codes.dtype = NUMPY[params.dtype]
        self._add("QuantizeLinear", [x, *self._qparams(params, codes.name)], [codes], codes.name)
        return codes

    def _dequantize(self, codes: gs.Tensor, params: QParams, output: str) -> gs.Variable:
        values = gs.Variable(output, dtype=F32)
        self._add("DequantizeLinear", [codes, *self._qparams(params, codes.name)], [values], output)
        return values

    def _read(self, tensor: gs.Tensor, params: QParams | None = None) -> gs.Tensor:
        """``tensor`` dequantized from codes of ``params`` (default: its own), converted where they differ.

        Between floating-point operators it is read as it is.
        """
        own = self.params.get(tensor.name)
        if own is None or (self.floats and (tensor.name, own) not in self._values):
            return tensor
        params = params or own
        key = tensor.name, params
        if key not in self._values:
            name = f"{tensor.name}/converted"
            codes = self._quantize(self._values[tensor.name, own], params, f"{name}/codes")
            self._values[key] = self._dequantize(codes, params, f"{name}/values")
        return self._values[key]

    def _read_wide(self, tensor: gs.Tensor) -> gs.Tensor:
        """An operand of arithmetic: 16 bits, whether variable or constant."""
        if self.floats:
            return self._read(tensor)
        if isinstance(tensor, gs.Constant):
            return self._read_constant(tensor)
        own = self.params[tensor.name]
        return self._read(tensor, widened(own) if own.dtype == "uint8" else own)

    def _read_constant(self, tensor: gs.Constant) -> gs.Variable:
        values = np.asarray(tensor.values, np.float32)
        return self._stored(tensor.name, values, spread(float(values.min()), float(values.max())))

    def _stored(self, name: str, values: np.ndarray, params: QParams) -> gs.Variable:
        """A constant as codes in the file."""
        key = name, params
        if key not in self._values:
            low, high = CODES[params.dtype]
            codes = np.clip(np.rint(values / np.float32(params.scale)) + params.zero_point, low, high)
            constant = self._constant(f"{name}/codes", np.asarray(codes, NUMPY[params.dtype]))
            self._values[key] = self._dequantize(constant, params, f"{name}/values")
        return self._values[key]

    def _finish(self, tensor: gs.Variable, produced: gs.Variable, params: QParams | None = None) -> None:
        """Q and DQ behind what an operator produced as ``tensor``."""
        params = params or self.params[tensor.name]
        self.params[tensor.name] = params
        if tensor.name in self._output_names:
            tensor.inputs.clear()
            self._quantize(produced, params, tensor)
            self.outputs[tensor.name] = params
        else:
            codes = self._quantize(produced, params, f"{tensor.name}/codes")
            self._values[tensor.name, params] = self._dequantize(codes, params, f"{tensor.name}/values")

    # -- nodes

    def _plain(self, node: gs.Node, inputs: list[gs.Tensor], outputs: list[gs.Variable]) -> None:
        """Arithmetic in 16 bits; what only moves codes moves them as they are."""
        if node.op == "Gather":
            table, params = inputs[0], self.params[outputs[0].name]
            sources = [self._stored(table.name, np.asarray(table.values, np.float32), params), inputs[1]]
        elif node.op in MOVES:
            sources = [self._read(inputs[0]), *inputs[1:]]
            self.params |= dict.fromkeys((t.name for t in outputs), self.params[inputs[0].name])
        elif node.op == "MatMul" and isinstance(inputs[1], gs.Constant):
            sources = [self._read_wide(inputs[0]), self._rotation(inputs[1])]
        elif node.op == "MatMul" and isinstance(inputs[0], gs.Constant):
            sources = [self._rotation(inputs[0]), self._read_wide(inputs[1])]
        elif node.op == "Concat":
            whole = self.params[outputs[0].name]
            sources = [
                self._stored(t.name, np.asarray(t.values, np.float32), whole)
                if isinstance(t, gs.Constant)
                else self._read_wide(t)
                for t in inputs
            ]
        else:
            sources = [self._read_wide(t) for t in inputs]
        produced = [gs.Variable(f"{t.name}/float", dtype=F32) for t in outputs]
        self._add(node.op, sources, produced, node.name or outputs[0].name, **node.attrs)
        for tensor, made in zip(outputs, produced, strict=True):
            self._finish(tensor, made)

    def _rotation(self, matrix: gs.Constant) -> gs.Variable:
        """An online rotation: its entries have one size, so that int8 codes hold them."""
        scale = float(np.abs(matrix.values).max()) / 127
        return self._stored(matrix.name, np.asarray(matrix.values, np.float32), QParams(scale, 0, "int8"))

    def _linear(self, node: gs.Node, inputs: list[gs.Tensor], outputs: list[gs.Variable]) -> None:
        x, codes, scale, *rest = inputs
        if self.floats and node.name == LM_HEAD:
            matrix = gs.Constant(f"{LM_HEAD}/float", codes.values.astype(np.float32) * scale.values)
            self._add("MatMul", [self._read(x), matrix], outputs, node.name)
            return
        output, bits = outputs[0], int(node.attrs["activation_bits"])
        narrow = has_narrow_output(node, self.wide_outputs)
        if self.floats and not narrow:
            raise PqExportError(
                "is not a linear of 8 bits, which graphs with floating-point parts are for",
                where=node.name,
                cure="Use a fully static graph.",
            )
        if bits == 16:
            input_params = self.params[x.name]
            input_params = widened(input_params) if input_params.dtype == "uint8" else input_params
            source = self._read_wide(x)
        else:
            source, input_params = self._linear_input(x, float(rest[0].values), bits, narrow)
        int4 = isinstance(codes, Int4Constant)
        zeros = self._constant(f"{node.name}.zero_point", np.zeros(scale.values.shape, np.int8), int4)
        weight = gs.Variable(f"{node.name}/weight", dtype=F32)
        self._add("DequantizeLinear", [codes, scale, zeros], [weight], weight.name, axis=1)
        produced = gs.Variable(f"{output.name}/float", dtype=F32)
        self._add("MatMul", [source, weight], [produced], node.name)
        planned = self.params[output.name]
        params = narrowed(planned) if narrow else planned
        finest = input_params.scale * float(scale.values.max())
        if params.scale < finest:
            params = _coarser(params, finest)
        self._finish(output, produced, params)
        if narrow and planned.dtype == "uint16" and not self.floats:
            # Here, not behind the Reshape that follows: compilers move a Transpose between a DQ and a Q of other
            # parameters, where it works on floating point.
            wide = widened(params)
            self._read(output, wide)
            self.params[output.name] = wide

    def _linear_input(self, x: gs.Tensor, scale: float, bits: int, narrow: bool) -> tuple[gs.Variable, QParams]:
        """The calibrated codes of a linear's input: 8 bits as they are, or in a 16-bit container."""
        calibrated = QParams(scale, 128, "uint8") if bits == 8 else QParams(scale, 0, "int4")
        wide = self._read_wide(x)
        key = f"{x.name}#{bits}", calibrated
        if key not in self._values:
            if bits == 4:  # conversion to 4 bits does not saturate everywhere, that to 16 does
                own = self.params[x.name]
                wide = self._convert(wide, own, spread(*calibrated.range))
            codes = self._quantize(wide, calibrated, f"{x.name}/calibrated/codes")
            self._values[key] = self._dequantize(codes, calibrated, f"{x.name}/calibrated/values")
        if narrow:
            return self._values[key], calibrated
        finer = QParams(scale / (256 if bits == 8 else 4096), 32768, "uint16")
        key_wide = key[0], finer
        if key_wide not in self._values:
            codes = self._quantize(self._values[key], finer, f"{x.name}/contained/codes")
            self._values[key_wide] = self._dequantize(codes, finer, f"{x.name}/contained/values")
        return self._values[key_wide], finer

    def _cache(self, node: gs.Node, inputs: list[gs.Tensor], outputs: list[gs.Variable]) -> None:
        """New codes out, and prefix, past and new values on one 16-bit grid for attention.

        ::

            new16 -> Q8 ─► present        past (uint8 input)      prefix (uint16 constant)
                         DQ -> Q16 -> DQ ─► DQ -> Q16 -> DQ ─► DQ ─► Concat -> Q16 -> DQ
        """
        past, new, *prefix = inputs
        present, joined = outputs
        cached, grid = self.fg.cache[past.name], self.params[joined.name]
        if self.floats:
            self._float_cache(cached, inputs, outputs)
            return
        parts: list[gs.Tensor] = []
        if prefix:
            parts.append(self._stored(prefix[0].name, np.asarray(prefix[0].values, np.float32), grid))
        if cached.scale is not None and (cached.top < 255 or cached.scale.size > 1):
            parts.append(self._steps(cached, past, new, present, grid))
        else:
            stored = grid if cached.scale is None else cache_codes(cached)
            source = self._read(new) if self.params[new.name] == stored else self._read_wide(new)
            codes = self._present(present, source, stored)
            past.dtype = NUMPY[stored.dtype]
            parts += [
                self._convert(self._dequantize(t, stored, f"{t.name}/values"), stored, grid) for t in (past, codes)
            ]
        produced = gs.Variable(f"{joined.name}/float", dtype=F32)
        self._add("Concat", parts, [produced], joined.name, axis=2)
        self._finish(joined, produced)

    def _float_cache(self, cached: CacheTensor, inputs: list[gs.Tensor], outputs: list[gs.Variable]) -> None:
        """Codes in and out, floating point between; a cache of 16 bits is float32."""
        past, new, *prefix = inputs
        present, joined = outputs
        if cached.scale is None:
            past.dtype = F32
            self._add("Identity", [self._read(new)], [present], present.name)
            pair = [past, self._read(new)]
        elif cached.top == 255 and cached.scale.size == 1:
            stored = cache_codes(cached)
            past.dtype = NUMPY[stored.dtype]
            codes = self._present(present, self._read(new), stored)
            pair = [self._dequantize(t, stored, f"{t.name}/values") for t in (past, codes)]
        else:
            raise PqExportError(
                "has a cache of 4 bits, which graphs with floating-point parts do not hold",
                where=cached.site,
                cure="Use --kv 8.",
            )
        self._add("Concat", [*prefix, *pair], [joined], joined.name, axis=2)

    def _steps(
        self, cached: CacheTensor, past: gs.Variable, new: gs.Variable, present: gs.Variable, grid: QParams
    ) -> gs.Variable:
        """A cache of 4-bit codes with a scale for each head: codes of steps, and the scales as products.

        No quantizer of an activation may have several scales, and the 16 values of int4 do the clipping::

            new16 -> Mul(1/scales) -> Q16 -> DQ -> Q4 -> DQ -> Q8(1) ─► present
            past, present -> DQ(1) -> Concat -> Q8(1) -> DQ -> Q16 -> DQ -> Mul(scales) -> Q16 -> DQ
        """
        assert cached.scale is not None
        scales = cached.scale.astype(np.float32).reshape(1, -1, 1, 1)
        fine, codes4, codes8 = spread(-8.0, 7.0), QParams(1.0, 0, "int4"), QParams(1.0, cached.zero_point, "uint8")
        name = cached.site
        heads, inverse = gs.Constant(f"{name}.heads", scales), gs.Constant(f"{name}.heads_inverse", 1 / scales)
        steps = gs.Variable(f"{name}/steps/float", dtype=F32)
        self._add("Mul", [self._read_wide(new), self._read_constant(inverse)], [steps], f"{name}/steps")
        values = self._dequantize(self._quantize(steps, fine, f"{name}/steps/codes"), fine, f"{name}/steps/values")
        rounded = self._quantize(values, codes4, f"{name}/int4/codes")
        codes = self._present(present, self._dequantize(rounded, codes4, f"{name}/int4/values"), codes8)
        past.dtype = NUMPY["uint8"]
        whole, product = gs.Variable(f"{name}/whole/float", dtype=F32), gs.Variable(f"{name}/heads/float", dtype=F32)
        pair: list[gs.Tensor] = [self._dequantize(t, codes8, f"{t.name}/values") for t in (past, codes)]
        self._add("Concat", pair, [whole], f"{name}/whole", axis=2)
        read = self._dequantize(self._quantize(whole, codes8, f"{name}/whole/codes"), codes8, f"{name}/whole/values")
        self._add("Mul", [self._convert(read, codes8, fine), self._read_constant(heads)], [product], f"{name}/heads")
        return self._dequantize(self._quantize(product, grid, f"{name}/heads/codes"), grid, f"{name}/heads/values")

    def _convert(self, values: gs.Variable, params: QParams, wanted: QParams) -> gs.Variable:
        """``values`` (dequantized) with ``wanted`` instead of ``params``."""
        if params == wanted:
            return values
        codes = self._quantize(values, wanted, f"{values.name}/converted/codes")
        return self._dequantize(codes, wanted, f"{values.name}/converted/values")

    def _present(self, present: gs.Variable, source: gs.Variable, params: QParams) -> gs.Variable:
        self.outputs[present.name] = params
        return self._quantize(source, params, present)


def _coarser(params: QParams, scale: float) -> QParams:
    """``params`` with at least ``scale``."""
    levels = CODES[params.dtype][1]
    low, _ = params.range
    return dataclasses.replace(params, scale=scale, zero_point=int(np.clip(np.rint(-low / scale), 0, levels)))
