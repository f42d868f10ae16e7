"""Methods of ``minimize`` as records of options: FIRE, gradient descent, Newton steps after FIRE.

A first-order method (:data:`Minimizer`) has the same functions in each record, which
:mod:`mdsens.relaxation._fire_loop` calls: ``functions`` (the minimizer's init and apply),
``force_limit``, ``positions`` and ``forces`` of a state, ``with_forces`` and ``at_stiffness``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from mdsens._util.errors import InputError
from mdsens._util.validation import check_positive, check_whole, short
from mdsens.mechanics.units import Limits
from mdsens.relaxation.jax_md import JaxMD, jax_md_minimize

__all__ = ["Fire", "GradientDescent", "Minimizer", "Newton"]

# Share of a measured stiffness that counts as the potential's stiffness, so that dt_max = 0.4 is
# 1.7 rad of the fastest vibration. Measured for packings in 2-D and 3-D and for Lennard-Jones
# glasses: the number of steps falls as this share is lowered to here and 10 % below, and rises at
# 20 % below.
MEASURED = 0.55


class FireState(NamedTuple):
    """State of FIRE.

    Attributes:
      inner: jax-md's state. Its forces, momenta and masses are multiplied by ``unit``.
      unit: a scalar, see ``Fire.functions``.
    """

    inner: Any
    unit: jax.Array


@dataclasses.dataclass(frozen=True)
class Fire:
    """jax-md's FIRE, with steps in the units of length and time of the system's potential.

    Bitzek et al., Phys. Rev. Lett. 97, 170201 (2006).

    Attributes:
      dt_start, dt_max: time step at the start and at most, in units of sqrt(10 m / k), k the
        potential's largest stiffness, so that the fastest vibration advances by dt sqrt(10): 0.4
        is 1.3 rad, where velocity Verlet becomes unstable at 2 rad. In a packing of unit harmonic
        discs k is about 10, and this is the time unit of jax-md. Once the particles have settled,
        the largest eigenvalue of the Hessian is measured, and 0.4 is 1.7 rad of its vibration: this
        takes between half the steps (Hertzian discs near jamming) and as many as before (a
        Lennard-Jones glass).
      max_step: the longest move of a particle in one step, as a fraction of the length scale of the
        potential (contact distance, or the distance of the minimum of the pair energy); it limits
        the first steps from starts where particles overlap.
      n_min, f_inc, f_dec, alpha_start, f_alpha: parameters of FIRE, as in the paper.
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

    def functions(
        self,
        forces: Callable[..., jax.Array],
        shift: Callable[..., jax.Array] | None,
        limits: Limits,
    ) -> tuple[Callable[[jax.Array], FireState], Callable[[FireState], FireState]]:
        """Return jax-md's functions (init, apply) on :class:`FireState`.

        The mass k / 10 brings the stiffest vibration to a fixed frequency, sqrt(10).

        jax-md adds 1e-6 to the square of the forces' norm, whatever their unit: below a norm of
        1e-3 its velocities no longer turn towards the forces, and with forces in newtons they never
        do. So forces, momenta and masses are multiplied by a number before jax-md gets them. This
        factor changes nothing in the trajectory and makes the 1e-6 negligible: in these units,
        round-off of the largest force that a particle may have is 1.

        Args:
          forces: forces (n, d) at positions (n, d).
          shift: positions after a displacement; None where ``apply`` is not called.
          limits: limits of the steps.
        """
        unit = 1.0 / (jnp.finfo(jnp.asarray(limits.strongest).dtype).eps * limits.strongest)

        def scaled_forces(positions: jax.Array, **options: Any) -> jax.Array:
            return unit * forces(positions, **options)

        init, apply = jax_md_minimize().fire_descent(
            scaled_forces,
            shift,
            dt_start=self.dt_start,
            dt_max=self.dt_max,
            n_min=self.n_min,
            f_inc=self.f_inc,
            f_dec=self.f_dec,
            alpha_start=self.alpha_start,
            f_alpha=self.f_alpha,
        )

        def start(positions: jax.Array) -> FireState:
            # jax-md stores step sizes as float16 where they fit. Steps give them another type,
            # which a compiled loop does not allow.
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
        """The force that moves a particle by ``longest`` in one time step of ``dt_max``."""
        # dt^2 f / m with the mass k / 10
        return longest * stiffness / (10.0 * self.dt_max**2)

    @staticmethod
    def positions(state: FireState) -> jax.Array:
        """Positions (n, d) of a state."""
        return state.inner.position

    @staticmethod
    def with_forces(state: FireState, forces: jax.Array) -> FireState:
        """The state with other forces, (n, d)."""
        return FireState(dataclasses.replace(state.inner, force=state.unit * forces), state.unit)

    @staticmethod
    def forces(state: FireState) -> jax.Array:
        """Forces (n, d) of a state, in the system's units."""
        return state.inner.force / state.unit

    @staticmethod
    def at_stiffness(state: FireState, stiffness: jax.Array) -> FireState:
        """The state with the mass that belongs to a measured largest stiffness."""
        mass = state.unit * MEASURED * stiffness / 10.0
        inner = dataclasses.replace(state.inner, mass=jnp.full_like(state.inner.mass, mass))
        return FireState(inner, state.unit)


