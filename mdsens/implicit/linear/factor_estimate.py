"""What a sparse factorization of a particle system's Hessian will cost, without making it.

Nested dissection (George, SIAM J. Numer. Anal. 10, 345 (1973)) divides the n particles by layers
that are as thick as the range of the interactions. Each particle has z neighbors, so that a layer
has about n^(1/2) z^(1/2) particles in two dimensions, n^(2/3) z^(1/3) in three. The rows of a layer
become a dense block of the factor L. Hence the laws

    2-D:  nnz(L) = 0.34 d^2 z n log2(n)        operations = 1.6 d^3 z^(3/2) n^(3/2)
    3-D:  nnz(L) = 2.3 d^2 z^(2/3) n^(4/3)     operations = 0.8 d^3 z^(5/4) n^2

with d rows for each particle. The numbers, and 5/4 in place of 1, are fits to the factors that
SuperLU makes in METIS's order: discs of 256 to 40,000, soft spheres of 256 to 4,000, Kob-Andersen
glasses of 500 to 2,000 and silicon of 511 to 2,743. For all of them the estimate of nnz(L) is 0.85
to 1.7 times the truth, that of the operations 0.8 to 1.7 times. A small system is bounded by its
dense factor.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

__all__ = ["FactorEstimate", "product_seconds"]

# Seconds of SuperLU for an operation in a dense block, and for an entry of L, on one core.
SECONDS_OF_OPERATION = 2e-10
SECONDS_OF_ENTRY = 4e-8
# Seconds of a step of conjugate gradients, on one core: in all, for a row of the vectors, and for
# an entry of the matrix. They are measured by the same clock and on the same core as the two above:
# only the ratio matters to a choice.
SECONDS_OF_STEP = 1.5e-5
SECONDS_OF_ROW = 3e-9
SECONDS_OF_NONZERO = 1e-9
# Bytes of an entry of L and U: a number in each of them, and shared indices.
BYTES_OF_ENTRY = 20.0


def _bounded(law: float, dense: float) -> float:
    """Join a law for large systems smoothly to its upper bound, the dense factor."""
    return 1.0 / math.hypot(1.0 / max(law, 1.0), 1.0 / max(dense, 1.0))


@dataclasses.dataclass(frozen=True)
class FactorEstimate:
    """Predicted cost of the factorization L D L^T of a sparse symmetric matrix.

    Attributes:
      nonzeros: number of entries of L.
      operations: number of multiplications, the sum of the squared lengths of the columns of L.
    """

    nonzeros: float
    operations: float

    @classmethod
    def of(cls, nodes: int, block: int, neighbors: float) -> FactorEstimate:
        """Estimate the factor of a network in space, by the laws of nested dissection.

        Args:
          nodes: number of nodes (particles).
          block: rows of the matrix for each node, which is the dimension of space.
          neighbors: mean number of other nodes in the row of a node.
        """
        n = float(max(nodes, 2))
        z = float(np.clip(neighbors, 1.0, n))
        if block <= 2:
            nonzeros = 0.34 * block**2 * z * n * math.log2(n)
            operations = 1.6 * block**3 * (z * n) ** 1.5
        else:
            nonzeros = 2.3 * block**2 * z ** (2 / 3) * n ** (4 / 3)
            operations = 0.8 * block**3 * z**1.25 * n**2
        rows = n * block
        return cls(_bounded(nonzeros, rows**2 / 2), _bounded(operations, rows**3 / 3))

    @property
    def seconds(self) -> float:
        """Return the estimated time of the factorization on one core, in seconds."""
        return SECONDS_OF_OPERATION * self.operations + SECONDS_OF_ENTRY * self.nonzeros

    @property
    def bytes(self) -> float:
        """Return the estimated memory of the factor, in bytes."""
        return BYTES_OF_ENTRY * self.nonzeros


def product_seconds(rows: int, nonzeros: int) -> float:
    """Estimate the time of a step of conjugate gradients on one core, in seconds.

    Args:
      rows: number of rows of the matrix.
      nonzeros: number of stored entries of the matrix.
    """
    return SECONDS_OF_STEP + SECONDS_OF_ROW * rows + SECONDS_OF_NONZERO * nonzeros
