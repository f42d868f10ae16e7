"""What the package says of a generated case, held against the truth."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from oracle import Oracle, observable_of, slopes_of, strongest_pair, true_force
from strategies import EPS, SOLVERS, Case, inputs

import mdsens as ms
from mdsens.mechanics.units import round_off


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one door said: its status, and how far its value is from the oracle's."""

    door: str
    solver: str
    status: ms.Status
    error: float = np.nan
    allowed: float = np.nan
    attainable: bool = (
        True  # what was asked of the solver is within what the relaxation and round-off leave
    )


@dataclasses.dataclass
class Record:
    """What became of a case; ``complaints`` is empty where all is well."""

    case: Case
    outcome: str = ""  # "refused", "unconverged", or the oracle's state
    message: str = ""
    condition: float = np.inf
    answers: list[Answer] = dataclasses.field(default_factory=list)
    complaints: list[str] = dataclasses.field(default_factory=list)


def attempt(record: Record, what: str, call: Callable[[], Any]) -> Any:
    """The call's result; None where it was refused in words or failed, as the record says."""
    try:
        return call()
    except ms.MdsensError as error:
        text = str(error)
        if "\n" in text or not text:
            record.complaints.append(f"{what}: the message is not one line: {text!r}")
        record.outcome, record.message = "refused", f"{what}: {text}"
    except Exception as error:
        record.outcome = "raw error"
        record.complaints.append(f"{what}: raised {type(error).__name__}: {str(error)[:300]}")
    return None


def _finite(tree: Any) -> bool:
    return all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(tree))


def judge(case: Case, max_steps: int = 3000) -> Record:
    """Build, relax and differentiate a case, and say what is wrong with any of it."""
    record = Record(case)
    given = inputs(case)
    system = attempt(
        record,
        "create",
        lambda: ms.System.create(
            given.positions, given.box, given.potential, given.params, given.species
        ),
    )
    if system is None:
        return record
    unit, n, d = 10.0 ** (case.energy - case.length), system.n, system.dimension
    how: dict[str, Any] = {"tolerance": None if case.tolerance is None else case.tolerance * unit}
    if case.pressure is not None:
        how["pressure"] = case.pressure * 10.0 ** (case.energy - d * case.length)
        max_steps = 20 * max_steps
    eq = attempt(
        record, "minimize", lambda: ms.minimize(system, max_steps=max_steps, throw=False, **how)
    )
    if eq is None:
        return record
    status = ms.Status(int(eq.status))
    if status.good:
        largest, reach = true_force(eq.system), max(float(eq.tolerance), float(eq.force_floor))
        if not (_finite(eq.positions) and largest <= 1.01 * reach + float(round_off(eq.system))):
            record.complaints.append(
                f"minimize: {status.name} at max_force {float(eq.max_force):.2e}, but the force is"
                f" {largest:.2e}"
            )
        if (
            case.tolerance is None
            and not largest <= 1e-3 * strongest_pair(eq.system)
            and n * d < 1000
        ):
            # a force that stands at round-off is that of nothing that is held
            if largest > 2.0 * float(eq.force_floor):
                record.complaints.append(
                    f"minimize: {status.name}, but the force left {largest:.2e} is a pair's"
                )
    record.outcome = "unconverged"
    oracle = None
    if status.good and not record.complaints:
        oracle = Oracle(eq)
        record.outcome, record.condition = oracle.state, oracle.condition
        if oracle.state == "stable" and oracle.null_space_off > 1e-6:
            record.complaints.append(
                f"linearize: its null space is off by {oracle.null_space_off:.1e}"
            )
    if oracle is not None:
        _network(record, eq, oracle)
    if case.pressure is None:
        _doors(record, eq, oracle)
        _certified(record, eq, oracle)
    _elastic(record, eq, oracle)
    return record


def _settled(oracle: Oracle) -> bool:
    """Whether the sign of the lowest eigenvalue is beyond doubt,
    of round-off and of what the force left can do.
    """
    return bool(
        oracle.values.size and abs(oracle.values[0]) > max(1e-8 * oracle.largest, oracle.doubtful)
    )


