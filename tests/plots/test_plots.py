"""Figures: what is drawn where. How they look is for the eye;
these hold the geometry and the refusals.
"""

import dataclasses
import io
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.quiver import Quiver, QuiverKey

import mdsens as ms
from mdsens.plots import (
    derivative_test,
    histogram,
    scalar_map,
    sensitivity_map,
    stiffness_spectrum,
)
from mdsens.sensitivity.results import Displacement, ParameterGradient
from mdsens.verify import DerivativeTest

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def pyplot():
    from matplotlib import pyplot

    pyplot.close("all")  # those that another test left open
    yield pyplot
    pyplot.close("all")


def minimum(system: ms.System) -> ms.Equilibrium:
    """A system taken as relaxed: a picture does not ask whether it is."""
    zero = jnp.zeros(())
    return ms.Equilibrium(system, jnp.asarray(ms.Status.CONVERGED.value), zero, zero, 0.0, 1e-12)


def answer(
    vectors: Any,
    rattlers: Any = None,
    nonaffine: Any = None,
    status: ms.Status = ms.Status.CONVERGED,
) -> Displacement:
    value = jnp.asarray(vectors)
    zero = jnp.zeros(())
    stats = ms.SolveStats(jnp.asarray(status.value), zero, zero, zero, "none")
    loose = jnp.zeros(len(value), bool) if rattlers is None else jnp.asarray(rattlers)
    return Displacement(
        value=value,
        stats=stats,
        nonaffine=value if nonaffine is None else jnp.asarray(nonaffine),
        max_force=zero,
        rattlers=loose,
    )


def discs(positions: Any, box: Any, sigma: Any, species: Any = None) -> ms.Equilibrium:
    potential = ms.potentials.soft_sphere()
    params = {"sigma": sigma, "epsilon": 1.0, "alpha": 2.0}
    return minimum(ms.System.create(np.asarray(positions, float), box, potential, params, species))


def axes() -> Axes:
    return Figure().subplots()


def circles(ax: Axes) -> list[Any]:
    return [artist for artist in ax.collections if isinstance(artist, EllipseCollection)]


def centers(ax: Axes) -> np.ndarray:
    return np.concatenate([np.asarray(group.get_offsets()) for group in circles(ax)])


def arrows(ax: Axes) -> tuple[np.ndarray, np.ndarray]:
    """Tails and vectors drawn."""
    found: list[Any] = [artist for artist in ax.collections if isinstance(artist, Quiver)]
    if not found:
        return np.zeros((0, 2)), np.zeros((0, 2))
    tails = np.concatenate([np.asarray(quiver.get_offsets()) for quiver in found])
    return tails, np.concatenate([np.stack([quiver.U, quiver.V], axis=1) for quiver in found])


def scale_arrow(ax: Axes) -> Any:
    (key,) = [artist for artist in ax.get_children() if isinstance(artist, QuiverKey)]
    return key


def texts(ax: Axes) -> list[str]:
    legend = ax.get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


# An interior disc, one across the left edge, one across a corner: 1 + 2 + 4 circles.
EDGES = [[5.0, 5.0], [0.2, 5.0], [9.9, 9.9]]


def test_returns_axes_and_draws_on_the_one_given(pyplot: Any):
    eq, r = discs(EDGES, 10.0, 1.0), answer(np.ones((3, 2)))
    ax = axes()
    assert sensitivity_map(eq, r, ax) is ax
    assert pyplot.get_fignums() == []
    drawn = sensitivity_map(eq, r)
    assert isinstance(drawn, Axes)
    assert [pyplot.figure(number) for number in pyplot.get_fignums()] == [
        drawn.get_figure(root=True)
    ]


def test_circles_have_their_size_and_the_images_that_reach_into_the_cell():
    ax = sensitivity_map(discs(EDGES, 10.0, 1.0), answer(np.ones((3, 2))), axes())
    expected = [
        (-0.1, -0.1),
        (-0.1, 9.9),
        (0.2, 5.0),
        (5.0, 5.0),
        (9.9, -0.1),
        (9.9, 9.9),
        (10.2, 5.0),
    ]
    found = sorted(map(tuple, centers(ax).round(4)))
    np.testing.assert_allclose(found, expected)
    for group in circles(ax):
        np.testing.assert_allclose(group.get_widths(), 1.0)
        assert group.get_clip_path() is not None
    assert ax.get_aspect() == 1.0


