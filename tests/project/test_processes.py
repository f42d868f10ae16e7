"""Systems, results and potentials in other processes and threads:
the same to the last bit, or an error that says what to do.

One child process does all the checks that need one.
It must not import conftest, which sets x64: neither does this.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import inspect
import multiprocessing
import pickle
import pkgutil
import re
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mdsens as ms
from mdsens._util.portable import Portable
from mdsens._util.tables import Shown
from mdsens.design import State, Step
from mdsens.elasticity import Isotropic
from mdsens.implicit.linear.eigen import Spectrum
from mdsens.mechanics.contact_changes import Crossing
from mdsens.model.box import BoxFunction
from mdsens.relaxation import jax_md as adapter

PLACES = [
    [0.1, 0.2],
    [0.9, 0.3],
    [0.4, 1.0],
    [1.5, 1.6],
    [1.2, 0.9],
    [1.9, 0.2],
    [0.1, 1.7],
    [1.0, 1.9],
]
SPECIES = [0, 1] * 4
PARAMS = {"sigma": [1.0, 0.9], "epsilon": 1.0, "alpha": 2.0}
FORCE = np.cos(np.arange(16.0) ** 2).reshape(8, 2)


def discs(dtype: Any = float, box: Any = 2.2) -> ms.System:
    return ms.System.create(
        np.array(PLACES, dtype), box, ms.potentials.soft_sphere(), PARAMS, SPECIES
    )


@functools.cache
def relaxed() -> ms.Equilibrium:
    return ms.minimize(discs())


def bits(tree: Any) -> list[tuple[Any, ...]]:
    """The leaves to the last bit, with what decides how they are computed with;
    of objects the kind.
    """
    found = []
    for leaf in jax.tree.leaves(tree):
        array = np.asarray(leaf)
        number = (str(array.dtype), getattr(leaf, "weak_type", None), array.shape, array.tobytes())
        found.append((type(leaf).__name__,) if array.dtype == object else number)
    return found


# ── every record that holds arrays ──


def classes() -> Iterator[type]:
    """The dataclasses of the package."""
    for found in pkgutil.walk_packages(ms.__path__, "mdsens."):
        if not found.name.endswith("__main__"):
            module = importlib.import_module(found.name)
            for kind in vars(module).values():
                if (
                    inspect.isclass(kind)
                    and kind.__module__ == found.name
                    and dataclasses.is_dataclass(kind)
                    and not inspect.isabstract(kind)
                ):
                    yield kind


def filled(kind: Any, value: Any) -> Any:
    """One with ``value`` in every field, but for static ones, which have their own name."""
    made = object.__new__(kind)
    for f in dataclasses.fields(kind):
        object.__setattr__(made, f.name, f.name if f.metadata.get("static") else value)
    return made


def holds_arrays(kind: Any) -> bool:
    """Whether it says so of a field, or is a pytree with leaves."""
    named = [
        f.name
        for f in dataclasses.fields(kind)
        # ArrayLike is what a user gives, which such a record stores as tuples
        if re.search("Array(?!Like)|PyTree", str(f.type)) and "Callable" not in str(f.type)
    ]
    leaves = jax.tree.leaves(filled(kind, 0.0))
    return bool(named) or (bool(leaves) and not dataclasses.is_dataclass(leaves[0]))


# Sums hold potentials, which are records;
# the others live within one call, and hold functions or tracers.
WITHIN = {"SumPotential", "PairLengths", "_Range", "_Line", "Operator", "Held"}
KINDS = [kind for kind in classes() if kind.__name__ not in WITHIN and holds_arrays(kind)]


def stand_ins(value: Any) -> dict[str, Any]:
    """Of every kind, one whose arrays are in its fields and one where they are deeper."""
    made = {kind.__name__: filled(kind, value) for kind in KINDS}
    deeper = {
        f"{kind.__name__} of trees": filled(kind, {"a": [value, (value, None)]}) for kind in KINDS
    }
    tuples = {kind.__name__: kind(*[value] * 4) for kind in (Isotropic, Crossing)}
    return {**made, **deeper, **tuples}


def of_the_host() -> dict[str, Any]:
    """Results whose arrays are numpy's: a certificate, a spectrum,
    the steps and the state of a design, …
    """
    kinds = [kind for kind in classes() if issubclass(kind, Shown) and kind not in KINDS] + [
        Step,
        State,
        Spectrum,
    ]
    return {kind.__name__: filled(kind, np.arange(3.0) / 3.0) for kind in kinds}


def parts(record: Any) -> list[Any]:
    return list(record if isinstance(record, tuple) else vars(record).values())


def test_every_record_of_arrays_is_portable():
    assert {kind.__name__ for kind in KINDS} >= {
        "System",
        "Equilibrium",
        "Displacement",
        "Moduli",
        "DerivativeCertificate",
        "Barrier",
    }
    assert [kind.__name__ for kind in KINDS if not issubclass(kind, Portable)] == []


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_records_are_copied_to_the_last_bit(copied):
    for record in [*stand_ins(jnp.arange(3.0) / 3.0).values(), *of_the_host().values()]:
        again = copied(record)
        assert type(again) is type(record)
        assert bits(parts(again)) == bits(parts(record))


LAWS = {
    **{
        name: getattr(ms.potentials, name)()
        for name in ("soft_sphere", "lennard_jones", "morse", "harmonic_morse")
    },
    "harmonic_bonds": ms.potentials.harmonic_bonds([[0, 1], [1, 2]]),
    "induced_dipoles": ms.potentials.induced_dipoles(),
    "charge_equilibration": ms.potentials.charge_equilibration(1.0),
    "sum": (
        ms.potentials.soft_sphere()
        + ms.potentials.morse().renamed({"sigma": "well", "epsilon": "depth", "alpha": "width"})
    ),
    "mixed": ms.potentials.from_pair(
        np.add, ("epsilon",), 2.5, mixing={"epsilon": ms.potentials.geometric}
    ),
}


@pytest.mark.parametrize("name", LAWS)
def test_a_potential_of_the_catalogue_is_the_same_potential_again(name):
    potential = LAWS[name]
    for again in (pickle.loads(pickle.dumps(potential)), copy.deepcopy(potential)):
        # so that nothing compiles anew
        assert again == potential and hash(again) == hash(potential)


def test_errors_keep_what_they_carry():
    for kind in (
        ms.MdsensError,
        ms.InputError,
        ms.PrecisionError,
        ms.TooLargeError,
        ms.UnsupportedVersionError,
    ):
        again = pickle.loads(pickle.dumps(kind("what and why")))
        assert type(again) is kind and str(again) == "what and why"
    for kind in (ms.ConvergenceError, ms.InterruptionError):
        error = kind("what and why", ms.Status.FLOPPY, discs())
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is kind
        # the message ends with where more is said, once
        message = "what and why ms.explain('FLOPPY') tells more."
        assert (str(error), str(again), again.status) == (message, message, ms.Status.FLOPPY)
        assert bits(again.result) == bits(error.result)


def test_a_linearization_is_copied_without_its_factor_and_makes_it_anew():
    lin = ms.linearize(relaxed())
    first = ms.response(lin, FORCE).value
    assert lin.factor is not None and "factor" in vars(lin.factor)
    for again in (pickle.loads(pickle.dumps(lin)), copy.copy(lin), copy.deepcopy(lin)):
        assert bits(ms.response(again, FORCE).value) == bits(first)


# ── another process ──


def lambdas() -> ms.System:
    """A potential, a mixing rule and a box out of functions that no other process can import."""
    stiffness = jnp.asarray(1.0 / 3.0)
    phi = ms.potentials.switched(lambda r, a: stiffness * a * jnp.exp(-r), 0.8, 1.0)
    pair = ms.potentials.from_pair(phi, ("a",), 1.0, mixing={"a": lambda a, b: jnp.maximum(a, b)})
    field = ms.potentials.from_energy(lambda R, p, d: p["k"] * jnp.sum(R**2), ("k",))
    return ms.System.create(
        PLACES,
        lambda p: jnp.eye(2) * (2.2 + p["k"]),
        pair + field,
        {"a": [1.0, 2.0], "k": 0.1},
        SPECIES,
    )


def laws_of_lambdas() -> dict[str, Any]:
    """Functions that hold arrays in each way that a function can."""
    table = jnp.asarray([1.0 / 3.0])
    phi = ms.potentials.switched(lambda r, a: table[0] * r, 0.8, 1.0)

    def again(r: Any, a: Any, depth: int = 0) -> Any:
        return again(r, a, 1) if depth else table[0] * r

    return {
        "switched": ms.potentials.from_pair(phi, ("a",), 1.0),
        "recursive": ms.potentials.from_pair(again, ("a",)),
        "breakpoints": ms.potentials.from_pair(np.add, ("a",), 1.0, lambda a: (table[0],)),
        "default": ms.potentials.from_energy(lambda R, p, d, table=table: table[0], ()),
        "partial": BoxFunction(functools.partial(lambda table, p: table[0] * jnp.eye(2), table)),
        "sum": (
            ms.potentials.soft_sphere() + ms.potentials.from_energy(lambda R, p, d: table[0], ())
        ),
    }


def messages(packed: dict[str, bytes]) -> dict[str, str]:
    """What becomes of each where it is unpickled: an error, or the types of its arrays."""
    found = {}
    for name, data in packed.items():
        try:
            record = pickle.loads(data)
            kinds = {
                str(leaf.dtype)
                for leaf in jax.tree.leaves(parts(record))
                if isinstance(leaf, jax.Array)
            }
            found[name] = ", ".join(sorted(kinds))
        except ms.PrecisionError as error:
            found[name] = f"PrecisionError: {error}"
    return found


def race(stub: str, late: bool) -> dict[str, Any]:
    """Threads that want the minimizers alone and one that wants all of jax_md, at once or ``late``,
    while the minimizers are being imported; with a jax_md of our own.
    """
    sys.path.insert(0, stub)
    finders, barrier = list(sys.meta_path), threading.Barrier(6)

    def want(k: int) -> Any:
        barrier.wait()
        if k:
            return adapter.jax_md_minimize()
        while late and "jax_md" not in sys.modules:
            time.sleep(1e-3)
        import jax_md

        return jax_md

    with ThreadPoolExecutor(6) as pool:
        package, *modules = pool.map(want, range(6))
    whole, copies = getattr(package, "whole", False), len({id(module) for module in modules})
    found = {"whole": whole, "copies": copies, "finders left": len(sys.meta_path) - len(finders)}
    adapter._imported.cache_clear()
    sys.path.remove(stub)
    for name in [name for name in sys.modules if name.split(".")[0] == "jax_md"]:
        del sys.modules[name]
    importlib.invalidate_caches()
    return found


def in_a_fork(system: ms.System, pipe: Any) -> None:
    try:
        ms.minimize(system)
        pipe.send("relaxed")
    except ms.MdsensError as error:
        pipe.send(str(error))


def forked(system: ms.System) -> str:
    """What a process forked from this one, in which jax is in use, says."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jax warns as well
        process = context.Process(target=in_a_fork, args=(system, there))
        process.start()
    said = here.recv() if here.poll(20) else "nothing, for 20 s"
    process.kill()
    return said


