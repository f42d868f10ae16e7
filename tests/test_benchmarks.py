"""Each benchmark runs on a small system without its peers, and its record says how exact each time was."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = {
    "relaxation": ["--sizes", "96", "--fractions", "0.95", "--seeds", "1", "--peers", "0"],
    "sensitivity": ["--sizes", "96", "--fractions", "0.95", "--spheres", "0", "--runs", "1", "--peers", "0"],
    "jacobian": ["--sizes", "96", "--runs", "1", "--peers", "0"],
    "scaling": ["--sizes", "96", "--runs", "1"],
}


@pytest.mark.parametrize("name", SMALL)
def test_benchmark_runs_and_tells_errors_beside_times(name: str, tmp_path: Path, monkeypatch):
    file = tmp_path / "record.json"
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(sys, "argv", [name, *SMALL[name], "--json", str(file)])
    importlib.import_module(f"benchmarks.{name}").main()
    record = json.loads(file.read_text())
    assert record["versions"]["jax"] and record["machine"]["cores"]
    assert record["rows"]
    for row in record["rows"]:
        wrong = [row[key] for key in ("error", "max_force", "adjoint", "residual") if key in row]
        assert wrong and max(wrong) < 1e-6, row
        assert row.get("status", "CONVERGED") == "CONVERGED"