def test_positions_are_wrapped_into_a_sheared_cell():
    cell = np.array([[10.0, 4.0], [0.0, 8.0]])
    inside = np.array([[0.5, 0.5], [0.3, 0.6]]) @ cell.T
    strayed = inside + np.array([[1, -2], [-1, 0]]) @ cell.T
    ax = sensitivity_map(discs(strayed, cell, 1.0), answer(np.ones((2, 2))), axes())
    np.testing.assert_allclose(centers(ax), inside, rtol=1e-5)
    outline = np.asarray(ax.patches[0].get_path().vertices)
    np.testing.assert_allclose(outline[:4], [[0, 0], [10, 0], [14, 8], [4, 8]])


def test_arrows_point_along_the_response_to_one_scale():
    vectors = np.array([[1.0, 0.0], [0.0, -2.0], [0.5, 0.5]])
    eq = discs([[3.0, 3.0], [6.0, 6.0], [3.0, 6.0]], 10.0, 1.0)
    tails, drawn = arrows(sensitivity_map(eq, answer(vectors), axes()))
    np.testing.assert_allclose(tails, eq.positions)
    ratio = drawn[0, 0] / vectors[0, 0]
    np.testing.assert_allclose(drawn, ratio * vectors, rtol=1e-5, atol=1e-6)
    assert 1.0 < np.linalg.norm(drawn, axis=1).max() < 2.0  # about 1.5 diameters
    _, fixed = arrows(sensitivity_map(eq, answer(vectors), axes(), scale=0.25))
    np.testing.assert_allclose(fixed, 0.25 * vectors, rtol=1e-5, atol=1e-6)


def test_an_arrow_that_leaves_the_cell_comes_in_at_the_other_side():
    eq = discs([[9.5, 5.0], [5.0, 5.0]], 10.0, 1.0)
    tails, drawn = arrows(sensitivity_map(eq, answer([[1.0, 0.0], [0.0, 0.1]]), axes(), scale=1.0))
    across = tails[drawn[:, 0] == 1.0]
    np.testing.assert_allclose(
        across[np.argsort(across[:, 0])], [[-0.5, 5.0], [9.5, 5.0]], rtol=1e-5
    )


def test_scale_arrow_says_its_value():
    eq = discs([[3.0, 3.0], [6.0, 6.0]], 10.0, 1.0)
    ax = sensitivity_map(eq, answer([[2.3, 0.0], [0.0, 2.3]]), axes(), label="|u|")
    key = scale_arrow(ax)
    assert key.text.get_text() == "|u| = 2"
    _, drawn = arrows(ax)
    assert key.U / 2.0 == pytest.approx(drawn[0, 0] / 2.3, rel=1e-5)


def test_part_chooses_what_is_drawn_and_the_label_tells():
    eq = discs([[3.0, 3.0], [6.0, 6.0]], 10.0, 1.0)
    r = answer([[1.0, 0.0], [1.0, 0.0]], nonaffine=[[0.0, 1.0], [0.0, 1.0]])
    parts: list[tuple[Any, int, bool]] = [("nonaffine", 1, True), ("value", 0, False)]
    for part, column, index in parts:
        ax = sensitivity_map(eq, r, axes(), part=part)
        assert (arrows(ax)[1][:, column] > 0).all()
        key = scale_arrow(ax)
        assert ("na" in key.text.get_text()) == index


def test_rattlers_are_hollow_dashed_and_without_arrow():
    eq = discs([[3.0, 3.0], [6.0, 6.0], [3.0, 6.0]], 10.0, 1.0)
    ax = sensitivity_map(eq, answer(np.ones((3, 2)), [False, True, False]), axes())
    (hollow,) = [group for group in circles(ax) if group.get_linestyle()[0][1] is not None]
    np.testing.assert_allclose(hollow.get_offsets(), [[6.0, 6.0]])
    np.testing.assert_allclose(hollow.get_facecolor()[:, :3], [to_rgb("white")])
    np.testing.assert_allclose(arrows(ax)[0], [[3.0, 3.0], [3.0, 6.0]])
    assert "rattler" in texts(ax)


def test_rattlers_of_plain_vectors_are_found():
    eq = discs([[3.0, 3.0], [6.0, 6.0]], 10.0, 1.0)  # nothing touches
    ax = sensitivity_map(eq, np.ones((2, 2)), axes())
    assert len(arrows(ax)[0]) == 0
    assert texts(ax) == ["rattler"]


