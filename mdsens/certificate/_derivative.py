"""How wrong the derivative along a direction can be, and how far it reaches: Newton step and second derivatives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens import contacts
from mdsens.certificate._record import Derivative
from mdsens.laws import PairTerm
from mdsens.sensitivity import Linearization, full_tangent
from mdsens.stationarity import NullSpace, Unknowns, gradient, mixed_product
from mdsens.stiffness import Stiffness
from mdsens.system import System, pair_terms

__all__ = ["derivative"]

Params = Mapping[str, Any]
POWER_STEPS = 30  # for the norm of dH: a few per cent, and it stands in an estimate


@jax.jit
def _newton_terms(
    system: System, null: NullSpace, tangent: Params, J: jax.Array, step: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """d(HJ + B dp) along the step; |d(B dp)| and |dH| a unit of it; and d2/dt2 of the force's negative on the path."""
    p = dict(system.params)

    def along(R: jax.Array, velocity: jax.Array, change: Params) -> jax.Array:
        """d/dt dU/dR at (R + t velocity, p + t change): H velocity + B change."""
        return jax.jvp(lambda r, q: gradient(system, Unknowns(r), q).positions, (R, p), (velocity, dict(change)))[1]

    def project(v: jax.Array) -> jax.Array:
        return null.project(Unknowns(v)).positions

    R, none = system.positions, jax.tree.map(jnp.zeros_like, p)
    length = jnp.linalg.norm(step)
    unit = step / jnp.where(length > 0, length, 1.0)
    pull = jax.jvp(lambda r: along(r, J, tangent), (R,), (step,))[1]
    mixed = jax.jvp(lambda r: along(r, jnp.zeros_like(R), tangent), (R,), (unit,))[1]

    def dH(v: jax.Array) -> jax.Array:
        return project(jax.jvp(lambda r: along(r, project(v), none), (R,), (unit,))[1])

    def power(_: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        v, _ = carry
        w = dH(v)
        size = jnp.linalg.norm(w)
        return w / jnp.where(size > 0, size, 1.0), size

    start = project(jnp.cos(jnp.arange(R.size, dtype=R.dtype) ** 2).reshape(R.shape))
    start = start / jnp.maximum(jnp.linalg.norm(start), 1e-300)
    _, spread = jax.lax.fori_loop(0, POWER_STEPS, power, (start, jnp.zeros((), R.dtype)))

    def slope(t: jax.Array) -> jax.Array:
        q = jax.tree.map(lambda value, change: value + t * change, p, dict(tangent))
        return jax.jvp(lambda r, q: gradient(system, Unknowns(r), q).positions, (R + t * J, q), (J, dict(tangent)))[1]

    zero = jnp.zeros((), R.dtype)
    bend = jax.jvp(slope, (zero,), (jnp.ones_like(zero),))[1]
    return pull, jnp.linalg.norm(project(mixed)), spread, bend


@jax.jit
def _third_diverges(system: System) -> jax.Array:
    """Whether the law's third derivative grows without bound as a pair nears a breakpoint from within (Hertzian).

    Told by its size at a thousandth, a millionth and a billionth of the length away.
    """
    found = jnp.zeros((), bool)
    for term in pair_terms(system):
        for b in term.lengths():

            def third(away: float, term: PairTerm = term, b: jax.Array = b) -> jax.Array:
                slope = term.energy
                for _ in range(3):
                    slope = jax.grad(lambda r, f=slope: jnp.sum(f(r)))
                return jnp.abs(slope(jnp.where(term.mask, b * (1.0 - away), 1.0)))

            far, near, beside = third(1e-3), third(1e-6), third(1e-9)
            found |= jnp.any(term.mask & (near > 1.5 * far) & (beside > 1.5 * near))
    return found


def derivative(lin: Linearization, stiffness: Stiffness, dparams: Params, step: np.ndarray, least: float) -> Derivative:
    """What the certificate says of a direction, ``step`` being the Newton step and ``least`` the smallest stiffness."""
    system, loose = lin.system, np.asarray(lin.network.rattlers)
    tangent = full_tangent(system, dparams)
    pull = np.asarray(mixed_product(system, tangent).positions)
    J, residual, status = stiffness.solve(-pull)
    norm = float(np.linalg.norm(J))
    dtype = system.positions.dtype
    there = jnp.asarray(J, dtype), jnp.asarray(step, dtype)
    d_pull, beta, gamma, bend = _newton_terms(system, lin.null, tangent, *there)
    dJ, _, _ = stiffness.solve(-np.asarray(d_pull))
    J2, _, _ = stiffness.solve(-np.asarray(bend))
    R = float(np.linalg.norm(stiffness.project(pull.ravel())))
    unit, way = norm or np.nan, float(np.linalg.norm(step))
    alpha = max(least, 0.0) or np.nan
    theorem = (float(beta) / alpha + float(gamma) * R / alpha**2) * way
    # the full system's pairs: what a rattler's neighbours do is left out by name
    if _third_diverges(system):
        theorem = np.nan
    crossing = contacts.crossings(lin.equilibrium.system, there[0], tangent, lin.network.rattlers)
    on, whole = _on_rattlers(lin.equilibrium.system, tangent, loose), _on_rattlers(system, tangent, None)
    curved = float(np.linalg.norm(J2))
    return Derivative(
        tangent,
        J,
        norm,
        status,
        residual,
        residual * R / alpha / unit,
        float(np.linalg.norm(dJ)) / unit,
        J + dJ,
        theorem / unit,
        crossing,
        float(crossing.forward),
        float(crossing.backward),
        2.0 * norm / curved if curved > 1e-8 * norm else np.inf,  # below it is round-off
        float(np.sqrt(on / whole)) if whole else 0.0,
    )


def _on_rattlers(system: System, tangent: Params, loose: np.ndarray | None) -> float:
    """Sum of squares of a direction's components that belong to rattlers alone; of all, where ``loose`` is None."""
    total = 0.0
    for v in map(np.asarray, tangent.values()):
        kind = np.ones(v.shape[0] if v.ndim else 0, bool)  # which particles or species are rattlers
        if loose is not None and v.shape == (system.n,):
            kind = loose
        elif loose is not None and v.ndim and v.shape[0] == system.species_count:
            held = np.bincount(np.asarray(system.species)[~loose], minlength=system.species_count)
            kind = held == 0
        elif loose is not None:
            continue
        mask = kind[:, None] | kind if v.ndim == 2 else kind
        total += float(np.sum(v[mask] ** 2)) if v.ndim else float(v**2)
    return total
