"""Progress bars of long computations, in a terminal or a notebook."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any, Self

import numpy as np

__all__ = ["Decades", "Members", "Trials"]


def _bar(wanted: bool | None, form: str, **options: Any) -> Any:
    """Make a progress bar of tqdm; return None where no bar is to be shown.

    Args:
      wanted: whether to show a bar; None shows one only in a terminal or a notebook.
      form: format of the bar.
      options: further arguments of tqdm.
    """
    watched = sys.stderr.isatty() or "ipykernel" in sys.modules
    if not (watched if wanted is None else wanted):
        return None
    if importlib.util.find_spec("ipywidgets"):
        from tqdm.auto import tqdm
    else:
        # Without ipywidgets, tqdm.auto prints a warning in a notebook.
        from tqdm import tqdm
    # The bar shows after 0.5 s, so that short computations show none.
    return tqdm(leave=False, delay=0.5, bar_format=form, **options)


class _Bar:
    """Base class of progress bars for a ``with`` block, at whose end the bar is closed."""

    bar: Any

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class Decades(_Bar):
    """Progress bar of one relaxation, on a logarithmic scale of the largest net force.

    The scale goes from the largest force met so far down to ``tolerance``, the force to relax to.
    The attribute ``tolerance`` may be set after the bar was made.
    """

    def __init__(self, wanted: bool | None, tolerance: float = np.inf):
        self.tolerance = tolerance
        self.first = 0.0  # the largest force so far, where the count of decades starts
        self.bar = _bar(wanted, "{desc} {bar} {elapsed}{postfix}", total=100, desc="relaxing")

    def show(self, steps: int, largest: float) -> None:
        """Update the bar with the relaxation steps done and the largest net force on a particle."""
        has_logarithm = np.isfinite(largest) and largest > 0 and 0 < self.tolerance < np.inf
        if self.bar is None or not has_logarithm:
            return
        self.first = max(largest, self.first)
        decades = np.log(self.first / self.tolerance)
        if decades > 0:
            percent = 100.0 * np.log(self.first / max(largest, self.tolerance)) / decades
        else:
            percent = 100.0
        self.bar.n = int(percent)
        self.bar.set_postfix_str(f"step {steps:,}, max_force {largest:.1e}")


class Members(_Bar):
    """Progress bar of a batch of configurations: how many of them are relaxed."""

    def __init__(self, count: int, wanted: bool | None):
        form = "{desc} {bar} {n_fmt} of {total_fmt}, {elapsed}, {remaining} to go"
        self.bar = _bar(wanted, form, total=count, desc="relaxing")

    def advance(self, count: int) -> None:
        """Add ``count`` to the number of relaxed configurations that the bar shows."""
        if self.bar is not None:
            self.bar.update(count)


class Trials(_Bar):
    """Progress bar of an inverse design, a search for parameters that give wanted properties.

    The bar shows the number of steps, and the largest distance of a property from its target.
    """

    def __init__(self, count: int, wanted: bool | None):
        form = "{desc} {bar} {n_fmt} of {total_fmt}, {elapsed}{postfix}"
        self.bar = _bar(wanted, form, total=count, desc="designing")

    def show(self, done: int, tolerances: float) -> None:
        """Update the bar of an inverse design with the steps done and the progress made.

        The progress is given by ``tolerances``, the largest distance of a property from its target,
        in units of the tolerance of this target.
        """
        if self.bar is not None:
            self.bar.n = done
            self.bar.set_postfix_str(f"{tolerances:.3g} tolerances to go")
