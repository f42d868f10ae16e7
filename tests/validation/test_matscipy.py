"""Relaxed elastic constants of a glass against matscipy's,
with the same potential, in Birch's convention.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import LONG, relative
from matscipy.calculators import pair_potential

import mdsens as ms
from mdsens.elasticity import moduli


def interaction(sigma: float, epsilon: float, onset: float, cutoff: float) -> Any:
    """The potential of the bundled glass as an interaction of matscipy,
    with derivatives of its own: 4 eps (x^12 - x^6) S.
    """

    def polynomial(r):  # S and its first two derivatives
        w = cutoff - onset
        x = np.clip((r - onset) / w, 0.0, 1.0)
        return (
            1 - x**3 * (10 - 15 * x + 6 * x**2),
            -30 * x**2 * (1 - x) ** 2 / w,
            -60 * x * (1 - x) * (1 - 2 * x) / w**2,
        )

    def bare(r):
        x6 = (sigma / r) ** 6
        return (
            4 * epsilon * (x6**2 - x6),
            4 * epsilon * (-12 * x6**2 + 6 * x6) / r,
            4 * epsilon * (156 * x6**2 - 42 * x6) / r**2,
        )

    class SwitchedLennardJones(pair_potential.calculator.CutoffInteraction):
        def __call__(self, r, *_):
            return bare(r)[0] * polynomial(r)[0]

        def first_derivative(self, r, *_):
            (f, df, _), (s, ds, _) = bare(r), polynomial(r)
            return df * s + f * ds

        def second_derivative(self, r, *_):
            (f, df, ddf), (s, ds, dds) = bare(r), polynomial(r)
            return ddf * s + 2 * df * ds + f * dds

    return SwitchedLennardJones(cutoff)


@LONG
def test_birchs_constants_of_a_lennard_jones_glass_are_matscipys():
    eq = ms.minimize(ms.load_system("binary_lj_glass", count=256))
    sigma, epsilon = (np.asarray(eq.params[name]) for name in ("sigma", "epsilon"))
    atoms = ms.io.to_ase(eq.system)
    atoms.numbers = np.asarray(eq.system.species) + 1
    parts = {
        (a + 1, b + 1): interaction(float(sigma[a, b]), float(epsilon[a, b]), 2.0, 2.5)
        for a, b in ((0, 0), (0, 1), (1, 1))
    }
    atoms.calc = pair_potential.PairPotential(parts)
    # the same minimum, by their forces
    assert np.linalg.norm(atoms.get_forces(), axis=1).max() < 1e-9
    assert float(ms.observables.energy(eq.system)) == pytest.approx(
        atoms.get_potential_energy(), rel=1e-10
    )
    affine = atoms.calc.get_birch_coefficients(atoms)
    with pytest.warns(DeprecationWarning):
        rest = atoms.calc.get_non_affine_contribution_to_elastic_constants(
            atoms, cg_parameters={"rtol": 1e-10, "atol": 0.0}
        )
    found = moduli(eq)
    birch = np.asarray(found.birch)
    symmetric = 0.5 * (birch + np.transpose(birch, (2, 3, 0, 1)))
    theirs = affine + rest
    theirs = 0.5 * (theirs + np.transpose(theirs, (2, 3, 0, 1)))
    assert relative(symmetric, theirs) < 1e-8
