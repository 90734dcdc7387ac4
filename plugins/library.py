"""The kernels from PyTorch: a ctypes binding over ``libpq.so`` that takes CUDA tensors.

Every call runs on PyTorch's current stream and checks types, shapes and contiguity here, so that a mistake is a
Python error that names the argument; what the library itself refuses comes back with its own words.
Constant operands (weights, scale, bias, gain, shift, left) must be finished when a call is made: nothing that is still
in flight on the stream may write them (``csrc/pq_kernels.h``).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_float, c_int, c_size_t, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pq_export.errors import PqExportError
from pq_export.plugins.abi import ABI_VERSION, Layout, Status, Type
from pq_export.plugins.layouts import pack, packed_bytes, round_up

if TYPE_CHECKING:
    import numpy as np
    import torch

K_STEP = 32  # the kernels' K is a multiple of this

_P, _I, _F = c_void_p, c_int, c_float
_CODES = [_P, _I, _I, _I, _I, _P]  # codes, codes_type, bits, M, K, stream
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "pq_status_string": (c_char_p, [_I]),
    "pq_abi_version": (_I, []),
    "pq_preferred_layout": (_I, [_I, _I]),
    "pq_packed_bytes": (c_size_t, [_I, _I, _I]),
    "pq_gemm_variants": (_I, [_I, _I, _I, _I, _I, POINTER(_I), _I]),
    "pq_gemm_variant_name": (c_char_p, [_I]),
    "pq_gemm_workspace": (c_size_t, [_I] * 5),
    "pq_gemm": (_I, [_I, _P, _I, _P, _I, _P, _P, _P, _P, _P, _I, _I, _F, _I, _I, _I, _P, c_size_t, _P]),
    "pq_quantize": (_I, [_P, _I, _P, _F, *_CODES]),
    "pq_rmsnorm_quantize": (_I, [_P, _I, _P, _P, _P, _F, _P, _F, *_CODES]),
    "pq_silu_mul_quantize": (_I, [_P, _P, _I, _I, _I, _I, _P, _P, _F, *_CODES]),
    "pq_quantize_dynamic": (_I, [_P, _I, _P, *_CODES]),
}


@dataclass(frozen=True)
class PackedWeights:
    """Weights of one linear on a GPU. ``data``: uint8, packed; ``scale``: fp32 [N], s_x * s_w; ``bias``: fp32 [N]."""

    data: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None
    layout: Layout
    N: int
    K: int

    @classmethod
    def of(
        cls,
        codes: np.ndarray,
        scale: np.ndarray | float,
        bias: np.ndarray | None = None,
        layout: Layout = Layout.S8,
        device: str | torch.device = "cuda",
    ) -> PackedWeights:
        """From codes int8 [N, K] (any N and K), scale [N] or a scalar, and bias [N]."""
        import numpy as np
        import torch

        def per_channel(values: np.ndarray | float, name: str) -> torch.Tensor:
            wide = np.asarray(values, np.float32)
            if wide.shape not in ((), (len(codes),)):
                raise PqExportError(f"has shape {list(wide.shape)}; N is {len(codes)}", where=name)
            return torch.from_numpy(np.broadcast_to(wide, (len(codes),)).copy()).to(device)

        return cls(
            torch.from_numpy(pack(codes, layout)).to(device),
            per_channel(scale, "scale"),
            None if bias is None else per_channel(bias, "bias"),
            layout,
            *codes.shape,
        )

    def __post_init__(self) -> None:
        import torch

        size = packed_bytes(self.layout, self.N, self.K)
        _checked(self.data, f"weights [{self.N}, {self.K}] in {self.layout.name}", torch.uint8, (size,))
        _checked(self.scale, "scale", torch.float32, (self.N,), self.data.device)
        if self.bias is not None:
            _checked(self.bias, "bias", torch.float32, (self.N,), self.data.device)


class Library:
    """A loaded ``libpq.so``."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._library = ctypes.CDLL(str(path))
            for name, (result, arguments) in SIGNATURES.items():
                function = getattr(self._library, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise PqExportError(
                f"cannot be loaded ({error})", where=path, cure="Build it again with: pq-export plugin build"
            ) from None
        version = self._library.pq_abi_version()
        if version != ABI_VERSION:
            raise PqExportError(
                f"has interface version {version}, not {ABI_VERSION}",
                where=path,
                cure="Build it again with: pq-export plugin build",
            )

    @classmethod
    def of_device(cls, device: int | None = None) -> Library:
        """The library that was built for a GPU of this machine (default: PyTorch's current one)."""
        import torch

        from pq_export.plugins.build import find_library

        major, minor = torch.cuda.get_device_capability(device)
        return cls(find_library(10 * major + minor))

    def status_string(self, status: int) -> str:
        return str(self._library.pq_status_string(status).decode())

    def packed_bytes(self, layout: Layout, N: int, K: int) -> int:
        return int(self._library.pq_packed_bytes(layout, N, K))

    def preferred_layout(self, weight_bits: int, activation_bits: int) -> Layout:
        """The layout that the current device's kernels are fastest with."""
        layout = self._library.pq_preferred_layout(weight_bits, activation_bits)
        if layout < 0:
            raise PqExportError(
                f"no kernel for {weight_bits}-bit weights and {activation_bits}-bit activations", where=self.path
            )
        return Layout(layout)

    def variants(self, layout: Layout, M: int, N: int, K: int) -> list[int]:
        """Tile variants for a problem on the current device, best guess first."""
        problem = (layout, layout.x_type, M, N, round_up(K, K_STEP))
        count = self._library.pq_gemm_variants(*problem, None, 0)
        ids = (c_int * count)()
        self._library.pq_gemm_variants(*problem, ids, count)
        return list(ids)

    def variant_name(self, variant: int) -> str:
        name = self._library.pq_gemm_variant_name(variant)
        return str(variant) if name is None else str(name.decode())

    def workspace(self, variant: int, layout: Layout, M: int, N: int, K: int) -> int:
        """Bytes that ``variant`` needs beside its operands."""
        return int(self._library.pq_gemm_workspace(variant, layout, M, N, round_up(K, K_STEP)))

    def gemm(
        self,
        x: torch.Tensor,
        weights: PackedWeights,
        y_type: Type = Type.F16,
        *,
        variant: int = -1,
        row_scale: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        y_scale: float = 1.0,
        y_bits: int = 8,
        out: torch.Tensor | None = None,
        workspace: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x codes [..., K] (int8), or [..., K / 2] (uint8, packed, for ``Layout.S4``) -> y [..., N].

        ``out`` and ``workspace`` (uint8) are used where given, else allocated.
        """
        import torch

        layout, N, device = weights.layout, weights.N, weights.data.device
        columns, dtype = weights.K, torch.int8
        if layout.x_type is Type.S4:
            columns, dtype = (weights.K + 1) // 2, torch.uint8
        lead = x.shape[:-1]
        x = _checked(x, "x", dtype, (*lead, columns), device).view(-1, columns)
        M, K = len(x), round_up(weights.K, K_STEP)
        if weights.K % K_STEP:  # what meets the weights' zero padding may be anything
            x = torch.nn.functional.pad(x, (0, (K if dtype is torch.int8 else K // 2) - columns))
        y_dtype, y_shape = _torch_type(y_type), (*lead, N // 2 if y_type is Type.S4 else N)
        if out is None:
            out = torch.empty(y_shape, dtype=y_dtype, device=device)
        _checked(out, "out", y_dtype, y_shape, device)
        if residual is not None:
            _checked(residual, "residual", y_dtype, y_shape, device)
        if row_scale is not None:
            _checked(row_scale, "row_scale", torch.float32, (M,), device)
        with torch.cuda.device(device):
            if workspace is None:
                chosen = variant if variant >= 0 else next(iter(self.variants(layout, M, N, weights.K)), -1)
                size = 0 if chosen < 0 else self.workspace(chosen, layout, M, N, weights.K)
                workspace = torch.empty(size, dtype=torch.uint8, device=device)
            self._call(
                "pq_gemm",
                (variant, x, layout.x_type, weights.data, layout, weights.scale, row_scale, weights.bias, residual),
                (out, y_type, y_bits, y_scale, M, N, K, workspace, workspace.numel()),
            )
        return out

    def quantize(
        self,
        x: torch.Tensor,
        scale: float,
        bits: int,
        codes_type: Type = Type.S8,
        *,
        shift: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [..., K], fp16, bf16 or fp32 -> codes int8 [..., K], or uint8 [..., K / 2] for ``Type.S4``."""
        M, K = _rows(x)
        codes = _codes_like(x, codes_type, out)
        with _on(x):
            self._call(
                "pq_quantize",
                (x, _type_of(x), _vector(shift, "shift", x), scale),
                (codes, codes_type, bits, M, K),
            )
        return codes

    def rmsnorm_quantize(
        self,
        x: torch.Tensor,
        scale: float,
        bits: int,
        codes_type: Type = Type.S8,
        *,
        eps: float = 1e-5,
        residual: torch.Tensor | None = None,
        gain: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes of RMSNorm(x [+ residual]), and that sum (x itself without a residual)."""
        import torch

        M, K = _rows(x)
        codes, total = _codes_like(x, codes_type, out), x
        if residual is not None:
            _checked(residual, "residual", x.dtype, tuple(x.shape), x.device)
            total = torch.empty_like(x)
        with _on(x):
            self._call(
                "pq_rmsnorm_quantize",
                (x, _type_of(x), residual, None if residual is None else total, _vector(gain, "gain", x), eps),
                (_vector(shift, "shift", x), scale, codes, codes_type, bits, M, K),
            )
        return codes, total

    def silu_mul_quantize(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        scale: float,
        bits: int,
        codes_type: Type = Type.S8,
        *,
        left: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Codes of silu(gate) * up, [M, K] each; both may be halves of one [M, 2 K] product.

        ``left``: fp32 [L, L], the left factor of the online Hadamard (:func:`reference.online_hadamard`).
        """
        import torch

        M, K = gate.shape
        for name, half in (("gate", gate), ("up", up)):
            if half.dtype != gate.dtype or half.shape != gate.shape or half.stride() != (gate.stride(0), 1):
                raise PqExportError(
                    f"is {half.dtype} {list(half.shape)} with strides {list(half.stride())}, gate is {gate.dtype} "
                    f"{list(gate.shape)} with {list(gate.stride())}",
                    where=name,
                    cure="Give both halves with one type, shape and row stride.",
                )
        order = 0 if left is None else len(left)
        if left is not None:
            _checked(left, "left", torch.float32, (order, order), gate.device)
        codes = _codes_like(gate, codes_type, out)
        with _on(gate):
            self._call(
                "pq_silu_mul_quantize",
                (gate, up, gate.stride(0), _type_of(gate), order, K // order if order else 0, left),
                (_vector(shift, "shift", gate), scale, codes, codes_type, bits, M, K),
            )
        return codes

    def quantize_dynamic(
        self, x: torch.Tensor, bits: int, codes_type: Type = Type.S8, *, out: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and fp32 [M] scales: one scale for each row."""
        import torch

        M, K = _rows(x)
        codes = _codes_like(x, codes_type, out)
        row_scale = torch.empty(M, dtype=torch.float32, device=x.device)
        with _on(x):
            self._call("pq_quantize_dynamic", (x, _type_of(x), row_scale), (codes, codes_type, bits, M, K))
        return codes, row_scale

    def _call(self, name: str, *arguments: Sequence[Any]) -> None:
        """Tensors become pointers; the last argument of every function is the current stream."""
        import torch

        values = [value for part in arguments for value in part]
        pointers = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in values]
        status = getattr(self._library, name)(*pointers, torch.cuda.current_stream().cuda_stream)
        if status != Status.OK:
            raise PqExportError(self.status_string(status), where=name)


def _torch_type(kind: Type) -> torch.dtype:
    import torch

    return {
        Type.F16: torch.float16,
        Type.BF16: torch.bfloat16,
        Type.F32: torch.float32,
        Type.S8: torch.int8,
        Type.S4: torch.uint8,
        Type.S32: torch.int32,
    }[kind]


def _type_of(x: torch.Tensor) -> Type:
    for kind in (Type.F16, Type.BF16, Type.F32):
        if x.dtype == _torch_type(kind):
            return kind
    raise PqExportError(f"is {x.dtype}", where="x", cure="Give fp16, bf16 or fp32.")


def _checked(
    x: torch.Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device | None = None
) -> torch.Tensor:
    """``x``, if it is what a kernel may be given. ``device``: where the other operands are."""
    where = x.is_cuda and device in (None, x.device)
    if not where or x.dtype != dtype or tuple(x.shape) != shape or not x.is_contiguous():
        raise PqExportError(
            f"is {x.dtype} {list(x.shape)} on {x.device}{'' if x.is_contiguous() else ', not contiguous'}",
            where=name,
            cure=f"Give {dtype} {list(shape)}, contiguous, on {device or 'a GPU'}.",
        )
    return x


def _rows(x: torch.Tensor) -> tuple[int, int]:
    """M and K of x [..., K]."""
    _checked(x, "x", x.dtype, tuple(x.shape))
    K = x.shape[-1]
    return (x.numel() // K if K else 0), K


def _vector(values: torch.Tensor | None, name: str, x: torch.Tensor) -> torch.Tensor | None:
    """fp32 [K], or None."""
    import torch

    return None if values is None else _checked(values, name, torch.float32, (x.shape[-1],), x.device)


def _codes_like(x: torch.Tensor, codes_type: Type, out: torch.Tensor | None) -> torch.Tensor:
    import torch

    shape = (*x.shape[:-1], x.shape[-1] // 2 if codes_type is Type.S4 else x.shape[-1])
    dtype = _torch_type(codes_type)
    if out is None:
        return torch.empty(shape, dtype=dtype, device=x.device)
    return _checked(out, "out", dtype, shape, x.device)


def _on(x: torch.Tensor) -> Any:
    import torch

    return torch.cuda.device(x.device)