def child(
    pipe: Any,
    packed: dict[str, bytes],
    host: dict[str, bytes],
    single: bytes,
    by_value: bytes,
    stub: str,
) -> None:
    """In a new process, without x64 and then with it."""
    found: dict[str, Any] = {
        "race": [race(stub, late) for late in (False, True)],
        "without": messages(packed),
        "single": messages({"": single})[""],
    }
    found["host"] = {name: bits(parts(pickle.loads(data))) for name, data in host.items()}
    ms.enable_x64()
    found["with"] = {name: cloudpickle.dumps(pickle.loads(data)) for name, data in packed.items()}
    eq, lin = pickle.loads(packed["eq"]), pickle.loads(packed["lin"])
    found["energy"] = ms.observables.energy(eq.system)
    found["response"] = ms.response(lin, FORCE)
    functions = cloudpickle.loads(by_value)
    found["energy by value"] = ms.observables.energy(functions)
    found["box by value"] = functions.box
    try:
        ms.implicit.raise_for_status(ms.Status.MAX_STEPS_REACHED, "made here", eq)
    except ms.ConvergenceError as error:
        found["error"] = error
    found["fork"] = forked(eq.system)
    pipe.send(found)


@functools.cache
def sent() -> dict[str, Any]:
    """What goes to the child: records made up and real ones."""
    eq = relaxed()
    lin = ms.linearize(eq)
    real = {"system": discs(), "packing": discs(box=ms.PackingFraction(0.9)), "eq": eq, "lin": lin}
    return {
        **stand_ins(jnp.arange(3.0) / 3.0),
        **real,
        "response": ms.response(lin, FORCE),
        **laws_of_lambdas(),
    }


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("stub")
    package = Path(folder, "jax_md")
    package.mkdir()
    package.joinpath("__init__.py").write_text(
        "import time\nfrom jax_md import minimize\ntime.sleep(0.1)\nwhole = True\n"
    )
    package.joinpath("minimize.py").write_text("import time\nimport jax_md\ntime.sleep(0.1)\n")
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    packed = {name: cloudpickle.dumps(record) for name, record in sent().items()}
    host = {name: pickle.dumps(record) for name, record in of_the_host().items()}
    single, by_value = pickle.dumps(discs(np.float32)), cloudpickle.dumps(lambdas())
    process = context.Process(
        target=child, args=(there, packed, host, single, by_value, str(folder))
    )
    process.start()
    there.close()
    try:
        return here.recv()  # EOFError where it ends without an answer
    finally:
        process.join(20)


