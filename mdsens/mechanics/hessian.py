"""This module computes the gradient F = dU/dx of the energy, the Hessian and mixed derivatives.

U is the energy, x are the positions and p the parameters. At a minimum F = 0, so that the
derivatives of F by x (the Hessian) and by p (mixed derivatives) give the response dx/dp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp

from mdsens._util.compilation import compiled
from mdsens._util.lattice import components
from mdsens._util.probe import chirp
from mdsens.implicit.linear import Operator, SymmetricScaling
from mdsens.mechanics.atom_hessian import atom_hessian
from mdsens.mechanics.forces import energy_gradient, row_terms, stiffness_of_pairs
from mdsens.mechanics.hessian_blocks import BlockRows
from mdsens.mechanics.null_space import NullSpace
from mdsens.mechanics.unknowns import Unknowns
from mdsens.model.neighbors import filled_rows
from mdsens.model.system import System, images_of
from mdsens.potentials.base import Potential
from mdsens.potentials.local import LocalPotential

__all__ = [
    "along",
    "dense_hessian",
    "force",
    "gradient",
    "hessian_change",
    "hessian_operator",
    "largest_force",
    "largest_stiffness",
    "max_force",
    "mixed_product",
    "mixed_transpose",
    "sparse_hessian",
]

Params = Mapping[str, Any]

# Numbers in a row of the Hessian up to which an energy of neighborhoods gets a sparse matrix: one
# of bond orders has about 50 (the second neighbors of silicon), and one of embedded atoms 1,300,
# whose factor fills up, so that products without a matrix are faster.
LONGEST_ROW = 600
# Unknowns up to which the matrix is small, however long its rows are.
SMALL = 1500
# Places in a neighbor list over the atoms within the cutoff: 1.1^3 for the skin, and 1.25 for room.
LISTED_OVER_NEAR = 1.66


def gradient(system: System, x: Unknowns, params: Params) -> Unknowns:
    """Compute the gradient dU/dx of the energy U by the positions x, at the given parameters."""
    return Unknowns(energy_gradient(system, params)(x.positions))


@compiled
def force(system: System) -> jax.Array:
    """Compute the forces -dU/dR on the particles of a system with the energy U, (n, d)."""
    return -gradient(system, Unknowns(system.positions), system.params).positions


@compiled
def largest_force(forces: jax.Array) -> jax.Array:
    """Return the largest norm among the forces (n, d) on n particles, called fmax in ASE."""
    return jnp.sqrt(jnp.max(jnp.sum(forces**2, axis=-1), initial=0.0))


@compiled
def max_force(system: System) -> jax.Array:
    """Compute the largest norm among the net forces on the particles of a system."""
    return largest_force(force(system))


def hessian_product(system: System) -> Callable[[Unknowns], Unknowns]:
    """Return the function v -> H v that multiplies displacements v by the Hessian H of the energy.

    H is taken at the positions of the system. For pairs the gradient of the energy is linearized
    once, here. For energies of all neighbors of an atom, every product differentiates the gradient
    again: what a linearization would store is read no faster than it is computed.
    """
    x = Unknowns(system.positions)

    def slope(y: Unknowns) -> Unknowns:
        return gradient(system, y, system.params)

    if system.potential.of_neighbors:
        return lambda v: jax.jvp(slope, (x,), (v,))[1]
    return jax.linearize(slope, x)[1]


def hessian_operator(
    system: System, null: NullSpace, blocks: BlockRows | None = None, definite: bool = True
) -> Operator:
    """Return the Hessian H of the energy, at the positions of the system, as a linear operator.

    The operator multiplies vectors by H, and knows the projection that removes the null space of H.

    Args:
      null: the null space of H.
      blocks: H assembled as a (d, d) block for each pair; None to compute products with H by the
        linearized gradient of the energy.
      definite: whether H is positive semidefinite, as at a minimum; False at a saddle.
    """
    properties: dict[str, Any] = {"symmetric": True, "positive_semidefinite": definite}
    if blocks is None:
        return Operator(hessian_product(system), **properties, project=null.project)

    def product(v: Unknowns) -> Unknowns:
        return Unknowns(blocks.product(v.positions))

    scaling = SymmetricScaling(lambda v: blocks.scaled(v.positions), blocks.scaled_product)
    return Operator(product, **properties, project=null.project, scaling=scaling)


@compiled
def dense_hessian(system: System) -> jax.Array:
    """Return the Hessian of the energy as a dense matrix (n d, n d), for checks and small systems.

    The system has n particles in d dimensions.
    """
    n, d = system.positions.shape
    product = hessian_product(system)
    # The k-th row is H e_k, e_k being the k-th unit vector: H is symmetric.
    return jax.vmap(lambda e: product(Unknowns(e.reshape(n, d))).positions.ravel())(jnp.eye(n * d))


@compiled
def _pair_blocks(system: System) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """Compute the second derivative d2phi/dv2 of each pair potential phi by the pair vector v.

    v is the vector between the two particles of a pair; there is a (d, d) block for each pair of
    each term of the potential, in d dimensions.

    Returns:
      for each term (i, j, blocks), with particle indices i and j, and blocks (d, d, …) whose last
        axes are those of j. A pair of the neighbor list appears twice, as a neighbor of both
        particles; a bond appears once.
    """
    images = images_of(system, system.box)
    x = components(system.positions)
    blocks = []
    for term in row_terms(system):
        apart = term.vectors(x, images)
        across, along = stiffness_of_pairs(term, apart)
        # ``v is w`` on the diagonal
        block = [[along * v * w + (across if v is w else 0.0) for w in apart] for v in apart]
        blocks.append((term.i, term.j, jnp.stack([jnp.stack(line) for line in block])))
    return blocks


_pair_blocks_each = compiled(jax.vmap(_pair_blocks))


@compiled
def _changes_of_blocks(
    system: System, motion: jax.Array
) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """Compute the derivatives of the blocks of :func:`_pair_blocks` while the particles move.

    ``motion`` (n, d) is the derivative of the positions by the number that the blocks change with.
    """

    def blocks(positions: jax.Array) -> list[jax.Array]:
        return [block for _, _, block in _pair_blocks(system.replace(positions=positions))]

    changes = jax.jvp(blocks, (system.positions,), (motion,))[1]
    terms = row_terms(system)
    return [(term.i, term.j, change) for term, change in zip(terms, changes, strict=True)]


def assembles(system: System) -> bool:
    """Return whether the Hessian of a system is assembled as a sparse matrix.

    It is for a sum over pairs, and where the energy of each atom depends on its own neighbors and
    the rows of the Hessian are short: such an energy couples two neighbors of an atom, so that a
    row has the atoms within twice the cutoff.
    """
    potential = system.potential
    if not (potential.pairwise or atoms_of(potential)):
        return False
    n = system.n
    d = system.dimension
    # a list holds a few times the atoms within the cutoff, and there are 2^d times as many within
    # twice this distance
    within = 2.0**d * system.neighbors.rows.shape[-2] / LISTED_OVER_NEAR
    return potential.pairwise or n * d <= SMALL or min(n, within) * d <= LONGEST_ROW


def atoms_of(potential: Potential) -> tuple[LocalPotential, ...]:
    """Return the parts of a potential that are sums over atoms of functions of their neighbors.

    The result is empty where the potential has other parts than these, pairs and bonds.
    """
    parts = getattr(potential, "parts", (potential,))
    local = tuple(part for part in parts if isinstance(part, LocalPotential))
    others = [part for part in parts if not isinstance(part, LocalPotential)]
    return local if all(part.pairwise for part in others) else ()


def sparse_hessian(system: System) -> sp.csr_array | None:
    """Assemble the Hessian as a scipy sparse matrix (n d, n d) from the pairs that interact.

    The result is None for a potential whose Hessian is not assembled, see :func:`assembles`. For a
    batch of systems the result is a block-diagonal matrix, with a block (n d, n d) for each system,
    of n particles in d dimensions. The function does not work inside ``jax.jit``.
    """
    if not assembles(system):
        return None
    n = system.n
    d = system.dimension
    members = system.batch
    fixed = system.replace(
        potential=system.potential.specialize(system.params),
        neighbors=filled_rows(system.neighbors),
    )
    of_terms = (_pair_blocks if members is None else _pair_blocks_each)(fixed)
    matrix = _matrix_of_blocks(of_terms, n, d, members)
    # The neighbor list may contain the same pair twice where several images of a particle are
    # listed.
    if fixed.neighbors.images is not None:
        matrix.sum_duplicates()
    if atoms_of(system.potential):
        matrix = matrix + atom_hessian(system)
    return matrix


def hessian_change(system: System, motion: np.ndarray) -> sp.csr_array | None:
    """Assemble the derivative of the Hessian while the particles move, a sparse matrix (n d, n d).

    The result is None for a potential that is not a sum over pairs. The function does not work
    inside ``jax.jit``, nor for a batch.

    Args:
      system: the system.
      motion: (n, d) the derivative of the positions.
    """
    if not system.potential.pairwise or system.batch is not None:
        return None
    n, d = system.positions.shape
    fixed = system.replace(
        potential=system.potential.specialize(system.params),
        neighbors=filled_rows(system.neighbors),
    )
    matrix = _matrix_of_blocks(_changes_of_blocks(fixed, motion), n, d, None)
    matrix.sum_duplicates()
    return matrix


def _matrix_of_blocks(
    of_terms: list[tuple[jax.Array, jax.Array, jax.Array]], n: int, d: int, members: int | None
) -> sp.csr_array:
    """Assemble a sparse matrix from the blocks of the pairs of each term of a potential.

    Args:
      of_terms: for each term (i, j, blocks), as :func:`_pair_blocks` returns.
      n: number of particles.
      d: dimension of space.
      members: number of systems in a batch; None for a single system.
    """
    # Empty first entries, so that a system without pairs gives a matrix of zeros.
    entries = [(np.zeros(0, int), np.zeros(0, int), np.zeros((0, d, d)))]
    for i, j, block in of_terms:
        entries += _list_entries(np.asarray(i), np.asarray(j), np.asarray(block, float), n, members)
    first, second, block = (np.concatenate(arrays) for arrays in zip(*entries, strict=True))
    matrix = _assemble_matrix(first, second, block, n * (members or 1))
    # ``entries`` begins with empty arrays, so more than 2 means two terms, or bonds: both may
    # contain the same pair.
    if len(entries) > 2:
        matrix.sum_duplicates()
    return matrix


def _list_entries(
    i: np.ndarray, j: np.ndarray, block: np.ndarray, n: int, members: int | None
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """List the pairs of one term of the potential that interact, in both orders of the particles.

    Args:
      i, j: particle indices of the pairs.
      block: the second derivative of the pair potential for each pair, (d, d, …).
      n: number of particles.
      members: number of systems in a batch, which all arrays have as their first axis; None for a
        single system.

    Returns:
      tuples (first particles (m,), second particles (m,), blocks (m, d, d)); particles are numbered
        through all systems of a batch.
    """
    # A list of bonds has each pair once: its block is entered for both orders of the particles.
    twice = j.ndim == (1 if members is None else 2)
    if members is not None:
        # particles are numbered through all members; the axis of members moves behind (d, d)
        shift = (n * np.arange(members)).reshape(-1, *[1] * (j.ndim - 1))
        block = np.moveaxis(block, 0, 2)
        i, j = i + shift, j + shift
    # pairs beyond their range, and padding, have blocks of zeros
    interacts = np.any(block != 0, axis=(0, 1))
    pair_blocks = np.ascontiguousarray(np.moveaxis(block[:, :, interacts], -1, 0))
    one = np.broadcast_to(i, j.shape)[interacts]
    other = j[interacts]
    entries = [(one, other, pair_blocks)]
    if twice:
        entries.append((other, one, pair_blocks))
    return entries


def _assemble_matrix(
    first: np.ndarray, second: np.ndarray, block: np.ndarray, total: int
) -> sp.csr_array:
    """Assemble the Hessian as a sparse matrix from the blocks of m pairs of particles.

    Args:
      first, second: (m,) indices of the two particles of each pair; each pair appears twice.
      block: (m, d, d) the second derivative of the pair potential for each pair.
      total: number of particles.
    """
    d = block.shape[-1]
    # Off the diagonal stands minus the block of the pair; on it the sum over the particle's pairs.
    entries = [np.bincount(first, block[:, a, b], total) for a in range(d) for b in range(d)]
    diagonal = np.stack(entries, axis=-1).reshape(total, d, d)
    particles = np.arange(total)
    first = np.concatenate([first, particles])
    second = np.concatenate([second, particles])
    block = np.concatenate([-block, diagonal])
    # scipy's BSR format: the blocks of one row stand together, those of row k from starts[k] on
    order = np.argsort(first, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(first, minlength=total))])
    shape = (total * d, total * d)
    return sp.bsr_array((block[order], second[order], starts), shape=shape).tocsr()


def along(f: Callable[[dict[str, Any]], Any], params: Params, dparams: Params) -> Any:
    """Compute the derivative of f(params) along a given change of some of the parameters.

    Args:
      f: a function of a dict of parameters.
      params: the parameters by name at which the derivative is taken.
      dparams: the change by parameter name; parameters that are not named are constant.
    """
    moving = {name: params[name] for name in dparams}
    return jax.jvp(lambda changed: f({**params, **changed}), (moving,), (dict(dparams),))[1]


@compiled
def mixed_product(system: System, dparams: Params) -> Unknowns:
    """Compute the change of the energy gradient dU/dx under a change of some parameters.

    The positions x are constant. With a change dp of the parameters p, the result is the mixed
    derivative d2U/dx dp times dp.

    Args:
      dparams: dp by parameter name; parameters that are not named are constant.
    """
    x = Unknowns(system.positions)
    return along(lambda p: gradient(system, x, p), system.params, dparams)


def mixed_transpose(system: System, cotangent: Unknowns) -> dict[str, Any]:
    """Compute (d2U/dx dp)^T w: the mixed derivative of the energy U, transposed, times a vector w.

    x are the positions and p the parameters. The result is a dict shaped like p.

    Args:
      cotangent: the vector w, shaped like x.
    """
    x = Unknowns(system.positions)
    return jax.vjp(lambda p: gradient(system, x, p), dict(system.params))[1](cotangent)[0]


# Products with the Hessian in a power iteration.
POWERS = 20


def largest_stiffness(
    slope: Callable[[jax.Array], jax.Array],
    positions: jax.Array,
    otherwise: jax.Array | float,
) -> jax.Array:
    """Compute the largest eigenvalue of the Hessian by power iteration.

    In packings and glasses the result is 0.94 to 1 times the true eigenvalue.

    Args:
      slope: the function that maps positions R to the gradient of the energy dU/dR.
      positions: (n, d) the positions R at which the Hessian is taken.
      otherwise: the result where the eigenvalue is zero or not finite.
    """

    def product(_: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        v, size = carry
        # carries w = H v and |w|: v has norm one, so that |w| approaches the largest eigenvalue
        w = jax.jvp(slope, (positions,), (v / jnp.where(size > 0, size, 1.0),))[1]
        return w, jnp.sqrt(jnp.sum(w**2))

    # A fixed start with entries of every size and sign.
    start = chirp(positions.shape, positions.dtype)
    _, size = jax.lax.fori_loop(0, POWERS, product, (start, jnp.sqrt(jnp.sum(start**2))))
    return jnp.where((size > 0) & jnp.isfinite(size), size, otherwise)
