"""What the paper's experiments share: the command line,
clock and memory of a compiled function, table and figure.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import mdsens as ms
from benchmarks._common import record_of, shown, write

RESULTS = Path(__file__).parents[1] / "results" / "paper"
IMPLICIT, UNROLLED, THIRD, FOURTH = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
BRIEF = 0.1  # seconds of timed runs that one function is given at least, where it would take less

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Asked:
    """The command line of an experiment.

    Attributes:
      smoke: tiny sizes on made data, one repetition.
      runs: timed runs of each compiled function, after one that is not counted.
      json, figure: where the record and the picture go; None for nowhere.
      load: of the machine over the last minute, before the experiment added its own.
    """

    smoke: bool
    runs: int
    json: Path | None
    figure: Path | None
    load: float


def asked(name: str, words: str | None, argv: Sequence[str] | None) -> Asked:
    """Read the command line; double precision from here on."""
    parser = argparse.ArgumentParser(
        description=words, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--smoke", action="store_true", help="tiny sizes on made data; writes no file unless asked"
    )
    parser.add_argument(
        "--runs", type=int, help="timed runs of each function: 3, or 1 with --smoke"
    )
    parser.add_argument(
        "--json", type=Path, help=f"the record: results/paper/{name}.json, or none with --smoke"
    )
    parser.add_argument(
        "--figure", type=Path, help=f"the figure: results/paper/{name}.png, or none with --smoke"
    )
    given = parser.parse_args(argv)
    ms.enable_x64()
    json = given.json or (None if given.smoke else RESULTS / f"{name}.json")
    figure = given.figure or (None if given.smoke else RESULTS / f"{name}.png")
    return Asked(
        given.smoke, given.runs or (1 if given.smoke else 3), json, figure, os.getloadavg()[0]
    )


@dataclasses.dataclass(frozen=True)
class FeatureValues:
    """A compiled function, and what one call of it takes.

    Attributes:
      run: the compiled function.
      answer: what it gave.
      seconds: the median of the timed runs.
      MB: temporaries that it holds at once, as XLA's analysis of the compiled program says before
        anything runs: its buffers, not its arguments, results or LAPACK's workspace. None where the
        backend does not say.
    """

    run: Callable[..., Any]
    answer: Any
    seconds: float
    MB: float | None


def measured(
    f: Callable[..., Any], *args: Any, runs: int, most: float = float("inf")
) -> FeatureValues:
    """Compile f for these arguments, call it once, then ``runs`` times by the clock;
    oftener where that takes no time.

    Args:
      most: MB of temporaries above which it is compiled and not called; the answer is None then.
    """
    compiled = jax.jit(f).lower(*args).compile()
    if (temporaries(compiled) or 0.0) > most:
        return FeatureValues(compiled, None, float("nan"), temporaries(compiled))
    times, answer = [], jax.block_until_ready(compiled(*args))
    while len(times) < runs or (sum(times) < BRIEF and len(times) < 10 * runs):
        began = time.perf_counter()
        answer = jax.block_until_ready(compiled(*args))
        times.append(time.perf_counter() - began)
    seconds = float(np.median(times)) if times else float("nan")
    return FeatureValues(compiled, answer, seconds, temporaries(compiled))


def temporaries(compiled: Any) -> float | None:
    """MB of temporaries of a compiled program, None where the backend does not say."""
    analysis = compiled.memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes / 1e6


def relative(a: Any, b: Any) -> float:
    """|a - b| / |b| in the 2-norm."""
    return float(jnp.linalg.norm(jnp.ravel(a) - jnp.ravel(b)) / jnp.linalg.norm(jnp.ravel(b)))


def finish(
    name: str,
    wanted: Asked,
    rows: list[Row],
    more: Row,
    draw: Callable[[Row], Figure],
) -> Row:
    """The table on the terminal, the record and the figure where they are wanted.

    Args:
      more: what the figure needs beside the rows, as lists.
      draw: the figure of a record.
    """
    record = record_of(f"paper/{name}", rows)
    record["machine"]["load"] = round(wanted.load, 2)
    record |= {"smoke": wanted.smoke, "runs": wanted.runs, **more}
    print(table(rows))
    if wanted.json is not None:
        write(record, wanted.json)
    if wanted.figure is not None:
        wanted.figure.parent.mkdir(parents=True, exist_ok=True)
        draw(record).savefig(wanted.figure, dpi=130)
    return record


def table(rows: list[Row]) -> str:
    """Rows as a table of Markdown that is aligned on the terminal, too."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([shown(row.get(name)) for name in names] for row in rows)]
    widths = [max(3, *(len(line[k]) for line in lines)) for k in range(len(names))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )
