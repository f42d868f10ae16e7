"""Output of ``mdsens design``: one printed line for each step, and the result as JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mdsens._util.pytree import named_leaves
from mdsens.design import Design, State, Step

__all__ = ["as_dict", "lines"]

WIDTH = 12  # of a column, at least: a number of six digits with sign and exponent, "-1.23457e-05"


def lines(names: tuple[str, ...], say: Callable[[str], None]) -> Callable[[State], None]:
    """Make a callback for ``ms.design.fit`` that prints each step of the search as a table row.

    Args:
      names: names of the targets, one for each column of the table.
      say: function that prints a line of text.
    """
    widths = [max(WIDTH, len(name)) for name in names]

    def line(first: str, cells: list[str], remark: str) -> str:
        padded = [f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)]
        return "  ".join([f"{first:>5}", *padded, remark]).rstrip()

    def remark_on(step: Step) -> str:
        remarks = []
        if not step.accepted:
            remarks.append("refused")
        if np.any(step.left_basin):
            remarks.append("left its basin")
        lost = int(np.sum(step.status != 0))  # 0 is CONVERGED
        if lost:
            remarks.append(f"{lost} of {step.status.size} members do not count")
        return ", ".join(remarks)

    def show_step(k: int, step: Step) -> None:
        say(line(str(k), [f"{v:.6g}" for v in step.values], remark_on(step)))

    def show(state: State) -> None:
        nonlocal header_shown
        # a design that is resumed comes with the steps of the earlier run: show them first
        if len(state.history) == 1 or not header_shown:
            header_shown = True
            say(line("step", list(names), ""))
            say(line("want", [f"{v:.6g}" for v in state.wanted], ""))
            say(line("+-", [f"{v:.1e}" for v in state.tolerance], ""))
            for k, step in enumerate(state.history[:-1]):
                show_step(k, step)
        show_step(len(state.history) - 1, state.history[-1])

    header_shown = False
    return show


def as_dict(design: Design) -> dict[str, Any]:
    """Convert the result of a search for parameters to a dict for JSON.

    None stands for NaN and infinity.
    """

    def plain(value: float) -> float | None:  # JSON has no NaN and no infinity
        return float(value) if np.isfinite(value) else None

    steps = [
        {
            "values": [plain(v) for v in np.ravel(step.values)],
            "predicted": [plain(v) for v in np.ravel(step.predicted)],
            "accepted": bool(step.accepted),
            "size": float(step.size),
            "trust": plain(step.trust),
            "crossed": int(step.crossed),
            "reach": plain(step.reach),
            "max_displacement_error": float(step.max_displacement_error),
            "left_basin": np.asarray(step.left_basin).tolist(),
            "status": np.asarray(step.status).tolist(),
        }
        for step in design.history
    ]
    return {
        "status": design.status.name,
        "targets": [
            {"name": name, "wanted": float(w), "tolerance": float(t), "reached": float(v)}
            for name, w, t, v in zip(
                design.names, design.wanted, design.tolerance, design.values, strict=True
            )
        ],
        "relaxations": design.relaxations,
        "parameters": {
            name: np.asarray(value).tolist() for name, value in named_leaves(design.params)
        },
        "history": steps,
    }
