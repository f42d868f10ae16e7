"""What the command line prints and stores of a design."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mdsens.design import Design, State, Step

__all__ = ["as_dict", "lines"]

WIDTH = 12


def lines(names: tuple[str, ...], say: Callable[[str], None]) -> Callable[[State], None]:
    """A callback that says a line a step, as they come, under a header."""
    wide = [max(WIDTH, len(name)) for name in names]

    def line(first: str, cells: list[str], rest: str) -> str:
        return "  ".join(
            [f"{first:>5}", *(f"{c:>{w}}" for c, w in zip(cells, wide, strict=True)), rest]
        ).rstrip()

    def said(step: Step) -> str:
        parts = [
            "" if step.accepted else "refused",
            "left its basin" if np.any(step.left_basin) else "",
        ]
        lost = int(np.sum(step.status != 0))
        parts.append(f"{lost} of {step.status.size} members do not count" if lost else "")
        return ", ".join(filter(None, parts))

    def show(state: State) -> None:
        if len(state.history) == 1 or not begun:
            begun.append(True)
            say(line("step", list(names), ""))
            say(line("want", [f"{v:.6g}" for v in state.wanted], ""))
            say(line("+-", [f"{v:.1e}" for v in state.tolerance], ""))
            for k, step in enumerate(state.history[:-1]):
                say(line(str(k), [f"{v:.6g}" for v in step.values], said(step)))
        step = state.history[-1]
        say(line(str(len(state.history) - 1), [f"{v:.6g}" for v in step.values], said(step)))

    begun: list[bool] = []
    return show


def as_dict(design: Design) -> dict[str, Any]:
    """A design as plain numbers and texts, for JSON; None stands for what is no number."""

    def plain(values: np.ndarray) -> Any:
        return [None if not np.isfinite(v) else float(v) for v in np.ravel(values)]

    steps = [
        {
            "values": plain(step.values), "predicted": plain(step.predicted), "accepted": bool(step.accepted),
            "size": float(step.size), "trust": plain(np.array([step.trust]))[0], "crossed": int(step.crossed),
            "reach": plain(np.array([step.reach]))[0], "max_displacement_error": float(step.max_displacement_error),
            "left_basin": np.asarray(step.left_basin).tolist(), "status": np.asarray(step.status).tolist(),
        }
        for step in design.history
    ]  # fmt: skip
    return {
        "status": design.status.name,
        "targets": [
            {"name": name, "wanted": float(w), "tolerance": float(t), "reached": float(v)}
            for name, w, t, v in zip(
                design.names, design.wanted, design.tolerance, design.values, strict=True
            )
        ],
        "relaxations": design.relaxations,
        "parameters": {name: np.asarray(value).tolist() for name, value in design.params.items()},
        "history": steps,
    }