def test_colors_are_the_species_or_the_diameters():
    spots = [[2.0, 2.0], [5.0, 5.0], [8.0, 8.0]]
    r = answer(np.ones((3, 2)))
    by_species = sensitivity_map(discs(spots, 10.0, [1.0, 0.6], np.array([0, 1, 0])), r, axes())
    fills = circles(by_species)[0].get_facecolor()
    assert (fills[0] == fills[2]).all() and (fills[0] != fills[1]).any()
    assert texts(by_species) == ["species 0", "species 1"]
    by_diameter = sensitivity_map(discs(spots, 10.0, [1.0, 0.6, 0.6]), r, axes())
    assert texts(by_diameter) == [r"$\sigma=0.6$", r"$\sigma=1$"]
    alike = sensitivity_map(discs(spots, 10.0, 1.0), r, axes())
    assert alike.get_legend() is None


def test_many_diameters_get_a_color_map():
    spots = np.stack([np.arange(10.0), np.arange(10.0)], axis=1) + 0.5
    sigma = np.linspace(0.5, 1.0, 10)
    ax = sensitivity_map(discs(spots, 10.0, sigma), answer(np.ones((10, 2))), axes())
    bar: Any = ax.child_axes[0]
    assert [text.get_text() for text in bar.texts] == [r"$\sigma$ 0.5", "1"]
    (group,) = circles(ax)
    assert len(np.unique(np.asarray(group.get_facecolor()), axis=0)) == 10


def test_a_potential_without_diameters_takes_the_distance_of_neighbors():
    spots = np.array([[0.0, 0.0], [1.3, 0.0], [2.6, 0.0]])
    potential = ms.potentials.from_pair(
        lambda r, k: k * (r - 1.3) ** 2 * (r < 2), parameters=("k",), cutoff=2.0
    )
    eq = minimum(ms.System.create(spots, None, potential, {"k": 1.0}))
    ax = sensitivity_map(eq, answer(np.ones((3, 2))), axes())
    np.testing.assert_allclose(circles(ax)[0].get_widths(), 1.3)
    assert len(ax.patches) == 0  # open boundaries have no cell


def test_open_boundaries_leave_room_for_the_arrows():
    eq = discs([[0.0, 0.0], [1.0, 0.0]], None, 1.0)
    ax = sensitivity_map(eq, answer([[-1.0, 0.0], [1.0, 0.0]]), axes(), scale=5.0)
    left, right = ax.get_xlim()
    assert left < -5.0 and right > 6.0


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_three_dimensions_are_seen_along_a_cell_vector_from_its_tip(axis: int):
    spots = np.array([[2.0, 3.0, 4.0], [6.0, 7.0, 5.0]])
    vectors = np.array([[0.1, 0.2, 0.3], [0.3, 0.1, 0.2]])
    ax = sensitivity_map(discs(spots, 10.0, 1.0), answer(vectors), axes(), axis=axis, scale=1.0)
    plane = [(axis + 1) % 3, (axis + 2) % 3]
    order = np.argsort(spots[:, axis])  # from the rear to the front
    np.testing.assert_allclose(centers(ax), spots[order][:, plane], rtol=1e-5)
    np.testing.assert_allclose(arrows(ax)[1], vectors[order][:, plane], rtol=1e-5)


def test_slab_keeps_a_part_of_the_depth():
    spots = np.array([[2.0, 3.0, 1.0], [6.0, 7.0, 9.0]])
    ax = sensitivity_map(discs(spots, 10.0, 1.0), answer(np.ones((2, 3))), axes(), slab=(0.5, 1.0))
    np.testing.assert_allclose(centers(ax), [[6.0, 7.0]])


def test_no_response_draws_no_arrows():
    ax = sensitivity_map(discs(EDGES, 10.0, 1.0), answer(np.zeros((3, 2))), axes())
    assert len(arrows(ax)[0]) == 0


def test_a_response_of_one_particle_alone_is_drawn():
    spots = np.stack([np.arange(30.0), np.arange(30.0)], axis=1) + 0.5
    vectors = np.zeros((30, 2))
    vectors[4, 0] = 1.0
    _, drawn = arrows(sensitivity_map(discs(spots, 30.0, 1.0), answer(vectors), axes()))
    assert drawn[:, 0].max() == pytest.approx(1.5)


def test_a_bad_status_stands_in_the_title():
    eq = discs(EDGES, 10.0, 1.0)
    assert sensitivity_map(eq, answer(np.ones((3, 2))), axes()).get_title() == ""
    bad = answer(np.ones((3, 2)), status=ms.Status.STAGNATED)
    assert sensitivity_map(eq, bad, axes(), title="a packing").get_title() == "a packing, STAGNATED"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"part": "affine"}, "`part` is 'affine'"),
        ({"scale": 0.0}, "`scale` is 0.0"),
        ({"slab": (0.0, 0.5)}, "`slab` is for 3-D"),
        ({"slab": (0.5, 0.5)}, "two fractions"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], says: str):
    with pytest.raises(ms.InputError, match=says):
        sensitivity_map(discs(EDGES, 10.0, 1.0), answer(np.ones((3, 2))), axes(), **options)


