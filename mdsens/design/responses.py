"""How many features answer to the parameters at once, and whether each can be moved alone.

With J the (m, p) Jacobian of the features by the parameters, features in units of their scales,

    J = U diag(s) V^T,

and the features are fully independent where all m singular values are above nothing: then for each
there is a change of the parameters, the least one J^+ e_k, that moves it by one scale and holds the
others, to first order. After Zu, Desai and Goodrich, *Fully independent response in disordered
solids* (arXiv:2412.05031).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mdsens._util.errors import InputError, raise_for_status
from mdsens._util.tables import Shown
from mdsens._util.validation import real_array, short
from mdsens.design.targets import evaluate_features, named
from mdsens.design.variables import Free, Variables
from mdsens.mechanics.status import Status
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.sensitivity.linearization import Linearization, linearized, require_sound

__all__ = ["FeatureResponse", "feature_response"]

# of the largest singular value: what is below is none; a gradient's own error is of that order
RANK = 1e-8


@dataclasses.dataclass(frozen=True, repr=False)
class FeatureResponse(Shown):
    """The response of many features at one minimum. Print it.

    Attributes:
      names: (m,) of the features.
      labels: (p,) of the parameters' components.
      values: (m,) of the features.
      scales: (m,) what a feature is measured in.
      jacobian: (m, p) derivatives by the variables, over the scales.
      singular_values: (min(m, p),) descending.
      directions: (min(m, p), m) of the singular values, in the space of the features over their
        scales.
      rank: how many singular values are above 1e-8 of the largest.
      alone: (m, p) the least change of the variables that moves one feature by its scale and holds
        the others; rows are nan where there is none.
      susceptibility: (m,) 1 / |alone|: what a feature moves by, in its scales, for a change of
        length 1 that holds the others; 0 where there is none.
      free: (m,) |row of the Jacobian|: the same if nothing else is held. susceptibility / free is
        the sine of the angle between a feature's gradient and the others.
      status: of the solves, the worst.
      variables: from which ``change`` makes parameters.
    """

    names: tuple[str, ...]
    labels: tuple[str, ...]
    values: np.ndarray
    scales: np.ndarray
    jacobian: np.ndarray
    singular_values: np.ndarray
    directions: np.ndarray
    rank: int
    alone: np.ndarray
    susceptibility: np.ndarray
    free: np.ndarray
    status: Status
    variables: Variables

    @property
    def independent(self) -> bool:
        """Whether every feature can be moved alone: rank m."""
        return self.rank == len(self.names)

    def change(self, name: str, by: float = 1.0) -> dict[str, np.ndarray]:
        """The parameters' change, as ``jvp`` takes it, that moves one feature and holds the others,
        to first order.

        Args:
          name: of the feature.
          by: how much, in the feature's own units.
        """
        if name not in self.names:
            raise InputError(f"there is no feature {name!r}: it has {', '.join(self.names)}.")
        k = self.names.index(name)
        if not np.isfinite(self.alone[k]).all():
            raise InputError(
                f"{name} cannot be moved alone: its gradient is made up of the others'."
            )
        return self.variables.tangent(self.variables.x, by / self.scales[k] * self.alone[k])

    _title = "Response of features"

    def _rows(self) -> list[tuple[str, str]]:
        m, p = self.jacobian.shape
        said = "fully independent" if self.independent else f"not independent: rank {self.rank}"
        s = self.singular_values
        rows = [
            ("status", f"{self.status.name}: {self.status.sentence}"),
            ("features", f"{m} by {p} variables: {said}"),
            ("singular values", f"{s.max(initial=0.0):.4g} to {s.min(initial=np.inf):.4g}"),
        ]
        for k, name in enumerate(self.names):
            share = self.susceptibility[k] / self.free[k] if self.free[k] > 0 else 0.0
            rows.append((
                name, f"{self.values[k]:.6g}; susceptibility {self.susceptibility[k]:.4g} with the others held, "
                f"{share:.2f} of what it is alone",
            ))  # fmt: skip
        return rows


def _checked_scales(scales: Any, count: int) -> np.ndarray:
    units = np.asarray(real_array("scales", scales, "give one positive number a feature."), float)
    if units.shape != (count,) or not (np.isfinite(units) & (units > 0)).all():
        raise InputError(
            f"scales is {short(scales)}: give {count} positive numbers, one a feature."
        )
    return units


def feature_response(
    features: Sequence[Any] | Mapping[str, Any],
    eq: Equilibrium | Linearization,
    wrt: str | Sequence[str] | Mapping[str, Free] = "sigma",
    *,
    scales: Any = None,
    throw: bool = True,
) -> FeatureResponse:
    """The Jacobian of many features by the parameters, and what it says of their independence.

    Args:
      features: names of ``ms.design.FEATURES``, functions of a System, ``Elastic(f)``; a dict gives
        them names.
      eq: from ``minimize`` or ``linearize``.
      wrt: parameters, as ``free`` of ``fit``: positive ones are varied by their logarithms.
      scales: (m,) what each feature is measured in; its value's size where None (1 where that is 0,
        to round-off).
      throw: raise where a solve did not converge.

    Returns:
      a :class:`FeatureResponse`.
    """
    if isinstance(features, str) or callable(features):
        features = [features]
    pairs = (
        list(features.items()) if isinstance(features, Mapping) else [(None, f) for f in features]
    )
    if not pairs:
        raise InputError("features is empty: give at least one.")
    found = [named(feature) for _, feature in pairs]
    names = tuple(str(given or own) for (given, _), (own, _) in zip(pairs, found, strict=True))
    for name in names:
        if names.count(name) > 1:
            raise InputError(
                f"two features are called {name!r}: give a dict of names and features."
            )
    lin = linearized(eq, None)
    variables = Variables.of(lin.equilibrium.system, wrt)
    given = None if scales is None else _checked_scales(scales, len(names))
    measurement = evaluate_features([feature for _, feature in found], lin)
    units = (
        np.where(
            np.abs(measurement.values) <= measurement.round_off, 1.0, np.abs(measurement.values)
        )
        if given is None
        else given
    )
    require_sound(lin, eq, throw)
    if throw:
        raise_for_status(measurement.status, "feature_response", measurement)
    jacobian = variables.pulled(variables.x, measurement.slopes) / units[:, None]
    finite = np.where(np.isfinite(jacobian), jacobian, 0.0)
    left, s, right = np.linalg.svd(finite, full_matrices=False)
    kept = s > RANK * s.max(initial=0.0)
    alone = (right[kept].T / s[kept]) @ left[:, kept].T
    moved = finite @ alone  # the identity where all can be moved alone
    able = np.abs(moved - np.eye(len(names))).max(axis=0) < 1e-6
    length = np.linalg.norm(alone, axis=0)
    susceptibility = np.where(able & (length > 0), 1.0 / np.where(length > 0, length, 1.0), 0.0)
    return FeatureResponse(
        names, variables.labels, measurement.values, units, jacobian, s, left.T, int(kept.sum()),
        np.where(able, alone, np.nan).T, susceptibility, np.linalg.norm(jacobian, axis=1), measurement.status, variables,
    )  # fmt: skip
