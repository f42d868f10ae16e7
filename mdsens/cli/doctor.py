"""What is installed, and whether it computes right: the check behind ``mdsens doctor``."""

from __future__ import annotations

import platform
import warnings
from importlib import metadata
from typing import Any

import numpy as np

__all__ = ["TOLERANCE", "energies", "versions"]

PACKAGES = ("mdsens", "jax", "jaxlib", "jax-md", "numpy", "scipy", "ase", "matplotlib")
TOLERANCE = (
    1e-10  # sums of some thousand terms in double precision; a lost pair is off by 1e-4 or more
)
# Enough for mdsens to keep a neighbor list in place of all pairs, and too few for jax-md to sort
# particles into cells: it is the search among all of them that jax 0.10.2 gets wrong.
N = 150


def versions() -> list[tuple[str, str]]:
    """Package and version, Python first; nothing is imported for it."""
    found = [("python", platform.python_version())]
    for name in PACKAGES:
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            found.append((name, "used from a checkout" if name == "mdsens" else "not installed"))
    return found


def energies() -> list[tuple[str, float, float]]:
    """One energy by several ways: (way, energy, relative error against all pairs in numpy).

    Random overlapping spheres in a sheared periodic cell in 3-D, by neighbor lists that compiled
    code builds. In jax 0.10.2 on CPU such lists lose pairs without a flag (jax issue 39103), and
    the energy is far too small: this is for the next compiler that does so.
    """
    import jax
    import jax.numpy as jnp
    from jax_md import energy, partition, space

    from mdsens import potentials
    from mdsens.model.system import System, listed, potential_energy

    length = (N * np.pi / 6 / 0.6) ** (1 / 3)
    box = length * np.array([[1.0, 0.2, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    fractions = np.random.default_rng(0).random((N, 3))
    apart = fractions[:, None] - fractions[None]
    r = np.linalg.norm((apart - np.round(apart)) @ box.T, axis=-1)[np.triu_indices(N, 1)]
    exact = float(np.sum(np.where(r < 1.0, 0.5 * (1.0 - r) ** 2, 0.0)))

    results: list[tuple[str, float]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jax-md's, about the types that it scatters
        soft_spheres: Any = getattr(energy, "soft_sphere_neighbor_list")  # noqa: B009 - its annotations are wrong
        displacement, _ = space.periodic_general(jnp.asarray(box), fractional_coordinates=True)
        make, theirs = soft_spheres(
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
        held = make.allocate(s)
        results.append(
            ("jax-md's list, jit", float(jax.jit(lambda s: theirs(s, neighbor=held.update(s)))(s)))
        )
        both = jax.jit(jax.vmap(lambda s: theirs(s, neighbor=held.update(s))))(jnp.stack([s, s]))
        results.append(("jax-md's list, jit and vmap", float(both[1])))

    params = {"sigma": 1.0, "epsilon": 1.0, "alpha": 2.0}
    system = System.create(fractions @ box.T, box, potentials.soft_sphere(), params)

    def ours(R: jax.Array) -> jax.Array:
        pairs, _ = listed(system, R)
        return potential_energy(system.replace(neighbors=pairs), R)

    moved = (
        system.positions + 0.3 * length
    )  # all alike: the same energy, but the list must be made anew
    results.append(("mdsens's list, jit", float(jax.jit(ours)(moved))))
    results.append(
        (
            "mdsens's list, jit and vmap",
            float(jax.jit(jax.vmap(ours))(jnp.stack([moved, moved]))[1]),
        )
    )
    return [
        ("all pairs, numpy", exact, 0.0),
        *((way, e, abs(e - exact) / exact) for way, e in results),
    ]