def test_bad_inputs_are_refused_and_leave_no_figure(pyplot: Any):
    eq, r = discs(EDGES, 10.0, 1.0), answer(np.ones((3, 2)))
    batch = jax.tree.map(lambda leaf: jnp.stack([jnp.asarray(leaf)] * 2), eq)
    evidence = {"stats": r.stats, "max_force": r.max_force, "rattlers": r.rattlers}
    adjoint = ParameterGradient(value={"sigma": jnp.ones(())}, **evidence)
    refused: list[tuple[Any, Any, str]] = [
        (batch, r, "batch of 2"),
        (eq.system, r, "`eq` is a System"),
        (eq, adjoint, "vjp"),
        (eq, answer(np.ones((4, 2))), r"shape \(4, 2\)"),
        (eq, answer(np.ones((3, 2, 2))), "jacobian"),
        (eq, answer(np.full((3, 2), np.nan)), "not finite"),
    ]
    for at, given, says in refused:
        with pytest.raises(ms.InputError, match=says):
            sensitivity_map(at, given)
    in_space = discs([[2.0, 3.0, 1.0]], 10.0, 1.0)
    views: list[tuple[dict[str, Any], str]] = [
        ({"axis": 3}, "`axis` is 3"),
        ({"slab": (0.5, 1.0)}, "no particle"),
    ]
    for options, says in views:
        with pytest.raises(ms.InputError, match=says):
            sensitivity_map(in_space, answer(np.ones((1, 3))), **options)
    assert pyplot.get_fignums() == []


def test_a_real_packing_makes_a_small_file():
    rng = np.random.default_rng(0)
    species = (np.arange(32) >= 16).astype(int)
    box = ms.PackingFraction(0.98)
    params = {"sigma": [1.0, 0.6], "epsilon": 1.0, "alpha": 2.0}
    system = ms.System.create(
        rng.random((32, 2)) * 4.2, box, ms.potentials.soft_sphere(), params, species
    )
    lin = ms.linearize(
        ms.minimize(system, tolerance=1e-9 if jax.config.read("jax_enable_x64") else 1e-4)
    )
    r = ms.jvp(lin, {"sigma": jnp.array([0.0, 1.0])}, throw=False)
    ax = sensitivity_map(lin, r)
    file = io.BytesIO()
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.savefig(file, dpi=150)
    assert 10_000 < len(file.getvalue()) < 300_000
    column = sensitivity_map(lin, ms.jacobian(lin, "sigma", throw=False).nonaffine[..., 1], axes())
    np.testing.assert_allclose(arrows(column)[1], arrows(ax)[1], rtol=1e-3, atol=1e-3)


def test_twenty_thousand_particles_are_drawn_by_few_artists():
    spots = np.random.default_rng(0).random((20_000, 2)) * 150.0
    ax = sensitivity_map(discs(spots, 150.0, 1.0), answer(spots - 75.0), axes())
    assert len(ax.collections) == 2


# ── a derivative's test ──


def vee(radius: float = 2e-4, failed: int = 0) -> DerivativeTest:
    """Round-off 1e-15 / t and truncation 1e5 t^2; contacts change beyond the radius;
    the first steps did not relax.
    """
    t = np.geomspace(1e-9, 1e-2, 15)
    errors = np.where(t > radius, 0.5, 1e-13 / t + 1e5 * t**2)
    statuses = [ms.Status.MAX_STEPS_REACHED] * failed + [ms.Status.CONVERGED] * (15 - failed)
    return DerivativeTest(t, errors, t > radius, radius, tuple(statuses))


def drawn(ax: Axes) -> dict[str, np.ndarray]:
    """Marked points by the name in the legend, (k, 2)."""
    named = {
        str(line.get_label()): line
        for line in ax.lines
        if not str(line.get_label()).startswith("_")
    }
    return {name: np.stack(line.get_data(), axis=1) for name, line in named.items()}


def test_errors_stand_over_their_steps_and_changed_contacts_apart():
    test, ax = vee(), axes()
    assert derivative_test(test, ax) is ax
    assert ax.get_xscale() == ax.get_yscale() == "log"
    points = drawn(ax)
    assert list(points) == ["same contacts", "contacts changed"] == texts(ax)
    kept = test.sound
    np.testing.assert_allclose(
        points["same contacts"], np.stack([test.steps, test.errors], axis=1)[kept]
    )
    np.testing.assert_allclose(
        points["contacts changed"], np.stack([test.steps, test.errors], axis=1)[~kept]
    )
    (x0, x1), (y0, y1) = ax.get_xlim(), ax.get_ylim()
    assert (
        x0 < test.steps.min()
        and test.steps.max() < x1
        and y0 < test.errors.min()
        and test.errors.max() < y1
    )


