"""What came out? A figure a question and a table of all records:
``python -m benchmarks.plots [--folder DIR]``.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

import mdsens as ms
from benchmarks._common import shown

RESULTS = Path(__file__).parent / "results"
RIGHT = 1e-6  # the error above which an answer is marked as failed
OURS, PEER, FAILED = "#0072b2", "#999999", "#d55e00"
COLORS = (
    "#0072b2",
    "#56b4e9",
    "#009e73",
    "#004d40",
    "#cc79a7",
    "#7b3294",
    "#e69f00",
    "#000000",
    "#8c6d31",
    "#999999",
)

Row = dict[str, Any]


def failed(row: Row) -> bool:
    """Whether a row's status, its error or what it reached is bad."""
    names = [
        name
        for name in str(row.get("status") or "CONVERGED").split(", ")
        if name in ms.Status.__members__
    ]
    reached, _, wanted = str(row.get("reached", "1 of 1")).partition(" of ")
    return (
        not all(ms.Status[name].good for name in names)
        or (row.get("error") or 0.0) > RIGHT
        or reached != wanted
    )


def groups(rows: Iterable[Row], *names: str) -> dict[Any, list[Row]]:
    """Rows by the values of some columns, in their order."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def panels(
    count: int, width: float, height: float, share: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of panels side by side."""
    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False, sharex=share, sharey=share)[0])


def logarithmic(ax: Axes, across: str, up: str = "") -> None:
    """Labels and a grid; ticks at powers of ten, where the axis has two or more of them."""
    ax.set_xlabel(across)
    ax.set_ylabel(up)
    for axis, limits in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
        if abs(np.diff(np.log10(limits))[0]) > 1.3:
            axis.set_minor_formatter(NullFormatter())
    ax.grid(alpha=0.3)


def mark_failed(ax: Axes, points: Iterable[tuple[float, float]]) -> None:
    """Crosses on what failed; the legend has them where there are any."""
    points = list(points)
    if points:
        ax.scatter(
            *zip(*points, strict=True),
            marker="x",
            s=90,
            color=FAILED,
            linewidths=2,
            zorder=4,
            label="failed",
        )


def relaxation(rows: list[Row]) -> Figure:
    """Bars: time over that of the fastest peer; whiskers over the seeds;
    what was reached beside them.
    """
    cases = groups(rows, "n", "fraction")
    figure, axes = panels(len(cases), 4.8, 2.6)
    for ax, ((n, fraction), some) in zip(axes, cases.items(), strict=True):
        peers = [r["seconds"] for r in some if not r["by"].startswith("mdsens") and not failed(r)]
        unit = min(peers or [r["seconds"] for r in some])
        for y, row in enumerate(some):
            color = FAILED if failed(row) else OURS if row["by"].startswith("mdsens") else PEER
            spread = [
                [(row["seconds"] - row["least"]) / unit],
                [(row["most"] - row["seconds"]) / unit],
            ]
            ax.barh(
                y, row["seconds"] / unit, color=color, xerr=spread, error_kw={"lw": 1, "capsize": 2}
            )
            note = f" {row['seconds']:.2g} s, {row['reached']} at {row['max_force']:.0e}"
            ax.text(row["most"] / unit, y, note, va="center", fontsize=8)
        ax.set_yticks(range(len(some)), [r["by"] for r in some])
        ax.invert_yaxis()
        ax.axvline(1.0, color="black", lw=0.8)
        ax.set_xlim(0, 1.7 * max(r["most"] for r in some) / unit)
        ax.set_xlabel("time / that of the fastest peer" if peers else "time / the shortest")
        ax.set_title(f"n = {n:,}, φ = {fraction}", fontsize=10)
    return figure


