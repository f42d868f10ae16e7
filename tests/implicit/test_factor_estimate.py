"""The estimated cost of a factor against SuperLU's, and the choice between it and CG."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.sparse.linalg import splu
from scipy.spatial import KDTree

from mdsens.implicit.linear.factor_estimate import FactorEstimate, product_seconds
from mdsens.implicit.linear.sparse_ldl import dissection


def network(n: int, d: int, neighbors: float) -> sp.csr_array:
    """A matrix with the pattern of about n particles of a periodic cell, as dense everywhere as a
    packing: the sites of a square or cubic lattice, moved at random.
    """
    ball = {2: np.pi, 3: 4 * np.pi / 3}[d]
    side = round(n ** (1 / d))
    n = side**d
    sites = np.stack(np.meshgrid(*d * [np.arange(side)], indexing="ij"), -1).reshape(n, d)
    moves = np.random.default_rng(0).uniform(-0.3, 0.3, (n, d))
    places = np.mod((sites + 0.5 + moves) / side, 1.0)
    pairs = KDTree(places, boxsize=1.0).query_pairs(
        (neighbors / (n * ball)) ** (1 / d), output_type="ndarray"
    )
    i, j = np.concatenate([pairs, pairs[:, ::-1]]).T
    graph = sp.csr_array((np.full(i.size, -1.0), (i, j)), shape=(n, n))
    degrees = np.asarray(-graph.sum(axis=1)).ravel()
    graph = graph + sp.dia_array(((degrees + 1.0)[None], [0]), shape=(n, n))
    block = np.full((d, d), 0.1) + np.eye(d)
    return sp.csr_array(sp.kron(graph, block))


# (particles, dimension, neighbors): discs, discs of a longer range, soft spheres, silicon, a glass
SYSTEMS = [(4000, 2, 5), (1500, 2, 20), (1500, 3, 8), (900, 3, 16), (700, 3, 75)]


@pytest.mark.parametrize("n, d, neighbors", SYSTEMS)
def test_the_estimate_is_near_to_superlus_factor(n, d, neighbors):
    matrix = network(n, d, neighbors)
    n = (matrix.indptr.size - 1) // d
    order = dissection(matrix, d)
    permuted = matrix[order][:, order]
    options = {"SymmetricMode": True}
    factor = splu(
        sp.csc_array(permuted), permc_spec="NATURAL", diag_pivot_thresh=0.0, options=options
    ).L
    lengths = np.diff(factor.indptr).astype(float)
    mean = matrix.nnz / (n * d * d) - 1.0
    estimate = FactorEstimate.of(n, d, mean)
    assert 0.5 < estimate.nonzeros / factor.nnz < 2.0
    assert 0.4 < estimate.operations / np.sum(lengths**2) < 2.5
    assert estimate.bytes > 12 * factor.nnz * 0.5


def test_a_small_network_costs_no_more_than_a_dense_factor():
    estimate = FactorEstimate.of(10, 3, 9)
    assert estimate.nonzeros <= 30**2 / 2 and estimate.operations <= 30**3 / 3


def cheaper(n: int, d: int, z: float, iterations: int = 500) -> bool:
    """Whether a factor is estimated cheaper than CG of so many iterations."""
    rows = n * d
    products = iterations * product_seconds(rows, int(rows * d * (z + 1)))
    return FactorEstimate.of(n, d, z).seconds <= products


def test_the_cheaper_way_to_solve():
    assert all(cheaper(n, 2, 5) for n in (64, 1024, 16384))
    assert not any(cheaper(n, 3, 76) for n in (1000, 4000, 32000))
    assert not cheaper(4096, 3, 8) and cheaper(64, 3, 8)
    assert not cheaper(4096, 2, 5, iterations=50) and cheaper(4096, 3, 8, iterations=20_000)