def test_the_radius_is_a_marked_line_where_it_is_in_sight():
    def lines(test: DerivativeTest) -> list[float]:
        ax = derivative_test(test, axes())
        named = [text.get_text() for text in ax.texts]
        found = [
            float(np.asarray(line.get_xdata())[0])
            for line in ax.lines
            if len(np.unique(line.get_xdata())) == 1
        ]
        assert ("first contact change" in named) == bool(found)
        return found

    assert lines(vee(2e-4)) == [2e-4]
    assert lines(vee(np.inf)) == []


def test_the_slope_is_written_where_it_shows():
    assert any("t^{2.0}" in text.get_text() for text in derivative_test(vee(), axes()).texts)
    assert not any("t^" in text.get_text() for text in derivative_test(vee(2e-7), axes()).texts)


def test_steps_that_did_not_relax_are_crossed_and_named():
    ax = derivative_test(vee(failed=2), axes(), title="a packing")
    assert len(drawn(ax)["not relaxed"]) == 2
    assert ax.get_title() == "a packing, MAX_STEPS_REACHED"
    assert derivative_test(vee(), axes()).get_title() == ""


def test_an_error_of_zero_is_drawn_too():
    test = dataclasses.replace(vee(), errors=np.zeros(15))
    assert (drawn(derivative_test(test, axes()))["same contacts"][:, 1] > 0).all()


def test_a_test_makes_its_own_figure(pyplot: Any):
    with pytest.raises(
        ms.InputError, match=r"`test` is a float: give what ms.verify.derivative_test returns"
    ):
        derivative_test(1.0)  # type: ignore[arg-type]
    assert pyplot.get_fignums() == []
    ax = derivative_test(vee())
    assert [pyplot.figure(number) for number in pyplot.get_fignums()] == [ax.get_figure(root=True)]


# ── the softest modes ──

VALUES = np.array([0.3, -2e-16, 0.004, 1e-16, -0.02, 5.0])


def test_stiffness_rises_with_the_mode_and_kinds_are_told_apart():
    ax = axes()
    assert stiffness_spectrum(VALUES, ax) is ax
    points = drawn(ax)
    assert (
        list(points)
        == ["2 of no stiffness", r"1 negative, at $|\lambda|$", "3 stable"]
        == texts(ax)
    )
    np.testing.assert_allclose(points["3 stable"], [[4, 0.004], [5, 0.3], [6, 5.0]])
    np.testing.assert_allclose(points[r"1 negative, at $|\lambda|$"], [[1, 0.02]])
    zero = points["2 of no stiffness"]
    assert (
        zero[:, 0].tolist() == [2, 3]
        and (zero[:, 1] < 0.004).all()
        and (zero[:, 1] > ax.get_ylim()[0]).all()
    )
    named = dict(
        zip(ax.get_yticks(), [label.get_text() for label in ax.get_yticklabels()], strict=True)
    )
    assert named[zero[0, 1]] == "0"
    assert all(tick > zero[0, 1] for tick in [*list(named)[1:], *ax.get_yticks(minor=True)])


def test_null_says_what_counts_as_zero():
    assert "1 of no stiffness" in drawn(stiffness_spectrum([1e-7, 1.0], axes(), null=1e-6))
    assert drawn(stiffness_spectrum([1e-7, 1.0], axes())).keys() == {"2 stable"}
    assert drawn(stiffness_spectrum([0.0, 1e-20, 1.0], axes(), null=0.0)).keys() == {
        "1 of no stiffness",
        "2 stable",
    }
    assert drawn(stiffness_spectrum(np.zeros(3), axes())).keys() == {"3 of no stiffness"}


def test_participation_colors_the_modes_in_their_order():
    ratios = np.array([0.3, 0.9, 0.1, 0.9, 0.5, 0.6])
    figure = Figure()
    ax = stiffness_spectrum(VALUES, figure.subplots(), participation=ratios)
    (dots,) = ax.collections
    np.testing.assert_allclose(np.asarray(dots.get_offsets()), [[4, 0.004], [5, 0.3], [6, 5.0]])
    np.testing.assert_allclose(np.asarray(dots.get_array()), [0.1, 0.3, 0.6])
    assert dots.get_clim() == (0.0, 1.0)
    assert figure.axes[1].get_ylabel() == "participation ratio"