def sensitivity(rows: list[Row]) -> Figure:
    """Time against true error, a point a solver."""
    cases = groups(rows, "system", "n")
    figure, axes = panels(len(cases), 4.2, 4.4, share=True)
    names = list(groups(rows, "by"))
    for ax, ((system, n), some) in zip(axes, cases.items(), strict=True):
        for row in some:
            k = names.index((row["by"],))
            marker = "o" if row["by"].startswith("mdsens") else "s"
            error = max(row["error"], 1e-15)
            color = COLORS[k % len(COLORS)]
            ax.loglog(
                row["seconds"],
                error,
                marker,
                color=color,
                ms=7,
                mec="black",
                mew=0.4 + (k >= len(COLORS)),
            )
        mark_failed(ax, [(r["seconds"], max(r["error"], 1e-15)) for r in some if failed(r)])
        ax.axhline(RIGHT, color=FAILED, lw=0.8, ls=":")
        ax.set_title(f"{system.replace('phi=', 'φ = ')}, n = {n:,}", fontsize=10)
    for ax in axes:
        logarithmic(
            ax, "time of one derivative, s", "relative error of dR/dσ" if ax is axes[0] else ""
        )
    figure.legend(*_keys(rows), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _keys(rows: list[Row]) -> tuple[list[Any], list[str]]:
    """The legend of ``sensitivity``."""
    lines, names = [], [by for (by,) in groups(rows, "by")]
    for k, by in enumerate(names):
        marker = "o" if by.startswith("mdsens") else "s"
        edge = {"mec": "black", "mew": 0.4 + (k >= len(COLORS))}
        lines.append(Line2D([], [], ls="", marker=marker, color=COLORS[k % len(COLORS)], **edge))
    lines.append(Line2D([], [], ls="", marker="x", color=FAILED, mew=2))
    return lines, [*names, f"failed: error above {RIGHT:.0e} or a bad status"]


def scaling(rows: list[Row]) -> Figure:
    """Time and memory against the number of particles, with the fitted powers."""
    sizes = [r for r in rows if r["n"] != "exponent"]
    powers = next((r for r in rows if r["n"] == "exponent"), {})
    figure, (ax, other) = panels(2, 4.4, 3.6)
    n = np.array([r["n"] for r in sizes], float)
    named = {"relax": "relaxing", "jvp": "jvp", "gradient": "gradient of the pressure"}
    for k, (key, label) in enumerate(named.items()):
        times = np.array([r[key] for r in sizes])
        if key in powers:
            label += f": $n^{{{powers[key]:.2f}}}$"
            ax.loglog(
                n,
                np.exp(np.mean(np.log(times))) * (n / np.exp(np.mean(np.log(n)))) ** powers[key],
                "--",
                color=COLORS[2 * k],
                lw=0.8,
            )
        ax.loglog(n, times, "o", color=COLORS[2 * k], label=label)
        mark_failed(ax, [(r["n"], r[key]) for r in sizes if failed(r)])
    ax.legend(fontsize=8)
    other.loglog(n, [r["peak_GiB"] for r in sizes], "o-", color=COLORS[0])
    logarithmic(ax, "particles", "time, s")
    logarithmic(other, "particles", "peak memory of the process, GiB")
    return figure


def jamming(rows: list[Row]) -> Figure:
    """Time and error against the pressure, a line a solver."""
    figure, axes = panels(2, 4.6, 3.8)
    for k, ((by,), some) in enumerate(groups(rows, "by").items()):
        pressures = [r["pressure"] for r in some]
        for ax, key in zip(axes, ("seconds", "error"), strict=True):
            values = [max(r[key], 1e-15) for r in some]
            ax.loglog(pressures, values, "o-", color=COLORS[k % len(COLORS)], ms=4, lw=1, label=by)
    for ax, key in zip(axes, ("seconds", "error"), strict=True):
        mark_failed(ax, [(r["pressure"], max(r[key], 1e-15)) for r in rows if failed(r)])
        label = {"seconds": "time of one derivative, s", "error": "relative error of dR/dσ"}[key]
        logarithmic(ax, "pressure, ε/σ² (to the right: towards unjamming)", label)
        ax.invert_xaxis()
    axes[1].axhline(RIGHT, color=FAILED, lw=0.8, ls=":")
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        fontsize=8,
        frameon=False,
    )
    figure.suptitle(" and ".join(f"n = {n:,}" for (n,) in groups(rows, "n")), fontsize=10)
    return figure


def honesty(rows: list[Row]) -> Figure:
    """Shares of the answers of each solver: right, refused,
    wrong and said so, wrong without a word.
    """
    cases = groups(rows, "side")
    figure, axes = panels(len(cases), 2.6, 4.0)
    kinds = {
        "right": ("right", "#009e73"),
        "right_refused": ("right, refused", "#a6d854"),
        "wrong_said": ("wrong, said so", "#cccccc"),
        "wrong_unsaid": ("wrong, not a word", FAILED),
    }
    solvers = sorted({r["by"] for r in rows}, key=lambda by: (not by.startswith("mdsens"), by))
    for ax, ((side,), some) in zip(axes, cases.items(), strict=True):
        left = np.zeros(len(solvers))
        ordered = sorted(some, key=lambda r: solvers.index(r["by"]))
        for key, (label, color) in kinds.items():
            share = np.array([100.0 * r[key] / r["answers"] for r in ordered])
            ax.barh(range(len(ordered)), share, left=left, color=color, label=label)
            left += share
        ax.set_yticks(
            range(len(solvers)), solvers if ax is axes[0] else [""] * len(solvers), fontsize=8
        )
        ax.invert_yaxis()
        ax.set_xlim(0, 100)
        ax.set_xlabel("answers, %")
        ax.set_title(side, fontsize=9)
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        fontsize=8,
        frameon=False,
    )
    return figure


