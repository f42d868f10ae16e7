"""How wrong the derivative along a direction can be, and how far it reaches: Newton step and second derivatives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from mdsens import contacts
from mdsens.certificate._record import Derivative
from mdsens.laws import PairTerm
from mdsens.linearization import Linearization, full_tangent
from mdsens.scales import scales
from mdsens.stationarity import Unknowns, gradient, mixed_product
from mdsens.stiffness import Stiffness
from mdsens.system import System, pair_terms

__all__ = ["ESTIMATE", "derivative"]

Params = Mapping[str, Any]
Motion: TypeAlias = tuple[jax.Array, Params]  # of positions and parameters
ESTIMATE = 1e-4  # residual of what stands in an estimate
NOTHING = 1e-6  # of the law's length: less, while the parameters change by their own size, is no response
POWER_STEPS = 30  # for the norm of dH: a few per cent, and it stands in an estimate


@jax.jit
def _second(system: System, first: Motion, second: Motion) -> jax.Array:
    """The second derivative of dU/dR by (R, params) along two directions, (n, d)."""
    here = system.positions, dict(system.params)

    def along(*place: Any) -> jax.Array:
        return jax.jvp(lambda R, p: gradient(system, Unknowns(R), p).positions, place, first)[1]

    return jax.jvp(along, here, second)[1]


def _spread(lin: Linearization, stiffness: Stiffness, unit: Motion) -> float:
    """|dH|, how fast the Hessian changes along a unit direction, off the null space: by power iteration."""
    still, size = unit[1], 0.0
    v = stiffness.project(np.cos(np.arange(unit[0].size) ** 2.0)).reshape(unit[0].shape)
    for _ in range(POWER_STEPS):
        v = v / (np.linalg.norm(v) or 1.0)
        v = np.asarray(_second(lin.system, unit, (jnp.asarray(v, unit[0].dtype), still)))
        v = stiffness.project(v.ravel()).reshape(v.shape)
        size = float(np.linalg.norm(v))
    return size


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
    still = {name: jnp.zeros_like(value) for name, value in tangent.items()}
    way = float(np.linalg.norm(step))
    path, newton = (jnp.asarray(J, dtype), tangent), (jnp.asarray(step, dtype), still)
    onward = jnp.asarray(step / (way or 1.0), dtype), still
    dJ, _, _ = stiffness.solve(-np.asarray(_second(system, newton, path)), ESTIMATE)
    J2, _, _ = stiffness.solve(-np.asarray(_second(system, path, path)), ESTIMATE)
    mixed = np.asarray(_second(system, onward, (jnp.zeros_like(path[0]), tangent)))
    beta, gamma = float(np.linalg.norm(stiffness.project(mixed.ravel()))), _spread(lin, stiffness, onward)
    R = float(np.linalg.norm(stiffness.project(pull.ravel())))
    unit = norm or np.nan
    alpha = max(least, 0.0) or np.nan
    theorem = (beta / alpha + gamma * R / alpha**2) * way
    # the full system's pairs: what a rattler's neighbours do is left out by name
    if _third_diverges(system):
        theorem = np.nan
    crossing = contacts.crossings(lin.equilibrium.system, path[0], tangent, lin.network.rattlers)
    on, whole = _on_rattlers(lin.equilibrium.system, tangent, loose), _on_rattlers(system, tangent, None)
    curved = float(np.linalg.norm(J2))
    full = max(float(np.max(np.abs(v), initial=0.0)) for v in tangent.values())
    size = max((float(jnp.max(jnp.abs(system.params[k]))) for k, v in tangent.items() if np.any(v != 0)), default=0.0)
    motion = float(np.abs(J).max(initial=0.0)) * (size / full if full > 0 and size > 0 else 1.0)
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
        crossing.forward,
        crossing.backward,
        2.0 * norm / curved if curved > 1e-8 * norm else np.inf,  # below it is round-off
        float(np.sqrt(on / whole)) if whole else 0.0,
        motion <= NOTHING * float(scales(system)[0]),
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
