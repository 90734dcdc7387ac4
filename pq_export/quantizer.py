"""Symmetric uniform quantization: the only place in the project that rounds.

Codes are ``clamp(round_half_even(x / scale), -2^(b-1), 2^(b-1) - 1)`` and values ``codes * scale``, in
fp32. That is ONNX QuantizeLinear and DequantizeLinear with zero point 0 (PrefixQuant, eq. 1-2).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def code_range(bits: int) -> tuple[int, int]:
    """Smallest and largest code, e.g. (-8, 7) for 4 bits."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def scale_from_max(max_abs: Tensor, bits: int) -> Tensor:
    """Scale that spreads [-max_abs, max_abs] over all ``2^bits`` levels: ``2 max / (2^b - 1)``, fp32.

    A tensor that is zero everywhere gets scale 1: every scale in a graph must be positive.
    """
    scale = (2.0 * max_abs / (2**bits - 1)).float()
    return torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))


def quantize(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Integer codes of ``x``, in the dtype of ``x``. ``scale`` broadcasts."""
    return torch.round(x / scale).clamp_(*code_range(bits))


def fake_quantize(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """``x`` rounded to the grid of ``scale``."""
    return quantize(x, scale, bits) * scale


def pack_int4(codes: np.ndarray) -> np.ndarray:
    """int8 codes in -8..7, any shape -> uint8 [ceil(size / 2)], first of two in the low nibble.

    The layout of ONNX INT4 tensors (onnx.proto, ``raw_data``).
    """
    nibbles = codes.astype(np.uint8).reshape(-1) & 0xF
    if nibbles.size % 2:
        nibbles = np.append(nibbles, np.uint8(0))
    return nibbles[0::2] | (nibbles[1::2] << 4)


def unpack_int4(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Inverse of :func:`pack_int4` -> int8 codes of ``shape``."""
    nibbles = np.stack((packed & 0xF, packed >> 4), axis=-1).reshape(-1)[: int(np.prod(shape))]
    return ((nibbles.astype(np.int8) ^ 8) - 8).reshape(shape)