def gpu(rows: list[Row]) -> Figure:
    """Bandwidth of the products beside the device's own; time and error of a solve."""
    figure, (ax, other) = panels(2, 4.4, 3.6)
    for k, ((what, dtype), some) in enumerate(
        groups([r for r in rows if "GB/s" in r], "what", "dtype").items()
    ):
        color = COLORS[k % len(COLORS)]
        if what.startswith("copy"):
            ax.axhline(some[0]["GB/s"], color=color, ls="--", lw=1, label=f"{what}, {dtype}")
        else:
            ax.loglog(
                [r["n"] for r in some],
                [r["GB/s"] for r in some],
                "o-",
                color=color,
                label=f"{what}, {dtype}",
            )
    for k, ((dtype,), some) in enumerate(
        groups([r for r in rows if r["what"].startswith("jvp")], "dtype").items()
    ):
        other.loglog(
            [r["n"] for r in some],
            [r["seconds"] for r in some],
            "o-",
            color=COLORS[3 * k],
            label=dtype,
        )
        for r in some:
            note = f"{r['error']:.0e}"
            other.annotate(
                note, (r["n"], r["seconds"]), (4, -10), textcoords="offset points", fontsize=7
            )
        bad = [(r["n"], r["seconds"]) for r in some if failed({"status": r["status"]})]
        mark_failed(other, bad)
    for panel in (ax, other):
        panel.margins(x=0.2, y=0.15)
    other.legend(fontsize=8)
    figure.legend(
        *ax.get_legend_handles_labels(),
        loc="outside lower left",
        ncols=3,
        fontsize=7,
        frameon=False,
    )
    logarithmic(ax, "particles", "bytes that must move / time, GB/s")
    logarithmic(other, "particles", "time of one derivative, s")
    other.set_title("beside each point its relative error", fontsize=9)
    return figure


def design(rows: list[Row]) -> Figure:
    """The share of the designs that are met, over relaxations."""
    problems = groups(rows, "problem")
    figure, axes = panels(len(problems), 3.6, 3.0, share=True)
    for ax, ((problem,), chosen) in zip(axes, problems.items(), strict=True):
        for k, ((by,), some) in enumerate(groups(chosen, "by").items()):
            steps = np.sort([row["relaxations"] for row in some if row["met"]])
            limit = max(row["relaxations"] for row in rows)
            across = np.concatenate([[0], steps, [limit]])
            up = np.concatenate([[0], np.arange(1, len(steps) + 1), [len(steps)]])
            ax.step(
                across,
                up,
                where="post",
                color=COLORS[k],
                label=f"{by}: {len(steps)} of {len(some)}",
            )
        ax.set_title(problem, fontsize=9)
        ax.set_xlabel("relaxations")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7, loc="upper left")
    axes[0].set_ylabel("designs met")
    axes[0].set_ylim(0, 1.5 * max(len(some) for some in groups(rows, "problem", "by").values()))
    return figure


FIGURES: dict[str, Callable[[list[Row]], Figure]] = {
    "relaxation": relaxation,
    "sensitivity": sensitivity,
    "scaling": scaling,
    "jamming": jamming,
    "honesty": honesty,
    "gpu": gpu,
    "design": design,
}


def section(name: str, record: dict[str, Any], pictured: bool) -> str:
    """The question, where it was answered, the figure, the rows of the record ``name``.json."""
    machine, rows = record["machine"], record["rows"]
    words = (importlib.import_module(f"benchmarks.{record['question']}").__doc__ or "").strip()
    question = " ".join(words.split("\n\n")[0].split())  # its first paragraph, in one line
    versions = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
    where = (
        f"{machine['processor']}, {machine['cores']} cores, jax on {machine['device']}; Python"
        f" {record['python']}"
    )
    columns = list(dict.fromkeys(column for row in rows for column in row))
    memory = f"Peak memory {record['peak_memory_GiB']} GiB"
    if "device_memory_GiB" in record:
        memory += f", on the device {record['device_memory_GiB']} GiB"
    lines = [f"## {name}", words, f"{where}, {versions}. {memory}."]
    lines += [record["note"]] if "note" in record else []
    lines += [f"![{question}]({name}.png)"] if pictured else []
    table = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    table += [
        "| " + " | ".join(shown(row.get(column)) for column in columns) + " |" for row in rows
    ]
    return "\n\n".join([*lines, "\n".join(table)])


def main() -> None:
    """A figure for each record, and README.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=RESULTS, help="where the records are, and the figures go"
    )
    folder = parser.parse_args().folder
    sections = [
        "# What the benchmarks measured\n\n`make bench` writes this folder; times are medians, in"
        " seconds."
    ]
    for file in sorted(folder.glob("*.json")):
        record = json.loads(file.read_text())
        draw = FIGURES.get(record["question"])
        if draw is not None:
            draw(record["rows"]).savefig(folder / f"{file.stem}.png", dpi=130)
        sections.append(section(file.stem, record, draw is not None))
    (folder / "README.md").write_text("\n\n".join(sections) + "\n")


if __name__ == "__main__":
    main()
