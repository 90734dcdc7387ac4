"""Hadamard matrices: ``H Hᵀ = n I`` in integers, and the factored transform against the dense one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pq_export.hadamard import (
    HadamardTransform,
    hadamard_factors,
    jacobsthal,
    paley,
    prime_power,
    random_hadamard,
    sylvester,
)


def is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def is_odd_prime_power(q: int) -> bool:
    """Independent of the package: some odd prime divides q and nothing else does."""
    return any(is_prime(p) and q in [p**k for k in range(1, 11)] for p in range(3, q + 1, 2) if q % p == 0)


def paley_should_make(order: int) -> bool:
    """Paley I: order - 1 ≡ 3 (mod 4) an odd prime power. Paley II: order / 2 - 1 ≡ 1 (mod 4) one."""
    half = order // 2 - 1
    return order % 4 == 0 and (is_odd_prime_power(order - 1) or (half % 4 == 1 and is_odd_prime_power(half)))


def assert_hadamard(matrix: np.ndarray, order: int) -> None:
    assert matrix.shape == (order, order)
    assert set(np.unique(matrix).tolist()) <= {-1, 1}
    # Every partial sum is an integer of at most `order` < 2^24: fp32 products are exact and use BLAS.
    gram = matrix.astype(np.float32) @ matrix.astype(np.float32).T
    assert (gram.astype(np.int64) == order * np.eye(order, dtype=np.int64)).all()


PALEY_ORDERS = [n for n in range(4, 1025, 4) if paley_should_make(n)]


def test_the_known_small_paley_orders() -> None:
    assert [n for n in PALEY_ORDERS if n <= 100] == (
        [4, 8, 12, 20, 24, 28, 32, 36, 44, 48, 52, 60, 68, 72, 76, 80, 84, 100]
    )


@pytest.mark.parametrize("low", range(1, 1025, 128))
def test_every_paley_order_up_to_1024(low: int) -> None:
    for order in range(low, low + 128):
        matrix = paley(order)
        assert (matrix is not None) == (order in PALEY_ORDERS), order
        if matrix is not None:
            assert_hadamard(matrix, order)


@pytest.mark.parametrize("order", [344, 684, 924, 2880])
def test_large_paley_orders(order: int) -> None:
    matrix = paley(order)
    assert matrix is not None
    assert_hadamard(matrix, order)


@pytest.mark.parametrize("order", [12, 28, 36, 52, 100, 124])
def test_product_in_int64(order: int) -> None:
    """The same statement without fp32 in between; 28, 52 and 100 come from GF(27), GF(25) and GF(49)."""
    matrix = paley(order)
    assert matrix is not None
    wide = matrix.astype(np.int64)
    assert (wide @ wide.T == order * np.eye(order, dtype=np.int64)).all()


@pytest.mark.parametrize("order", [1, 2, 4, 64, 512])
def test_sylvester(order: int) -> None:
    matrix = sylvester(order)
    assert_hadamard(matrix, order)
    # Independent definition: entry (i, j) is (-1) to the number of common bits.
    bits = np.array([[bin(i & j).count("1") for j in range(order)] for i in range(order)])
    assert (matrix == 1 - 2 * (bits % 2)).all()


@pytest.mark.parametrize("order", [3, 6, 12, 96])
def test_sylvester_refuses_other_orders(order: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        sylvester(order)


@pytest.mark.parametrize(
    ("q", "power"),
    [
        (2, (2, 1)),
        (9, (3, 2)),
        (27, (3, 3)),
        (343, (7, 3)),
        (625, (5, 4)),
        (1021, (1021, 1)),
        (1, None),
        (12, None),
        (1001, None),
    ],
)
def test_prime_power(q: int, power: tuple[int, int] | None) -> None:
    assert prime_power(q) == power


@pytest.mark.parametrize("q", [7, 11, 13, 23])
def test_jacobsthal_of_a_prime_field_is_the_legendre_symbol(q: int) -> None:
    squares = {x * x % q for x in range(1, q)}
    expected = [[0 if i == j else (1 if (i - j) % q in squares else -1) for j in range(q)] for i in range(q)]
    matrix = jacobsthal(q)
    assert matrix is not None and (matrix == np.array(expected)).all()


@pytest.mark.parametrize("q", [9, 25, 27, 81, 125, 243])
def test_jacobsthal_of_an_extension_field(q: int) -> None:
    """``Q Qᵀ = q I - J`` and ``Q J = 0`` hold for no other ±1 pattern made by differences."""
    matrix = jacobsthal(q)
    assert matrix is not None
    wide = matrix.astype(np.int64)
    assert (wide @ wide.T == q * np.eye(q, dtype=np.int64) - 1).all()
    assert (wide.sum(1) == 0).all()
    assert ((wide if q % 4 == 1 else -wide) == wide.T).all()


@pytest.mark.parametrize("q", [1, 2, 8, 15, 21, 64])
def test_jacobsthal_without_a_field_of_odd_order(q: int) -> None:
    assert jacobsthal(q) is None


@pytest.mark.parametrize("low", range(1, 257, 64))
def test_factors_are_orthonormal_dense(low: int) -> None:
    for order in range(low, low + 64):
        factors = hadamard_factors(order)
        assert factors.left_order * factors.right_order == order == factors.order
        matrix = factors.matrix()
        assert matrix.shape == (order, order) and matrix.dtype == np.float64
        assert np.abs(matrix @ matrix.T - np.eye(order)).max() < 1e-12, order


@pytest.mark.parametrize("low", range(257, 1025, 128))
def test_factors_are_orthonormal_factor_by_factor(low: int) -> None:
    """(L ⊗ R)(L ⊗ R)ᵀ = LLᵀ ⊗ RRᵀ: it is enough that LLᵀ = c I in integers and RRᵀ = I / c."""
    for order in range(low, low + 128):
        factors = hadamard_factors(order)
        left, right = factors.left().astype(np.float64), factors.right()
        assert (len(left), len(right)) == (factors.left_order, factors.right_order)
        assert len(left) * len(right) == order
        c = float(np.square(left[0]).sum())
        assert set(np.unique(left)) <= ({-1, 0, 1} if factors.construction == "block" else {-1, 1})
        assert np.array_equal(left @ left.T, c * np.eye(len(left))), order
        assert np.abs(c * right @ right.T - np.eye(len(right))).max() < 1e-12, order


@pytest.mark.parametrize("order", [576, 688, 1000, 1001, 1024])
def test_factors_are_orthonormal_dense_spot_checks(order: int) -> None:
    matrix = hadamard_factors(order).matrix()
    assert np.abs(matrix @ matrix.T - np.eye(order)).max() < 1e-12


@pytest.mark.parametrize(
    ("order", "core", "left", "right", "construction"),
    [
        (64, 1, 8, 8, "sylvester"),
        (576, 36, 36, 16, "paley"),
        (1536, 12, 48, 32, "paley"),
        (2880, 180, 180, 16, "paley"),
        (4864, 76, 76, 64, "paley"),
        (8960, 140, 140, 64, "paley"),
        (11008, 344, 344, 32, "paley"),
        (14336, 28, 112, 128, "paley"),
        (18944, 148, 148, 128, "paley"),
        (13696, 107, 107, 128, "block"),
        (15, 15, 15, 1, "block"),
    ],
)
def test_table_of_model_sizes(order: int, core: int, left: int, right: int, construction: str) -> None:
    factors = hadamard_factors(order)
    assert (factors.core, factors.construction) == (core, construction)
    assert (factors.left_order, factors.right_order) == (left, right)


@pytest.mark.parametrize("order", [576, 1536, 2880, 4864, 11008, 13696, *range(4, 512, 4)])
def test_core_is_the_smallest_and_the_split_the_cheapest(order: int) -> None:
    odd = order // (order & -order)
    candidates = [odd * 2**t for t in range(2, 20) if order % (odd * 2**t) == 0]
    core = 1 if odd == 1 else next((k for k in candidates if paley_should_make(k)), odd)
    factors = hadamard_factors(order)
    assert factors.core == core
    splits = [core * 2**t for t in range(20) if order % (core * 2**t) == 0]
    assert factors.left_order + factors.right_order == min(left + order // left for left in splits)
    assert factors.left_order in splits


@pytest.mark.parametrize("order", [1, 2, 15, 16, 24, 36, 96, 144, 344, 576, 856])
def test_transform_equals_dense_product(order: int) -> None:
    x = torch.randn(2, 3, order, generator=torch.Generator().manual_seed(order))
    dense = x.double() @ torch.from_numpy(hadamard_factors(order).matrix())
    assert torch.allclose(HadamardTransform(order)(x).double(), dense, atol=1e-5)
    assert torch.allclose(HadamardTransform(order).double()(x.double()), dense, atol=1e-6)


@pytest.mark.parametrize("order", [15, 24, 96, 344])
def test_transform_is_undone_by_the_transpose(order: int) -> None:
    x = torch.randn(4, order, generator=torch.Generator().manual_seed(0))
    matrix = torch.from_numpy(hadamard_factors(order).matrix())
    assert torch.allclose(HadamardTransform(order)(x).double() @ matrix.T, x.double(), atol=1e-5)


def test_transform_is_not_symmetric_so_the_side_matters() -> None:
    """Order 12 is Paley I, whose matrix is not symmetric: x Hᵀ is another transform."""
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    transposed = x @ torch.from_numpy(hadamard_factors(12).matrix().T).float()
    assert not torch.allclose(HadamardTransform(12)(x), transposed, atol=1e-2)


@pytest.mark.parametrize("order", [16, 48, 96, 107])
def test_random_hadamard(order: int) -> None:
    q = random_hadamard(order, 3)
    assert q.dtype == torch.float64
    assert (q @ q.T - torch.eye(order, dtype=torch.float64)).abs().max() < 1e-12
    assert torch.equal(q, random_hadamard(order, 3))
    assert not torch.equal(q, random_hadamard(order, 4))
    # A signed Hadamard: magnitudes are those of the plain one.
    assert torch.allclose(q.abs(), torch.from_numpy(hadamard_factors(order).matrix().T).abs(), atol=0, rtol=0)


@pytest.mark.parametrize("order", [16, 48, 96])
def test_random_hadamard_flips_whole_rows(order: int) -> None:
    """``D Hᵀ``: every row is one of Hᵀ with one sign, and both signs occur."""
    signs = random_hadamard(order, 3).numpy() * np.sign(hadamard_factors(order).matrix().T) * np.sqrt(order)
    assert np.allclose(signs, np.round(signs[:, :1]), atol=1e-12)
    assert set(np.round(signs[:, 0]).tolist()) == {-1.0, 1.0}
