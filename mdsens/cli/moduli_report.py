"""Output of ``mdsens moduli``: elastic moduli and their derivatives, as tables and as JSON."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdsens._util import tables
from mdsens.cli.report import AXES, Component
from mdsens.elasticity import GPa, Moduli, gradient, isotropic, voigt
from mdsens.mechanics.stability import birch as birch_tensor
from mdsens.mechanics.strain import basis
from mdsens.sensitivity.derivatives import Linearization

__all__ = ["as_dict", "derivatives", "in_gpa", "page", "slopes_of", "verdict"]

ROUND_OFF = 1e-9  # entries of a tensor below this share of its largest one are shown as zero
# the words for an angstrom in ``units`` of a system's file
ANGSTROM = ("Å", "angstrom", "angstroms", "Angstrom", "Angstroms", "ångström", "Ångström", "A")
# symbol in the tables -> attribute of Moduli and of isotropic(tensor)
MODULI = {"K": "bulk", "G": "shear", "E": "young", "nu": "poisson"}


def page(moduli: Moduli, in_gpa: bool = False) -> str:
    """Format the elastic moduli, the elastic tensor A and Birch's tensor B as tables.

    A is the second derivative of the energy by the strain, divided by the volume; B is the
    derivative of the stress by the strain.

    Args:
      moduli: the moduli.
      in_gpa: whether energies are in eV and lengths in angstroms, so that B is shown in GPa, too,
        with what it would be if particles followed the strain affinely, where that differs.
    """
    # the axes of each Mandel index: the first non-zero entry of its unit strain
    entries = [np.argwhere(unit)[0] for unit in basis(moduli.stress.shape[0])]
    axes = [f"{AXES[i]}{AXES[j]}" for i, j in entries]

    def matrix(title: str, tensor: jax.Array) -> str:
        return table(title, np.asarray(voigt(tensor)))

    def table(title: str, values: np.ndarray) -> str:
        # what is round-off beside the largest entry shows neither digits nor a sign
        values = np.where(np.abs(values) < ROUND_OFF * np.max(np.abs(values)), 0.0, values)
        cells = np.reshape(tables.numbers(values.ravel()), values.shape).tolist()
        rows = [[name, *row] for name, row in zip(axes, cells, strict=True)]
        return tables.columns(title, ["", *axes], rows)

    title = "A, by Voigt's indices: the energy's second derivative by strain, a volume"
    birch = "B, Birch's: the stress's derivative by strain (row: stress)"
    parts = [str(moduli), matrix(title, moduli.tensor), matrix(birch, moduli.birch)]
    if in_gpa:
        relaxed = np.asarray(moduli.voigt) / GPa
        affine = np.asarray(voigt(birch_tensor(moduli.affine, moduli.stress))) / GPa
        parts.append(table("B in GPa", relaxed))
        # the same where no particle leaves its affine position, as in an fcc crystal
        if np.max(np.abs(affine - relaxed)) > ROUND_OFF * np.max(np.abs(relaxed)):
            parts.append(table("B in GPa if affine, without internal strain", affine))
    return "\n\n".join(parts)


def in_gpa(units: str, dimension: int) -> bool:
    """Return whether a system's elastic constants can be shown in GPa.

    They can in 3-D where the text ``units`` of the system's file names eV and Å (or angstrom).
    """
    # NFKC makes the sign of the unit, U+212B, the letter Å
    words = set(re.findall(r"\w+", unicodedata.normalize("NFKC", units)))
    return dimension == 3 and "eV" in words and not words.isdisjoint(ANGSTROM)


def slopes_of(lin: Linearization, parts: Sequence[Component]) -> dict[str, np.ndarray]:
    """Compute the derivatives of the pressure and the elastic moduli by each parameter component.

    Returns:
      arrays (components,) by name: P for the pressure; K, G, E and nu for the moduli of the tensor
      A, the second derivative of the energy by the strain, divided by the volume; and K_B, G_B,
      E_B and nu_B for those of Birch's tensor, the derivative of the stress by the strain.
    """

    def features(m: Moduli) -> jax.Array:
        birch = isotropic(m.birch)
        moduli = [
            *(getattr(m, name) for name in MODULI.values()),
            *(getattr(birch, name) for name in MODULI.values()),
        ]
        # where the cell is relaxed to a pressure, that pressure does not change with the other
        # parameters; its derivative by itself is added below
        pressure = m.pressure if lin.cell is None else jnp.zeros(())
        return jnp.stack([pressure, *moduli])

    # throw=False: a bad status is on the page of the moduli, and in the verdict
    value = gradient(features, lin, throw=False).value
    names = ["P", *MODULI, *(f"{name}_B" for name in MODULI)]

    def along(part: Component) -> np.ndarray:
        changes = {k: np.asarray(v, float) for k, v in part.direction.items()}
        # (features, *shape of the parameter) with (*shape): a sum over the components
        slopes = sum(np.tensordot(np.asarray(value[k]), v, axes=v.ndim) for k, v in changes.items())
        dP = 0.0 if lin.cell is None else float(changes.get("pressure", np.zeros(())))
        return slopes + dP * (np.arange(len(names)) == 0)  # P is the first of the names

    columns = [along(part) for part in parts]
    return dict(zip(names, np.stack(columns, axis=1), strict=True))


def as_dict(
    moduli: Moduli, parts: Sequence[Component], slopes: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Convert elastic tensors and derivatives of the moduli to a dict for JSON.

    None stands for NaN and infinity.
    """

    def plain(value: list[Any] | float) -> Any:  # JSON has no NaN and no infinity
        if isinstance(value, list):
            return [plain(v) for v in value]
        return float(value) if np.isfinite(value) else None

    tensors = {
        name: plain(np.asarray(getattr(moduli, name)).tolist())
        for name in ("tensor", "birch", "affine", "stress")
    }
    by_component = {
        part.label: {k: plain(v) for k, v in zip(slopes, row, strict=True)}
        for part, row in zip(parts, zip(*slopes.values(), strict=True), strict=True)
    }
    return {**tensors, "status": moduli.status.name, "derivatives": by_component}


def verdict(moduli: Moduli) -> str:
    """Format the last line of ``mdsens moduli``, which says whether the moduli can be trusted."""
    status = moduli.status
    if not status.good:
        return f"not to be trusted: {status.sentence}"
    if status.warning:
        return f"good, but see the warning: {status.sentence}"
    return "good: stable against every strain"


def derivatives(parts: Sequence[Component], slopes: dict[str, np.ndarray], count: int) -> str:
    """Format the derivatives of elastic moduli as a table, one row for each parameter component.

    Of more than ``count`` components, the table shows the ``count`` components that Poisson's ratio
    depends on most.
    """
    title = "Derivatives, those of Birch's tensor with _B"
    order = np.arange(len(parts))
    if len(parts) > count:
        order = np.argsort(-np.abs(slopes["nu"]), kind="stable")[:count]
        title += f": the {count} of {len(parts)} that nu depends on most"
    cells = [tables.numbers(values[order]) for values in slopes.values()]
    rows = [
        [parts[int(k)].label, *row] for k, row in zip(order, zip(*cells, strict=True), strict=True)
    ]
    return tables.columns(title, ["by", *slopes], rows)