# Positions and the forces there, (n, d) each.
DescentState: TypeAlias = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class GradientDescent:
    """jax-md's gradient descent.

    The method is slow. It serves to show that the derivative does not depend on the method that
    found the minimum.

    Attributes:
      step_size: step size in units of 1 / k, k the potential's largest stiffness; the method
        diverges above 2.
      max_step: as in :class:`Fire`.
    """

    step_size: float = 1.0
    max_step: float = 0.1

    def __post_init__(self) -> None:
        check_positive(self, ("step_size", "max_step"))

    def functions(
        self,
        forces: Callable[..., jax.Array],
        shift: Callable[..., jax.Array] | None,
        limits: Limits,
    ) -> tuple[Callable[[jax.Array], DescentState], Callable[[DescentState], DescentState]]:
        """A pair of functions (init, apply) on the state (positions, forces).

        The arguments are those of ``Fire.functions``.
        """

        # jax-md's state is the positions alone, and it would compute the forces of each step twice,
        # for the step and for the test of the tolerance: it gets those of the state.
        def stored_forces(R: jax.Array, force: jax.Array, **_: Any) -> jax.Array:
            return force

        step_size = self.step_size / limits.stiffness
        init, apply = jax_md_minimize().gradient_descent(stored_forces, shift, step_size)

        def start(positions: jax.Array) -> DescentState:
            return init(positions), forces(positions)

        def step(state: DescentState) -> DescentState:
            moved = apply(state[0], force=state[1])
            return moved, forces(moved)

        return start, step

    def force_limit(self, longest: jax.Array, stiffness: jax.Array) -> jax.Array:
        """The force that moves a particle by ``longest`` in one step."""
        return longest * stiffness / self.step_size

    @staticmethod
    def positions(state: DescentState) -> jax.Array:
        """Positions (n, d) of a state."""
        return state[0]

    @staticmethod
    def with_forces(state: DescentState, forces: jax.Array) -> DescentState:
        """The state with other forces, (n, d)."""
        return state[0], forces

    @staticmethod
    def forces(state: DescentState) -> jax.Array:
        """Forces (n, d) of a state."""
        return state[1]

    @staticmethod
    def at_stiffness(state: DescentState, stiffness: jax.Array) -> DescentState:
        """Return the state unchanged: the step size does not follow the measured stiffness."""
        return state


# The first-order methods.
Minimizer: TypeAlias = Fire | GradientDescent | JaxMD


@dataclasses.dataclass(frozen=True)
class Newton:
    """FIRE until the minimum is near, and Newton steps under a trust region where FIRE is slow.

    Near jamming the softest modes make FIRE slow and in the end stall, while a Newton step squares
    the distance to the minimum. Steps that do not lower the energy as their quadratic model
    promised are shortened. Where shortening does not help, FIRE goes on to a tenth of ``begin``
    before Newton steps are tried again. See :mod:`mdsens.relaxation._newton`.

    Attributes:
      first: the FIRE that finds the basin of the minimum.
      begin: largest force, relative to the mean force of a contact, at which Newton steps are
        tried. Far above 1e-3 contacts change with each step and Newton steps make little headway;
        lower it where another minimum is reached than by FIRE alone. Beyond 16,384 particles the
        force is smaller, in inverse proportion to their number.
      patience: steps of FIRE before Newton steps are tried. A quick relaxation ends before, without
        compiling them. Newton steps are not tried either where the force falls so fast that FIRE
        reaches the minimum in the time that they take.
    """

    first: Fire = Fire()
    begin: float = 3e-4
    patience: int = 1000

    def __post_init__(self) -> None:
        check_positive(self, ("begin",))
        check_whole(self, "patience")
        if not isinstance(self.first, Fire):
            raise InputError(f"Newton(first={short(self.first)}): give Fire().")
