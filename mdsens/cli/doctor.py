"""For ``mdsens doctor``: installed versions, and a check that neighbor lists compile correctly."""

from __future__ import annotations

import platform
import warnings
from importlib import metadata
from typing import Any

import numpy as np

__all__ = ["TOLERANCE", "energies", "versions"]

PACKAGES = ("mdsens", "jax", "jaxlib", "jax-md", "numpy", "scipy", "ase", "matplotlib")
# Relative: round-off of a sum of some thousand terms in double precision stays below, and a lost
# pair changes the energy by 1e-4 or more.
TOLERANCE = 1e-10
# Particles: enough for mdsens to keep a neighbor list instead of all pairs, and too few for jax-md
# to sort them into cells: jax 0.10.2 compiles the search among all particles wrongly.
N = 150


def versions() -> list[tuple[str, str]]:
    """Return names and versions of Python and of packages, without importing these packages."""
    rows = [("python", platform.python_version())]
    for name in PACKAGES:
        try:
            rows.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            rows.append((name, "used from a checkout" if name == "mdsens" else "not installed"))
    return rows


def energies() -> list[tuple[str, float, float]]:
    """Compute the energy of one system by several methods, to find neighbor lists that lose pairs.

    The system is random overlapping spheres in a sheared periodic cell in 3-D. The first method is
    a sum over all pairs with numpy; the other methods use neighbor lists that compiled code builds.
    With jax 0.10.2 on CPU such lists lose pairs, but do not set the flag that marks an incomplete
    list (jax issue 39103), and the energy is far too small. This check finds other releases of jax
    with such a fault.

    Returns:
      (method, energy, error) for each method; the error is relative to numpy's sum over all pairs.
    """
    import jax
    import jax.numpy as jnp
    from jax_md import energy, partition, space

    from mdsens import potentials
    from mdsens.model.system import System, listed, potential_energy

    length = (N * np.pi / 6 / 0.6) ** (1 / 3)  # packing fraction 0.6 of spheres of diameter 1
    # a full matrix in 3-D, with which jax 0.10.2 loses pairs
    box = length * np.array([[1.0, 0.2, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    # a fixed seed, so that the check is the same on every machine
    fractions = np.random.default_rng(0).random((N, 3))
    # all pairs: harmonic soft spheres, (1 - r)^2 / 2 for each overlapping one
    separations = fractions[:, None] - fractions[None]
    # rounding is right up to half the smallest height of the cell, 2.5; pairs interact up to 1
    nearest_images = (separations - np.round(separations)) @ box.T
    r = np.linalg.norm(nearest_images, axis=-1)[np.triu_indices(N, 1)]
    exact = float(np.sum(np.where(r < 1.0, 0.5 * (1.0 - r) ** 2, 0.0)))

    results: list[tuple[str, float]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jax-md's, about the types that it scatters
        # getattr and Any: jax-md's annotations of this function are wrong
        soft_spheres: Any = getattr(energy, "soft_sphere_neighbor_list")  # noqa: B009
        displacement, _ = space.periodic_general(jnp.asarray(box), fractional_coordinates=True)
        lists, jax_md_energy = soft_spheres(
            displacement,
            jnp.asarray(box),
            sigma=1.0,
            epsilon=1.0,
            alpha=2.0,
            dr_threshold=0.1,
            fractional_coordinates=True,
            format=partition.OrderedSparse,
        )
        s = jnp.asarray(fractions)
        allocated = lists.allocate(s)

        def updated(s: jax.Array) -> jax.Array:  # the list is updated inside compiled code
            return jax_md_energy(s, neighbor=allocated.update(s))

        results.append(("jax-md's list, jit", float(jax.jit(updated)(s))))
        pair = jax.jit(jax.vmap(updated))(jnp.stack([s, s]))
        results.append(("jax-md's list, jit and vmap", float(pair[1])))

    params = {"sigma": 1.0, "epsilon": 1.0, "alpha": 2.0}
    system = System.create(fractions @ box.T, box, potentials.soft_sphere(), params)

    def mdsens_energy(R: jax.Array) -> jax.Array:
        pairs, _ = listed(system, R)
        return potential_energy(system.replace(neighbors=pairs), R)

    # a translation keeps the energy, but forces the list to be built again
    moved = system.positions + 0.3 * length
    results.append(("mdsens's list, jit", float(jax.jit(mdsens_energy)(moved))))
    pair = jax.jit(jax.vmap(mdsens_energy))(jnp.stack([moved, moved]))
    results.append(("mdsens's list, jit and vmap", float(pair[1])))
    compared = [(method, value, abs(value - exact) / exact) for method, value in results]
    return [("all pairs, numpy", exact, 0.0), *compared]
