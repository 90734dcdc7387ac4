"""The numbers of ``csrc/pq_kernels.h``, by name."""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path

SOURCE_DIRECTORY = Path(__file__).resolve().parent
HEADER = SOURCE_DIRECTORY / "csrc" / "pq_kernels.h"
ABI_VERSION = 1


class Status(IntEnum):
    """What a function of the library returns."""

    OK = 0
    BAD_SHAPE = 1
    BAD_TYPE = 2
    BAD_POINTER = 3
    BAD_VARIANT = 4
    SMALL_WORKSPACE = 5
    NOT_BUILT = 6
    CUDA_ERROR = 7


class Type(IntEnum):
    """Element types. ``S4`` is packed, two to a byte; ``S8`` also holds 4-bit codes, one to a byte."""

    F16 = 0
    BF16 = 1
    F32 = 2
    S8 = 3
    S4 = 4
    S32 = 5


class Layout(IntEnum):
    """Orders of packed weights: for m16n8k64.s4, for 2 x m16n8k32.s8 from 4 bits, for m16n8k32.s8 from 8 bits."""

    S4 = 0
    S8 = 1
    W8 = 2

    @property
    def weight_bits(self) -> int:
        return 8 if self is Layout.W8 else 4

    @property
    def x_type(self) -> Type:
        """The type of activation codes that goes with it."""
        return Type.S4 if self is Layout.S4 else Type.S8
