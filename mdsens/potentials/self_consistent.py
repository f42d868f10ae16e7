"""Potentials whose energy is itself a minimum, over dipoles or charges, and their derivatives through it.

    U(R, p) = min over y of W(y, R, p),      dU = dW at the y of the minimum,      d2U by dy as well

y, the dipoles or the charges, solves a linear system, and its derivative is that of the implicit
function theorem. A first derivative of U needs none of it, since dW/dy = 0 (the 2n + 1 theorem).
Hessians and mixed products do, and with them a relaxed configuration is differentiated through both
levels.

An inner residual d, relative to the right-hand side, enters U as d^2, forces, Hessians and what is
derived from them as d: forces of size f have an error of about d f, and ``ms.minimize`` cannot
reach a tolerance below that. The defaults solve to round-off. Measured, all relative, 64 particles;
dipoles by CG, then charges by MINRES:

    rtol    d        U        forces   Hessian's product    d        U        forces   Hessian's product
    1e-2    1.5e-3   3e-8     4.6e-4   2.4e-3               6.1e-3   4e-5     3.0e-2   2.3e-2
    1e-4    5.9e-5   5e-11    1.8e-5   3.7e-5               3.3e-5   1e-9     1.6e-4   1.2e-4
    1e-6    4.6e-7   3e-15    1.3e-7   2.5e-7               7.2e-7   7e-13    3.6e-6   2.6e-6
    1e-10   2.3e-11  0        6.8e-12  1.1e-11              8.8e-11  2e-16    1.9e-10  1.3e-10
    1e-14   6.3e-15  0        1.8e-15  3.3e-15              5.5e-15  0        2.5e-14  1.6e-14

Where there is no minimum over y (a polarization catastrophe), U is -inf, where the inner solve
fails otherwise, +inf, and the forces are not finite: ``System.create`` refuses such a start, and
``ms.minimize`` that runs into one ends with ``Status.NOT_FINITE``. Particles in open space alone,
all pairs of them: in a periodic cell the sums would be Ewald's.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util.errors import InputError
from mdsens._util.memory import require_memory
from mdsens._util.outcome import is_good, worse
from mdsens.implicit.linear._krylov import cg, norm
from mdsens.implicit.linear.operators import Direct, LinearMap, Method, Operator, choose
from mdsens.implicit.linear.result import Result
from mdsens.implicit.linear.solution import solve
from mdsens.implicit.root import root
from mdsens.potentials.base import Displacement, Params, _NamedPotential
from mdsens.potentials.parameters import check_finite

__all__ = ["AllPairs", "SelfConsistentPotential", "Species", "minimum", "nan_where_failed"]

Species = jax.Array | None
# Numbers a pair in a product with the Hessian and its parts, of 32 columns at a time; of an inner
# matrix that is written out, those of a pair of particles.
NUMBERS, WRITTEN = 400, 30
PROBED = 1e-6  # residual at which a matrix has shown its sign


class AllPairs(NamedTuple):
    """The vectors r_i - r_j (n, n, d), and their lengths and inverse lengths (n, n), 1 and 0 on the
    diagonal.
    """

    vectors: jax.Array
    lengths: jax.Array
    inverse: jax.Array

    @classmethod
    def of(cls, positions: jax.Array, displacement: Displacement) -> AllPairs:
        vectors = displacement(positions[:, None], positions[None])
        own = jnp.eye(positions.shape[0], dtype=bool)
        lengths = jnp.sqrt(
            jnp.where(own, 1.0, jnp.sum(vectors**2, axis=-1))
        )  # sqrt(0) would make NaN derivatives
        return cls(vectors, lengths, jnp.where(own, 0.0, 1.0 / lengths))


def _added(status: jax.Array) -> jax.Array:
    """What is added to U for how the inner solve ended: 0 where it is good."""
    failed = jnp.where(status == Result.INDEFINITE.value, -jnp.inf, jnp.inf)
    return jnp.where(is_good(status), 0.0, failed)


def nan_where_failed(status: jax.Array) -> jax.Array:
    """1 where the inner solve is good, else inf: a factor of derivatives, which must be linear
    either way.
    """
    return jnp.where(_added(status) == 0.0, 1.0, jnp.inf)


class Functional(Protocol):
    """W of the variables y, quadratic; a pytree of all that it depends on."""

    @property
    def definite(self) -> bool:
        """Whether the derivative of the conditions is positive definite at a minimum."""
        ...

    def start(self) -> Any:
        """Variables like those of the minimum, zero."""
        ...

    def energy(self, y: Any) -> jax.Array: ...

    def conditions(self, y: Any) -> Any:
        """What is zero at the minimum, with a symmetric derivative."""
        ...

    def curvature(self) -> tuple[LinearMap, jax.Array]:
        """d2W/dy2 on the changes that are free (not definite on others), and an array like these."""
        ...


def minimum(functional: Functional, method: Method) -> tuple[Any, jax.Array]:
    """The y of the minimum, with its derivative by all that W depends on, and the status of its
    solve.
    """

    @root(
        lambda y, W: W.conditions(y),
        solve=method,
        symmetric=True,
        positive_semidefinite=functional.definite,
        has_aux=True,
    )
    def found(start: Any, W: Functional) -> tuple[Any, jax.Array]:
        return _solved(W, start, method)

    return found(functional.start(), functional)


@functools.partial(jax.jit, static_argnames="method")  # traced once for all that is derived from it
def _solved(functional: Functional, start: Any, method: Method) -> tuple[Any, jax.Array]:
    left, product = jax.linearize(functional.conditions, start)
    operator = Operator(product, symmetric=True, positive_semidefinite=functional.definite)
    how = choose(method, sum(leaf.size for leaf in jax.tree.leaves(start)), operator)
    y, stats = solve(operator, jax.tree.map(jnp.negative, left), how)
    seen = functional.definite and isinstance(how, Direct)  # by Cholesky's factor
    return y, stats.status if seen else worse(stats.status, _stability(functional))


def _stability(functional: Functional) -> jax.Array:
    """INDEFINITE where a direction has negative curvature: the right-hand side, if symmetric, may
    have no part there.

    By conjugate gradients from a chirp, which has a part along every mode: they cannot converge
    without one, and meet that it is negative.
    """
    curvature, like = functional.curvature()
    probe = jnp.cos(jnp.arange(like.size, dtype=like.dtype) ** 2)
    tol = jnp.asarray(PROBED, like.dtype)

    def apply(v: jax.Array) -> jax.Array:
        return curvature(v.reshape(like.shape)).ravel()

    _, _, status = cg(apply, probe / norm(probe), tol, jnp.int32(10 * like.size))
    return jnp.where(status == Result.INDEFINITE.value, status, Result.CONVERGED.value)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _least(functional: Any, method: Method) -> jax.Array:
    """min over y of W."""
    y, status = minimum(functional, method)
    return functional.energy(y) + _added(status)


@_least.defjvp
def _least_jvp(method: Method, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (functional,), (change,) = primals, tangents
    y, status = minimum(
        functional, method
    )  # with its own derivative, which the second derivative takes
    slope = jax.jvp(lambda W: W.energy(y), (functional,), (change,))[1]
    return functional.energy(y) + _added(status), slope * nan_where_failed(status)


class SelfConsistentPotential(_NamedPotential):
    """What potentials with a minimum inside share: parameters of particles, open space, all pairs."""

    solve: Method
    above: tuple[float, ...]

    @property
    def pairwise(self) -> bool:
        return False

    def functional(self, pairs: AllPairs, *values: jax.Array) -> tuple[Any, jax.Array]:
        """W at the parameters of each particle, and the energy that does not depend on y."""
        raise NotImplementedError

    def at_rest(
        self, positions: jax.Array, params: Params, species: Species, count: int
    ) -> tuple[Any, Any, jax.Array]:
        """W in open space, the y of its minimum, and the status of the solve."""
        values = self.values(params, positions.shape[0], species, count)
        functional, _ = self.functional(AllPairs.of(positions, _between), *values)
        return functional, *minimum(functional, self.solve)

    def values(
        self, params: Params, n: int, species: Species, species_count: int
    ) -> list[jax.Array]:
        """Each parameter at each particle, (n,)."""
        values = []
        for name in self.names:
            value = jnp.asarray(params[name])
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
        return fixed + _least(functional, self.solve)

    def check(self, params: Params, n: int, species_count: int) -> None:
        for name, above in zip(self.names, self.above, strict=False):
            value = np.asarray(params[name], float)
            if value.shape not in ((), (n,)) and not (
                species_count and value.shape == (species_count,)
            ):
                kinds = f" or ({species_count},) for one a species" if species_count else ""
                raise InputError(
                    f"parameter {name} has shape {value.shape}: give a scalar, ({n},) for one a"
                    f" particle{kinds}."
                )
            check_finite(name, value, above)

    def check_at(
        self, positions: jax.Array, box: Any, params: Params, species: Species, species_count: int
    ) -> None:
        if box is not None:
            raise InputError(
                f"{self.name} in a periodic cell would need Ewald's sums, which it does not have:"
                " give box=None (a cluster in open space)."
            )
        n, d = positions.shape
        entries = NUMBERS * n**2 + (WRITTEN * (d * n) ** 2 if isinstance(self.solve, Direct) else 0)
        remedy = (
            "take fewer particles, or solve=CG(rtol=1e-14) of mdsens.implicit where it is Direct()."
        )
        require_memory(
            entries,
            positions.dtype.itemsize,
            f"a Hessian product of {self.name} for {n} particles",
            remedy,
        )
        apart = np.asarray(AllPairs.of(positions, _between).lengths)
        if not apart.min(initial=1.0) > 0.0:
            i, j = np.argwhere(apart == 0.0)[0]
            raise InputError(
                f"positions[{i}] and positions[{j}] are the same point: move one of them."
            )
        status = Result(int(_status(self, positions, dict(params), species, species_count)))
        if not status.good:
            raise InputError(self._without_minimum(status))

    def _without_minimum(self, status: Result) -> str:
        return (
            f"the inner solve of {self.name} failed at these positions and parameters"
            f" ({status.sentence}): give solve=Direct() of mdsens.implicit, or look for values that"
            " are far too large."
        )


def _between(a: jax.Array, b: jax.Array) -> jax.Array:
    """The vector from b to a, in open space."""
    return a - b


@functools.partial(jax.jit, static_argnames=("potential", "species_count"))
def _status(
    potential: SelfConsistentPotential,
    positions: jax.Array,
    params: Params,
    species: Species,
    species_count: int,
) -> jax.Array:
    return potential.at_rest(positions, params, species, species_count)[2]
