"""Parameters of potentials, as they are printed in the literature."""

from __future__ import annotations

# Stillinger and Weber, Phys. Rev. B 31, 5262 (1985), in eV and angstroms.
SILICON = {
    "epsilon": 2.1683,
    "sigma": 2.0951,
    "a": 1.80,
    "lambda": 21.0,
    "gamma": 1.20,
    "cos_theta0": -1 / 3,
    "A": 7.049556277,
    "B": 0.6022245584,
    "p": 4.0,
    "q": 0.0,
}
