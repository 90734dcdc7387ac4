"""The forward of a W4A4 (W4A8, W8A8) decoder on a GPU.

A layer is ten kernels in decode: four quantizers, each fused with what produces its input (norm, attention, norm,
SiLU·mul with R4), four integer products (qkv and gate/up as one each, the residual inside o_proj and down_proj), and
two between qkv and the attention's quantizer (RoPE with R3 and the cache; attention).
"""

from __future__ import annotations

import importlib.util
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pq_export.cuda.cache import KVCache
from pq_export.cuda.eager import EagerAttention
from pq_export.cuda.weights import DecoderWeights, Kernels, Linear, Norm, Site
from pq_export.errors import PqExportError
from pq_export.plugins.abi import Type

Y_TYPES = {torch.float16: Type.F16, torch.bfloat16: Type.BF16, torch.float32: Type.F32}

Codes = tuple[Tensor, "Tensor | None"]  # of a linear's input, and fp32 [M] scales of rows where they are not constant


class Attention(Protocol):
    """:class:`EagerAttention` says what these do."""

    def prefill(self, index: int, qkv: Tensor) -> Tensor: ...
    def step(self, index: int, qkv: Tensor, site: Site | None = None) -> Tensor: ...


class CudaDecoder:
    """``weights`` with a cache for ``batch`` sequences of up to ``capacity`` tokens.

    ``attention``: ``fused`` (Triton) or ``eager``; default: fused where Triton and a GPU are there, but for float32.
    ``packed``: keep 4-bit KV codes two to a byte. ``overlap``: of fused attention (:class:`FusedAttention`).
    """

    def __init__(
        self,
        weights: DecoderWeights,
        kernels: Kernels,
        *,
        capacity: int,
        batch: int = 1,
        packed: bool = True,
        attention: str | None = None,
        overlap: bool | None = None,
    ):
        if weights.dtype not in Y_TYPES:
            raise PqExportError(f"has no kernels for {weights.dtype}", cure="Use float16, bfloat16 or float32.")
        self.weights, self.kernels = weights, kernels
        if weights.device.type == "cuda":
            torch.cuda.synchronize(weights.device)  # kernels read constants before those ahead of them have ended
        self.cache = KVCache(weights, batch, capacity, packed)
        self.attention: Attention
        if (attention or _default_attention(weights)) == "fused":
            from pq_export.cuda.fused import FusedAttention

            self.attention = FusedAttention(weights, self.cache, overlap)
        else:
            self.attention = EagerAttention(weights, self.cache)

    def prefill(self, input_ids: Tensor) -> Tensor:
        """int64 [B, S], the first tokens of every sequence -> logits [B, vocab] of the last one, fp32."""
        batch, new = input_ids.shape
        if batch != self.cache.batch or not 0 < new <= self.cache.capacity:
            raise PqExportError(
                f"got {batch} sequences of {new} tokens; the cache holds {self.cache.batch} of {self.cache.capacity}",
                where="prefill",
            )
        self.cache.length.zero_()
        x = F.embedding(input_ids.reshape(-1), self.weights.embed)
        for index in range(len(self.weights.layers)):
            x = self._layer(index, x, new)
        self.cache.length.fill_(new)
        return self._logits(x.view(batch, new, -1)[:, -1])

    def step(self, input_ids: Tensor) -> Tensor:
        """int64 [B], one token behind the cached ones -> logits [B, vocab], fp32. :meth:`advance` counts it."""
        x = F.embedding(input_ids, self.weights.embed)
        for index in range(len(self.weights.layers)):
            x = self._layer(index, x, 0)
        return self._logits(x)

    def advance(self) -> None:
        """The token of the last :meth:`step` belongs to the cache. On the GPU: the caller minds the capacity."""
        self.cache.length.add_(1)

    def _layer(self, index: int, x: Tensor, new: int) -> Tensor:
        """Residual stream x [M, hidden] -> the same behind the layer. ``new``: tokens in prefill, 0 in a step."""
        layer = self.weights.layers[index]
        qkv = self._product(self._norm_codes(x, layer.input_norm, layer.qkv), layer.qkv)
        if new:
            mixed = self.attention.prefill(index, qkv.view(-1, new, qkv.shape[-1])).reshape(len(x), -1)
            codes = self._plain_codes(mixed, layer.o)
        else:
            codes = self._step_codes(index, qkv)
        x = self._product(codes, layer.o, x)
        gate_up = self._product(self._norm_codes(x, layer.post_norm, layer.gate_up), layer.gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        codes = self._silu_codes(gate, up, layer.down)
        del gate_up, gate, up  # the largest tensor of a prefill
        return self._product(codes, layer.down, x)

    def _product(self, codes: Codes, linear: Linear, residual: Tensor | None = None) -> Tensor:
        options: dict[str, Any] = {"residual": residual, "row_scale": codes[1]}
        return self.kernels.gemm(codes[0], linear.weights, Y_TYPES[self.weights.dtype], **options)

    def _norm_codes(self, x: Tensor, norm: Norm, linear: Linear) -> Codes:
        site, eps = linear.site, self.weights.sizes.rms_norm_eps
        codes, _ = self.kernels.rmsnorm_quantize(
            x, site.scale, site.bits, site.codes_type, eps=eps, gain=norm.gain, shift=norm.shift
        )
        return codes, None

    def _plain_codes(self, x: Tensor, linear: Linear) -> Codes:
        site = linear.site
        return self.kernels.quantize(x, site.scale, site.bits, site.codes_type), None

    def _step_codes(self, index: int, qkv: Tensor) -> Codes:
        linear = self.weights.layers[index].o
        if linear.site.codes_type is Type.S8:
            return self.attention.step(index, qkv, linear.site), None
        return self._plain_codes(self.attention.step(index, qkv), linear)

    def _silu_codes(self, gate: Tensor, up: Tensor, linear: Linear) -> Codes:
        site, left = linear.site, self.weights.r4_left
        return self.kernels.silu_mul_quantize(gate, up, site.scale, site.bits, site.codes_type, left=left), None

    def _logits(self, x: Tensor) -> Tensor:
        """Residual stream [B, hidden] of the last tokens."""
        w = self.weights
        normed = F.rms_norm(x.float(), (x.shape[-1],), w.final_norm, w.sizes.rms_norm_eps)
        return F.linear(normed.to(w.dtype), w.lm_head).float()


def _default_attention(weights: DecoderWeights) -> str:
    """In fp32, which is for validation, the fused kernels have no tensor cores and gain nothing."""
    usable = weights.device.type == "cuda" and weights.dtype is not torch.float32
    return "fused" if usable and importlib.util.find_spec("triton") else "eager"
