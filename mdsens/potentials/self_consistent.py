"""Potentials whose energy is a minimum over inner variables: dipoles or charges.

    U(R, p) = min over y of W(y, R, p)

R are the positions and p the parameters. The inner variables y, dipoles or charges, solve a linear
system of equations, and the derivative of y by R and p follows from the implicit function theorem.
A first derivative of U does not need the derivative of y, since dW/dy = 0 (the 2n + 1 theorem): it
is the derivative of W at constant y. Hessians and mixed derivatives of U need the derivative of y,
so that a relaxed configuration is differentiated through both minimizations, over R and over y.

If the solve for y leaves a residual d, relative to the right-hand side of the equations, the error
of U is of the order d^2, while forces, Hessians and everything derived from them have errors of the
order d: forces of size f have an error of about d f, and ``ms.minimize`` cannot reach a tolerance
below d f. The default solvers go to round-off. Measured errors, all relative, for 64 particles (H v
is a product with the Hessian):

            dipoles, CG                             charges, MINRES
    rtol    d        U      forces   H v            d        U      forces   H v
    1e-2    1.5e-3   3e-8   4.6e-4   2.4e-3         6.1e-3   4e-5   3.0e-2   2.3e-2
    1e-4    5.9e-5   5e-11  1.8e-5   3.7e-5         3.3e-5   1e-9   1.6e-4   1.2e-4
    1e-6    4.6e-7   3e-15  1.3e-7   2.5e-7         7.2e-7   7e-13  3.6e-6   2.6e-6
    1e-10   2.3e-11  0      6.8e-12  1.1e-11        8.8e-11  2e-16  1.9e-10  1.3e-10
    1e-14   6.3e-15  0      1.8e-15  3.3e-15        5.5e-15  0      2.5e-14  1.6e-14

Where W has no minimum over y (a polarization catastrophe), U is -inf; where the solve for y fails
otherwise, U is +inf. The forces are not finite in either case: ``System.create`` refuses such
positions, and ``ms.minimize`` ends with ``Status.NOT_FINITE`` if it comes to such positions. All
pairs interact, and boundaries must be open: a periodic cell would need Ewald sums.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.compilation import compiled
from mdsens._util.errors import InputError
from mdsens._util.memory import require_memory
from mdsens._util.outcome import is_good, worse
from mdsens._util.probe import chirp
from mdsens._util.pytree import PyTree
from mdsens.implicit.linear import Direct, LinearMap, Method, Operator, choose
from mdsens.implicit.linear.cg import cg
from mdsens.implicit.linear.result import Result
from mdsens.implicit.linear.solution import solve
from mdsens.implicit.linear.vectors import norm
from mdsens.implicit.root import root
from mdsens.potentials.base import Displacement, NamedPotential, Params
from mdsens.potentials.parameters import check_finite

__all__ = ["AllPairs", "SelfConsistentPotential", "Species", "minimum", "nan_where_failed"]

Species = jax.Array | None
# Memory, in numbers: per pair of particles for a product of the Hessian with 32 columns at a time;
# and per entry of the inner matrix where Direct() writes it out.
NUMBERS = 400
WRITTEN = 30
# Relative residual at which conjugate gradients have met negative curvature, if there is any.
PROBED = 1e-6


class AllPairs(NamedTuple):
    """Vectors and distances between all pairs of particles.

    Attributes:
      vectors: (n, n, d) r_i - r_j.
      lengths: (n, n) lengths of the vectors; 1 on the diagonal.
      inverse: (n, n) inverse lengths of the vectors; 0 on the diagonal.
    """

    vectors: jax.Array
    lengths: jax.Array
    inverse: jax.Array

    @classmethod
    def of(cls, positions: jax.Array, displacement: Displacement) -> AllPairs:
        vectors = displacement(positions[:, None], positions[None])
        diagonal = jnp.eye(positions.shape[0], dtype=bool)
        # sqrt(0) would make NaN derivatives
        lengths = jnp.sqrt(jnp.where(diagonal, 1.0, jnp.sum(vectors**2, axis=-1)))
        return cls(vectors, lengths, jnp.where(diagonal, 0.0, 1.0 / lengths))


def _failure_energy(status: jax.Array) -> jax.Array:
    """Return what is added to the energy for the status of the solve for dipoles or charges.

    The value is 0 if the solve succeeded, -inf if the energy has no minimum over the dipoles or
    charges, and inf if the solve failed otherwise.
    """
    failed = jnp.where(status == Result.INDEFINITE.value, -jnp.inf, jnp.inf)
    return jnp.where(is_good(status), 0.0, failed)


def nan_where_failed(status: jax.Array) -> jax.Array:
    """Return a factor that makes results infinite or NaN if the solve for them has failed.

    The results are dipoles, charges, or derivatives of the energy. The factor is 1 if ``status``,
    that of the solve for the dipoles or charges, is a success, and inf otherwise. It is a factor
    and not a term, since a derivative along a direction must stay linear in this direction.
    """
    return jnp.where(_failure_energy(status) == 0.0, 1.0, jnp.inf)


class Functional(Protocol):
    """The energy W(y) of the inner variables y (dipoles or charges), a quadratic function of y.

    An object of this class is a pytree of the arrays that W depends on.
    """

    @property
    def definite(self) -> bool:
        """Whether the equations for dipoles or charges have a positive definite matrix."""
        ...

    def start(self) -> Any:
        """Return zeros in the shape of the dipoles or charges, at which their solve starts."""
        ...

    def energy(self, y: PyTree) -> jax.Array:
        """Return the energy W at the inner variables y, the dipoles or charges."""
        ...

    def conditions(self, y: PyTree) -> Any:
        """Return the residuals that are zero at the minimum of the energy over y.

        y are the inner variables, dipoles or charges. The derivative of the residuals by y is a
        symmetric matrix.
        """
        ...

    def curvature(self) -> tuple[LinearMap, jax.Array]:
        """Return a function that multiplies by d2W/dy2, and an array of the shape it multiplies.

        W is the energy and y the dipoles or charges. The function must be right for changes of
        y that keep the constraints, such as a fixed total charge. For other changes any positive
        definite matrix will do.
        """
        ...


def minimum(functional: Functional, method: Method) -> tuple[Any, jax.Array]:
    """Compute the dipoles or charges y that minimize an energy W, and the status of the solve.

    y can be differentiated by everything that W depends on.
    """

    @root(
        lambda y, W: W.conditions(y),
        solve=method,
        symmetric=True,
        positive_semidefinite=functional.definite,
        has_aux=True,
    )
    def solution(start: PyTree, W: Functional) -> tuple[Any, jax.Array]:
        return _solve_conditions(W, start, method)

    # W goes in as an argument: it is a tree of the arrays that the root has derivatives by.
    return solution(functional.start(), functional)


# compiled by itself, so that all derivatives that need it trace it once
@compiled(static_argnames="method")
def _solve_conditions(
    functional: Functional, start: PyTree, method: Method
) -> tuple[Any, jax.Array]:
    """Solve the linear equations for the dipoles or charges; return these and the status."""
    # The conditions are linear in y but for a constant, which is their value at y = 0. One linear
    # solve is therefore the whole minimization.
    residual, product = jax.linearize(functional.conditions, start)
    operator = Operator(product, symmetric=True, positive_semidefinite=functional.definite)
    chosen = choose(method, sum(leaf.size for leaf in jax.tree.leaves(start)), operator)
    y, stats = solve(operator, jax.tree.map(jnp.negative, residual), chosen)
    # a Cholesky factorization fails by itself where there is no minimum
    if functional.definite and isinstance(chosen, Direct):
        return y, stats.status
    return y, worse(stats.status, _check_curvature(functional))


def _check_curvature(functional: Functional) -> jax.Array:
    """Return the status INDEFINITE if an energy has a direction of negative curvature.

    The energy is a function of dipoles or charges. Without negative curvature the status is
    CONVERGED. The solve for the dipoles or charges may not meet the negative curvature: in a
    symmetric configuration the right-hand side may have no component along its direction.
    Conjugate gradients are therefore run here with a right-hand side cos(k^2), k = 0, 1, 2, ...,
    which has a component along every mode.
    """
    curvature, like = functional.curvature()
    # at most 10 steps per unknown, where exact arithmetic would need one
    probe = chirp(like.size, like.dtype)
    tol = jnp.asarray(PROBED, like.dtype)

    def apply(v: jax.Array) -> jax.Array:
        return curvature(v.reshape(like.shape)).ravel()

    _, _, status = cg(apply, probe / norm(probe), tol, jnp.int32(10 * like.size))
    return jnp.where(status == Result.INDEFINITE.value, status, Result.CONVERGED.value)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _minimal_energy(functional: Functional, method: Method) -> jax.Array:
    """Compute the minimum of the energy over the dipoles or charges, by a solve with ``method``."""
    y, status = minimum(functional, method)
    return functional.energy(y) + _failure_energy(status)


@_minimal_energy.defjvp
def _minimal_energy_jvp(
    method: Method, primals: tuple[Functional], tangents: tuple[PyTree]
) -> tuple[jax.Array, jax.Array]:
    """Compute the minimal energy U and its derivative along a direction.

    U is the minimum of an energy W(y), where y are the dipoles or charges. The derivative is that
    of W at constant y, since dW/dy = 0 at the minimum.
    """
    (functional,) = primals
    (change,) = tangents
    # a second derivative of U takes the derivative of this y
    y, status = minimum(functional, method)
    slope = jax.jvp(lambda W: W.energy(y), (functional,), (change,))[1]
    # The infinite term is a constant to jax, so the slope needs a factor of its own.
    return functional.energy(y) + _failure_energy(status), slope * nan_where_failed(status)


class SelfConsistentPotential(NamedPotential):
    """Base class of the potentials whose energy is a minimum over dipoles or charges.

    Boundaries must be open, and all pairs interact. Parameters are scalars or have one value per
    particle or per species.

    Attributes:
      solve: the method by which the linear equations for the dipoles or charges are solved.
      above: for each parameter the value that it must exceed; -inf if any value is allowed.
    """

    solve: Method
    above: tuple[float, ...]

    @property
    def pairwise(self) -> bool:
        return False

    def functional(self, pairs: AllPairs, *values: jax.Array) -> tuple[Any, jax.Array]:
        """Return the energy W(y) of the dipoles or charges y, and the part independent of y.

        Args:
          pairs: the vectors and distances of all pairs.
          values: the parameters, each (n,).
        """
        raise NotImplementedError

    def at_rest(
        self, positions: jax.Array, params: Params, species: Species, count: int
    ) -> tuple[Any, Any, jax.Array]:
        """Compute the dipoles or charges y of minimal energy at given positions.

        Returns:
          (the energy W(y) as an object, y at its minimum, the status of the solve).
        """
        values = self.values(params, positions.shape[0], species, count)
        functional, _ = self.functional(AllPairs.of(positions, _difference), *values)
        return functional, *minimum(functional, self.solve)

    def values(
        self, params: Params, n: int, species: Species, species_count: int
    ) -> list[jax.Array]:
        """Return the potential's parameters as arrays (n,), each with one value per particle."""
        values = []
        for name in self.names:
            value = jnp.asarray(params[name])
            # first per species: it matters where there are as many species as particles
            if value.ndim and species is not None and value.shape[0] == species_count:
                value = value[species]
            values.append(jnp.broadcast_to(value, (n,)))
        return values

    def many_body(
        self,
        positions: jax.Array,
        params: Params,
        displacement: Displacement,
        species: Species,
        species_count: int,
    ) -> jax.Array:
        values = self.values(params, positions.shape[0], species, species_count)
        functional, fixed = self.functional(AllPairs.of(positions, displacement), *values)
        return fixed + _minimal_energy(functional, self.solve)

    def check(self, params: Params, n: int, species_count: int) -> None:
        # `above` has a value for every parameter, `names` may lack the last: damping
        for name, above in zip(self.names, self.above, strict=False):
            value = np.asarray(params[name], float)
            per_species = species_count and value.shape == (species_count,)
            if value.shape not in ((), (n,)) and not per_species:
                kinds = f" or ({species_count},) for one per species" if species_count else ""
                raise InputError(
                    f"parameter {name} has shape {value.shape}: give a scalar, ({n},) for one value"
                    f" per particle{kinds}."
                )
            check_finite(name, value, above)

    def check_at(
        self,
        positions: jax.Array,
        box: Callable[[], jax.Array | None],
        params: Params,
        species: Species,
        species_count: int,
    ) -> None:
        """Raise an error if the potential cannot be used for a configuration.

        Raises:
          InputError: a periodic cell, two particles at the same point, or no minimum of the energy
            over the dipoles or charges.
          TooLargeError: a product with the Hessian would not fit in memory.
        """
        if box() is not None:
            raise InputError(
                f"{self.name} in a periodic cell would need Ewald sums, which are not implemented:"
                " give box=None (a cluster in open space)."
            )
        n, d = positions.shape
        entries = NUMBERS * n**2 + (WRITTEN * (d * n) ** 2 if isinstance(self.solve, Direct) else 0)
        what = f"a Hessian product of {self.name} for {n} particles"
        remedy = (
            "take fewer particles, or solve=CG(rtol=1e-14) of mdsens.implicit where it is Direct()."
        )
        require_memory(entries, positions.dtype.itemsize, what, remedy)
        apart = np.asarray(AllPairs.of(positions, _difference).lengths)
        # The diagonal holds ones, so that a zero belongs to two different particles.
        if not apart.min(initial=1.0) > 0.0:
            i, j = np.argwhere(apart == 0.0)[0]
            raise InputError(
                f"positions[{i}] and positions[{j}] are the same point: move one of them."
            )
        status = Result(int(_solve_status(self, positions, dict(params), species, species_count)))
        if not status.good:
            raise InputError(self._without_minimum(status))

    def _without_minimum(self, status: Result) -> str:
        """Return the error message for a solve for dipoles or charges that failed with a status."""
        return (
            f"the inner solve of {self.name} failed at these positions and parameters"
            f" ({status.sentence}): give solve=Direct() of mdsens.implicit, or look for parameters"
            " that are far too large."
        )


def _difference(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the vector a - b from point b to point a, for open boundaries."""
    return a - b


@compiled(static_argnames=("potential", "species_count"))
def _solve_status(
    potential: SelfConsistentPotential,
    positions: jax.Array,
    params: Params,
    species: Species,
    species_count: int,
) -> jax.Array:
    """Return the status of the solve for dipoles or charges at given positions."""
    return potential.at_rest(positions, params, species, species_count)[2]
