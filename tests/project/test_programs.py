"""How many programs jax compiles: few for a first answer, and hardly any for a similar system."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
from conftest import LONG, quick

# Each script prints the programs that each of its calls compiled, by name, in a process of its own:
# here, earlier tests have compiled some of them.
COUNTED = """
import collections, json
import jax
import numpy as np
import mdsens as ms

ms.enable_x64()
seen = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **more: seen.append(more["fun_name"].removeprefix("jit(").strip(")"))
    if event == "/jax/core/compile/backend_compile_duration"
    else None
)
counts = []

def counted(call):
    before = len(seen)
    result = call()
    counts.append(collections.Counter(seen[before:]))
    return result

def answer(system, change, **options):
    eq = counted(lambda: ms.minimize(system(), progress=False, throw=False, **options))
    counted(lambda: ms.jvp(eq, change, throw=False))
    counted(lambda: ms.certify(eq, change))
    return eq
"""

EIGHT_CALLS = """
system = counted(lambda: ms.load_system("seed_packing_2d"))
change = {"sigma": [0.0, 1.0]}
eq = answer(lambda: system, change)
r = ms.jvp(eq, change)
counted(lambda: ms.vjp(eq, np.asarray(r.positions)))
counted(lambda: ms.gradient(ms.observables.pressure, eq))
counted(lambda: ms.verify.finite_difference(eq, change))
counted(lambda: ms.elasticity.moduli(eq))
print(json.dumps(counts))
"""

# Seeds and densities: the volume changes by up to 1 % to either side.
SIMILAR = """
for k in range({number}):
    share = 1.0 + 0.02 * ((0.618 * k) % 1.0 - 0.5)
    start = len(seen)
    eq = answer(lambda: ms.load_system({name!r}, seed=k, {box}), {change})
    counts.append(collections.Counter(seen[start:]))
print(json.dumps(counts[3::4]))
"""
SYSTEMS: dict[str, tuple[str, str]] = {
    "seed_packing_2d": (
        'box={"packing_fraction": 0.98 * share, "follows": "parameters"}',
        '{"sigma": [0.0, 1.0]}',
    ),
    "bidisperse_3d": ('box={"packing_fraction": 0.72 * share}', '{"sigma": [0.0, 1.0]}'),
    "binary_lj_glass": ('box={"number_density": 1.2 * share}', '{"sigma": np.ones((2, 2))}'),
    "silicon_vacancy": (
        'positions={"constant": 5.430949778405 * share ** (1.0 / 3.0)}',
        '{"sigma": 1.0}',
    ),
}

CELLS = """
def relaxed(system, cell):
    return counted(lambda: ms.minimize(system, cell=cell, progress=False, throw=False))

packing = ms.load_system("seed_packing_2d", count=64)
for pressure in (0.02, 0.021):
    assert relaxed(packing, ms.relaxation.AtPressure(pressure)).status in (0, 1)
print(json.dumps(counts))
"""

WIRE = """
from ase.build import bulk

atoms = bulk("Cu", "fcc", a=3.615, cubic=True).repeat((1, 1, 4))
places = atoms.positions + 0.05 * np.random.default_rng(0).normal(size=(16, 3))
copper = ms.load_system("copper_gupta")
box = np.diag([30.0, 30.0, atoms.cell[2, 2]])
axes = (False, False, True)
wire = ms.System.create(places, box, copper.potential, dict(copper.params), periodic=axes)
for pull in (0.005, 0.0051):
    cell = ms.relaxation.AtStress(np.diag([0.0, 0.0, pull]))
    counted(lambda: ms.minimize(wire, cell=cell, progress=False))
print(json.dumps(counts))
"""


PLUS_ONE = """
@jax.jit
def plus_one(x):
    return x + 1.0

for x in (1.0, 2.0, np.ones(3)):
    counted(lambda: plus_one(x))
print(json.dumps(counts))
"""


def programs(script: str) -> list[Counter[str]]:
    """The programs that each call of a script compiles, by name."""
    variables = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-c", COUNTED + script]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    assert not done.returncode, done.stderr
    return [Counter(counts) for counts in json.loads(done.stdout)]


def test_a_first_answer_takes_few_programs():
    calls = programs(EIGHT_CALLS)
    total = sum(counts.total() for counts in calls)
    assert len(calls) == 8
    # one of each kind at least: a count of zero would mean that nothing is counted
    assert all(sum(c[name] for c in calls) == 1 for name in ("steps_on_list", "solid", "search"))
    assert total <= 40, calls


@pytest.mark.parametrize("name", quick(SYSTEMS, "seed_packing_2d"))
def test_similar_systems_share_their_programs(name: str):
    box, change = SYSTEMS[name]
    each = programs(SIMILAR.format(number=20, name=name, box=box, change=change))
    first = each[0]
    further: Counter[str] = sum(each[1:], Counter())
    # of the relaxation: one program, or the second of two in small systems
    steps = first["steps_on_list"] + first["_advance_at_once"]
    assert len(each) == 20 and steps == 1
    # Two programs of a kind in the first one, such as right-hand sides of two forms, may be two in
    # a further one.
    assert all(count <= max(first[kind], 1) for kind, count in further.items()), further


def test_a_relaxed_cell_is_compiled_once():
    first, second = programs(CELLS)
    assert first["steps_on_list"] == 1 and first.total() <= 45, first
    assert not second, second


@LONG
def test_a_wire_that_is_pulled_is_not_compiled_at_each_step():
    """Its cell becomes shorter than twice the range, and then has images: two kinds of lists."""
    first, second = programs(WIRE)
    assert 1 <= first["steps_on_list"] <= 2 and first.total() <= 80, first
    assert second["steps_on_list"] == 0 and second.total() <= 10, second


def test_what_is_counted_is_what_jax_compiles():
    assert [dict(counts) for counts in programs(PLUS_ONE)] == [{"plus_one": 1}, {}, {"plus_one": 1}]
