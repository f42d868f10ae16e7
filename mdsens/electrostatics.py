"""Laws whose energy is itself a minimum: induced dipoles, and charges that equalise their electronegativity.

    U(R, p) = min over y of W(y, R, p),      dU = dW at the y that minimises,      d2U by dy as well

y, the dipoles or the charges, solves a linear system with the derivative of the implicit function theorem. A first
derivative of U needs none of it, since dW/dy = 0 (the 2n + 1 theorem); Hessians and mixed products do, and so have the
derivative of a relaxed configuration, through both levels.

Where there is no minimum over y (a polarisation catastrophe), U is -inf and its derivatives are not finite, so that
``ms.minimize`` ends with ``Status.NOT_FINITE``; where the inner solve fails otherwise, U is +inf. Open boundaries alone:
the sums reach over all pairs, and those of a periodic system would need Ewald's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._checks import short
from mdsens.implicit.linear import linear_solve
from mdsens.implicit.operators import Direct, Method, Operator
from mdsens.implicit.status import InputError, Status
from mdsens.laws import Displacement, Params, _check_finite, _NamedLaw

__all__ = ["InducedDipoles", "induced_dipoles"]

Species = jax.Array | None


class Apart(NamedTuple):
    """All pairs: the vectors r_i - r_j (n, n, d), their lengths (n, n), 1 on the diagonal, and what is a pair."""

    vectors: jax.Array
    lengths: jax.Array
    real: jax.Array


def _apart(positions: jax.Array, displacement: Displacement) -> Apart:
    vectors = displacement(positions[:, None], positions[None])
    real = ~jnp.eye(positions.shape[0], dtype=bool)
    squared = jnp.where(real, jnp.sum(vectors**2, axis=-1), 1.0)  # sqrt(0) would make NaN derivatives
    return Apart(vectors, jnp.sqrt(squared), real)


def _of_particles(value: jax.Array, n: int, species: Species, species_count: int) -> jax.Array:
    """A parameter at each particle, (n,), from a scalar, one a species or one a particle."""
    if value.ndim and species is not None and value.shape[0] == species_count:
        return value[species]
    return jnp.broadcast_to(value, (n,))


def _check_particle_value(name: str, value: np.ndarray, n: int, species_count: int, above: float) -> None:
    allowed = [(), (n,), *([(species_count,)] if species_count else [])]
    if value.shape not in allowed:
        kinds = f" or ({species_count},) for one a species" if species_count else ""
        raise InputError(f"parameter {name} has shape {value.shape}: give a scalar, ({n},) for one a particle{kinds}.")
    _check_finite(name, value, above)


def _outcome(status: jax.Array) -> jax.Array:
    """What is added to U for the way the inner solve ended: 0, or an infinity of the sign that is meant."""
    failed = jnp.where(status == Status.INDEFINITE.value, -jnp.inf, jnp.inf)
    return jnp.where(status < Status.MAX_STEPS_REACHED.value, 0.0, failed)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _least(law: Any, state: Any) -> jax.Array:
    """min over y of law.functional(y, state)."""
    y, status = law.inner(state)
    return law.functional(y, state) + _outcome(status)


@_least.defjvp
def _least_jvp(law: Any, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (state,), (change,) = primals, tangents
    y, status = law.inner(state)  # with its derivative, which a second derivative takes
    slope = jax.jvp(lambda s: law.functional(y, s), (state,), (change,))[1]
    # a factor, and no choice between two values: a derivative must be linear, forward and transposed
    return _least(law, state), slope * jnp.where(_outcome(status) == 0.0, 1.0, jnp.inf)


class _Polar(NamedTuple):
    """What the dipoles' energy depends on: roots of polarizabilities (n,), the field (n, d), and T's two parts."""

    root: jax.Array
    field: jax.Array
    vectors: jax.Array
    isotropic: jax.Array
    along: jax.Array

    def tensor(self, mu: jax.Array) -> jax.Array:
        """T mu, (n, d)."""
        share = self.along * jnp.einsum("ijd,jd->ij", self.vectors, mu)
        return self.isotropic @ mu - jnp.einsum("ij,ijd->id", share, self.vectors)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InducedDipoles(_NamedLaw):
    """See :func:`induced_dipoles`."""

    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    damped: bool = dataclasses.field(metadata={"static": True})
    solve: Method = dataclasses.field(metadata={"static": True})
    name: str = dataclasses.field(default="induced_dipoles", metadata={"static": True})

    @property
    def pairwise(self) -> bool:
        return False

    def many_body(
        self, positions: jax.Array, params: Params, displacement: Displacement, species: Species, species_count: int
    ) -> jax.Array:
        state, fixed = self._state(positions, params, displacement, species, species_count)
        return fixed + _least(self, state)

    def _state(
        self, positions: jax.Array, params: Params, displacement: Displacement, species: Species, species_count: int
    ) -> tuple[_Polar, jax.Array]:
        """What induces, and the energy of the charges."""
        n = positions.shape[0]
        charge, alpha = (
            _of_particles(jnp.asarray(params[name]), n, species, species_count) for name in self.names[:2]
        )
        pairs = _apart(positions, displacement)
        inverse = jnp.where(pairs.real, 1.0 / pairs.lengths, 0.0)
        cubed = inverse**3
        first, second = jnp.ones(()), jnp.ones(())
        if self.damped:
            u3 = jnp.asarray(params[self.names[2]]) * pairs.lengths**3 / jnp.sqrt(alpha[:, None] * alpha[None])
            fading = jnp.exp(-u3)
            first, second = 1.0 - fading, 1.0 - (1.0 + u3) * fading
        field = jnp.einsum("ij,j,ijd->id", first * cubed, charge, pairs.vectors)
        state = _Polar(jnp.sqrt(alpha), field, pairs.vectors, first * cubed, 3.0 * second * cubed * inverse**2)
        return state, 0.5 * charge @ inverse @ charge

    def functional(self, scaled: jax.Array, state: _Polar) -> jax.Array:
        """W of mu / sqrt(alpha): dipoles in these have equal stiffness, small polarizabilities included."""
        mu = state.root[:, None] * scaled
        return 0.5 * jnp.sum(scaled**2) - jnp.sum(mu * state.field) + 0.5 * jnp.sum(mu * state.tensor(mu))

    def inner(self, state: _Polar) -> tuple[jax.Array, jax.Array]:
        """The mu / sqrt(alpha) of the minimum, and the status of the solve."""
        root = state.root[:, None]

        def product(x: jax.Array) -> jax.Array:
            return x + root * state.tensor(root * x)

        x, stats = linear_solve(Operator(product, positive_semidefinite=True), root * state.field, self.solve)
        return x, stats.status

    def check(self, params: Params, n: int, species_count: int) -> None:
        for name, above in zip(self.names[:2], (-math.inf, 0.0), strict=True):
            _check_particle_value(name, np.asarray(params[name], float), n, species_count, above)
        for name in self.names[2:]:
            value = np.asarray(params[name], float)
            if value.ndim:
                raise InputError(f"parameter {name} has shape {value.shape}: give a number, one for all pairs.")
            _check_finite(name, value, 0.0)


def induced_dipoles(damped: bool = True, solve: Method = Direct()) -> InducedDipoles:
    """Point charges that polarise each other's particles, with Thole's damping.

        U = sum over pairs of q_i q_j / r_ij + min over mu of
            [sum |mu_i|^2 / (2 alpha_i) - sum mu_i . E_i + 1/2 sum mu_i . T_ij mu_j]
        E_i = sum_j q_j s(r) r_vec / r^3,     T_ij = s(r) / r^3 - 3 t(r) r_vec r_vec / r^5,    r_vec = r_i - r_j
        s = 1 - exp(-x),   t = 1 - (1 + x) exp(-x),   x = damping r^3 / sqrt(alpha_i alpha_j);   s = t = 1 undamped

    """
    if not isinstance(damped, bool):
        raise InputError(f"damped is {short(damped)}: give True or False.")
    if not isinstance(solve, Method):
        raise InputError(f"solve is {short(solve)}: give Direct(), CG() or another record of mdsens.implicit.")
    names = ("charge", "polarizability", "damping")
    return InducedDipoles(names if damped else names[:2], damped, solve)
