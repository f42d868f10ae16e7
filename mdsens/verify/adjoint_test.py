"""Compare forward-mode with reverse-mode derivatives by the adjoint identity of the two."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from mdsens import sensitivity
from mdsens._util.errors import raise_for_status
from mdsens._util.pytree import largest_entry
from mdsens._util.tables import Shown
from mdsens.implicit.linear import Method
from mdsens.mechanics.load import differentiated
from mdsens.mechanics.status import Status
from mdsens.mechanics.unknowns import Unknowns
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.sensitivity.linearization import Linearization, changes, linearized, require_sound
from mdsens.verify.records import relative

__all__ = ["AdjointTest", "adjoint"]


@dataclasses.dataclass(frozen=True, repr=False)
class AdjointTest(Shown):
    """Result of a test of the adjoint identity <w, J v> = <J^T w, v> at an energy minimum.

    J is the derivative of the relaxed positions by the parameters, v a change of the parameters,
    and w a cotangent, that is, weights of the positions. The two sides are computed by different
    linear solves. They differ if a solver stopped too early, if the Hessian is not symmetric, or if
    the forward and the reverse rule of a derivative contradict each other. An error that is the
    same on both sides, such as a wrong energy, does not violate the identity; ``derivative_test``
    detects such an error.

    Attributes:
      forward: <w, J v>, by ``jvp``.
      reverse: <J^T w, v>, by ``vjp``.
      gap: difference of ``forward`` and ``reverse`` relative to the larger of the two (absolute
        where the larger one is below 1e-6).
      status: the worse status of the two linear solves.
    """

    forward: float
    reverse: float
    gap: float
    status: Status

    _title = "Adjoint identity"

    def _rows(self) -> list[tuple[str, str]]:
        return [
            ("<w, J v>", f"{self.forward:.12g}"),
            ("<J^T w, v>", f"{self.reverse:.12g}"),
            ("gap", f"{self.gap:.1e}"),
            ("status", f"{self.status.name}: {self.status.sentence}"),
        ]


def adjoint(
    eq: Equilibrium | Linearization,
    dparams: Mapping[str, Any] | None = None,
    cotangent: ArrayLike | Unknowns | None = None,
    seed: int = 0,
    *,
    solve: Method | None = None,
    throw: bool = False,
) -> AdjointTest:
    """Compare ``jvp`` with ``vjp`` at a minimum by the adjoint identity <w, J v> = <J^T w, v>.

    J is the derivative of the relaxed positions (in a relaxed cell, also of the cell) by the
    parameters.

    Args:
      eq: a minimum, from ``minimize`` or ``linearize``; not a batch.
      dparams: the change v of the parameters, as in ``jvp``; None takes a random change of every
        parameter, about as large as its value.
      cotangent: the cotangent w, weights (n, d) of the positions; in a relaxed cell
        ``Unknowns(w, strain)`` as in ``vjp``. None takes a random cotangent, without the part in
        the null space (rattlers, translations), and in a relaxed cell with a random strain.
      seed: seed of the random directions.
      solve: the linear solver, as in ``jvp``.
      throw: raise ConvergenceError where one of the two solves did not converge.

    Returns:
      an :class:`AdjointTest`, with a bad status where a solve did not converge.

    Raises:
      InputError: bad names or shapes. ConvergenceError: an unconverged or unjammed minimum.
    """
    lin = linearized(eq, solve)
    rng = np.random.default_rng(seed)
    if dparams is None:
        dparams = _random_change(lin, rng)
    if cotangent is None:
        cotangent = _random_cotangent(lin, rng)
    tangent = sensitivity.jvp(lin, dparams, throw=False)
    gradient = sensitivity.vjp(lin, cast(Any, cotangent), throw=False)
    # After the solves, which check the arguments: a wrong argument is reported first.
    require_sound(lin, eq, throw=True)
    if isinstance(cotangent, Unknowns):
        w = cotangent.positions
        w_strain = cotangent.strain
    else:
        w = cotangent
        w_strain = None
    # <w, J v> over the positions and, in a relaxed cell, the strain.
    forward = float(np.sum(np.asarray(w) * np.asarray(tangent.positions)))
    if w_strain is not None and tangent.strain is not None:
        forward += float(np.sum(np.asarray(w_strain) * np.asarray(tangent.strain)))
    # Parameters that v does not name do not change, and add nothing to the sum.
    reverse = 0.0
    for name, change in changes(lin.system, dparams, lin.params).items():
        leaves = zip(jax.tree.leaves(gradient.value[name]), jax.tree.leaves(change), strict=True)
        reverse += float(sum(np.sum(np.asarray(slope) * np.asarray(v)) for slope, v in leaves))
    gap = relative(abs(forward - reverse), max(abs(forward), abs(reverse)))
    result = AdjointTest(forward, reverse, gap, Status.worst_of([tangent.status, gradient.status]))
    if throw:
        raise_for_status(result.status, "the two sides of the adjoint identity", result)
    return result


def _random_change(lin: Linearization, rng: np.random.Generator) -> dict[str, Any]:
    """Make a random change of every parameter, by name, about as large as the parameter itself."""

    def of_array(value: jax.Array) -> np.ndarray:
        # A parameter that is zero everywhere has no size, and changes by about 1.
        return (largest_entry(value) or 1.0) * rng.standard_normal(value.shape)

    dparams = {name: jax.tree.map(of_array, value) for name, value in lin.params.items()}
    for parameter in differentiated(lin.system, lin.params):
        if parameter.paired:  # a symmetric matrix has a symmetric change
            dparams[parameter.name] = dparams[parameter.name] + dparams[parameter.name].T
    return dparams


def _random_cotangent(lin: Linearization, rng: np.random.Generator) -> jax.Array | Unknowns:
    """Make a random cotangent: weights (n, d) of the positions, and of the strain if it is relaxed.

    The weights of the positions have no part in the null space of the Hessian (rattlers,
    translations).
    """
    n, d = lin.system.positions.shape
    dtype = lin.system.positions.dtype
    random = jnp.asarray(rng.standard_normal((n, d)), dtype)
    positions = lin.null.project(Unknowns(random)).positions
    if lin.cell is None:
        return positions
    return Unknowns(positions, jnp.asarray(rng.standard_normal(d * (d + 1) // 2), dtype))