def test_without_x64_double_precision_is_refused_and_never_cut(answers):
    for name, message in answers["without"].items():
        assert message.startswith("PrecisionError: "), (name, message)
        assert "is float64, and this process computes in float32: call ms.enable_x64()" in message
        assert "initializer=ms.enable_x64" in message and "\n" not in message


def test_without_x64_single_precision_arrives(answers):
    assert answers["single"] == "bool, float32, int32"


def test_what_is_of_the_host_keeps_double_precision_anywhere(answers):
    assert {
        "Certificate",
        "Design",
        "DerivativeTest",
        "FeatureResponse",
        "State",
        "Step",
    } <= answers["host"].keys()
    assert answers["host"] == {name: bits(parts(record)) for name, record in of_the_host().items()}


def test_with_x64_every_record_comes_back_to_the_last_bit(answers):
    for name, record in sent().items():
        again = pickle.loads(answers["with"][name])
        assert type(again) is type(record)
        assert bits(parts(again)) == bits(parts(record)), name


def test_another_process_computes_the_same(answers):
    assert bits(answers["energy"]) == bits(ms.observables.energy(relaxed().system))
    assert bits(answers["response"]) == bits(ms.response(relaxed(), FORCE))


def test_functions_travel_by_value(answers):
    system = lambdas()
    assert isinstance(system.boundary, BoxFunction)
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(system)
    assert bits(answers["energy by value"]) == bits(ms.observables.energy(system))
    assert bits(answers["box by value"]) == bits(system.box)


