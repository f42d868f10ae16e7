"""Generated systems: a clear error, a number that dense linear algebra confirms,
or a status that says why not.

    make fuzz                          3,000 cases, and every packing of test_jammed.py
    MDSENS_FUZZ_CASES=500 make fuzz    as many as wanted

The cases are the same in every run. One that fails prints as ``Case(...)``, and
``judge(Case(...))`` repeats it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from bad_inputs import bad_values
from conftest import forget_compiled_code
from hypothesis import HealthCheck, given, settings
from judge import Record, judge, summary
from strategies import LONG_SHAPES, SHAPES, Case, Shape, cases

import mdsens as ms

LONG = "MDSENS_FUZZ_CASES" in os.environ
CASES = int(os.environ.get("MDSENS_FUZZ_CASES", "27"))
# each shape compiles its own
RUN = LONG_SHAPES if LONG else [shape for shape in SHAPES if shape.n in (2, 9)]
TOTAL_SHARE = sum(shape.share for shape in RUN)

ANSWERED = 0.95  # of the solves at stable minima, where what is asked for can be reached


@pytest.mark.parametrize("shape", RUN, ids=lambda shape: shape.name)
def test_no_wrong_number_has_a_good_status(
    shape: Shape, record_property: Callable[[str, object], None]
):
    records: list[Record] = []

    @settings(
        max_examples=max(2, round(CASES * shape.share / TOTAL_SHARE)),
        derandomize=True,
        database=None,
        deadline=None,  # the first case of a shape compiles
        suppress_health_check=list(HealthCheck),  # type: ignore[arg-type]
    )
    @given(case=cases(shape, LONG))
    def holds(case):
        forget_compiled_code()
        record = judge(case)
        records.append(record)
        assert not record.complaints, "\n".join([*record.complaints, str(case)])

    try:
        holds()
    finally:
        record_property("fuzz", [summary(record) for record in records])
    asked = [
        a
        for r in records
        if r.outcome == "stable"
        for a in r.answers
        if a.status.good or a.attainable
    ]
    missed = sum(not a.status.good for a in asked)
    assert missed <= max(1, (1 - ANSWERED) * len(asked)), (
        f"{missed} of {len(asked)} solves at stable minima unanswered"
    )


def test_gmres_takes_no_round_off_for_a_negative_curvature():
    """Asked for more digits than there are, its last vectors lie in the null space,
    where the polynomial is largest.
    """
    shape = Shape(8, 2, "springs", "open")
    record = judge(
        Case(
            shape=shape,
            solver="GMRES",
            seed=60,
            start="rows",
            jitter=1e-6,
            fill=1.2,
            alpha=3.0,
            bond_strain=-0.3,
            rtol=1e-13,
            cotangent="translation",
        )
    )
    assert record.outcome == "stable" and not record.complaints
    assert {answer.status.name for answer in record.answers} <= {
        "CONVERGED",
        "NULL_COMPONENT_DROPPED",
    }


# ── bad input ──


@cache
def discs() -> ms.Equilibrium:
    places = 2.1 * np.random.default_rng(0).random((6, 2))
    params = {"sigma": [1.0, 0.9], "epsilon": 1.0, "alpha": 2.0}
    species = np.arange(6) % 2
    return ms.minimize(ms.System.create(places, 2.1, ms.potentials.soft_sphere(), params, species))


def create(**changes) -> ms.System:
    s = discs().system
    given = {
        "positions": s.positions,
        "box": 2.1,
        "potential": s.potential,
        "params": s.params,
        "species": s.species,
    }
    return ms.System.create(**{**given, **changes})


def params(name: str) -> Callable[[Any], Any]:
    return lambda value: create(params={**discs().params, name: value})


# What the argument's shape is, the call, and what is good there although it is bad elsewhere.
ARGUMENTS: dict[str, tuple[tuple[int, ...], Callable[[Any], Any], set[str]]] = {
    "positions": ((6, 2), lambda v: create(positions=v), set()),
    "box": ((2, 2), lambda v: create(box=v), {"type"}),
    "species": ((6,), lambda v: create(species=v), set()),
    "potential": ((2,), lambda v: create(potential=v), set()),
    "params": ((2,), lambda v: create(params=v), set()),
    "sigma": ((2,), params("sigma"), {"one too many"}),  # a species may be empty
    "epsilon": ((), params("epsilon"), set()),
    "packing fraction": ((), lambda v: create(box=ms.PackingFraction(v)), set()),
    "shape of the cell": ((2, 2), lambda v: create(box=ms.PackingFraction(0.9, v)), set()),
    "what the box function returns": ((2, 2), lambda v: create(box=lambda p: v), set()),
    "system": ((6, 2), lambda v: ms.minimize(v), {"system"}),
    "params of minimize": ((2,), lambda v: ms.minimize(discs().system, v), set()),
    "sigma of minimize": ((2,), lambda v: ms.minimize(discs().system, {"sigma": v}), set()),
    "tolerance": ((), lambda v: ms.minimize(discs().system, tolerance=v), set()),
    "max_steps": (
        (),
        lambda v: ms.minimize(discs().system, max_steps=v),
        {"infinite", "huge integer"},
    ),
    "method": ((), lambda v: ms.minimize(discs().system, method=v), set()),
    "step of a method": ((), lambda v: ms.relaxation.Fire(dt_max=v), {"huge integer"}),
    "minimum": ((6, 2), lambda v: ms.jvp(v, {"epsilon": 1.0}), set()),
    "minimum to linearize": ((6, 2), lambda v: ms.linearize(v), set()),
    "direction": ((2,), lambda v: ms.jvp(discs(), v), set()),
    "change of sigma": ((2,), lambda v: ms.jvp(discs(), {"sigma": v}), set()),
    "change of epsilon": ((), lambda v: ms.jvp(discs(), {"epsilon": v}), set()),
    "cotangent": ((6, 2), lambda v: ms.vjp(discs(), v), set()),
    "force": ((6, 2), lambda v: ms.response(discs(), v), set()),
    "solver": ((), lambda v: ms.vjp(discs(), np.ones((6, 2)), solve=v), set()),
    "observable": ((), lambda v: ms.gradient(v, discs()), {"type"}),
    "wrt": ((), lambda v: ms.jacobian(discs(), v), set()),
    "chunk": ((), lambda v: ms.jacobian(discs(), chunk=v), {"huge integer"}),
    "onset": ((), lambda v: ms.potentials.lennard_jones(onset=v), set()),
    "cutoff": ((), lambda v: ms.potentials.morse(cutoff=v), set()),
    "bonds": ((5, 2), ms.potentials.harmonic_bonds, {"empty", "no rows"}),
    "phi": ((), lambda v: ms.potentials.from_pair(v, ("sigma",), 1.0), {"type"}),
    "names of parameters": (
        (2,),
        lambda v: ms.potentials.from_energy(sum, v),
        {"dict", "generator", "empty", "no rows", "texts"},
    ),
    "energy": ((), lambda v: ms.potentials.from_energy(v, ("sigma",)), {"type"}),
    "systems to stack": ((2,), ms.stack, set()),
}


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_bad_input_is_refused_in_one_line(argument: str):
    shape, call, good_there = ARGUMENTS[argument]
    wrong = []
    for label, value in bad_values(shape).items():
        if label in good_there:
            continue
        try:
            result = call(value)
        except ms.MdsensError as error:
            if not 10 < len(str(error)) < 400 or "\n" in str(error):
                wrong.append(f"{label}: {error}")
        except Exception as error:
            wrong.append(f"{label}: raised {type(error).__name__}: {error}")
        else:
            wrong.append(f"{label}: gave a {type(result).__name__}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", [3, None, ("sigma",), 1.5, b"sigma", "sgima"])
def test_a_name_that_is_none_is_refused(name: Any):
    with pytest.raises(ms.InputError, match="no parameter"):
        create(params={**discs().params, name: 1.0})
    with pytest.raises(ms.InputError, match="no parameter"):
        ms.jvp(discs(), {name: 1.0})
