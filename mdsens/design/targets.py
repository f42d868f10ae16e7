"""Features of a minimum with their total derivatives by the parameters, and targets of a design.

A feature is a number that a relaxed configuration determines, such as the pressure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from mdsens import elasticity, modes, observables
from mdsens._util.errors import InputError
from mdsens._util.pytree import named_leaves
from mdsens._util.suggestions import did_you_mean
from mdsens._util.user_functions import Traceable
from mdsens._util.validation import check_count, real_number, short
from mdsens.elasticity import Moduli
from mdsens.mechanics.status import Status
from mdsens.model.system import System
from mdsens.sensitivity.derivatives import numbers, value_and_gradient
from mdsens.sensitivity.linearization import Linearization
from mdsens.sensitivity.results import ParameterGradient

__all__ = [
    "Elastic",
    "FEATURES",
    "Feature",
    "FeatureValues",
    "Softest",
    "Target",
    "evaluate_features",
    "hold",
    "named",
]


# Round-off of a feature, in eps times sum |p df/dp|: more than 1, because the positions follow the
# parameters through a linear solve, and a feature is a sum over many pairs.
ROUNDED = 1e3


@dataclasses.dataclass(frozen=True)
class Elastic:
    """A feature of a design computed from elastic moduli, such as ``Elastic(lambda m: m.poisson)``.

    A feature is a number that a relaxed configuration determines. The gradient of this feature
    costs one linear solve more than the moduli themselves. A feature that is a function of a System
    and calls ``moduli`` itself needs several more linear solves for its gradient.

    Attributes:
      of: a function of the :class:`~mdsens.elasticity.Moduli` that returns one number.
    """

    of: Callable[[Moduli], Any]


@dataclasses.dataclass(frozen=True)
class Softest:
    """The smallest stiffness, as a feature of a design: the lowest eigenvalue of the Hessian.

    Eigenvalues of the null space (translations, rattlers) are left out.

    Attributes:
      count: number of the lowest eigenvalues of which to take the mean.
    """

    count: int = 1

    def __post_init__(self) -> None:
        check_count("Softest", "count", self.count)


Feature: TypeAlias = Elastic | Softest | Callable[[System], Any]

# Moduli without a prefix are those of A = V^-1 d2U/dstrain2, the convention of the packing
# literature; those of Birch's stress-strain tensor are what an experiment measures.
FEATURES: dict[str, Feature] = {
    "bulk": Elastic(lambda m: m.bulk),
    "shear": Elastic(lambda m: m.shear),
    "young": Elastic(lambda m: m.young),
    "poisson": Elastic(lambda m: m.poisson),
    "birch_bulk": Elastic(lambda m: elasticity.isotropic(m.birch).bulk),
    "birch_shear": Elastic(lambda m: elasticity.isotropic(m.birch).shear),
    "birch_young": Elastic(lambda m: elasticity.isotropic(m.birch).young),
    "birch_poisson": Elastic(lambda m: elasticity.isotropic(m.birch).poisson),
    "stability": Elastic(lambda m: m.stability),
    "pressure": observables.pressure,
    "energy": observables.energy,
    "volume": observables.volume,
    "packing_fraction": observables.packing_fraction,
    "smallest_stiffness": Softest(),
}


def named(feature: str | Feature) -> tuple[str, Feature]:
    """Return the name and the definition of a feature, a property that a design may target.

    Args:
      feature: a name in ``FEATURES``, or the definition: a function of a System, ``Elastic``, or
        ``Softest``.
    """
    if isinstance(feature, str):
        if feature not in FEATURES:
            hint = did_you_mean(feature, sorted(FEATURES))
            raise InputError(f"there is no feature {feature!r}: {hint}")
        return feature, FEATURES[feature]
    if not (isinstance(feature, Elastic | Softest) or callable(feature)):
        raise InputError(
            f"the feature is {short(feature)}: give a name such as 'poisson', a function of a"
            " System, or Elastic(f)."
        )
    if isinstance(feature, Softest):
        return "smallest_stiffness", feature
    of = feature.of if isinstance(feature, Elastic) else feature
    return getattr(of, "__name__", "feature").replace("<lambda>", "feature"), feature


@dataclasses.dataclass(frozen=True)
class Target:
    """A feature (a property of a relaxed system), its wanted value in a design, and a tolerance.

    Attributes:
      of: the feature: a name in ``ms.design.FEATURES``, a function of a System
        (``ms.observables.pressure``), or ``Elastic(lambda m: m.poisson)``.
      value: the wanted value; with ``from_start`` the wanted change from the starting value.
      tolerance: the target is met within this distance, in the feature's units; with ``share`` in
        units of the wanted value.
      name: name of the target in tables and figures; if empty, the name of the feature.
      from_start: whether ``value`` is a change from the starting value: ``Target("poisson", -0.1,
        2e-3, from_start=True)`` lowers Poisson's ratio by 0.1.
      share: whether ``tolerance`` is a fraction of the wanted value: ``Target("pressure", 0.0,
        0.01, from_start=True, share=True)``, or ``hold("pressure", 0.01)``, keeps the pressure
        within 1 %.
    """

    of: Any
    value: float
    tolerance: float
    name: str = ""
    from_start: bool = False
    share: bool = False

    def __post_init__(self) -> None:
        label = named(self.of)[0]
        # The record is frozen; its fields are set here to the numbers and texts that were meant.
        object.__setattr__(self, "name", str(self.name) or label)
        for field in ("value", "tolerance"):
            where = f"target '{self.name}': `{field}`"
            number = real_number(where, getattr(self, field), "give one number.")
            if not np.isfinite(number):
                raise InputError(f"{where} is {number}: give a finite number.")
            object.__setattr__(self, field, number)
        if not self.tolerance > 0:
            raise InputError(
                f"target '{self.name}': `tolerance` is {self.tolerance}: give a positive number."
            )

    @property
    def feature(self) -> Feature:
        """The feature of the target: a function of a System, an ``Elastic`` or a ``Softest``.

        If the attribute ``of`` of the target is a name in ``ms.design.FEATURES``, the feature is
        the one listed there under this name.
        """
        return named(self.of)[1]

    def resolved(self, start: float) -> tuple[float, float]:
        """Return the wanted value and the tolerance of the target, both in the feature's unit.

        Args:
          start: the value of the feature at the start of the design.
        """
        value = self.value + (start if self.from_start else 0.0)
        return value, self.tolerance * (abs(value) if self.share else 1.0)


class FeatureValues(NamedTuple):
    """The values of m features of one minimum, such as its pressure, with their derivatives.

    Attributes:
      values: (m,) the values of the features.
      slopes: derivatives of the features by each parameter, a dict of arrays (m, *shape of the
        parameter). A leaf of a tree of arrays has its own name, such as ``weights.layers.0.w``.
      round_off: (m,) the error of each value from rounding the parameters. A value below this error
        counts as zero.
      status: the worst status of the linear solves. The status is bad where a feature is computed
        from the moduli of a configuration that is no solid (FLOPPY, UNSTABLE). Near an instability
        the derivatives of the moduli are so large that they would dominate any mean.
    """

    values: np.ndarray
    slopes: Mapping[str, np.ndarray]
    round_off: np.ndarray
    status: Status


def evaluate_features(features: Sequence[Feature], lin: Linearization) -> FeatureValues:
    """Compute features of a linearized minimum, and their derivatives by all parameters.

    One factorization of the Hessian serves all features; each feature takes one adjoint solve.
    """
    values = np.full(len(features), np.nan)
    slopes: dict[str, np.ndarray] = {}
    codes = [int(lin.status)]

    def stacked(which: Sequence[int]) -> Callable[[Any], jax.Array]:
        """Combine k features (properties such as the pressure) into one function.

        The function takes what each feature takes, the elastic moduli or the system. It returns the
        values of the k features as an array (k,).

        Args:
          which: indices of the features.
        """
        chosen: list[Any] = [getattr(features[k], "of", features[k]) for k in which]
        functions = [Traceable("a feature", f) for f in chosen]
        return lambda argument: jnp.stack([_scalar(f(argument)) for f in functions])

    def keep(which: Sequence[int], value: ArrayLike, response: ParameterGradient) -> None:
        """Store the values and derivatives of several of the features that are being evaluated.

        Args:
          which: indices of these features.
          value: their values.
          response: their derivatives by all parameters.
        """
        values[which] = np.asarray(value)
        codes.append(Status.worst_of(response.stats.status))
        for name, slope in named_leaves(response.value):
            shape = slope.shape[np.ndim(value) :]  # of the parameter
            rows = slopes.setdefault(name, np.zeros((len(features), *shape)))
            rows[which] = np.asarray(slope)

    soft = [(k, feature) for k, feature in enumerate(features) if isinstance(feature, Softest)]
    elastic = [k for k, feature in enumerate(features) if isinstance(feature, Elastic)]
    plain = [k for k, f in enumerate(features) if not isinstance(f, Softest | Elastic)]
    # All features of one kind go through a single call, so that they share what it computes: the
    # moduli, and the factor for the adjoint solves.
    if elastic:
        keep(elastic, *elasticity.value_and_gradient(stacked(elastic), lin, throw=False))
    if plain:
        keep(plain, *value_and_gradient(stacked(plain), lin, throw=False))
    for k, feature in soft:
        stiffness = modes.smallest_stiffness(lin, feature.count, throw=False)
        gradient = modes.gradient(lin, feature.count, throw=False)
        keep([k], np.array([stiffness.value]), _with_leading_axis(gradient))
        # The eigenvalue has a status of its own, apart from that of its gradient.
        codes.append(stiffness.status.value)
    return FeatureValues(values, slopes, _estimate_round_off(slopes, lin), Status.worst_of(codes))


def _estimate_round_off(slopes: Mapping[str, np.ndarray], lin: Linearization) -> np.ndarray:
    """Compute the error of each of m features from rounding the parameters, (m,).

    Args:
      slopes: derivatives of the features by each parameter, arrays (m, *shape of the parameter).
      lin: the linearized minimum, with the parameters.
    """
    # First-order effect of rounding each parameter: eps |p| |df/dp|, summed over the components.
    eps = float(np.finfo(lin.system.positions.dtype).eps)
    params = dict(named_leaves(lin.params))
    shares = [
        (slope * np.asarray(params[name])).reshape(len(slope), -1) for name, slope in slopes.items()
    ]
    return ROUNDED * eps * np.abs(np.concatenate(shares, axis=1)).sum(axis=1)


def _with_leading_axis(response: ParameterGradient) -> ParameterGradient:
    """Return the gradient of a scalar as the gradient of an array with one element, shape (1,)."""
    return dataclasses.replace(response, value=jax.tree.map(lambda s: s[None], response.value))


def _scalar(value: ArrayLike) -> jax.Array:
    """Return the value of a property as a scalar array; raise InputError for several numbers.

    jax can trace the conversion, so that derivatives pass through.
    """
    array = numbers(value)
    if array.size != 1:
        raise InputError(f"a feature has shape {array.shape}: give one number for each feature.")
    return array.reshape(())


def hold(of: str | Feature, share: float = 0.01, name: str = "") -> Target:
    """Return a target that keeps a feature at its starting value, within a fraction of this value.

    Args:
      of: the feature, such as ``"pressure"``; as in :class:`Target`.
      share: the fraction, 0.01 for 1 %.
      name: name of the target in tables and figures; if empty, the name of the feature.
    """
    return Target(of, 0.0, share, name, from_start=True, share=True)
