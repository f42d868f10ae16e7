"""What implicit.certify says of a derivative, against how wrong it is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems import RootProblem, root_problems

from mdsens.implicit import CG, Result, RootCertificate, certify
from mdsens.implicit.conditions import optimality, projections

PROBLEMS = [problem for problem in root_problems() if problem.null_space is None]


def shifted(tree, by: float):
    """The tree with each entry off by ``by`` of the largest, up and down in turn."""
    flat, unravel = ravel_pytree(tree)
    return unravel(flat + by * jnp.max(jnp.abs(flat)) * jnp.cos(3.0 * jnp.arange(flat.size) + 1))


def condition(problem: RootProblem):
    if not problem.fixed_point:
        return problem.F
    return lambda x, theta: jax.tree.map(jnp.subtract, x, problem.F(x, theta))


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_the_error_is_the_one_there_is(problem: RootProblem) -> None:
    """At 1e-5 from a root known in closed form: distance and error to 1 %,
    and the corrected value far better.
    """
    change = jnp.cos(2.0 * jnp.arange(problem.theta.size) + 1).reshape(problem.theta.shape)
    root, slope = jax.jvp(problem.answer, (problem.theta,), (change,))
    x = shifted(root, 1e-5)
    known: dict[str, Any] = {
        "symmetric": problem.symmetric,
        "positive_semidefinite": problem.positive_semidefinite,
    }
    found = jax.jit(lambda x: certify(condition(problem), x, (problem.theta,), (change,), **known))(
        x
    )
    exact, near, better = (ravel_pytree(tree)[0] for tree in (slope, found.value, found.corrected))
    off = float(jnp.linalg.norm(near - exact) / jnp.linalg.norm(near))
    away = float(
        jnp.linalg.norm(ravel_pytree(x)[0] - ravel_pytree(root)[0])
        / jnp.linalg.norm(ravel_pytree(x)[0])
    )
    assert Result(int(found.status)).good, found
    assert float(found.distance) == pytest.approx(away, rel=0.01)
    assert float(found.error) == pytest.approx(off, rel=0.01, abs=1e-13)
    assert (
        float(jnp.linalg.norm(better - exact)) <= 1e-3 * off * float(jnp.linalg.norm(exact)) + 1e-13
    )
    assert float(found.step_error) < 1e-3


def cubic(x, theta):
    return x**3 - theta


@jax.jit
def of_cubic(x) -> RootCertificate:
    return certify(cubic, jnp.asarray(x), (jnp.asarray(8.0),), (jnp.asarray(1.0),))


def test_at_the_root_nothing_is_off() -> None:
    found = of_cubic(2.0)
    assert int(found.status) == Result.CONVERGED
    assert float(found.error) == 0 and float(found.distance) == 0 and float(found.residual) == 0
    assert float(found.value) == pytest.approx(1 / 12, rel=1e-14)
    assert "CONVERGED" in repr(found) and "error" in repr(found)


def test_round_off_at_a_root_next_to_zero_is_no_distance() -> None:
    """A residual that is a sum of terms of order one:
    what a step leaves is noise, and x itself no measure of it.
    """
    terms = jnp.asarray(np.random.default_rng(0).normal(size=1000))

    def F(x, theta):
        return jnp.sum(terms * jnp.exp(x)) - jnp.sum(terms[::-1]) + 1 - theta

    starts = jnp.linspace(-1e-14, 1e-14, 100)
    found = jax.jit(jax.vmap(lambda x: certify(F, x, (jnp.asarray(1.0),), (jnp.asarray(1.0),))))(
        starts
    )
    assert float(jnp.max(found.step_error)) > 0.25  # by it alone, some were no roots
    assert np.all(np.asarray(found.status) == Result.CONVERGED)
    assert float(jnp.max(found.error)) < 1e-13


def test_far_from_a_root_it_is_none() -> None:
    """A step from 0.5 lands at 11 for a root of 2; at 1.8 it leads there,
    and the derivative is still a quarter off.
    """
    assert int(of_cubic(0.5).status) == Result.NOT_A_ROOT
    near = of_cubic(1.8)
    assert int(near.status) == Result.INACCURATE
    assert float(near.error) == pytest.approx(2 * (2**3 - 1.8**3) / (3 * 1.8**3), rel=1e-12)
    assert int(of_cubic(1.99).status) == Result.CONVERGED


def test_a_face_that_the_solver_has_not_reached_is_no_root() -> None:
    """min (x - 1.2)^2 / 2 in [0, 1]: at 0.7 the map does not see the wall yet,
    and its derivative is 1, not 0.
    """
    mapped = optimality.projected_gradient(
        lambda x, theta: 0.5 * (x - theta) ** 2,
        lambda x, theta: projections.box(x, 0.0, 1.0),
        step=0.5,
    )

    @jax.jit
    def at(x) -> RootCertificate:
        return certify(
            lambda x, theta: x - mapped(x, theta), x, (jnp.asarray(1.2),), (jnp.asarray(1.0),)
        )

    early, late = at(0.7), at(1.0)
    assert float(early.value) == pytest.approx(1) and float(early.error) == 0
    assert int(early.status) == Result.NOT_A_ROOT
    assert float(late.value) == 0 and int(late.status) == Result.CONVERGED


def test_what_no_step_can_take_off_is_no_root() -> None:
    """A spring on a line, pulled at both ends alike: it slides on whatever its length."""
    stiffness = jnp.array([[1.0, -1.0], [-1.0, 1.0]])

    def judged(pull: float) -> Result:
        def F(x, theta):
            return stiffness @ x - theta * jnp.array([1.0, -1.0]) + pull

        def off_sliding(x, theta):
            return lambda v: v - jnp.mean(v)

        one = (jnp.asarray(1.0),)
        return Result(
            int(
                certify(
                    F, jnp.array([0.5, -0.5]), one, one, symmetric=True, null_space=off_sliding
                ).status
            )
        )

    assert judged(0.3) is Result.NOT_A_ROOT
    assert judged(1e-13) is Result.CONVERGED


def test_members_of_a_batch_each_have_a_status() -> None:
    found = jax.jit(jax.vmap(of_cubic))(jnp.array([2.0, 1.8, 0.5]))
    assert [Result(int(s)).name for s in found.status] == ["CONVERGED", "INACCURATE", "NOT_A_ROOT"]
    assert "NOT_A_ROOT" in repr(found)


def test_a_singular_condition_says_so() -> None:
    found = certify(
        lambda x, theta: jnp.ones((2, 2)) @ x - theta,
        jnp.ones(2),
        (jnp.ones(2),),
        (jnp.array([1.0, -1.0]),),
    )
    assert not Result(int(found.status)).good and int(found.status) == int(found.solve.status)


def test_what_was_declared_is_used() -> None:
    known: dict[str, Any] = {"solve": CG(), "symmetric": True, "positive_semidefinite": True}
    found = certify(cubic, jnp.asarray(1.99), (jnp.asarray(8.0),), (jnp.asarray(1.0),), **known)
    assert found.solve.solver.startswith("CG")
    assert float(found.corrected) == pytest.approx(1 / 12, rel=2e-4)


def test_the_free_directions_are_left_alone() -> None:
    """A dimer on a line, whose center nothing holds:
    the step opens the bond to its length and does not move it.
    """

    def force(x, length):
        stretch = jnp.log((x[1] - x[0]) / length)
        return jnp.array([-1.0, 1.0]) * stretch

    found = certify(
        force,
        jnp.array([0.3, 1.29]),
        (jnp.asarray(1.0),),
        (jnp.asarray(1.0),),
        symmetric=True,
        null_space=lambda x, length: lambda v: v - jnp.mean(v),
    )
    assert Result(int(found.status)).good
    np.testing.assert_allclose(found.step, [-0.005, 0.005], rtol=0.02)
    np.testing.assert_allclose(found.corrected, [-0.5, 0.5], rtol=1e-3)


def test_single_precision_is_certified_in_single_precision() -> None:
    """With x64 switched on, as in these tests, a number of float64 would change the type of F."""
    theta = jnp.asarray(2.0, jnp.float32)
    x = jnp.asarray([1.41421, 1.4143], jnp.float32)
    found = certify(lambda x, t: x**2 - t, x, (theta,), (jnp.ones_like(theta),))
    assert found.value.dtype == jnp.float32
    np.testing.assert_allclose(found.value, 0.5 / 2.0**0.5, rtol=1e-4)
