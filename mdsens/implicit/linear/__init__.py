"""Linear solves with a known null space: Krylov methods, factorizations, refinement, eigenvalues."""