@pytest.mark.parametrize(
    "values", [[0.12, 0.2], [0.5], np.geomspace(1e-9, 1e9, 50), np.linspace(0.0, 9.0, 300)]
)
def test_every_spectrum_has_a_decade_and_named_ticks(values: Any):
    ax = stiffness_spectrum(values, axes(), null=0.0)
    bottom, top = ax.get_ylim()
    assert top / bottom > 9.0
    named = [t for t in ax.get_yticks() if bottom <= t <= top]
    assert 2 <= len(named) <= 10


@pytest.mark.parametrize(
    ("values", "options", "says"),
    [
        ([], {}, r"`given` has shape \(0,\)"),
        (np.eye(2), {}, r"`given` has shape \(2, 2\)"),
        ([1.0, np.nan], {}, "finite"),
        ([1.0, 2.0], {"participation": [0.5]}, r"`participation` has shape \(1,\)"),
        ([1.0], {"participation": [1.5]}, "outside 0 to 1"),
        ([1.0], {"null": -1.0}, "`null` is -1.0"),
    ],
)
def test_bad_spectra_are_refused_and_leave_no_figure(
    values: Any, options: Any, says: str, pyplot: Any
):
    with pytest.raises(ms.InputError, match=says):
        stiffness_spectrum(values, **options)
    assert pyplot.get_fignums() == []


def test_the_curves_are_saved_small():
    for ax in (derivative_test(vee()), stiffness_spectrum(VALUES, participation=np.full(6, 0.5))):
        file = io.BytesIO()
        figure = ax.get_figure(root=True)
        assert figure is not None
        figure.savefig(file, dpi=150)
        assert 8_000 < len(file.getvalue()) < 100_000