def _network(record: Record, eq: ms.Equilibrium, oracle: Oracle) -> None:
    """A saddle is not where a relaxation ends, and what carries force is no rattler."""
    if oracle.state == "saddle" and _settled(oracle) and not oracle.touching:
        record.complaints.append(
            f"minimize: {ms.Status(int(eq.status)).name} at a saddle, lowest {oracle.values[0]:.2e}"
        )
    if oracle.carried.max(initial=0.0) <= 0:
        return
    between_bounds = np.flatnonzero(
        oracle.rattlers & (oracle.carried > 1e-3 * oracle.carried.max())
    )
    if between_bounds.size and oracle.carried.max() > 1e3 * float(eq.max_force):
        k = int(between_bounds[0])
        record.complaints.append(
            f"linearize: particle {k} is a rattler that carries a force of {oracle.carried[k]:.2e}"
        )


def _elastic(record: Record, eq: ms.Equilibrium, oracle: Oracle | None) -> None:
    """Moduli that are those of dense linear algebra, or a status."""
    if eq.system.box is None or not (record.case.pressure is not None or record.case.seed % 4 == 0):
        return
    outcome = record.outcome
    m = attempt(record, "moduli", lambda: ms.elasticity.moduli(eq, throw=False))
    record.outcome = outcome
    if m is None:
        return
    status = ms.Status(int(np.max(np.asarray(m.stats.status))))
    if not status.good:
        return
    if outcome in ("unconverged", "unjammed", "saddle"):
        if outcome != "saddle" or (oracle is not None and _settled(oracle)):
            record.complaints.append(f"moduli: {status.name} on an {outcome} minimum")
        return
    assert oracle is not None
    tensor = np.asarray(m.tensor)
    got = [float(x) for x in (m.bulk, m.shear, m.poisson)]
    if not (np.isfinite(tensor).all() and np.isfinite(got).all()):
        record.complaints.append(f"moduli: {status.name} with values that are not finite")
        return
    d = oracle.d
    if not (got[0] > 0 and got[1] > 0 and -1.0 <= got[2] <= (1.0 if d == 2 else 0.5)):
        record.complaints.append(
            f"moduli: {status.name} with bulk {got[0]:.3g}, shear {got[1]:.3g}, nu {got[2]:.3g}"
        )
    if oracle.state == "stable":
        want = oracle.moduli()
        off = np.abs(tensor - want).max() / max(
            np.abs(want).max(), 1e-9 * np.abs(np.asarray(m.affine)).max()
        )
        if not off <= 1e-6 + 100 * EPS * oracle.condition:
            record.complaints.append(
                f"moduli: {status.name}, but off by {off:.1e} (condition {oracle.condition:.1e})"
            )


def _certified(record: Record, eq: ms.Equilibrium, oracle: Oracle | None) -> None:
    """The certificate names the oracle's state, and its figures are the oracle's."""
    c = attempt(record, "certify", lambda: ms.certify(eq))
    if c is None:
        return
    named = {status for status, _ in c.findings}
    if record.outcome == "unconverged" and c.status.good:
        record.complaints.append(f"certify: {c.status.name} on an unconverged minimum")
    # it says itself so
    if oracle is None or {ms.Status.CONTACTS_UNSETTLED, ms.Status.STIFFNESS_UNSETTLED} & named:
        return
    expected = {
        "saddle": ms.Status.INDEFINITE,
        "floppy": ms.Status.FLOPPY,
        "unjammed": ms.Status.UNJAMMED,
    }
    # a saddle can have modes of no stiffness beside
    also = {ms.Status.FLOPPY} if oracle.state == "saddle" else set()
    wanted = {expected[oracle.state]} if oracle.state in expected else set()
    if not _on_edge(oracle) and (named - also) & set(expected.values()) != wanted:
        said = ", ".join(s.name for s in named) or "nothing against it"
        record.complaints.append(f"certify: {said} at a {oracle.state} configuration")
    if oracle.state == "stable" and not _on_edge(oracle):
        off = abs(c.stiffness_min - oracle.values[0])
        if off > 1e-6 * abs(oracle.values[0]) + 100 * EPS * oracle.largest:
            record.complaints.append(
                f"certify: lambda_min {c.stiffness_min:.8g}, not {oracle.values[0]:.8g}"
            )


