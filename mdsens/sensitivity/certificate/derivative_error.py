"""How wrong the derivative along a direction can be, and how far it reaches: Newton step and second
derivatives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens.mechanics.hessian import Unknowns, along
from mdsens.mechanics.units import natural_units
from mdsens.model.system import System, pair_terms, parameters_of
from mdsens.potentials.base import PairTerm
from mdsens.sensitivity.certificate.parts import DerivativeCertificate
from mdsens.sensitivity.certificate.solution_space import Motion, Space, on_host
from mdsens.sensitivity.linearization import Linearization, full_tangent

__all__ = ["ESTIMATE", "derivative"]

Params = Mapping[str, Any]
ESTIMATE = 1e-4  # residual of what stands in an estimate
NOTHING = 1e-6  # of the potential's length: less, while the parameters change by their own size, is no response
POWER_STEPS = 30  # for the norm of dH: a few per cent, and it stands in an estimate


def _spread(space: Space, unit: Motion) -> float:
    """|dH|, how fast the Hessian changes along a unit direction, off the null space: by power
    iteration.
    """
    start, size = space.still, 0.0
    v = space.onward(
        on_host(lambda leaf: np.cos(np.arange(leaf.size) ** 2.0).reshape(leaf.shape), start)
    )
    for _ in range(POWER_STEPS):
        v = on_host(lambda leaf, by=space.size(v) or 1.0: (leaf / by).astype(leaf.dtype), v)
        turned = space.second(unit, (v, unit[1]))
        v, size = space.onward(turned), space.strength(turned)
    return size


@jax.jit
def _third_diverges(system: System) -> jax.Array:
    """Whether the potential's third derivative grows without bound as a pair nears a breakpoint from
    within (Hertzian).

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


def derivative(
    space: Space, dparams: Params, step: Unknowns, least: float
) -> DerivativeCertificate:
    """What the certificate says of a direction.

    Args:
      space: of the minimum's unknowns.
      dparams: the direction.
      step: the Newton step.
      least: the smallest stiffness of all unknowns; 0 where it is not known to be positive.
    """
    lin, system, loose = space.lin, space.lin.system, np.asarray(space.lin.network.rattlers)
    tangent = full_tangent(system, dparams, lin.params)
    still = {name: np.zeros_like(value) for name, value in tangent.items()}
    pull = _mixed(space.core, tangent)
    J, residual, status = space.response(tangent, pull)
    norm, way = space.size(J), space.size(step)
    path = J, tangent
    onward = on_host(lambda leaf: (leaf / (way or 1.0)).astype(leaf.dtype), step), still
    dJ, _, _ = space.solve(_minus(space.second((step, still), path)), ESTIMATE)
    J2, _, _ = space.solve(_minus(space.second(path, path)), ESTIMATE)
    beta = space.strength(space.second(onward, (space.still, tangent)))
    gamma, R = _spread(space, onward), space.strength(pull)
    unit = norm or np.nan
    alpha = least or np.nan
    error_bound = (beta / alpha + gamma * R / alpha**2) * way
    if _third_diverges(system):
        error_bound = np.nan
    crossing = space.crossings(J, tangent)
    switch = space.switches(J, tangent)
    on, whole = (
        _on_rattlers(lin.equilibrium.system, tangent, loose),
        _on_rattlers(system, tangent, None),
    )
    curved = space.size(J2)
    full = max(float(np.max(np.abs(v), initial=0.0)) for v in tangent.values())
    size = max(
        (float(jnp.max(jnp.abs(lin.params[k]))) for k, v in tangent.items() if np.any(v != 0)),
        default=0.0,
    )
    length = float(natural_units(system)[0])
    moved = max(float(np.abs(x).max(initial=0.0)) for x in _lengths(J, length))
    motion = moved * (size / full if full > 0 and size > 0 else 1.0)
    return DerivativeCertificate(
        tangent,
        jax.tree.map(np.asarray, lin.structure.stored(lin, J)),
        norm,
        status,
        residual,
        residual * R / alpha / unit,
        space.size(dJ) / unit,
        jax.tree.map(np.asarray, lin.structure.stored(lin, on_host(np.add, J, dJ))),
        error_bound / unit,
        crossing,
        min(crossing.forward, switch[0]),
        min(crossing.backward, switch[1]),
        np.inf if curved <= 1e-8 * norm else 2.0 * norm / curved,  # below it is round-off
        float(np.sqrt(on / whole)) if whole else 0.0,
        motion <= NOTHING * length,
        switch,
    )


@jax.jit
def _mixed(lin: Linearization, tangent: Params) -> Unknowns:
    return along(lambda p: lin.condition(lin.unknowns, p), lin.params, tangent)


def _minus(forces: Unknowns) -> Unknowns:
    return on_host(np.negative, forces)


def _lengths(x: Unknowns, length: float) -> tuple[np.ndarray, ...]:
    """A change of the unknowns as motions: of particles, and of what the cell strains by the potential's
    length.
    """
    positions = np.asarray(x.positions)
    return (positions,) if x.strain is None else (positions, length * np.asarray(x.strain))


def _on_rattlers(system: System, tangent: Params, loose: np.ndarray | None) -> float:
    """Sum of squares of a direction's components that belong to rattlers alone; of all, where
    ``loose`` is None.
    """
    total = 0.0
    for parameter in parameters_of(system, tangent):
        v = np.asarray(tangent[parameter.name])
        kind = np.ones(v.shape[0] if v.ndim else 0, bool)  # which particles or species are rattlers
        if loose is not None and v.shape == (system.n,):
            kind = loose
        elif (
            loose is not None
            and system.species is not None
            and v.ndim
            and v.shape[0] == system.species_count
        ):
            held = np.bincount(np.asarray(system.species)[~loose], minlength=system.species_count)
            kind = held == 0
        elif loose is not None:
            continue
        mask = np.triu(kind[:, None] | kind) if parameter.paired else kind  # a pair is one number
        total += float(np.sum(v[mask] ** 2)) if v.ndim else float(v**2)
    return total
