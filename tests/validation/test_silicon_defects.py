"""A vacancy and interstitials of silicon against LAMMPS: the minimum from the same start, and how
it moves as a parameter changes. The stored numbers are those of ``silicon_defects.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import silicon_defects
from conftest import quick

import mdsens as ms

STORED = json.loads(Path(silicon_defects.__file__).with_suffix(".json").read_text())
MAKERS = {"sw": ms.potentials.stillinger_weber, "tersoff": ms.potentials.tersoff}
CASES = [(style, defect) for style in MAKERS for defect in silicon_defects.DEFECTS]


@pytest.mark.parametrize("case", quick(CASES, ("sw", "hexagonal")), ids=" ".join)
def test_minimum_and_derivatives_are_those_of_lammps(case: tuple[str, str]) -> None:
    style, defect = case
    stored = STORED[style][defect]
    params, spacing, names = silicon_defects.POTENTIALS[style]
    places = silicon_defects.start(defect, spacing)
    eq = ms.minimize(ms.System.create(places, 2 * spacing, MAKERS[style](), params))
    assert ms.Status(int(eq.status)) is ms.Status.CONVERGED
    assert ms.certify(eq).status.good
    energy = float(ms.observables.energy(eq.system))
    assert energy == pytest.approx(stored["energy"], rel=1e-13)
    there = silicon_defects.central(np.asarray(eq.positions))[::8]
    np.testing.assert_allclose(there, stored["positions"], atol=1e-9)
    lin = ms.linearize(eq)
    slope = ms.gradient(ms.observables.energy, lin).value
    for name in names:
        expected = stored["derivatives"][name]
        # Forces of 1e-12 are 1e-9 of a derivative by a step of a thousandth: the vacancy of
        # Stillinger and Weber has all its angles right, and hardly moves with lambda.
        assert slope[name] == pytest.approx(expected["energy"], rel=1e-8, abs=1e-9)
        moved = silicon_defects.central(np.asarray(ms.jvp(lin, {name: 1.0}).value))
        assert np.linalg.norm(moved) == pytest.approx(expected["norm"], rel=1e-6, abs=5e-9)
        components = expected["positions"]
        np.testing.assert_allclose(moved[::8], components, atol=1e-6 * expected["norm"] + 1e-9)
