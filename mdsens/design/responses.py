"""Determine whether parameters can change several features independently of each other.

A feature is a property of a relaxed system, such as the pressure. The Jacobian J of m features by p
parameters, (m, p), with each feature in units of a scale, has the singular value decomposition

    J = U diag(s) V^T.

The features are fully independent if none of the m singular values s is zero. For each feature k
there is then a change of the parameters that changes the feature by one scale and leaves the other
features as they are, to first order. The smallest such change is J^+ e_k, with the pseudo-inverse
J^+ of J and the unit vector e_k. After Zu, Desai and Goodrich, *Fully independent response in
disordered solids* (arXiv:2412.05031).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mdsens._util.errors import InputError, raise_for_status
from mdsens._util.tables import Shown
from mdsens._util.validation import real_array, short
from mdsens.design.targets import Feature, evaluate_features, named
from mdsens.design.variables import Free, Variables
from mdsens.implicit.linear import Method
from mdsens.mechanics.status import Status
from mdsens.relaxation.equilibrium import Equilibrium
from mdsens.sensitivity.linearization import Linearization, linearized, require_sound

__all__ = ["FeatureResponse", "feature_response"]

# Singular values below this share of the largest count as zero: the error of a gradient is of that
# order.
RANK = 1e-8
# How much of another feature's scale may change while one feature is moved alone.
ALONE = 1e-6


@dataclasses.dataclass(frozen=True, repr=False)
class FeatureResponse(Shown):
    """The response of m features of one minimum to p variables; ``print`` shows a table.

    A feature is a property of the relaxed system, such as the pressure. A variable is a component
    of a parameter, or its logarithm.

    Attributes:
      names: (m,) names of the features.
      labels: (p,) labels of the variables, such as ``sigma[1]``.
      values: (m,) values of the features.
      scales: (m,) the scale of each feature, that is, its unit in the Jacobian.
      jacobian: (m, p) derivatives of the features by the variables, divided by the scales.
      singular_values: (min(m, p),) singular values of the Jacobian, descending.
      directions: (min(m, p), m) the singular vectors in the space of the features, in units of the
        scales.
      rank: how many singular values are above 1e-8 of the largest.
      alone: (m, p) row k is the smallest change of the variables that changes feature k by its
        scale and leaves the other features as they are; nan if no change does this.
      susceptibility: (m,) 1 / norm of each row of ``alone``: the change of a feature, in units of
        its scale, for a change of the variables of length 1 that leaves the other features as they
        are; 0 if no change does this.
      free: (m,) norm of each row of the Jacobian: the susceptibility of a feature if the other
        features may change. susceptibility / free is the sine of the angle between the gradient of
        a feature and the space spanned by the gradients of the others.
      status: the worst status of the linear solves.
      variables: the variables, from which ``change`` computes changes of the parameters.
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
        """Whether every feature can be changed alone, while the other features stay as they are."""
        return self.rank == len(self.names)

    def change(self, name: str, by: float = 1.0) -> dict[str, np.ndarray]:
        """Compute a change of the parameters that changes one feature and leaves the others alone.

        The other features stay as they are to first order. The change is a dict of arrays by the
        names of the parameters, which ``jvp`` takes as a direction.

        Args:
          name: the name of the feature.
          by: the change of the feature, in the feature's own unit.

        Raises:
          InputError: there is no feature of this name, or it cannot be changed alone.
        """
        if name not in self.names:
            raise InputError(f"there is no feature {name!r}: give one of {', '.join(self.names)}.")
        k = self.names.index(name)
        if not np.isfinite(self.alone[k]).all():
            raise InputError(
                f"{name!r} cannot be changed alone, because its gradient is a combination of the"
                " gradients of the other features: leave out a feature, or free more parameters."
            )
        return self.variables.tangent(self.variables.x, by / self.scales[k] * self.alone[k])

    _title = "Response of features"

    def _rows(self) -> list[tuple[str, str]]:
        m, p = self.jacobian.shape
        verdict = (
            ": fully independent" if self.independent else f": not independent: rank {self.rank}"
        )
        if m == 1:
            verdict = ""
        s = self.singular_values
        rows = [
            ("status", f"{self.status.name}: {self.status.sentence}"),
            ("features", f"{m} by {p} variables{verdict}"),
            ("singular values", f"{s.max(initial=0.0):.4g} to {s.min(initial=np.inf):.4g}"),
        ]
        for k, name in enumerate(self.names):
            share = self.susceptibility[k] / self.free[k] if self.free[k] > 0 else 0.0
            text = f"{self.values[k]:.6g}; susceptibility {self.susceptibility[k]:.4g}"
            if m > 1:
                text += f" with the others held, {share:.2f} of what it is alone"
            rows.append((name, text))
        return rows


