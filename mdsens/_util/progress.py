"""Progress bars of long computations, in a terminal or a notebook.

While jax compiles a program for longer than half a second, the bars of that thread say so: no step
is done meanwhile, and the first relaxation of a system may compile for longer than it runs.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
from typing import Any, Self

import jax
import numpy as np

__all__ = ["Decades", "Members", "Trials"]

# Events of jax: a program is ready for the compiler, and it is compiled or loaded from a cache.
LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
COMPILED = "/jax/core/compile/backend_compile_duration"
# Seconds of compiling after which the bars say so, and seconds between two updates then.
PATIENCE = 0.5
INTERVAL = 1.0

# The bars that are shown, by the thread that made them: jax's events come in the thread that
# compiles.
_shown: dict[int, list[_Bar]] = {}


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
    """Base class of progress bars for a ``with`` block, at whose end the bar is closed.

    Attributes:
      bar: the bar of tqdm; None where none is shown.
    """

    def __init__(self, bar: Any):
        self.bar = bar
        self._name = "" if bar is None else bar.desc
        # while jax compiles: the event that ends the thread that says so
        self._compiled: threading.Event | None = None
        self._announcer: threading.Thread | None = None
        if bar is not None:
            _shown.setdefault(threading.get_ident(), []).append(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the bar."""
        self.end_compiling()
        for thread, bars in list(_shown.items()):
            if self in bars:
                bars.remove(self)
            if not bars:
                del _shown[thread]
        if self.bar is not None:
            self.bar.close()

    def begin_compiling(self) -> None:
        """Show "compiling" in place of the bar's name, from half a second on."""
        self.end_compiling()
        self._compiled = threading.Event()
        self._announcer = threading.Thread(
            target=self._announce, args=(self._compiled,), daemon=True
        )
        self._announcer.start()

    def end_compiling(self) -> None:
        """Show the bar's name again, where it says "compiling"."""
        if self._compiled is None or self._announcer is None:
            return
        self._compiled.set()
        self._announcer.join()
        self._compiled = None
        self._announcer = None
        self.bar.set_description_str(self._name, refresh=False)

    def _announce(self, compiled: threading.Event) -> None:
        """Show that jax compiles, and the time since the bar was made, until it has compiled."""
        wait = PATIENCE
        while not compiled.wait(wait):
            self.bar.set_description_str("compiling")
            wait = INTERVAL


def _on_duration(event: str, duration_secs: float, **_: object) -> None:
    """Take an event of jax: the bars of this thread say while jax compiles.

    jax has no event as it begins to compile. The one before, as a program is ready for the
    compiler, takes its place.
    """
    if not _shown or event not in (LOWERED, COMPILED):
        return
    for bar in _shown.get(threading.get_ident(), ()):
        if event == LOWERED:
            bar.begin_compiling()
        else:
            bar.end_compiling()


jax.monitoring.register_event_duration_secs_listener(_on_duration)


class Decades(_Bar):
    """Progress bar of one relaxation, on a logarithmic scale of the largest net force.

    The scale goes from the largest force met so far down to ``tolerance``, the force to relax to.
    The attribute ``tolerance`` may be set after the bar was made.
    """

    def __init__(self, wanted: bool | None, tolerance: float = np.inf):
        self.tolerance = tolerance
        self.first = 0.0  # the largest force so far, where the count of decades starts
        form = "{desc} {bar} {elapsed}{postfix}"
        super().__init__(_bar(wanted, form, total=100, desc="relaxing"))

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
        super().__init__(_bar(wanted, form, total=count, desc="relaxing"))

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
        super().__init__(_bar(wanted, form, total=count, desc="designing"))

    def show(self, done: int, tolerances: float) -> None:
        """Update the bar of an inverse design with the steps done and the progress made.

        The progress is given by ``tolerances``, the largest distance of a property from its target,
        in units of the tolerance of this target.
        """
        if self.bar is not None:
            self.bar.n = done
            self.bar.set_postfix_str(f"{tolerances:.3g} tolerances to go")
