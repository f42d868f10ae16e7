"""What a design aims at: numbers measured on a minimum, with their total derivatives by the
parameters.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from mdsens import elasticity, modes, observables
from mdsens._util.errors import InputError
from mdsens._util.user_functions import Traceable
from mdsens._util.validation import real_number, short
from mdsens.elasticity import Moduli
from mdsens.mechanics.status import Status
from mdsens.model.system import System
from mdsens.sensitivity.derivatives import numbers, value_and_gradient
from mdsens.sensitivity.linearization import Linearization
from mdsens.sensitivity.results import ParameterGradient

__all__ = [
    "FEATURES",
    "Elastic",
    "Feature",
    "FeatureValues",
    "Softest",
    "Target",
    "evaluate_features",
    "named",
]


# of eps: positions follow the parameters through a solve, and a feature is a sum over many pairs
ROUNDED = 1e3


@dataclasses.dataclass(frozen=True)
class Elastic:
    """A number made of the elastic moduli, ``Elastic(lambda m: m.poisson)``.

    Its gradient costs one solve more than the moduli, where that of a function of a System that
    calls ``moduli`` inside costs several.
    """

    of: Callable[[Moduli], Any]


@dataclasses.dataclass(frozen=True)
class Softest:
    """The smallest stiffness, the lowest eigenvalue of the Hessian off its null space; the mean of
    ``count`` lowest.
    """

    count: int = 1


Feature: TypeAlias = Elastic | Softest | Callable[[System], Any]

# The moduli are of A, the convention of the packing literature; those of Birch's tensor are what an
# experiment sees.
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


def named(feature: Any) -> tuple[str, Feature]:
    """A feature and its name, from the name of one in ``FEATURES`` or from the feature itself."""
    if isinstance(feature, str):
        if feature not in FEATURES:
            near = difflib.get_close_matches(feature, FEATURES, n=1)
            hint = (
                f"did you mean {near[0]!r}?"
                if near
                else f"give one of {', '.join(sorted(FEATURES))}."
            )
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
    """A number that is wanted, and how near is near enough.

    Attributes:
      of: a name of ``ms.design.FEATURES``, a function of a System (``ms.observables.pressure``),
        ``Elastic(lambda m: m.poisson)``.
      value: what is wanted; counted from where the design starts where ``from_start``.
      tolerance: how far from it is met, in the feature's units; where ``share``, as a share of the
        value wanted.
      name: for tables and figures; the feature's own where empty.
      from_start: ``Target("poisson", -0.1, 2e-3, from_start=True)`` lowers Poisson's ratio by 0.1.
      share: ``Target("pressure", 0.0, 0.01, from_start=True, share=True)``, or ``hold("pressure",
        0.01)``, holds the pressure within 1 %.
    """

    of: Any
    value: float
    tolerance: float
    name: str = ""
    from_start: bool = False
    share: bool = False

    def __post_init__(self) -> None:
        label = named(self.of)[0]
        object.__setattr__(self, "name", str(self.name) or label)
        for field in ("value", "tolerance"):
            where = f"target {self.name}: {field}"
            number = real_number(where, getattr(self, field), "give one number.")
            if not np.isfinite(number):
                raise InputError(f"{where} is {number}: give a finite number.")
            object.__setattr__(self, field, number)
        if not self.tolerance > 0:
            raise InputError(
                f"target {self.name}: tolerance is {self.tolerance}: give a positive number."
            )

    @property
    def feature(self) -> Feature:
        """What is measured."""
        return named(self.of)[1]

    def resolved(self, start: float) -> tuple[float, float]:
        """(the value wanted, the tolerance), as numbers, of a design that starts at a value."""
        value = self.value + (start if self.from_start else 0.0)
        return value, self.tolerance * (abs(value) if self.share else 1.0)


class FeatureValues(NamedTuple):
    """Features at one minimum.

    Attributes:
      values: (m,).
      slopes: (m, *shape of each parameter) the derivatives.
      round_off: (m,) what the rounding of the parameters alone makes of the values: less is zero.
      status: the worst. It is bad where a feature is made of moduli of no solid (FLOPPY, UNSTABLE):
        near an instability they are so large that they would rule any mean.
    """

    values: np.ndarray
    slopes: Mapping[str, np.ndarray]
    round_off: np.ndarray
    status: Status


def evaluate_features(features: Sequence[Feature], lin: Linearization) -> FeatureValues:
    """Every feature with its derivatives by all parameters: one factor, one adjoint solve for each
    feature.
    """
    values, slopes = np.full(len(features), np.nan), {}
    codes = [int(lin.status)]

    def stacked(which: Sequence[int]) -> Callable[[Any], Any]:
        chosen: list[Any] = [getattr(features[k], "of", features[k]) for k in which]
        functions = [Traceable("a feature", f) for f in chosen]
        return lambda at: jnp.stack([_one(f(at)) for f in functions])

    def keep(which: Sequence[int], value: Any, response: ParameterGradient) -> None:
        values[which] = np.asarray(value)
        codes.append(Status.worst_of(response.stats.status))
        for name, slope in response.value.items():
            rows = slopes.setdefault(
                name, np.zeros((len(features), *slope.shape[np.ndim(value) :]))
            )
            rows[which] = np.asarray(slope)

    soft = [k for k, feature in enumerate(features) if isinstance(feature, Softest)]
    elastic = [k for k, feature in enumerate(features) if isinstance(feature, Elastic)]
    plain = [k for k in range(len(features)) if k not in soft and k not in elastic]
    if elastic:
        keep(elastic, *elasticity.value_and_gradient(stacked(elastic), lin, throw=False))
    if plain:
        keep(plain, *value_and_gradient(stacked(plain), lin, throw=False))
    for k in soft:
        count = features[k].count  # type: ignore[union-attr]
        found = modes.smallest_stiffness(lin, count, throw=False)
        keep([k], np.array([found.value]), _lifted(modes.gradient(lin, count, throw=False)))
        codes.append(found.status.value)
    eps = float(np.finfo(lin.system.positions.dtype).eps)
    shares = [
        (slope * np.asarray(lin.params[name])).reshape(len(features), -1)
        for name, slope in slopes.items()
    ]
    round_off = ROUNDED * eps * np.abs(np.concatenate(shares, axis=1)).sum(axis=1)
    return FeatureValues(values, slopes, round_off, Status.worst_of(codes))


def _lifted(response: ParameterGradient) -> ParameterGradient:
    """The gradient of a number as that of one number in an array."""
    return dataclasses.replace(
        response, value={name: slope[None] for name, slope in response.value.items()}
    )


def _one(value: Any) -> Any:
    array = numbers(value)
    if array.size != 1:
        raise InputError(
            f"a feature has shape {array.shape}: give one number a feature, a target for each."
        )
    return array.reshape(())
