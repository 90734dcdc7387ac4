"""Precision as a value: how many bits weights, activations and the KV cache have."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pq_export.errors import UsageError

WEIGHT_ACTIVATION = {"w4a4": (4, 4), "w4a8": (4, 8), "w8a8": (8, 8), "w4a16": (4, 16)}
KV_BITS = (4, 8, 16)
OVERRIDE_BITS = (4, 8)  # what a single linear or activation site may have instead of the model's bits


@dataclass(frozen=True)
class Precision:
    """Bits of weights (4, 8), linear inputs (4, 8, 16) and cached keys and values (4, 8, 16).

    16 means floating point, not quantized. KV scales are per head at 4 bits and per tensor at 8
    (PrefixQuant, section 5).
    """

    weight_bits: int
    activation_bits: int
    kv_bits: int

    def __str__(self) -> str:
        return f"W{self.weight_bits}A{self.activation_bits}KV{self.kv_bits}"

    @property
    def kv_per_head(self) -> bool:
        return kv_scales_per_head(self.kv_bits)

    @classmethod
    def named(cls, name: str, kv_bits: int | None = None) -> Precision:
        """``w4a4``-like name and KV bits (default: 4 for w4a4 and w4a8, 8 for w8a8, 16 for w4a16)."""
        if name not in WEIGHT_ACTIVATION:
            raise UsageError(f"unknown precision '{name}'", cure=f"Use one of {', '.join(WEIGHT_ACTIVATION)}.")
        weight_bits, activation_bits = WEIGHT_ACTIVATION[name]
        if kv_bits is None:
            kv_bits = {"w8a8": 8, "w4a16": 16}.get(name, 4)
        if type(kv_bits) is not int or kv_bits not in KV_BITS:
            raise UsageError(f"--kv {kv_bits!r} is not possible", cure=f"Use one of {KV_BITS}.")
        return cls(weight_bits, activation_bits, kv_bits)

    @classmethod
    def parse(cls, text: str) -> Precision:
        """Inverse of ``str``: ``W4A4KV4``."""
        match = re.fullmatch(r"W(\d+)A(\d+)KV(\d+)", text)
        bits = tuple(map(int, match.groups())) if match else ()
        if bits[:2] not in WEIGHT_ACTIVATION.values() or bits[2] not in KV_BITS:
            raise UsageError(f"'{text}' is not a precision such as W4A4KV4")
        return cls(*bits)


def kv_scales_per_head(bits: int) -> bool:
    """Whether keys or values of ``bits`` have a scale for each head, and not a single one."""
    return bits == 4
