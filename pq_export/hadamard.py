"""Hadamard matrices of every order a decoder meets, in the factored form the graph executes.

An order n = K·2^t becomes ``H = (H_K ⊗ H_{2^t}) / sqrt(n)`` with ``H_K`` from a Paley construction, or,
where none exists for any such K, a block-diagonal matrix of Sylvester blocks. Sylvester: repeated
doubling. Paley I: q ≡ 3 (mod 4) a prime power, order q + 1. Paley II: q ≡ 1 (mod 4), order 2(q + 1)
(R. Paley, "On orthogonal matrices", 1933).
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


def sylvester(order: int) -> np.ndarray:
    """±1 Hadamard matrix [order, order] for a power of two."""
    if order & (order - 1):
        raise ValueError(f"{order} is not a power of two")
    matrix = np.ones((1, 1), dtype=np.int8)
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with p prime and p^k = q, or None."""
    for p in range(2, q + 1):
        if q % p == 0:
            k = 0
            while q % p == 0:
                q, k = q // p, k + 1
            return (p, k) if q == 1 else None
    return None


Polynomial = tuple[int, ...]  # coefficients over GF(p), lowest first


def _remainder(polynomial: Polynomial, divisor: Polynomial, p: int) -> Polynomial:
    """``polynomial`` modulo the monic ``divisor``."""
    rest, degree = list(polynomial), len(divisor) - 1
    for top in range(len(rest) - 1, degree - 1, -1):
        leading = rest[top]
        for i, coefficient in enumerate(divisor):
            rest[top - degree + i] -= leading * coefficient
    return tuple(c % p for c in rest[:degree])


def _product(a: Polynomial, b: Polynomial) -> Polynomial:
    result = [0] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            result[i + j] += x * y
    return tuple(result)


def _irreducible(p: int, k: int) -> Polynomial:
    """The first monic polynomial of degree ``k`` without a monic factor of degree 1..k/2: it makes GF(p^k)."""
    for low in itertools.product(range(p), repeat=k):
        candidate = (*low, 1)
        factors = ((*f, 1) for degree in range(1, k // 2 + 1) for f in itertools.product(range(p), repeat=degree))
        if all(any(_remainder(candidate, factor, p)) for factor in factors):
            return candidate
    raise AssertionError(f"GF({p}^{k}) exists")


def jacobsthal(q: int) -> np.ndarray | None:
    """Matrix [q, q] of the quadratic character χ(a_i - a_j) of GF(q), or None if q is no odd prime power."""
    power = prime_power(q)
    if power is None or power[0] == 2:
        return None
    p, k = power
    modulus, zero = _irreducible(p, k), (0,) * k
    elements = list(itertools.product(range(p), repeat=k))
    squares = {_remainder(_product(a, a), modulus, p) for a in elements if a != zero}
    place = p ** np.arange(k)  # an element as one number: its digits to base p
    character = np.full(q, -1, dtype=np.int8)
    character[0] = 0
    character[[int(np.dot(square, place)) for square in squares]] = 1
    values = np.array(elements)
    return character[((values[:, None, :] - values[None, :, :]) % p) @ place]


def paley(order: int) -> np.ndarray | None:
    """±1 Hadamard matrix [order, order] by Paley I or II, or None if neither applies."""
    if order % 4:
        return None
    if (order - 1) % 4 == 3 and (residues := jacobsthal(order - 1)) is not None:
        conference = np.block([[np.zeros((1, 1)), np.ones((1, order - 1))], [-np.ones((order - 1, 1)), residues]])
        return (conference + np.eye(order)).astype(np.int8)
    q = order // 2 - 1
    if q % 4 == 1 and (residues := jacobsthal(q)) is not None:
        conference = np.block([[np.zeros((1, 1)), np.ones((1, q))], [np.ones((q, 1)), residues]])
        return (np.kron(conference, [[1, 1], [1, -1]]) + np.kron(np.eye(q + 1), [[1, -1], [-1, -1]])).astype(np.int8)
    return None


@dataclass(frozen=True)
class HadamardFactors:
    """``order = left_order · right_order``; the matrix is ``left ⊗ sylvester(right_order)``, normalised.

    ``left`` is ``H_core ⊗ sylvester(left_order / core)``: powers of two may sit on either side, and the split
    decides what the transform costs, ``left_order + right_order`` products an element. ``construction`` is
    'sylvester', 'paley' or 'block' (then ``H_core`` is the identity).
    """

    order: int
    core: int
    left_order: int
    construction: str

    @property
    def right_order(self) -> int:
        return self.order // self.left_order

    def left(self) -> np.ndarray:
        """[left_order, left_order], entries ±1 (and 0 for 'block')."""
        return np.kron(_core_factor(self.core, self.construction), sylvester(self.left_order // self.core))

    def right(self) -> np.ndarray:
        """[right_order, right_order] in fp64, with the whole normalisation folded in."""
        norm = self.order // self.core if self.construction == "block" else self.order
        return sylvester(self.right_order) / np.sqrt(norm)

    def matrix(self) -> np.ndarray:
        """The dense orthogonal matrix [order, order], fp64."""
        return np.kron(self.left(), self.right())


@functools.lru_cache
def _core_factor(order: int, construction: str) -> np.ndarray:
    if construction == "block":
        return np.eye(order, dtype=np.int8)
    matrix = np.ones((1, 1), dtype=np.int8) if order == 1 else paley(order)
    if matrix is None:
        raise AssertionError(f"no Paley construction of order {order}")
    return matrix


@functools.lru_cache
def hadamard_factors(order: int) -> HadamardFactors:
    """Factors for any order ≥ 1: the smallest Paley core that exists, else the block fallback."""
    odd = order // (order & -order)
    if odd == 1:
        return _split(order, 1, "sylvester")
    core = 4 * odd
    while order % core == 0:
        if paley(core) is not None:
            return _split(order, core, "paley")
        core *= 2
    return _split(order, odd, "block")


def _split(order: int, core: int, construction: str) -> HadamardFactors:
    """Put powers of two on the left while that makes the two factors' sum smaller."""
    left = core
    while order % (2 * left) == 0 and 2 * left + order // (2 * left) < left + order // left:
        left *= 2
    return HadamardFactors(order, core, left, construction)


def random_hadamard(order: int, seed: int) -> Tensor:
    """Randomised Hadamard ``D Hᵀ`` [order, order], fp64: a random ±1 diagonal times a Hadamard (QuaRot)."""
    signs = np.random.default_rng(seed).integers(0, 2, order) * 2.0 - 1.0
    return torch.from_numpy(signs[:, None] * hadamard_factors(order).matrix().T)


class HadamardTransform(nn.Module):
    """``x @ H`` over the last axis [..., order] by its two factors: left + right products an element, not n."""

    left: Tensor
    right: Tensor

    def __init__(self, order: int):
        super().__init__()
        factors = hadamard_factors(order)
        self.factors = factors
        # x @ (L ⊗ R) reshapes x to [K, m] and is Lᵀ x R.
        self.register_buffer("left", torch.from_numpy(factors.left().T.astype(np.float32)), persistent=False)
        self.register_buffer("right", torch.from_numpy(factors.right().astype(np.float32)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        tiles = x.unflatten(-1, (self.factors.left_order, self.factors.right_order)) @ self.right
        return (self.left @ tiles).flatten(-2) if self.factors.left_order > 1 else tiles.flatten(-2)
