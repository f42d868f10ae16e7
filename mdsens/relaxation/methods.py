"""Methods of ``minimize``, each a class of options: FIRE, gradient descent, and Newton steps.

Each first-order minimizer (:data:`Minimizer`) has the same functions, which
:mod:`mdsens.relaxation.fire_loop` calls. ``functions`` returns two functions: init makes a state
of the minimizer from positions, and apply takes one step. ``force_limit`` returns the upper limit
to which larger forces on a particle are shortened. ``positions`` and ``forces`` return the
positions and the forces in a state. ``with_forces`` returns a state with other forces, and
``at_stiffness`` a state with steps for another stiffness.
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

__all__ = ["DEEP", "Fire", "GradientDescent", "Minimizer", "Newton"]

# Share of a measured stiffness that counts as the potential's stiffness, so that dt_max = 0.4 is
# 1.7 rad of the fastest vibration. Measured for packings in 2-D and 3-D and for Lennard-Jones
# glasses: the number of steps falls as this share is lowered to here and 10 % below, and rises at
# 20 % below.
MEASURED = 0.55
# Size to which the force on a particle that overlaps deeply with another is shortened, in units of
# the largest force that a particle may have. The margin marks such a particle: it gets no momentum.
DEEP = 1.01


class FireState(NamedTuple):
    """State of the FIRE minimizer between two steps.

    Attributes:
      inner: the fields of the state in jax-md's FIRE by name, with forces, momenta and masses
        multiplied by ``unit``. A dict, and not the record of jax-md, so that compiled programs can
        be kept for later processes, which cannot import that record by its name.
      unit: this factor, a scalar. It makes negligible the 1e-6 that jax-md adds to the squared norm
        of the forces, see ``Fire.functions``.
    """

    inner: dict[str, Any]
    unit: jax.Array


@dataclasses.dataclass(frozen=True)
class Fire:
    """The FIRE minimizer, as implemented in jax-md, with steps in units of the potential.

    Bitzek et al., Phys. Rev. Lett. 97, 170201 (2006).

    Attributes:
      dt_start, dt_max: the first and the largest time step dt, in units of sqrt(10 m / k), with m
        the mass of a particle and k the largest stiffness of the potential. In one step the phase
        of the fastest vibration advances by dt sqrt(10): by 1.3 rad for dt = 0.4, where velocity
        Verlet becomes unstable at 2 rad. In a packing of unit harmonic discs k is about 10, so that
        this time unit is that of jax-md. Once the particles move slowly, the largest eigenvalue of
        the Hessian is measured, and the mass is set so that with dt = 0.4 the phase of the
        vibration with this stiffness advances by 1.7 rad in one step. The measurement halves the
        number of steps for Hertzian discs near jamming, and does not change the number for a
        Lennard-Jones glass.
      max_step: the longest move of a particle in one step, as a fraction of the length scale of the
        potential (contact distance, or the distance of the minimum of the pair energy). This limit
        matters in the first steps from a configuration in which particles overlap.
      n_min, f_inc, f_dec, alpha_start, f_alpha: parameters of FIRE, named as in the paper.
    """

    dt_start: float = 0.1
    dt_max: float = 0.4
    max_step: float = 0.1
    # From here on the values of the paper, which are the defaults of jax-md, too.
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
        shift: Callable[..., jax.Array],
        limits: Limits,
    ) -> tuple[Callable[[jax.Array], FireState], Callable[[FireState], FireState]]:
        """Return the functions (init, apply) of jax-md's FIRE, on states :class:`FireState`.

        ``init`` makes a state from positions (n, d), and ``apply`` takes one step. Particles have
        the mass k / 10, with k the largest stiffness of the potential, so that the stiffest
        vibration has the frequency sqrt(10).

        jax-md adds 1e-6 to the squared norm of the forces, whatever their unit. Where the norm is
        below 1e-3, the velocities in jax-md therefore no longer turn towards the forces; with
        forces in newtons they never do. So forces, momenta and masses are multiplied by one factor
        before jax-md gets them. The factor does not change the trajectory, and it makes the 1e-6
        negligible: in the multiplied units, round-off of the largest force that a particle may have
        is 1.

        A particle that overlaps deeply with another (its force is shortened to ``DEEP``) loses its
        momentum, and moves away from the other step by step. With its momentum the energy of the
        overlap would heat the system: 2,000 Lennard-Jones particles at random positions would need
        500 steps, in which the neighbor list is searched again every three, until this heat is
        gone, instead of 80.

        Args:
          forces: function from positions (n, d) to forces (n, d).
          shift: function from positions and displacements to the displaced positions.
          limits: the longest step and the largest force of a particle, and the potential's
            stiffness.
        """
        unit = 1.0 / (jnp.finfo(jnp.asarray(limits.strongest).dtype).eps * limits.strongest)

        def scaled_forces(positions: jax.Array, **options: Any) -> jax.Array:
            return unit * forces(positions, **options)

        minimizers = jax_md_minimize()
        init, apply = minimizers.fire_descent(
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
            first = init(positions, mass=jnp.asarray(unit * limits.stiffness / 10.0, dtype))
            sizes = {
                "dt": jnp.asarray(self.dt_start, dtype),
                "alpha": jnp.asarray(self.alpha_start, dtype),
            }
            return FireState({**vars(first), **sizes}, jnp.asarray(unit, dtype))

        def step(state: FireState) -> FireState:
            moved = apply(minimizers.FireDescentState(**state.inner))
            if limits.extreme is None:
                return FireState(vars(moved), state.unit)
            # squares spare a root for each particle in each step
            squared = jnp.sum(moved.force**2, axis=-1, keepdims=True)
            free = squared < (0.5 * (1.0 + DEEP) * state.unit * limits.strongest) ** 2
            momentum = jnp.where(free, moved.momentum, 0.0)
            return FireState({**vars(moved), "momentum": momentum}, state.unit)

        return start, step

    def force_limit(self, longest: jax.Array, stiffness: jax.Array) -> jax.Array:
        """Return the force that moves a particle by ``longest`` in one FIRE step of ``dt_max``.

        ``stiffness`` is the largest stiffness of the potential, which sets the mass of a particle.
        """
        # dt^2 f / m with the mass k / 10
        return longest * stiffness / (10.0 * self.dt_max**2)

    @staticmethod
    def positions(state: FireState) -> jax.Array:
        """Return the positions (n, d) in a state of FIRE."""
        return state.inner["position"]

    @staticmethod
    def with_forces(state: FireState, forces: jax.Array) -> FireState:
        """Return a state of FIRE with its forces replaced by ``forces``, (n, d)."""
        return FireState({**state.inner, "force": state.unit * forces}, state.unit)

    @staticmethod
    def forces(state: FireState) -> jax.Array:
        """Return the forces (n, d) in a state of FIRE, in the system's units."""
        return state.inner["force"] / state.unit

    @staticmethod
    def at_stiffness(state: FireState, stiffness: jax.Array) -> FireState:
        """Return a state of FIRE with the particle mass set from a measured stiffness.

        ``stiffness`` is the largest eigenvalue of the Hessian, in the system's units.
        """
        mass = state.unit * MEASURED * stiffness / 10.0
        # jax-md stores momenta, and these stay: the velocities change in inverse proportion to the
        # mass.
        masses = jnp.full_like(state.inner["mass"], mass)
        return FireState({**state.inner, "mass": masses}, state.unit)


