"""Progress of long work, where somebody watches: a terminal or a notebook."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any, Self

import numpy as np

__all__ = ["Decades", "Members", "Trials"]


def _bar(wanted: bool | None, form: str, **how: Any) -> Any:
    """A tqdm bar, or None where nobody watches and none is asked for."""
    watched = sys.stderr.isatty() or "ipykernel" in sys.modules
    if not (watched if wanted is None else wanted):
        return None
    if importlib.util.find_spec("ipywidgets"):
        from tqdm.auto import tqdm
    else:  # without them tqdm.auto warns in a notebook
        from tqdm import tqdm
    return tqdm(leave=False, delay=0.5, bar_format=form, **how)


class _Bar:
    """A progress bar, or none; closed at the end of a ``with`` block."""

    bar: Any

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class Decades(_Bar):
    """The decades of force still to go in one relaxation, whose ``tolerance`` is set as it becomes
    known.
    """

    def __init__(self, wanted: bool | None, tolerance: float = np.inf):
        self.tolerance, self.first = tolerance, 0.0
        self.bar = _bar(wanted, "{desc} {bar} {elapsed}{postfix}", total=100, desc="relaxing")

    def show(self, steps: int, largest: float) -> None:
        if self.bar is None or not (
            np.isfinite(largest) and largest > 0 and 0 < self.tolerance < np.inf
        ):
            return
        self.first = max(largest, self.first)
        decades = np.log(self.first / self.tolerance)
        done = (
            100.0 * np.log(self.first / max(largest, self.tolerance)) / decades
            if decades > 0
            else 100.0
        )
        self.bar.n = int(done)
        self.bar.set_postfix_str(f"step {steps:,}, max_force {largest:.1e}")


class Members(_Bar):
    """The members of a batch that are done."""

    def __init__(self, count: int, wanted: bool | None):
        form = "{desc} {bar} {n_fmt} of {total_fmt}, {elapsed}, {remaining} to go"
        self.bar = _bar(wanted, form, total=count, desc="relaxing")

    def advance(self, count: int) -> None:
        if self.bar is not None:
            self.bar.update(count)


class Trials(_Bar):
    """The steps of a design, and how far the worst of its features is from its target."""

    def __init__(self, count: int, wanted: bool | None):
        self.bar = _bar(
            wanted,
            "{desc} {bar} {n_fmt} of {total_fmt}, {elapsed}{postfix}",
            total=count,
            desc="designing",
        )

    def show(self, done: int, tolerances: float) -> None:
        if self.bar is not None:
            self.bar.n = done
            self.bar.set_postfix_str(f"{tolerances:.3g} tolerances to go")
