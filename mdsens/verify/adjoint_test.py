"""Forward against reverse: one identity that holds for any direction and any cotangent."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mdsens import sensitivity
from mdsens._util.errors import InputError
from mdsens._util.tables import Shown
from mdsens.implicit.linear.operators import Method, check_method
from mdsens.mechanics.hessian import Unknowns
from mdsens.mechanics.status import Status
from mdsens.model.system import parameters_of
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.sensitivity.derivatives import Linearization
from mdsens.sensitivity.linearization import require_sound
from mdsens.verify.records import relative

__all__ = ["AdjointTest", "adjoint"]


@dataclasses.dataclass(frozen=True, repr=False)
class AdjointTest(Shown):
    """The adjoint identity <w, J v> = <J^T w, v> at a minimum.

    The two sides share no solve, so a solver that stopped too early, a Hessian that is not
    symmetric or a derivative rule that contradicts itself pulls them apart. It says nothing of an
    energy that is wrong on both sides: that is for ``derivative_test``.

    Attributes:
      forward: <w, J v>, by ``jvp``.
      reverse: <J^T w, v>, by ``vjp``.
      gap: their difference relative to the larger one (absolute where that is below 1e-6).
      status: the worse of the two solves'.
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
    cotangent: Any = None,
    seed: int = 0,
    *,
    solve: Method | None = None,
) -> AdjointTest:
    """Hold ``jvp`` against ``vjp``: <w, J v> and <J^T w, v>, J the derivative of the minimum by the
    parameters.

    Args:
      eq: from ``minimize`` or ``linearize``; not a batch.
      dparams: v, as in ``jvp``; where None, a random change of every parameter, of its own size.
      cotangent: w, (n, d), or at a pressure ``Unknowns(w, strain)`` as in ``vjp``; where None,
        random on the particles that are held, without translation, and on the cell that responds.
      seed: of the random ones.
      solve: the linear solver, as in ``jvp``.

    Returns:
      an :class:`AdjointTest`. A solve that does not converge shows in its status and does not
      raise.

    Raises:
      InputError: bad names or shapes. ConvergenceError: an unconverged or unjammed minimum.
    """
    if not isinstance(eq, Equilibrium | Linearization):
        raise InputError(
            f"got a {type(eq).__name__}: give what ms.minimize or ms.linearize returns."
        )
    lin = eq if isinstance(eq, Linearization) else sensitivity.linearize(eq, throw=False)
    if solve is not None:
        check_method(solve)
        lin = dataclasses.replace(lin, solve=solve)
    rng = np.random.default_rng(seed)
    if dparams is None:
        params = {name: np.asarray(value) for name, value in lin.params.items()}
        dparams = {
            k: (np.abs(v).max(initial=0.0) or 1.0) * rng.standard_normal(v.shape)
            for k, v in params.items()
        }
        for parameter in parameters_of(lin.system, lin.params):
            if parameter.paired:
                dparams[parameter.name] = dparams[parameter.name] + dparams[parameter.name].T
    if cotangent is None:
        random = rng.standard_normal(lin.system.positions.shape)
        cotangent = lin.null.project(
            Unknowns(jnp.asarray(random, lin.system.positions.dtype))
        ).positions
        if lin.cell is not None:
            d = random.shape[1]
            cotangent = Unknowns(
                cotangent, jnp.asarray(rng.standard_normal(d * (d + 1) // 2), cotangent.dtype)
            )
    ahead, back = (
        sensitivity.jvp(lin, dparams, throw=False),
        sensitivity.vjp(lin, cotangent, throw=False),
    )
    require_sound(lin, eq, throw=True)
    parts = cotangent if isinstance(cotangent, Unknowns) else Unknowns(cotangent)
    moved = ahead.value if isinstance(ahead.value, Unknowns) else Unknowns(ahead.value)
    forward = float(np.sum(np.asarray(parts.positions) * np.asarray(moved.positions)))
    if parts.strain is not None and moved.strain is not None:
        forward += float(np.sum(np.asarray(parts.strain) * np.asarray(moved.strain)))
    reverse = float(
        sum(np.sum(np.asarray(back.value[name]) * np.asarray(v)) for name, v in dparams.items())
    )
    gap = relative(abs(forward - reverse), max(abs(forward), abs(reverse)))
    return AdjointTest(forward, reverse, gap, Status.worst_of([ahead.status, back.status]))