# Positions and the forces there, (n, d) each.
DescentState: TypeAlias = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class GradientDescent:
    """Gradient descent, as implemented in jax-md.

    Gradient descent is slow. With this method one can show that the derivative of a minimum does
    not depend on how the minimum was found.

    Attributes:
      step_size: step size in units of 1 / k, with k the largest stiffness of the potential;
        gradient descent diverges above 2.
      max_step: the longest move of a particle in one step, as a fraction of the length scale of the
        potential (contact distance, or the distance of the minimum of the pair energy).
    """

    step_size: float = 1.0
    max_step: float = 0.1

    def __post_init__(self) -> None:
        check_positive(self, ("step_size", "max_step"))

    def functions(
        self,
        forces: Callable[..., jax.Array],
        shift: Callable[..., jax.Array],
        limits: Limits,
    ) -> tuple[Callable[[jax.Array], DescentState], Callable[[DescentState], DescentState]]:
        """Return the functions (init, apply) of gradient descent on states (positions, forces).

        ``init`` makes a state from positions (n, d), and ``apply`` takes one step.

        Args:
          forces: function from positions (n, d) to forces (n, d).
          shift: function from positions and displacements to the displaced positions.
          limits: limits of the steps, of which the stiffness of the potential is used.
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
        """Return the force that moves a particle by ``longest`` in one step of gradient descent.

        ``stiffness`` is the largest stiffness of the potential, which sets the step size.
        """
        return longest * stiffness / self.step_size

    @staticmethod
    def positions(state: DescentState) -> jax.Array:
        """Return the positions (n, d) in a state of gradient descent."""
        return state[0]

    @staticmethod
    def with_forces(state: DescentState, forces: jax.Array) -> DescentState:
        """Return a state of gradient descent with its forces replaced by ``forces``, (n, d)."""
        return state[0], forces

    @staticmethod
    def forces(state: DescentState) -> jax.Array:
        """Return the forces (n, d) in a state of gradient descent."""
        return state[1]

    @staticmethod
    def at_stiffness(state: DescentState, stiffness: jax.Array) -> DescentState:
        """Return the state unchanged, since gradient descent does not use a measured stiffness."""
        return state


# The first-order methods.
Minimizer: TypeAlias = Fire | GradientDescent | JaxMD


@dataclasses.dataclass(frozen=True)
class Newton:
    """Relaxation by FIRE until the minimum is near, and by Newton steps where FIRE is slow.

    Near jamming the softest modes make FIRE slow, and FIRE may stall in the end, while a Newton
    step squares the distance to the minimum. The Newton steps have a trust region: a step is
    shortened where the energy does not fall as the quadratic model of the step predicted. Where
    shortening does not help, FIRE continues until the force is a tenth of ``begin``, and then
    Newton steps are tried again. Each step is made by a factor of the Hessian, or by conjugate
    gradients where these are estimated to take less time, as for long ranges in three dimensions.
    See :mod:`mdsens.relaxation.newton`.

    Attributes:
      first: options of FIRE, which finds the basin of the minimum.
      begin: the largest force on a particle at which Newton steps are tried, in units of the mean
        force of a contact. Far above 1e-3, contacts change with each step and Newton steps make
        little progress. Lower this number where Newton steps lead to another minimum than FIRE
        alone. Beyond 16,384 particles, Newton steps are tried at a force that is smaller in inverse
        proportion to the number of particles.
      patience: number of steps of FIRE before Newton steps are tried. A relaxation that ends within
        these steps does not compile the Newton steps. Nor are Newton steps tried where the force
        falls so fast that FIRE reaches the minimum in less time than the Newton steps. For more
        than 1,024 atoms whose forces are costly, as in silicon, 0.15 times as many steps are taken.
    """

    first: Fire = Fire()
    begin: float = 3e-4
    patience: int = 1000

    def __post_init__(self) -> None:
        check_positive(self, ("begin",))
        check_whole(self, "patience")
        if not isinstance(self.first, Fire):
            raise InputError(f"Newton(first={short(self.first)}): give Fire() of ms.relaxation.")