def _check_features(
    features: str | Feature | Sequence[Any] | Mapping[str, Any],
) -> tuple[tuple[str, ...], list[Feature]]:
    """Check the features (properties of a relaxed system) that a user asks for.

    Returns:
      the names of the features, no two of them equal, and their definitions.
    """
    labeled = _label_features(features)
    if not labeled:
        raise InputError("`features` is empty: give at least one feature.")
    resolved = [named(feature) for _, feature in labeled]
    names = tuple(
        str(label or name) for (label, _), (name, _) in zip(labeled, resolved, strict=True)
    )
    for name in names:
        if names.count(name) > 1:
            raise InputError(
                f"two features are called {name!r}: give a dict of names and features."
            )
    return names, [feature for _, feature in resolved]


def _label_features(
    features: str | Feature | Sequence[Any] | Mapping[str, Any],
) -> list[tuple[str | None, Any]]:
    """List pairs of name and feature, from what a user gives as ``features``.

    This is a dict of features by name, several features, or a single feature. The name is None
    where the user gives no name. A feature is a property of a relaxed system.
    """
    if isinstance(features, Mapping):
        return list(features.items())
    if isinstance(features, Iterable) and not isinstance(features, str):
        return [(None, feature) for feature in features]
    # a single one, or what is none, which ``named`` refuses
    return [(None, features)]


def _checked_scales(scales: ArrayLike, count: int) -> np.ndarray:
    """Check the scale that a user gives for each feature, and return the scales as an array."""
    units = np.asarray(real_array("`scales`", scales, "give one number for each feature."), float)
    if units.shape != (count,) or not (np.isfinite(units) & (units > 0)).all():
        raise InputError(
            f"`scales` is {short(scales)}: give {count} positive numbers, one for each feature."
        )
    return units


def feature_response(
    features: str | Feature | Sequence[Any] | Mapping[str, Any],
    eq: Equilibrium | Linearization,
    wrt: str | Sequence[str] | Mapping[str, Free] = "sigma",
    *,
    scales: ArrayLike | None = None,
    solve: Method | None = None,
    throw: bool = True,
) -> FeatureResponse:
    """Compute the Jacobian of several features by the parameters, and analyze their independence.

    Args:
      features: a sequence of m features, or a dict of names and features. A feature is a name in
        ``ms.design.FEATURES``, a function of a System, or ``Elastic(f)`` with a function f of the
        elastic moduli.
      eq: a minimum, from ``minimize`` or ``linearize``. In a relaxed cell the derivatives are those
        under the condition of its relaxation, such as a constant pressure.
      wrt: the parameters by which to differentiate, in the form of the argument ``free`` of
        ``ms.design.fit``; for positive parameters the derivatives are by the logarithms.
      scales: (m,) the unit of each feature; None takes the absolute value of the feature (1 where
        this value is 0 to round-off).
      solve: the linear solver, as in ``jvp``.
      throw: whether to raise an error where a linear solve did not converge.

    Returns:
      a :class:`FeatureResponse`.

    Raises:
      InputError: bad features, names, parameters or scales. ConvergenceError: with ``throw``, a
        minimum that cannot be differentiated, or a solve that did not converge.
    """
    names, definitions = _check_features(features)
    lin = linearized(eq, solve)
    variables = Variables.of(lin.equilibrium.system, wrt)
    # The scales are checked before the features are measured, which takes time.
    units = None if scales is None else _checked_scales(scales, len(names))
    measurement = evaluate_features(definitions, lin)
    if units is None:
        sizes = np.abs(measurement.values)
        units = np.where(sizes <= measurement.round_off, 1.0, sizes)
    require_sound(lin, eq, throw)
    if throw:
        raise_for_status(measurement.status, "feature_response", measurement)
    jacobian = variables.pulled(variables.x, measurement.slopes) / units[:, None]
    # With throw=False a failed solve leaves nan, which numpy's svd refuses.
    finite = np.where(np.isfinite(jacobian), jacobian, 0.0)
    left, s, right = np.linalg.svd(finite, full_matrices=False)
    kept = s > RANK * s.max(initial=0.0)
    # J^+, (p, m): column k is the least change that comes nearest to changing feature k alone.
    alone = (right[kept].T / s[kept]) @ left[:, kept].T
    moved = finite @ alone  # the identity matrix if every feature can be changed alone
    # Column k: the change of all features where feature k is to change alone.
    able = np.abs(moved - np.eye(len(names))).max(axis=0) < ALONE
    length = np.linalg.norm(alone, axis=0)
    # The inner where() only keeps numpy from warning of a division by zero.
    susceptibility = np.where(able & (length > 0), 1.0 / np.where(length > 0, length, 1.0), 0.0)
    return FeatureResponse(
        names=names,
        labels=variables.labels,
        values=measurement.values,
        scales=units,
        jacobian=jacobian,
        singular_values=s,
        directions=left.T,
        rank=int(kept.sum()),
        alone=np.where(able, alone, np.nan).T,
        susceptibility=susceptibility,
        free=np.linalg.norm(jacobian, axis=1),
        status=measurement.status,
        variables=variables,
    )
