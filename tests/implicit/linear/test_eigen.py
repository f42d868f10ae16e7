"""The lowest eigenpairs against a dense oracle, by each of the three ways;
saddles, floppy modes and their counts.
"""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from mdsens.implicit.linear import eigen
from mdsens.implicit.linear.sparse_ldl import SparseFactor, solve_on_range


def chain(n, ends=1.0, seed=0):
    """A ring of n uneven springs and a few more: its null space is the constant vector."""
    rng = np.random.default_rng(seed)
    i = np.concatenate([np.arange(n), rng.integers(0, n, n)])
    j = np.concatenate([(np.arange(n) + 1) % n, rng.integers(0, n, n)])
    k = np.where(i == j, 0.0, rng.uniform(0.5, 1.5, 2 * n))
    ones = np.ones(2 * n)
    edge = sp.coo_array(
        (np.concatenate([ones, -ones]), (np.tile(np.arange(2 * n), 2), np.concatenate([i, j])))
    )
    return (edge.T @ sp.diags_array(k) @ edge).tocsc()


def off_mean(v):
    return v - v.mean(axis=0, keepdims=True)


def found(matrix, k, way, monkeypatch, null=1, project=off_mean):
    monkeypatch.setattr(eigen, "DENSE_SIZE", 10_000 if way == "dense" else 0)
    assembled = matrix if way == "shift-invert" else None
    spectrum = eigen.lowest(
        lambda v: matrix @ v, matrix.shape[0], k, project=project, null=null, matrix=assembled
    )
    assert spectrum.method == way
    return spectrum


WAYS = ("dense", "shift-invert", "LOBPCG")


@pytest.mark.parametrize("way", WAYS)
def test_lowest_modes_are_the_dense_ones(way, monkeypatch):
    matrix = chain(300)
    values, vectors = np.linalg.eigh(matrix.toarray())
    spectrum = found(matrix, 4, way, monkeypatch)
    # LOBPCG stops at a residual of 1e-4 of the value,
    # whose square over the gap is the value's error
    np.testing.assert_allclose(spectrum.values, values[1:5], rtol=1e-7 if way == "LOBPCG" else 1e-9)
    assert np.abs(spectrum.vectors[:, 0] @ vectors[:, 1]) == pytest.approx(
        1, abs=1e-6 if way == "LOBPCG" else 1e-8
    )
    assert spectrum.largest == pytest.approx(values[-1], rel=2e-3)
    assert (spectrum.residuals < 1e-4 * spectrum.values[0]).all()
    assert spectrum.negative == spectrum.zero == 0


