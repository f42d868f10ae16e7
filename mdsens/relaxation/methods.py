"""jax-md's minimizers as option records, in the system's own units of length and time."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mdsens._util.errors import InputError
from mdsens._util.validation import check_positive, check_whole, short
from mdsens.relaxation.jax_md import jax_md_minimize

__all__ = ["Fire", "GradientDescent", "Newton"]

# Of a stiffness that was measured, what counts as the potential's: dt_max is then 1.7 rad of the fastest
# vibration. Measured, of packings in 2-D and 3-D and of Lennard-Jones glasses: steps fall down to
# here and 10 % below, and rise at 20 %.
MEASURED = 0.55


class FireState(NamedTuple):
    """jax-md's state, whose forces, momenta and masses are multiplied by ``unit``."""

    inner: Any
    unit: jax.Array


@dataclasses.dataclass(frozen=True)
class Fire:
    """jax-md's FIRE (Bitzek et al., Phys. Rev. Lett. 97, 170201, 2006), in the system's own units
    of length and time.

    Attributes:
      dt_start, dt_max: time step at the start and at most, in units of sqrt(10 m / k), k the
        potential's largest stiffness, so that the fastest vibration advances by dt sqrt(10): 0.4
        are 1.3 rad, where velocity Verlet breaks down at 2. In a packing of unit harmonic discs, k
        is about 10 and this is jax-md's own unit. Once particles have settled, the largest
        eigenvalue of the Hessian is measured, and 0.4 are 1.7 rad of its vibration: between half
        the steps (Hertzian discs near jamming) and as many as before (a Lennard-Jones glass).
      max_step: the longest move of a particle in one step, as a fraction of the potential's length
        (contact, or the minimum of the pair energy); it tames the first steps from overlapping
        starts.
      n_min, f_inc, f_dec, alpha_start, f_alpha: as in the paper.
    """

    dt_start: float = 0.1
    dt_max: float = 0.4
    max_step: float = 0.1
    n_min: int = 5
    f_inc: float = 1.1
    f_dec: float = 0.5
    alpha_start: float = 0.1
    f_alpha: float = 0.99

    def __post_init__(self) -> None:
        check_positive(
            self, ("dt_start", "dt_max", "max_step", "f_inc", "f_dec", "alpha_start", "f_alpha")
        )
        check_whole(self, "n_min")

    def functions(self, forces: Any, shift: Any, limits: Any) -> tuple[Any, Any]:
        """jax-md's functions (init, apply), with a mass that brings the stiffest vibration to a
        fixed frequency.

        jax-md adds 1e-6 to the square of the forces' norm, whatever their unit: below a norm of
        1e-3 its velocities no longer turn towards the forces, and with forces in newtons they never
        do. So forces, momenta and masses are given to it multiplied by a number that leaves the run
        as it is and makes the 1e-6 nothing: round-off of the largest force that a particle may have
        is then 1.
        """
        unit = 1.0 / (jnp.finfo(jnp.asarray(limits.strongest).dtype).eps * limits.strongest)

        def scaled(positions: jax.Array, **options: Any) -> jax.Array:
            return unit * forces(positions, **options)

        init, apply = jax_md_minimize().fire_descent(
            scaled,
            shift,
            dt_start=self.dt_start,
            dt_max=self.dt_max,
            n_min=self.n_min,
            f_inc=self.f_inc,
            f_dec=self.f_dec,
            alpha_start=self.alpha_start,
            f_alpha=self.f_alpha,
        )

        def start(positions: jax.Array) -> Any:
            # jax-md keeps step sizes in float16 where they fit, which a loop cannot carry
            dtype = positions.dtype
            inner = dataclasses.replace(
                init(positions, mass=jnp.asarray(unit * limits.stiffness / 10.0, dtype)),
                dt=jnp.asarray(self.dt_start, dtype),
                alpha=jnp.asarray(self.alpha_start, dtype),
            )
            return FireState(inner, jnp.asarray(unit, dtype))

        def step(state: FireState) -> FireState:
            return FireState(apply(state.inner), state.unit)

        return start, step

    def force_limit(self, longest: jax.Array, stiffness: jax.Array) -> jax.Array:
        """The force that moves a particle by ``longest`` in one time step."""
        return longest * stiffness / (10.0 * self.dt_max**2)

    @staticmethod
    def positions(state: FireState) -> jax.Array:
        return state.inner.position

    @staticmethod
    def with_forces(state: FireState, forces: jax.Array) -> FireState:
        return FireState(dataclasses.replace(state.inner, force=state.unit * forces), state.unit)

    @staticmethod
    def forces(state: FireState) -> jax.Array:
        return state.inner.force / state.unit

    @staticmethod
    def at_stiffness(state: FireState, stiffness: jax.Array) -> FireState:
        """The state with the mass for a largest stiffness that was measured."""
        mass = state.unit * MEASURED * stiffness / 10.0
        return FireState(
            dataclasses.replace(state.inner, mass=jnp.full_like(state.inner.mass, mass)), state.unit
        )


