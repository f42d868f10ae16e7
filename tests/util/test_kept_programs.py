"""Programs that are kept with their signatures: which are, and what serves a later process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mdsens as ms
from mdsens._util import compilation, kept_programs
from mdsens._util.kept_programs import SUFFIX, Keeper, Unkept
from mdsens.mechanics import units
from mdsens.model.neighbors import within

# In a process of its own: the sum of all results, and how often jax traced and compiled.
ANSWER = """
import json, sys
import jax
import numpy as np
import mdsens as ms

ms.enable_x64()
ms.enable_compilation_cache(sys.argv[1])
seen = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **more: seen.append(event.split("/")[-1])
)
eq = ms.minimize(ms.load_system("seed_packing_2d", count=16), progress=False)
r = ms.jvp(eq, {"sigma": [0.0, 1.0]})
# by LAPACK, whose functions jax looks up when it lowers a program
moduli = ms.elasticity.moduli(eq)
numbers = [np.asarray(x).tolist() for x in (eq.positions, r.positions, moduli.bulk)]
print(json.dumps([numbers, seen.count("backend_compile_duration")]))
"""

# A user's potential: the script is changed, and the name of its function stays.
OWN = """
import sys
import jax.numpy as jnp
import mdsens as ms

ms.enable_x64()
ms.enable_compilation_cache(sys.argv[1])

def phi(r, sigma):
    return FACTOR * sigma * jnp.maximum(0.0, 1.0 - r / 3.0) ** 4

potential = ms.potentials.from_pair(phi, ("sigma",), cutoff=3.0, name="own")
positions = [[0.0, 0.0], [1.5, 0.0]]
system = ms.System.create(positions, None, potential, {"sigma": 1.0})
print(float(ms.observables.energy(system)))
"""


def output(script: str, folder: Path) -> str:
    """What a script prints in a process of its own; its argument is the folder."""
    variables = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-c", script, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    assert not done.returncode, done.stderr
    return done.stdout


def test_a_second_process_compiles_nothing_and_gets_the_same_numbers(tmp_path: Path):
    first, compiled_first = json.loads(output(ANSWER, tmp_path))
    kept = sorted(tmp_path.glob(f"*{SUFFIX}"))
    second, compiled_second = json.loads(output(ANSWER, tmp_path))
    assert first == second
    assert compiled_first > 10 and len(kept) > 10
    assert compiled_second == 0
    assert sorted(tmp_path.glob(f"*{SUFFIX}")) == kept
    # a file that was cut off serves no process, and is written anew
    (damaged,) = tmp_path.glob(f"steps_on_list-*{SUFFIX}")
    whole = damaged.stat().st_size
    damaged.write_bytes(damaged.read_bytes()[:1000])
    third, compiled_third = json.loads(output(ANSWER, tmp_path))
    assert third == first and compiled_third == 1
    assert damaged.stat().st_size == pytest.approx(whole, rel=0.05)


def test_a_potential_of_the_user_is_compiled_as_it_is_now(tmp_path: Path):
    energies = [float(output(OWN.replace("FACTOR", f), tmp_path)) for f in ("1.0", "3.0")]
    assert energies == pytest.approx([0.5**4, 3.0 * 0.5**4], rel=1e-14)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder in which this process keeps its programs during a test."""
    monkeypatch.setattr(kept_programs._Folder, "path", tmp_path)
    return tmp_path


def keeper_of(function: Any, static: tuple[str, ...] = ()) -> Keeper:
    return Keeper(function, jax.jit(function, static_argnames=static), static, {})


def add(x: jax.Array, y: Any) -> jax.Array:
    return x + y


def test_functions_outside_of_known_packages_are_left_to_jax(folder: Path):
    with pytest.raises(Unkept):
        keeper_of(add)((1.0, 2.0), {})
    # one that was transformed has the name of another
    raw = units.force_scale.__wrapped__  # type: ignore[attr-defined]
    assert keeper_of(raw)._order == ("system", "length", "stiffness", "left")
    assert keeper_of(jax.vmap(raw))._order is None
    assert keeper_of(lambda x: x)._order is None
    for phi in (lambda r, sigma: r, add):
        with pytest.raises(Unkept):
            kept_programs._pickled(ms.potentials.from_pair(phi, ("y",), cutoff=1.0))
    assert kept_programs._pickled(ms.potentials.lennard_jones())
    assert not list(folder.iterdir())


def test_each_setting_has_its_own_program(folder: Path):
    keep = keeper_of(within)
    R = np.zeros((3, 2))
    for call, want in (
        (lambda: keep((R, R + 1.0, 2.0), {}), True),
        (lambda: keep((R, R + 1.0, np.float32(2.0)), {}), True),  # another type
        (lambda: keep((R[:2], R[:2] + 1.0, 2.0), {}), True),  # another shape
        (lambda: keep((R, R + 1.0), {"distance": 2.0}), True),  # another tree
        (lambda: keep((R, None, 2.0), {}), True),
    ):
        before = len(list(folder.iterdir()))
        assert bool(call()) is bool(call()) is want
        assert len(list(folder.iterdir())) == before + 1
    with jax.default_matmul_precision("float32"):
        assert keep((R, R + 1.0, 2.0), {})
    assert len(list(folder.iterdir())) == before + 2
    # another process, as it were: the same program for other numbers
    again = keeper_of(within)
    assert not again((R, R + 1.0, 1.0), {})
    assert len(list(folder.iterdir())) == before + 2
    with jax.debug_nans(True), pytest.raises(Unkept):
        keeper_of(within)((R, R + 1.0, 2.0), {})


def test_programs_that_call_this_process_are_not_kept():
    def call(x: jax.Array) -> jax.Array:
        return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    def looped(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 3, lambda _, y: jax.jit(call)(y), x)

    def without(x: jax.Array) -> jax.Array:
        return jax.lax.cond(x > 0, jnp.sin, lambda y: jax.lax.fori_loop(0, 3, add, y), x)

    programs = [jax.make_jaxpr(f)(1.0).jaxpr for f in (call, looped, without)]
    assert [kept_programs._calls_process(p) for p in programs] == [True, True, False]


def test_arguments_that_jax_refuses_are_refused_by_jax(folder: Path):
    call = compilation.compiled(within)
    with pytest.raises(TypeError, match="abstract array"):
        call("text", None, 1.0)
    assert not list(folder.iterdir())