@pytest.mark.parametrize("way", WAYS)
def test_what_is_zero_to_round_off_is_zero(way, monkeypatch):
    """Two rings apart: one motion more than the null space that is known."""
    matrix = sp.block_diag([chain(150), chain(150, seed=1)]).tocsc()
    spectrum = found(matrix, 2, way, monkeypatch)
    assert spectrum.zero == 1 and spectrum.values[0] == 0.0 and not spectrum.settled
    assert spectrum.values[1] == pytest.approx(np.linalg.eigvalsh(matrix.toarray())[2], rel=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_saddles_are_counted(way, monkeypatch):
    matrix = chain(300)
    rng = np.random.default_rng(1)
    down = sp.csc_array(np.diag(np.where(rng.uniform(size=300) < 0.02, -3.0, 0.0)))
    projector = np.eye(300) - 1 / 300
    dense = projector @ (matrix + down).toarray() @ projector
    values = np.linalg.eigvalsh(dense)
    # a matrix that keeps the null space and has the holes
    spectrum = found(sp.csc_array(dense), 3, way, monkeypatch)
    np.testing.assert_allclose(spectrum.values, values[:3], rtol=1e-7)
    below = int((values < -1e-9).sum())
    assert below > 1
    assert spectrum.negative == (below if spectrum.counted else min(below, 3))


@pytest.mark.parametrize("way", WAYS)
def test_modes_without_stiffness_are_counted(way, monkeypatch):
    one = chain(150)
    # two rings: one more zero mode than is known
    matrix = sp.csc_array(sp.block_diag([one, chain(150, seed=3)]))
    spectrum = found(matrix, 3, way, monkeypatch)
    assert spectrum.zero == 1 and spectrum.negative == 0
    assert abs(spectrum.values[0]) < 1e-11
    assert spectrum.stable.tolist() == [False, True, True]


@pytest.mark.parametrize("way", WAYS)
def test_a_matrix_of_zeros_has_zero_modes_alone(way, monkeypatch):
    """And none that round-off makes negative."""
    spectrum = found(sp.csc_array((40, 40)), 3, way, monkeypatch)
    assert (
        spectrum.negative == spectrum.hidden == 0
        and spectrum.largest == 0.0
        and not spectrum.settled
    )
    assert spectrum.zero == (39 if spectrum.counted else 3)
    np.testing.assert_array_equal(spectrum.values, np.zeros(3))
    np.testing.assert_allclose(spectrum.vectors.T @ spectrum.vectors, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(spectrum.vectors.sum(axis=0), 0.0, atol=1e-12)


@pytest.mark.parametrize("sizes", [(1.0, 1.0), (0.0, np.nan), (0.0, 0.0)])
def test_soft_start_vectors_save_products_and_change_no_mode(sizes, monkeypatch):
    """Also where some or all of the solves that make them soft fail."""
    monkeypatch.setattr(eigen, "DENSE_SIZE", 0)
    matrix = chain(300)
    values, vectors = np.linalg.eigh(matrix.toarray())
    products = []

    def apply(v):
        products.append(v.shape[1])
        return matrix @ v

    def soften(v):
        x = vectors[:, 1:] @ ((vectors[:, 1:].T @ v) / values[1:, None])
        return x * np.resize(sizes, v.shape[1])

    counts = []
    for option in (None, soften):
        products.clear()
        spectrum = eigen.lowest(
            apply, 300, 2, project=off_mean, null=1, iteration=eigen.Iteration(soften=option)
        )
        counts.append(sum(products))
        np.testing.assert_allclose(spectrum.values, values[1:3], rtol=1e-7)
        assert (spectrum.residuals < 1e-4 * spectrum.values[0]).all()
    if all(sizes):
        assert counts[1] < counts[0]


def test_a_looser_accuracy_takes_fewer_products(monkeypatch):
    monkeypatch.setattr(eigen, "DENSE_SIZE", 0)
    matrix = chain(300)
    lowest = np.linalg.eigvalsh(matrix.toarray())[1]
    products = []
    for accuracy in (1e-2, 1e-6):
        count = []
        spectrum = eigen.lowest(
            lambda v, count=count: count.append(v.shape[1]) or matrix @ v,
            300,
            project=off_mean,
            null=1,
            iteration=eigen.Iteration(accuracy=accuracy),
        )
        products.append(sum(count))
        assert spectrum.residuals[0] <= accuracy * lowest * 1.01
        assert spectrum.values[0] == pytest.approx(lowest, rel=1e-2)
    assert products[0] < products[1]


def test_no_more_modes_than_the_range_holds(monkeypatch):
    matrix = chain(5)
    spectrum = found(matrix, 9, "dense", monkeypatch)
    assert spectrum.values.shape == (4,)
    nothing = eigen.lowest(lambda v: v, 3, 1, project=lambda v: 0 * v, null=3)
    assert nothing.values.size == 0


def test_a_lobpcg_that_breaks_down_is_no_zero_mode(monkeypatch):
    matrix = chain(300)

    def broken(apply, guess, *_):
        return np.linalg.qr(guess)[0]

    monkeypatch.setattr(eigen, "lobpcg", broken)
    spectrum = found(matrix, 2, "LOBPCG", monkeypatch)
    assert spectrum.zero == 0
    np.testing.assert_allclose(
        spectrum.values, np.linalg.eigvalsh(matrix.toarray())[1:3], rtol=1e-6
    )


def test_solving_on_the_range_takes_the_shift_back_out():
    matrix = chain(400)
    b = np.random.default_rng(2).normal(size=400)
    columns = np.stack([b, np.ones(400)], axis=1)
    columns = columns - columns.mean(axis=0)
    x, residual, _ = solve_on_range(
        matrix, SparseFactor(matrix, 1e-6), lambda v: v - v.mean(axis=0), columns
    )
    np.testing.assert_allclose(
        x[:, 0], np.linalg.pinv(matrix.toarray(), hermitian=True) @ b, atol=1e-9
    )
    assert np.all(residual < 1e-13)
    assert np.all(x[:, 1] == 0)
