"""Each benchmark runs on a small system without its peers,
and its record says how exact each time was.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import LONG, ROOT

SMALL = {
    "relaxation": ["--sizes", "96", "--fractions", "0.95", "--seeds", "1", "--peers", "0"],
    "sensitivity": [
        "--sizes",
        "96",
        "--fractions",
        "0.95",
        "--spheres",
        "0",
        "--runs",
        "1",
        "--peers",
        "0",
    ],
    "jacobian": ["--sizes", "96", "--runs", "1", "--peers", "0"],
    "product": ["--sizes", "96", "--runs", "1"],
    "elasticity": ["--sizes", "96", "--runs", "1"],
    "batch": ["--sizes", "24", "--members", "3", "--runs", "1"],
    "scaling": ["--sizes", "96", "--runs", "1"],
    "atoms": ["--sizes", "64", "--runs", "1", "--peers", "0"],
    "first_answer": ["--runs", "1", "--systems", "Lennard-Jones dimer", "--commands", "0"],
    "glass": ["--sizes", "256", "--systems", "glass", "--runs", "1", "--peers", "0"],
    "jamming": ["--sizes", "96", "--runs", "1", "--pressures", "0.1"],
    "design": ["--sizes", "64", "--seeds", "1", "--steps", "2", "--problems", "0", "--peers", "0"],
    "honesty": [
        "--sizes",
        "96",
        "--draws",
        "1",
        "--pressures",
        "0.1",
        "--limits",
        "5000",
        "--peers",
        "0",
    ],
}


# they compile for longest
LONGER = (
    "sensitivity",
    "jacobian",
    "batch",
    "jamming",
    "design",
    "honesty",
    "elasticity",
    "atoms",
    "first_answer",
    "glass",
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch) -> Callable[..., list[dict[str, Any]]]:
    """Run a benchmark with its record in ``tmp_path``; its rows."""
    monkeypatch.syspath_prepend(str(ROOT))

    def rows(name: str, *options: str) -> list[dict[str, Any]]:
        file = tmp_path / f"{name}.json"
        monkeypatch.setattr(sys, "argv", [name, *options, "--json", str(file)])
        importlib.import_module(f"benchmarks.{name}").main()
        record = json.loads(file.read_text())
        assert record["versions"]["jax"] and record["machine"]["cores"]
        return record["rows"]

    return rows


@pytest.mark.parametrize(
    "name", [pytest.param(k, marks=LONG if k in LONGER else ()) for k in SMALL]
)
def test_benchmark_runs_and_tells_errors_beside_times(name: str, run):
    rows = run(name, *SMALL[name])
    assert rows
    for row in rows:
        wrong = [row[key] for key in ("error", "max_force", "adjoint", "residual") if key in row]
        assert wrong and max(wrong) < 1e-6, row
        assert row.get("status", "CONVERGED") == "CONVERGED"


@LONG
def test_an_ensemble_is_designed_and_held_against_fresh_packings(run):
    rows = run("ensemble", "--sizes", "64", "--members", "2", "--steps", "1", "--change", "0.02")
    assert len(rows) == 2 and all(
        abs(row["fresh"]) < 1.0 and row["relaxations"] == 1 for row in rows
    )


@LONG
def test_no_solve_that_failed_says_nothing(run):
    options = [
        "--sizes",
        "96",
        "--draws",
        "1",
        "--pressures",
        "0.001",
        "--limits",
        "30",
        "--peers",
        "0",
    ]
    rows = run("honesty", *options)
    assert not any(row["wrong_unsaid"] for row in rows)
    assert all(row["wrong_said"] == row["answers"] for row in rows if row["by"] != "mdsens Auto")


@LONG
def test_gpu_benchmark_runs_on_a_cpu_and_tells_errors_of_each_precision(run):
    rows = run(
        "gpu", "--sizes", "96", "--runs", "1", "--members", "2", "--small", "32", "--megabytes", "1"
    )
    for row in rows:
        assert row["seconds"] > 0
        if "error" in row:
            assert row["error"] < (1e-6 if row["dtype"] == "float64" else 0.1), row


def test_records_become_figures_and_a_table(tmp_path: Path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    plots = importlib.import_module("benchmarks.plots")
    for record in plots.RESULTS.glob("*.json"):
        shutil.copy(record, tmp_path)
    monkeypatch.setattr(sys, "argv", ["plots", "--folder", str(tmp_path)])
    plots.main()
    table = (tmp_path / "README.md").read_text()
    for record in tmp_path.glob("*.json"):
        assert f"## {record.stem}" in table
        if json.loads(record.read_text())["question"] in plots.FIGURES:
            assert 1e4 < (tmp_path / f"{record.stem}.png").stat().st_size < 3e5