@dataclasses.dataclass(frozen=True)
class GradientDescent:
    """jax-md's gradient descent: slow; here to show that the derivative does not care which solver
    found the minimum.

    Attributes:
      step_size: of a step, in units of 1 / k, k the potential's largest stiffness; it diverges above 2.
      max_step: as in :class:`Fire`.
    """

    step_size: float = 1.0
    max_step: float = 0.1

    def __post_init__(self) -> None:
        check_positive(self, ("step_size", "max_step"))

    def functions(self, forces: Any, shift: Any, limits: Any) -> tuple[Any, Any]:
        """A pair of functions (init, apply) on the state (positions, forces)."""

        def stored(R: jax.Array, force: jax.Array, **_: Any) -> jax.Array:
            return force

        step_size: Any = self.step_size / limits.stiffness
        functions: Any = jax_md_minimize().gradient_descent(stored, shift, step_size)
        init, apply = functions

        def step(state: Any) -> Any:
            moved = apply(state[0], force=state[1])
            return moved, forces(moved)

        return (lambda R: (init(R), forces(R))), step

    def force_limit(self, longest: jax.Array, stiffness: jax.Array) -> jax.Array:
        """The force that moves a particle by ``longest``."""
        return longest * stiffness / self.step_size

    @staticmethod
    def positions(state: Any) -> jax.Array:
        return state[0]

    @staticmethod
    def with_forces(state: Any, forces: jax.Array) -> Any:
        return state[0], forces

    @staticmethod
    def forces(state: Any) -> jax.Array:
        return state[1]

    @staticmethod
    def at_stiffness(state: Any, stiffness: jax.Array) -> Any:
        """The same: its steps keep to the potential's stiffness."""
        return state


@dataclasses.dataclass(frozen=True)
class Newton:
    """FIRE until the minimum is near; where it then crawls, Newton steps under a trust region.

    Near jamming the softest modes make FIRE slow and in the end stall, while a Newton step squares
    the distance to the minimum. Steps that do not lower the energy as their quadratic model
    promised are shortened, and where shortening does not help, FIRE goes on to a tenth of ``begin``
    first. See :mod:`mdsens.relaxation._newton`.

    Attributes:
      first: the FIRE that finds the basin.
      begin: largest force, relative to the mean force of a contact, at which Newton steps are
        tried. Far above 1e-3 contacts change with each step and they make little headway; lower it
        where another minimum is reached than by FIRE alone. Beyond 16,384 particles it counts for
        less, in proportion to their number.
      patience: steps of FIRE before they are tried: a quick relaxation is over by then, without
        compiling them. Nor are they tried where the force falls so fast that FIRE will be there in
        the time that they take.
    """

    first: Fire = Fire()
    begin: float = 3e-4
    patience: int = 1000

    def __post_init__(self) -> None:
        check_positive(self, ("begin",))
        check_whole(self, "patience")
        if not isinstance(self.first, Fire):
            raise InputError(f"Newton(first={short(self.first)}): give Fire().")
