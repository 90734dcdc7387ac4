"""The KV cache on a GPU: one static buffer of codes for every key and value tensor of the model.

4-bit codes lie two to a byte: byte d of a head holds code d in its low nibble and code d + D / 2 in its high one, both
in two's complement. RoPE turns the same pairs, so the kernel that rotates a key holds both when it packs them.
The prefix is not in the cache.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from pq_export.cuda.weights import CacheQuantizer, DecoderWeights
from pq_export.errors import PqExportError


class Format(IntEnum):
    """How a cache tensor [B, G, T, ...] holds its codes."""

    PACKED = 0  # uint8 [..., D / 2]
    BYTES = 1  # int8 [..., D]
    FLOAT = 2  # not quantized, [..., D] of the model's type


class KVCache:
    """Keys and values of all layers for ``batch`` sequences of equal length.

    ``length``: int32 [1] on the GPU, tokens held: kernels read it there, so one CUDA graph serves every position.
    """

    def __init__(self, weights: DecoderWeights, batch: int, capacity: int, packed: bool = True):
        """``packed`` False keeps 4-bit codes in bytes, as the onnxruntime target does."""
        if capacity + weights.prefix_length > len(weights.cos):
            raise PqExportError(
                f"a cache of {capacity} tokens and a prefix of {weights.prefix_length} are more than the "
                f"{len(weights.cos)} positions loaded",
                cure="Load the weights with a larger max_length.",
            )
        s = weights.sizes
        self.batch, self.capacity = batch, capacity
        self.length = torch.zeros(1, dtype=torch.int32, device=weights.device)

        def buffer(form: Format) -> Tensor:
            width = s.head_dim // 2 if form is Format.PACKED else s.head_dim
            dtype = {Format.PACKED: torch.uint8, Format.BYTES: torch.int8, Format.FLOAT: weights.dtype}[form]
            shape = (batch, s.num_kv_heads, capacity, width)
            return torch.zeros(shape, dtype=dtype, device=weights.device)

        self.key_formats = [format_of(layer.key, packed) for layer in weights.layers]
        self.value_formats = [format_of(layer.value, packed) for layer in weights.layers]
        self.keys = [buffer(form) for form in self.key_formats]
        self.values = [buffer(form) for form in self.value_formats]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))


def format_of(quantizer: CacheQuantizer, packed: bool = True) -> Format:
    """The format of a tensor's codes."""
    if quantizer.bits == 16:
        return Format.FLOAT
    return Format.PACKED if quantizer.bits == 4 and packed else Format.BYTES


def stored(codes: Tensor, form: Format) -> Tensor:
    """Codes (or values) [..., D] of a floating type -> what a cache of ``form`` holds."""
    if form is Format.FLOAT:
        return codes
    if form is Format.BYTES:
        return codes.to(torch.int8)
    low, high = (codes.to(torch.int32) & 0xF).chunk(2, dim=-1)
    return (low | (high << 4)).to(torch.uint8)


def loaded(held: Tensor, form: Format) -> Tensor:
    """Inverse of :func:`stored`, in fp32."""
    if form is not Format.PACKED:
        return held.float()
    both = held.to(torch.int32)
    return ((torch.cat((both & 0xF, both >> 4), dim=-1) ^ 8) - 8).float()