def test_importing_the_module_leaves_matplotlib_alone():
    done = subprocess.run(
        [sys.executable, "-c", "import sys, mdsens.plots; sys.exit('matplotlib' in sys.modules)"],
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_modes_of_a_certificate_are_drawn_as_they_are():
    eq = ms.minimize(ms.load_system("dimer"))
    ax = stiffness_spectrum(ms.certify(eq), axes())
    np.testing.assert_array_equal(
        ax.collections[0].get_offsets(), [[1.0, ms.certify(eq).stiffness_min]]
    )
    with pytest.raises(ms.InputError, match="a Equilibrium: give a Certificate"):
        stiffness_spectrum(eq, axes())


# ── on a dark background ──


def test_a_dark_background_has_light_arrows_on_dark_particles():
    eq, r = discs(EDGES, 10.0, [1.0, 0.9, 1.0]), answer(np.ones((3, 2)), [False, True, False])
    luma = [0.299, 0.587, 0.114]
    seen = {}
    for paper in ("white", "black"):
        ax = sensitivity_map(eq, r, Figure(facecolor=paper).subplots())
        quiver: Any = next(artist for artist in ax.collections if isinstance(artist, Quiver))
        full, hollow = circles(ax)[0], circles(ax)[-1]
        np.testing.assert_allclose(hollow.get_facecolor()[:, :3], [to_rgb(paper)])
        seen[paper] = (
            float(np.dot(quiver.get_facecolor()[0][:3], luma)),
            float(np.dot(full.get_facecolor()[0][:3], luma)),
        )
    (arrow, disc), (light_arrow, dark_disc) = seen["white"], seen["black"]
    assert arrow < 0.2 < 0.6 < disc and dark_disc < 0.5 < 0.8 < light_arrow


def test_pyplots_own_style_is_followed(pyplot: Any):
    with pyplot.style.context("dark_background"):
        ax = sensitivity_map(discs(EDGES, 10.0, 1.0), answer(np.ones((3, 2))), title="a packing")
        curve = derivative_test(vee())
    assert min(to_rgb(ax.title.get_color())) > 0.8
    (name,) = [text for text in curve.texts if text.get_text() == "first contact change"]
    assert min(to_rgb(name.get_color())) > 0.8


# ── what was changed, and the edge of the cell ──


def rings(ax: Axes) -> list[Any]:
    return [group for group in circles(ax) if len(group.get_facecolor()) == 0]


@pytest.mark.parametrize(("changed", "count"), [(0, 1), ([0, 1], 3), (np.int64(2), 4)])
def test_changed_particles_have_a_ring_with_their_images(changed: Any, count: int):
    eq, r = discs(EDGES, 10.0, 1.0), answer(np.ones((3, 2)))
    ax = sensitivity_map(eq, r, axes(), changed=changed)
    (ring,) = rings(ax)
    assert len(np.asarray(ring.get_offsets())) == count and texts(ax) == ["changed"]
    assert not rings(sensitivity_map(eq, r, axes()))


@pytest.mark.parametrize("changed", [3, -1, 0.5, [[0, 1]], "0"])
def test_an_index_of_no_particle_is_refused(changed: Any):
    with pytest.raises(ms.InputError, match="index of a particle from 0 to 2"):
        sensitivity_map(discs(EDGES, 10.0, 1.0), answer(np.ones((3, 2))), axes(), changed=changed)


def test_an_arrow_across_a_corner_is_drawn_in_the_cell_that_it_crosses():
    # it leaves upwards, and comes in from the left only above the cell
    eq = discs([[9.9, 9.7], [5.0, 5.0]], 10.0, 1.0)
    tails, drawn = arrows(sensitivity_map(eq, answer([[1.0, 1.0], [0.0, 0.1]]), axes(), scale=1.0))
    across = tails[drawn[:, 0] == 1.0].round(4)
    expected = [(-0.1, -0.3), (-0.1, 9.7), (9.9, -0.3), (9.9, 9.7)]
    np.testing.assert_allclose(sorted(map(tuple, across)), expected, rtol=1e-5)


def test_a_layout_leaves_room_for_the_row_of_the_scale_arrow():
    figure = Figure(figsize=(3.0, 3.0), layout="constrained")
    eq = discs(EDGES, 10.0, 1.0, np.array([0, 1, 2]))
    ax = sensitivity_map(eq, answer(np.ones((3, 2))), figure.subplots())
    figure.savefig(io.BytesIO(), dpi=100)
    key = scale_arrow(ax)
    assert key.text.get_window_extent().y0 > 0


# ── one number for each particle ──


def colorbar(ax: Axes) -> Any:
    return ax.child_axes[0]


def test_colors_are_the_values_and_white_is_zero(pyplot: Any):
    eq = discs(EDGES, 10.0, 1.0)
    ax = axes()
    assert scalar_map(eq, [0.0, -2.0, 1.0], ax, label="$dG$", changed=1, title="shear") is ax
    full, ring = circles(ax)
    at = np.asarray(full.get_offsets()).round(4).tolist()
    fills = np.asarray(full.get_facecolor())[:, :3]
    middle, negative, positive = (fills[at.index(spot)] for spot in EDGES)
    assert middle.min() > 0.95 and np.ptp(middle) < 0.02
    assert negative[2] > 2 * negative[0] and positive[0] > positive[2]
    assert len(np.asarray(ring.get_offsets())) == 2 and texts(ax) == ["changed"]
    bar = colorbar(ax)
    assert bar.get_ylabel() == "$dG$" and bar.get_ylim() == (-2.0, 2.0)
    assert ax.get_title() == "shear" and pyplot.get_fignums() == []
    assert isinstance(scalar_map(eq, [0.0, -2.0, 1.0]), Axes)
    assert len(pyplot.get_fignums()) == 1


def test_a_limit_is_the_end_of_the_color_map_and_nan_is_hollow():
    eq = discs([[3.0, 3.0], [6.0, 6.0], [3.0, 6.0]], 10.0, 1.0)
    ax = scalar_map(eq, [np.nan, 5.0, 1.0], axes(), limit=1.0)
    full, hollow = circles(ax)
    fills = np.asarray(full.get_facecolor())
    np.testing.assert_allclose(fills[0], fills[1])
    np.testing.assert_allclose(np.asarray(hollow.get_offsets()), [[3.0, 3.0]])
    assert hollow.get_linestyle()[0][1] is not None
    nothing = scalar_map(eq, np.zeros(3), axes())
    assert colorbar(nothing).get_ylim() == (-1.0, 1.0)


def test_values_in_three_dimensions_do_not_fade():
    spots = np.array([[2.0, 3.0, 1.0], [6.0, 7.0, 9.0]])
    ax = scalar_map(discs(spots, 10.0, 1.0), [1.0, 1.0], axes())
    fills = np.concatenate([np.asarray(group.get_facecolor()) for group in circles(ax)])
    assert len(np.unique(fills, axis=0)) == 1
    thin = scalar_map(discs(spots, 10.0, 1.0), [1.0, 1.0], axes(), slab=(0.5, 1.0))
    np.testing.assert_allclose(centers(thin), [[6.0, 7.0]])


def test_bad_values_are_refused_and_leave_no_figure(pyplot: Any):
    eq = discs(EDGES, 10.0, 1.0)
    batch = jax.tree.map(lambda leaf: jnp.stack([jnp.asarray(leaf)] * 2), eq)
    good = np.ones(3)
    refused: list[tuple[Any, Any, dict[str, Any], str]] = [
        (batch, good, {}, "batch of 2"),
        (eq.system, good, {}, "`eq` is a System"),
        (eq, np.ones((3, 2)), {}, r"shape \(3, 2\)"),
        (eq, {"sigma": good}, {}, "is a dict"),
        (eq, [1.0, np.inf, 0.0], {}, "1 infinite"),
        (eq, good, {"limit": -1.0}, "`limit` is -1.0"),
        (eq, good, {"changed": 7}, "`changed` is 7"),
        (eq, good, {"slab": (0.0, 0.5)}, "`slab` is for 3-D"),
    ]
    for at, given, options, says in refused:
        with pytest.raises(ms.InputError, match=says):
            scalar_map(at, given, **options)
    assert pyplot.get_fignums() == []


def test_a_histogram_counts_and_names_the_mean_with_its_error(pyplot: Any):
    values = np.random.default_rng(0).normal(0.5, 1.0, (20, 20))
    values[0, 0] = np.nan
    ax = axes()
    assert histogram(values, ax, label="slope", title="of all") is ax
    bars = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    kept = values[np.isfinite(values)]
    mean, error = kept.mean(), kept.std(ddof=1) / np.sqrt(399)
    band, counts = bars[-1], [bar.get_height() for bar in bars[:-1]]
    assert sum(counts) == 399 and len(counts) == 20
    assert band.get_x() == pytest.approx(mean - error)
    assert band.get_width() == pytest.approx(2 * error)
    assert texts(ax) == [f"mean {mean:.3f} ± {error:.3f}, 399 values, 1 NaN"]
    lines = sorted(float(np.asarray(line.get_xdata())[0]) for line in ax.lines)
    assert lines == [0.0, pytest.approx(mean)]
    assert ax.get_xlabel() == "slope" and ax.get_title() == "of all"
    assert pyplot.get_fignums() == []
    assert isinstance(histogram(values), Axes) and len(pyplot.get_fignums()) == 1


def test_a_mean_is_written_to_the_digits_of_its_error():
    def name(values: Any) -> str:
        return texts(histogram(values, axes(), bins=3))[0]

    assert name([2.0]) == "mean 2, 1 value"
    assert name([2.0, 2.0]) == "mean 2 ± 0, 2 values"
    assert name([90.0, 110.0, 130.0]) == "mean 110 ± 12, 3 values"
    assert name([1e-7, 3e-7]) == r"mean (2.0 ± 1.0) $\times10^{-7}$, 2 values"


@pytest.mark.parametrize(
    ("values", "bins", "says"),
    [
        ([], None, "no number"),
        ([np.nan], None, "no number"),
        ([np.inf, 1.0], None, "infinite"),
        ("few", None, "is a str"),
        ([1.0, 2.0], 0, "`bins` is 0"),
    ],
)
def test_bad_histograms_are_refused(values: Any, bins: Any, says: str, pyplot: Any):
    with pytest.raises(ms.InputError, match=says):
        histogram(values, bins=bins)
    assert pyplot.get_fignums() == []


def test_the_second_picture_shows_which_diameters_changed(pyplot: Any):
    # each touches four others, so that none is a rattler
    places = np.stack(np.meshgrid(np.arange(3.0), np.arange(3.0)), axis=-1).reshape(-1, 2) + 0.5
    sizes = np.full(9, 1.2)
    changed = sizes * np.array([1.1, 0.9, *[1.0] * 7])
    before, after = discs(places, 3.0, sizes), discs(places + 0.01, 3.0, changed)
    left, right = ms.plots.before_after(before, after)
    pale = np.concatenate([group.get_facecolor() for group in circles(right)])[:, :3]
    # red where it grew, blue where it shrank, white where nothing changed, images included
    warm = np.round(pale[:, 0] - pale[:, 2], 2)
    assert warm.max() > 0.2 and warm.min() < -0.2
    assert set(warm.tolist()) - {warm.max(), warm.min()} == {np.median(warm)}
    assert abs(np.median(warm)) < 0.02
    words = [text.get_text() for ax in right.child_axes for text in ax.texts]
    assert any("-10 %" in word for word in words) and any("10 %" in word for word in words)
    # equal diameters are drawn as in the first picture
    _, same = ms.plots.before_after(before, discs(places, 3.0, sizes))
    for group, other in zip(circles(same), circles(left), strict=True):
        np.testing.assert_array_equal(group.get_facecolor(), other.get_facecolor())