def _on_edge(oracle: Oracle) -> bool:
    """An eigenvalue stands so near to what counts as zero that round-off decides."""
    if not oracle.values.size or not oracle.largest:
        return False
    scaled = np.abs(oracle.values / oracle.largest)
    return bool(np.any((scaled > 1e-14) & (scaled < 1e-10)))


def _direction(case: Case, eq: ms.Equilibrium, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A random change of every parameter or of one, in proportion to its size."""
    names = list(eq.params)
    chosen = names if case.seed % 3 == 0 else [names[case.seed % len(names)]]
    found = {}
    for k in chosen:
        value = np.asarray(eq.params[k])
        change = np.abs(value).max() * rng.standard_normal(value.shape) * np.ones(())
        # entries (a, b) and (b, a) are one number of a pair of species
        paired = getattr(case.shape, k, "") == "matrix"
        found[k] = change + change.T if paired else change
    return found


def _cotangent(
    case: Case, n: int, d: int, loose: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    if case.cotangent == "zero":
        return np.zeros((n, d))
    if case.cotangent == "translation":
        return np.ones((n, d))
    w = rng.standard_normal((n, d))
    if case.cotangent == "one particle":  # a rattler where there is one
        chosen = int(np.argmax(loose)) if loose.any() else case.seed % n
        w[np.arange(n) != chosen] = 0.0
    return w


def _doors(record: Record, eq: ms.Equilibrium, oracle: Oracle | None) -> None:
    case = record.case
    rng = np.random.default_rng(case.seed + 1)
    n, d = eq.system.n, eq.system.dimension
    solve = SOLVERS[case.solver](rtol=case.rtol)
    dparams = _direction(case, eq, rng)
    loose = np.zeros(n, bool) if oracle is None else oracle.rattlers
    w = _cotangent(case, n, d, loose, rng)
    calls: dict[str, Any] = {
        "jvp": lambda **kw: ms.jvp(eq, dparams, solve=solve, **kw),
        "vjp": lambda **kw: ms.vjp(eq, w, solve=solve, **kw),
    }
    # one of the two, because each compiles anew
    name = "energy" if eq.system.box is None else "pressure"
    observable = getattr(ms.observables, name)
    calls[f"gradient of {name}"] = lambda **kw: ms.gradient(observable, eq, solve=solve, **kw)
    for door, call in calls.items():
        outcome = record.outcome
        result = attempt(record, door, lambda call=call: call(throw=False))
        if result is None:
            if record.outcome == "refused":
                record.complaints.append(f"{door}: refused a sound input: {record.message}")
            continue
        status = result.status
        if outcome in ("unconverged", "unjammed") and status.good:
            record.complaints.append(f"{door}: {status.name} on an {outcome} minimum")
        if (
            outcome == "saddle"
            and status.good
            and oracle is not None
            and _settled(oracle)
            and _asks(result)
        ):
            record.complaints.append(f"{door}: {status.name} at a saddle")
        if not status.good:
            within = oracle is None or case.rtol >= oracle.attainable(door, dparams, w)
            record.answers.append(Answer(door, case.solver, status, attainable=within))
            _must_raise(record, door, call)
            continue
        if not _finite((result.value, getattr(result, "nonaffine", None))):
            record.complaints.append(f"{door}: {status.name} with a value that is not finite")
            continue
        error, allowed = np.nan, np.nan
        if oracle is not None and oracle.state in ("stable", "floppy", "saddle", "marginal"):
            error, allowed = _compare(oracle, door, result, dparams, w)
            if oracle.state == "stable" and not error <= allowed:
                record.complaints.append(
                    f"{door} by {case.solver}: {status.name}, residual"
                    f" {float(np.max(result.stats.residual)):.1e}, but off by {error:.1e} (allowed"
                    f" {allowed:.1e}, condition {oracle.condition:.1e})"
                )
        record.answers.append(Answer(door, case.solver, status, error, allowed))


def _asks(result: Any) -> bool:
    """Whether a derivative was more than the zero of a right-hand side that is none."""
    return float(np.max(np.asarray(result.stats.iterations), initial=0)) > 0


def _must_raise(record: Record, door: str, call: Any) -> None:
    try:
        call(throw=True)
    except ms.ConvergenceError as error:
        if "\n" in str(error):
            record.complaints.append(f"{door}: the message is not one line: {error}")
        return
    except Exception as error:
        record.complaints.append(f"{door}: raised {type(error).__name__}: {error}")
        return
    record.complaints.append(f"{door}: its status is bad and it does not raise")


def _compare(
    oracle: Oracle, door: str, result: Any, dparams: dict[str, np.ndarray], w: np.ndarray
) -> tuple[float, float]:
    """The worst (error, what is allowed), both relative to the size of the oracle's value."""
    residual = float(np.max(result.stats.residual))
    if door == "jvp":
        b = oracle.right_hand_side(door, dparams, w)
        x = oracle.solve(b)
        noise = (
            sum(oracle.natural(k) * np.linalg.norm(dp) for k, dp in dparams.items())
            / oracle.softest
        )
        amplified = residual * np.linalg.norm(oracle.off_null(b)) / oracle.softest
        rest = oracle.off_null(x - oracle.affine(dparams).ravel())
        size = np.linalg.norm(x)
        return max(
            oracle.verdict(np.ravel(result.value) - x, size, noise, amplified),
            oracle.verdict(
                np.ravel(result.nonaffine) - rest, size + np.linalg.norm(rest), noise, amplified
            ),
            key=_excess,
        )
    slope, direct = w, {k: np.zeros(np.shape(v)) for k, v in oracle.system.params.items()}
    if door != "vjp":
        slope, direct = slopes_of(observable_of(door), oracle.system)
    y = oracle.solve(np.asarray(slope))
    most = np.linalg.norm(slope) / oracle.softest  # the largest that a solution can be
    found = []
    for k, given in direct.items():
        mixed, given = oracle.mixed[k], np.asarray(given)
        off = np.asarray(result.value[k]) - (given - (mixed.T @ y).reshape(given.shape))
        size = np.linalg.norm(given) + np.linalg.norm(mixed) * np.linalg.norm(y)
        noise = (
            oracle.natural(k) * np.linalg.norm(y)
            + np.linalg.norm(mixed) * most
            + np.linalg.norm(given)
        )
        # its parts may all be round-off, as by the lengths of pairs at rest
        if door == "gradient of energy":
            noise += oracle.natural(k) * oracle.extent
        amplified = (
            residual
            * np.linalg.norm(mixed)
            * np.linalg.norm(oracle.off_null(np.asarray(slope)))
            / oracle.softest
        )
        found.append(oracle.verdict(off, size, noise, amplified))
    return max(found, key=_excess)


def _excess(pair: tuple[float, float]) -> float:
    return pair[0] / pair[1]


def summary(record: Record) -> dict[str, Any]:
    """What the figures need of a record, in plain types that cross from one process to another."""
    answers = [
        [a.solver, a.status.good, a.attainable, float(a.error), float(a.error) > float(a.allowed)]
        for a in record.answers
    ]
    return {"outcome": record.outcome, "answers": answers, "failed": bool(record.complaints)}


def figures(found: list[dict[str, Any]]) -> Iterator[str]:
    """Lines about all records of a run."""
    count = Counter(record["outcome"] for record in found)
    yield f"{len(found):,} cases: " + ", ".join(
        f"{k:,} {outcome}" for outcome, k in count.most_common()
    )
    yield f"{sum(record['failed'] for record in found):,} with something wrong"
    yield ""
    yield (
        "solver     stable, answered   beyond reach   worst error   "
        "saddles with a good status   floppy ones"
    )
    for solver in (*SOLVERS, ""):

        def answers(outcome: str, solver: str = solver) -> list[Any]:
            return [
                a
                for r in found
                if r["outcome"] == outcome
                for a in r["answers"]
                if solver in ("", a[0])
            ]

        stable = answers("stable")
        good, beyond = [a for a in stable if a[1]], sum(not a[1] and not a[2] for a in stable)
        saddles, floppy = ([a[1] for a in answers(state)] for state in ("saddle", "floppy"))
        yield (
            f"{solver or 'all':<11}{f'{len(good):,} of {len(stable) - beyond:,}':<19}"
            f"{beyond:<15,}{max((a[3] for a in good), default=0.0):<14.1e}"
            f"{f'{sum(saddles)} of {len(saddles)}':<29}{sum(floppy)} of {len(floppy)}"
        )
