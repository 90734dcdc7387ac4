"""The shapes that tests and the benchmark share: linears of real models, as (name, K inputs, N outputs)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One linear, y [M, N] = x [M, K] @ w [N, K]ᵀ. Linears that read the same input are one product."""

    model: str
    name: str
    K: int
    N: int

    @property
    def weights(self) -> int:
        return self.K * self.N

    def __str__(self) -> str:
        return f"{self.model} {self.name} {self.K}x{self.N}"


LLAMA_3_8B = (
    Shape("8B", "qkv", 4096, 6144),
    Shape("8B", "o", 4096, 4096),
    Shape("8B", "gate_up", 4096, 28672),
    Shape("8B", "up", 4096, 14336),
    Shape("8B", "down", 14336, 4096),
)
LLAMA_2_7B = (
    Shape("7B", "qkv", 4096, 12288),
    Shape("7B", "up", 4096, 11008),
    Shape("7B", "down", 11008, 4096),
)
LLAMA_70B = (
    Shape("70B", "o", 8192, 8192),
    Shape("70B", "qkv", 8192, 10240),
    Shape("70B", "up", 8192, 28672),
    Shape("70B", "gate_up", 8192, 57344),
    Shape("70B", "down", 28672, 8192),
)
SHAPES = (*LLAMA_3_8B, *LLAMA_2_7B, *LLAMA_70B)

# Sizes that no model has: N that is odd, or less than a tile; K that ends inside a tile of 64.
ODD = (
    Shape("odd", "small", 32, 1),
    Shape("odd", "narrow", 32, 17),
    Shape("odd", "half", 96, 80),
    Shape("odd", "prime", 160, 33),
    Shape("odd", "tile+1", 576, 129),
    Shape("odd", "tiny", 576, 1536),
    Shape("odd", "long", 4128, 257),
)

BENCH_M = (1, 4, 8, 16, 32, 64, 256, 2048, 8192)
QUICK_M = (1, 16, 256, 2048)
QUICK_SHAPES = (LLAMA_3_8B[1], LLAMA_3_8B[3], LLAMA_3_8B[4], LLAMA_70B[2])
SMALL_M = tuple(range(1, 18))  # decode, and the first M after it
MID_M = (31, 33, 64, 127, 256)
LARGE_M = (2048, 8192)
TEST_M = (*SMALL_M, *MID_M, *LARGE_M)
