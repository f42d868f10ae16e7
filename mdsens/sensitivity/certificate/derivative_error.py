"""Error and range of the derivative of a minimum along a direction in parameter space.

F(x, p) is the condition that is zero at the minimum x* for the parameters p, H = dF/dx and B =
dF/dp. The response J = dx/dt, for parameters p + t dp, solves H J = - B dp. The error of J at the
point x, where the relaxation ended, is estimated by the change of J along the Newton step from x to
x*. The range is the distance t along the direction at which the first pair crosses a breakpoint of
the potential, a distance between particles at which a derivative of the potential jumps or
diverges.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.compilation import compiled
from mdsens._util.probe import chirp
from mdsens._util.pytree import largest_entry
from mdsens.implicit.linear.eigen import lanczos_lowest
from mdsens.mechanics.hessian import along
from mdsens.mechanics.load import differentiated
from mdsens.mechanics.units import natural_units
from mdsens.mechanics.unknowns import Unknowns
from mdsens.model.system import System, pair_terms
from mdsens.potentials.base import PairTerm
from mdsens.sensitivity.certificate.parts import DerivativeCertificate
from mdsens.sensitivity.certificate.solution_space import Motion, Space, on_host
from mdsens.sensitivity.linearization import Linearization, full_tangent

__all__ = ["ESTIMATE", "derivative"]

Params = Mapping[str, Any]
# Relative residual of the solves whose solutions are parts of an estimate only.
ESTIMATE = 1e-4
# Largest motion that counts as no response, in units of the potential's length scale, while the
# parameters change by as much as their values.
NOTHING = 1e-6
# Steps of the power iteration for the norm of dH. They give it to a few per cent, enough for an
# estimate.
POWER_STEPS = 30
# Steps of Lanczos' method for the same where the derivative of the Hessian is a matrix: they find
# the norm to 1e-3.
LANCZOS_STEPS = 20


def _norm_of_hessian_change(space: Space, unit: Motion) -> float:
    """Compute the norm of the Hessian's derivative along a direction, outside of the null space.

    The norm is computed by Lanczos' method where the derivative is assembled as a matrix, else by
    power iteration, both from a vector that contains all wavelengths.

    Args:
      space: norms of displacements and forces at the minimum, and second derivatives there.
      unit: the direction, a pair: a change of the unknowns, of norm one, and a change of the
        parameters.
    """
    matrix = space.hessian_change(unit)
    if matrix is not None:
        start = chirp((space.lin.system.positions.size,), float, np)
        return _largest_in_size(lambda v: space.factor.project(matrix @ v), start)
    size = 0.0
    v = space.onward(on_host(lambda leaf: chirp(leaf.shape, xp=np), space.still))
    for _ in range(POWER_STEPS):
        v = on_host(lambda leaf, by=space.size(v) or 1.0: (leaf / by).astype(leaf.dtype), v)
        product = space.second(unit, (v, unit[1]))
        v = space.onward(product)
        size = space.strength(product)
    return size


def _largest_in_size(apply: Callable[[np.ndarray], np.ndarray], start: np.ndarray) -> float:
    """Compute the largest absolute value of the eigenvalues of a symmetric operator, by Lanczos.

    Args:
      apply: the function that multiplies the operator with a vector (size,).
      start: a vector (size,) that contains all wavelengths.
    """
    image = apply(start)
    if not image.any():  # an operator of zeros, as where no force is left
        return 0.0
    ends = lanczos_lowest(apply, image, LANCZOS_STEPS)
    return np.nan if ends is None else float(np.abs(ends[0]).max())


@compiled
def _third_diverges(system: System) -> jax.Array:
    """Return whether the third derivative of the pair potential diverges at a breakpoint.

    It diverges for Hertzian contacts, as the contact distance is approached from below. The
    derivative is evaluated at relative distances of 1e-3, 1e-6 and 1e-9 below the breakpoint, and
    counts as divergent where it grows by more than a half from each of these distances to the next.
    """
    diverges = jnp.zeros((), bool)
    for term in pair_terms(system):
        for b in term.lengths():
            # the arguments with defaults bind the values of this turn of the loop
            def third(distance: float, term: PairTerm = term, b: jax.Array = b) -> jax.Array:
                derivative = term.energy
                for _ in range(3):
                    derivative = jax.grad(lambda r, f=derivative: jnp.sum(f(r)))
                # masked pairs get a length of 1, where the potential is finite
                return jnp.abs(derivative(jnp.where(term.mask, b * (1.0 - distance), 1.0)))

            far = third(1e-3)
            near = third(1e-6)
            nearest = third(1e-9)
            diverges |= jnp.any(term.mask & (near > 1.5 * far) & (nearest > 1.5 * near))
    return diverges


def derivative(
    space: Space, dparams: Params, step: Unknowns, least: float
) -> DerivativeCertificate:
    """Estimate the error and the range of the derivative of a minimum along a direction.

    Args:
      space: norms and linear solves for the unknowns of the minimum.
      dparams: the direction, changes by parameter name.
      step: the Newton step from the present positions to the exact minimum.
      least: the smallest stiffness of positions and cell together; 0 where it is not known to be
        positive.
    """
    lin = space.lin
    tangent = full_tangent(lin.system, dparams, lin.params)
    no_change = jax.tree.map(np.zeros_like, tangent)

    # the response J, and its norm; NaN makes ratios to a norm of zero NaN, without a warning
    pull = _derivative_by_params(space.core, tangent)
    J, residual, status = space.response(tangent, pull, lin.solve.rtol)
    norm = space.size(J, tangent)
    norm_or_nan = norm or np.nan
    path = J, tangent
    to_minimum = step, no_change

    # dJ, the change of J along the Newton step, and J2 = d2x/dt2, the curvature of the path:
    # H dJ = - d(H J + B dp) along (step, 0), and H J2 = - d(H J + B dp) along (J, dp)
    dJ, _, _ = space.solve(_negative(space.second(to_minimum, path)), ESTIMATE)
    J2, _, _ = space.solve(_negative(space.second(path, path)), ESTIMATE)
    curvature = space.size(J2)

    # R and alpha of Theorem 1 of arXiv:2105.15183
    R = space.strength(pull)
    # 0 means not known; as NaN it makes every estimate NaN that divides by it
    alpha = least or np.nan
    error_bound = _bound_error(space, to_minimum, tangent, R, alpha)

    crossing = space.crossings(J, tangent)
    switch = space.switches(J, tangent)

    rattlers = np.asarray(lin.network.rattlers)
    # the load on a relaxed cell belongs to no particle
    of_system = {name: tangent[name] for name in lin.system.params if name in tangent}
    on_rattlers = _square_on_rattlers(lin.equilibrium.system, of_system, rattlers)
    on_all = _square_on_rattlers(lin.system, tangent, None)
    return DerivativeCertificate(
        dparams=tangent,
        response=jax.tree.map(np.asarray, lin.structure.stored(lin, J, tangent)),
        norm=norm,
        status=status,
        residual=residual,
        linear_error=residual * R / alpha / norm_or_nan,
        error=space.size(dJ) / norm_or_nan,
        corrected=jax.tree.map(
            np.asarray, lin.structure.stored(lin, on_host(np.add, J, dJ), tangent)
        ),
        error_bound=error_bound / norm_or_nan,
        crossing=crossing,
        forward=min(crossing.forward, switch[0]),
        backward=min(crossing.backward, switch[1]),
        # a curvature below 1e-8 of the slope is round-off
        curvature_scale=np.inf if curvature <= 1e-8 * norm else 2.0 * norm / curvature,
        on_rattlers=float(np.sqrt(on_rattlers / on_all)) if on_all else 0.0,
        vanishes=_moves_nothing(lin, J, tangent),
        switch=switch,
    )


def _bound_error(
    space: Space, to_minimum: Motion, tangent: Params, R: float, alpha: float
) -> float:
    """Bound the norm of the error of a derivative by Theorem 1 of arXiv:2105.15183.

    The bound is (beta / alpha + gamma R / alpha^2) |x - x*|, where beta and gamma are the rates at
    which B dp and H change along the Newton step. It is NaN where the potential's third derivative
    diverges at a contact.

    Args:
      space: norms and products with derivatives at the minimum.
      to_minimum: the Newton step to the exact minimum, at constant parameters.
      tangent: the changes dp of the parameters by name.
      R: the norm of B dp.
      alpha: the smallest stiffness; NaN where it is not known to be positive.
    """
    step, no_change = to_minimum
    step_norm = space.size(step)
    unit_step = on_host(lambda leaf: (leaf / (step_norm or 1.0)).astype(leaf.dtype), step)
    along_step = unit_step, no_change
    beta = space.strength(space.second(along_step, (space.still, tangent)))
    gamma = _norm_of_hessian_change(space, along_step)
    if _third_diverges(space.lin.system):
        return np.nan
    return (beta / alpha + gamma * R / alpha**2) * step_norm


def _moves_nothing(lin: Linearization, J: Unknowns, tangent: Params) -> bool:
    """Return whether nothing moves while the parameters change by as much as their values.

    Args:
      lin: the linearization of the minimum.
      J: the response of positions and strain to the change of the parameters.
      tangent: the change of the parameters by name.
    """
    # The largest motion while the parameters change by their size, that is, by the largest entry of
    # those that change.
    change = largest_entry(tangent)
    size = max(
        (largest_entry(lin.params[name]) for name, v in tangent.items() if largest_entry(v) > 0),
        default=0.0,
    )
    # of the whole system, whose units the minimization has compiled
    length = float(natural_units(lin.equilibrium.system)[0])
    strain = lin.structure.strain(lin, J, tangent)
    moved = J if strain is None else dataclasses.replace(J, strain=strain)
    largest = max(float(np.abs(x).max(initial=0.0)) for x in _motions(moved, length))
    motion = largest * (size / change if change > 0 and size > 0 else 1.0)
    return motion <= NOTHING * length


@compiled
def _derivative_by_params(lin: Linearization, tangent: Params) -> Unknowns:
    """Compute (dF/dp) dp, the derivative by the parameters p of the condition F = 0 of the minimum.

    Args:
      lin: the linearization of the minimum.
      tangent: the changes dp by parameter name.
    """
    return along(lambda p: lin.condition(lin.unknowns, p), lin.params, tangent)


def _negative(forces: Unknowns) -> Unknowns:
    return on_host(np.negative, forces)


def _motions(x: Unknowns, length: float) -> tuple[np.ndarray, ...]:
    """Return the changes of the positions and, if any, of the strain, both as lengths.

    The strain is multiplied by ``length`` for this purpose.
    """
    positions = np.asarray(x.positions)
    return (positions,) if x.strain is None else (positions, length * np.asarray(x.strain))


def _square_on_rattlers(system: System, tangent: Params, rattlers: np.ndarray | None) -> float:
    """Sum the squares of the changes of those parameters that belong to rattlers alone.

    The leaves of a tree of arrays, such as a network's weights, belong to no particle.

    Args:
      system: the system.
      tangent: the changes by parameter name.
      rattlers: (n,) True for rattlers; where None, the sum is over all parameters.
    """
    total = 0.0
    for parameter in differentiated(system, tangent):
        v = np.asarray(parameter.of(tangent))
        chosen: np.ndarray | None = np.ones(v.shape[0] if v.ndim else 0, bool)
        if rattlers is not None:
            in_tree = parameter.name not in tangent
            chosen = None if in_tree else _rows_of_rattlers(system, v.shape, rattlers)
        if chosen is None:
            continue
        # Of a matrix of pairs the upper triangle counts: (a, b) and (b, a) are one number. It
        # belongs to rattlers if either species does.
        mask = np.triu(chosen[:, None] | chosen) if parameter.paired else chosen
        total += float(np.sum(v[mask] ** 2)) if v.ndim else float(v**2)
    return total


def _rows_of_rattlers(
    system: System, shape: tuple[int, ...], rattlers: np.ndarray
) -> np.ndarray | None:
    """Return which rows of a parameter, particles or species, are rattlers only.

    The result is None for a parameter whose rows are neither particles nor species.

    Args:
      system: the system.
      shape: shape of the parameter.
      rattlers: (n,) True for rattlers.
    """
    if shape == (system.n,):
        return rattlers
    if system.species is None or not shape or shape[0] != system.species_count:
        return None
    count = system.species_count
    return np.bincount(np.asarray(system.species)[~rattlers], minlength=count) == 0
