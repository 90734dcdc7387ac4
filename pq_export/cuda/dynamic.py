"""Our W4A4 with a scale for every token, measured when it runs: what static scales are compared with.

The same products, attention and cache. RMSNorm and its quantizer are one compiled kernel; SiLU·mul is another, R4 two
half-precision products, and the quantizers behind R4 and attention, which need a row's maximum, kernels of their own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pq_export.cuda.decoder import Codes, CudaDecoder
from pq_export.cuda.weights import Linear, Norm
from pq_export.hadamard import HadamardTransform
from pq_export.plugins.abi import Type
from pq_export.quantizer import code_range


def _norm_dynamic(x: Tensor, eps: float, top: int) -> tuple[Tensor, Tensor]:
    """int8 codes [M, K] of RMSNorm(x) and fp32 [M] scales, as :meth:`Library.quantize_dynamic` defines them."""
    normed = F.rms_norm(x.float(), (x.shape[-1],), None, eps)
    scale = normed.abs().amax(-1, keepdim=True) / top
    scale = torch.where(scale > 0, scale, 1.0)
    return torch.round(normed / scale).clamp(-top - 1, top).to(torch.int8), scale[:, 0]


def _silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


class DynamicDecoder(CudaDecoder):
    """Takes weights of :func:`pq_export.cuda.random_weights.without_input_scales`; norms without gain and bias."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        w = self.weights
        self._r4 = None
        if w.r4_left is not None:
            self._r4 = HadamardTransform(w.sizes.intermediate_size).to(device=w.device, dtype=w.dtype)
        self._norm_dynamic = torch.compile(_norm_dynamic, dynamic=False)
        self._silu_mul = torch.compile(_silu_mul, dynamic=False)

    def _norm_codes(self, x: Tensor, norm: Norm, linear: Linear) -> Codes:
        assert norm.gain is None and norm.shift is None
        eps = self.weights.sizes.rms_norm_eps
        if linear.site.codes_type is Type.S8:
            return self._norm_dynamic(x, eps, code_range(linear.site.bits)[1])
        return self._plain_codes(F.rms_norm(x, (x.shape[-1],), None, eps), linear)

    def _plain_codes(self, x: Tensor, linear: Linear) -> Codes:
        return self.kernels.quantize_dynamic(x, linear.site.bits, linear.site.codes_type)

    def _step_codes(self, index: int, qkv: Tensor) -> Codes:
        return self._plain_codes(self.attention.step(index, qkv), self.weights.layers[index].o)

    def _silu_codes(self, gate: Tensor, up: Tensor, linear: Linear) -> Codes:
        product = self._silu_mul(gate, up)
        return self._plain_codes(product if self._r4 is None else self._r4(product).contiguous(), linear)