def test_an_error_arrives_with_its_status_and_its_result(answers):
    error = answers["error"]
    assert isinstance(error, ms.ConvergenceError) and error.status is ms.Status.MAX_STEPS_REACHED
    assert isinstance(error.result, ms.Equilibrium) and error.result.positions.dtype == jnp.float64


def test_a_forked_process_says_what_to_do_and_does_not_hang(answers):
    assert 'start processes with multiprocessing.get_context("spawn")' in answers["fork"]


# ── threads ──


def test_threads_that_need_the_minimizers_at_once_get_one_copy(answers):
    assert answers["race"] == 2 * [{"whole": True, "copies": 1, "finders left": 0}]


def test_two_relaxations_at_once_are_as_one_after_the_other():
    systems = [discs(), discs().with_params({"sigma": [1.0, 0.8]})]

    def run(system: ms.System) -> tuple[ms.Equilibrium, ms.Displacement]:
        eq = ms.minimize(system, progress=True)
        return eq, ms.response(eq, FORCE)

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run, systems))
    for (eq, response), (eq_alone, alone) in zip(together, map(run, systems), strict=True):
        assert bits(eq.system) == bits(eq_alone.system) and int(eq.steps) == int(eq_alone.steps)
        assert bits(response) == bits(alone)


def test_threads_share_a_linearization():
    lin = ms.linearize(relaxed())
    forces = [np.roll(FORCE, k) for k in range(12)]

    def one(force: np.ndarray) -> np.ndarray:
        return np.asarray(ms.response(lin, force).value)

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(one, forces))
    assert all(np.array_equal(a, one(force)) for a, force in zip(together, forces, strict=True))
