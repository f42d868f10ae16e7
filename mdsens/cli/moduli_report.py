"""What the command line says of elastic moduli and of their derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mdsens._util import tables
from mdsens.cli.report import AXES, Component
from mdsens.elasticity import Moduli, gradient, isotropic, voigt
from mdsens.mechanics.strain import basis
from mdsens.sensitivity.derivatives import Linearization

__all__ = ["as_dict", "derivatives", "page", "slopes_of", "verdict"]

MODULI = {"K": "bulk", "G": "shear", "E": "young", "nu": "poisson"}


def page(found: Moduli) -> str:
    """The moduli in both conventions, and the tensors they are of."""
    axes = [
        f"{AXES[i]}{AXES[j]}"
        for i, j in (np.argwhere(unit)[0] for unit in basis(found.stress.shape[0]))
    ]

    def matrix(title: str, tensor: Any) -> str:
        entries = np.asarray(voigt(tensor))
        cells = np.reshape(tables.numbers(entries.ravel()), entries.shape).tolist()
        return tables.columns(
            title, ["", *axes], [[name, *row] for name, row in zip(axes, cells, strict=True)]
        )

    return "\n\n".join(
        [
            str(found),
            matrix(
                "A, by Voigt's indices: the energy's second derivative by strain, a volume",
                found.tensor,
            ),
            matrix("B, Birch's: the stress's derivative by strain (row: stress)", found.birch),
        ]
    )


def slopes_of(lin: Linearization, parts: Sequence[Component]) -> dict[str, np.ndarray]:
    """The derivative of each modulus by each component."""

    def features(m: Moduli) -> Any:
        of_birch = isotropic(m.birch)
        both = [
            *(getattr(m, name) for name in MODULI.values()),
            *(getattr(of_birch, name) for name in MODULI.values()),
        ]
        given = (
            m.pressure if lin.cell is None else jnp.zeros(())
        )  # at a pressure it stays, but for its own change
        return jnp.stack([given, *both])

    value = gradient(features, lin, throw=False).value  # the page says what the moduli are of
    names = ["P", *MODULI, *(f"{name}_B" for name in MODULI)]

    def along(part: Component) -> np.ndarray:
        changes = {k: np.asarray(v, float) for k, v in part.direction.items()}
        found = sum(np.tensordot(np.asarray(value[k]), v, axes=v.ndim) for k, v in changes.items())
        own = 0.0 if lin.cell is None else float(changes.get("pressure", np.zeros(())))
        return found + own * (np.arange(len(names)) == 0)

    columns = [along(part) for part in parts]
    return dict(zip(names, np.stack(columns, axis=1), strict=True))


def as_dict(
    found: Moduli, parts: Sequence[Component], slopes: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Tensors and derivatives as plain numbers, for JSON; None stands for what is no number."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(v) for v in value]
        return float(value) if np.isfinite(value) else None

    tensors = {
        name: plain(np.asarray(getattr(found, name)).tolist())
        for name in ("tensor", "birch", "affine", "stress")
    }
    by = {
        part.label: {k: plain(v) for k, v in zip(slopes, row, strict=True)}
        for part, row in zip(parts, zip(*slopes.values(), strict=True), strict=True)
    }
    return {**tensors, "status": found.status.name, "derivatives": by}


def verdict(found: Moduli) -> str:
    """The last line: what the moduli are worth."""
    status = found.status
    if not status.good:
        return f"not to be trusted: {status.sentence}"
    if status.warning:
        return f"good, but see the warning: {status.sentence}"
    return "good: stable against every strain"


def derivatives(parts: Sequence[Component], slopes: dict[str, np.ndarray], count: int) -> str:
    """A row a component; of many, those that Poisson's ratio depends on most."""
    order = (
        np.argsort(-np.abs(slopes["nu"]), kind="stable")[:count]
        if len(parts) > count
        else np.arange(len(parts))
    )
    cells = [tables.numbers(values[order]) for values in slopes.values()]
    rows = [
        [parts[int(k)].label, *row] for k, row in zip(order, zip(*cells, strict=True), strict=True)
    ]
    most = f": the {count} of {len(parts)} that nu depends on most" if len(parts) > count else ""
    return tables.columns(
        f"Derivatives, those of Birch's tensor with _B{most}", ["by", *slopes], rows
    )
