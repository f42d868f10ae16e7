"""The paper's experiments at smoke size: records have their fields,
and the implicit result is what they say it is.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

FOLDER = ROOT / "benchmarks" / "paper"
EXPERIMENTS = sorted(file.stem for file in FOLDER.glob("*.py") if not file.stem.startswith("_"))
RECORDS = [
    name
    for name in EXPERIMENTS
    if (ROOT / "benchmarks" / "results" / "paper" / f"{name}.json").exists()
]

Record = dict[str, Any]


def ridge(record: Record) -> None:
    """Theorem 1 holds at every number of steps, and unrolling is further off than its bound."""
    for row in record["rows"]:
        assert row["implicit"] <= row["bound"] < row["forward"]
        assert row["forward"] == pytest.approx(row["reverse"], rel=1e-9)
    assert record["rows"][-1]["implicit"] < 1e-4


def dynamics(record: Record) -> None:
    """At rest implicit, ``ms.jvp`` of another code path, and unrolled agree;
    before, unrolling is further off.
    """
    rows = {(row["steps"], row["by"]): row for row in record["rows"]}
    early, late = record["counts"]
    assert record["packings"][0]["at_rest"] < 1e-8
    assert rows[late, "implicit, forward"]["error"] < 1e-8
    assert rows[early, "unrolled, forward"]["error"] > max(
        1.0, rows[early, "implicit, forward"]["error"]
    )
    assert rows[late, "unrolled, forward"]["error"] < 1e-6


def svm(record: Record) -> None:
    """Finite differences stand behind the truth;
    either fixed point gives the same derivative, near it as x is.
    """
    rows = {row["way"]: row for row in record["rows"]}
    assert all(row["differences"] < 1e-6 for row in rows.values())
    assert rows["implicit PG"]["error"] == pytest.approx(rows["implicit MD"]["error"], abs=1e-8)
    assert rows["implicit PG"]["error"] < rows["implicit PG"]["solution"]


def distillation(record: Record) -> None:
    """Finite differences stand behind the implicit gradient at a solution;
    both are wrong where the solver stops.
    """
    newton, descent, unrolled = record["rows"][:3]
    assert max(newton["error_start"], newton["error_later"]) < 1e-6
    assert descent["method"] == "implicit" and unrolled["method"] == "unrolled"
    assert min(descent["error_start"], unrolled["error_start"]) > 0.1


def dictionary(record: Record) -> None:
    """An implicit derivative is right at its best."""
    errors = [
        row["error"]
        for row in record["rows"]
        if "implicit" in str(row.values()) and row.get("error") is not None
    ]
    assert errors and min(errors) < 1e-6


CLAIMS: dict[str, Callable[[Record], None]] = {
    "ridge": ridge,
    "dynamics": dynamics,
    "svm": svm,
    "distillation": distillation,
    "dictionary": dictionary,
}


@pytest.fixture(autouse=True)
def _checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_runs_small_and_is_as_exact_as_it_says(name: str, tmp_path: Path, capsys):
    file = tmp_path / f"{name}.json"
    importlib.import_module(f"benchmarks.paper.{name}").main(["--smoke", "--json", str(file)])
    record = json.loads(file.read_text())
    assert record["question"] == f"paper/{name}" and record["smoke"] and record["rows"]
    assert (
        record["versions"]["jax"] and record["machine"]["cores"] and record["machine"]["load"] >= 0
    )
    assert list(tmp_path.iterdir()) == [file]  # no figure where none was asked for
    assert capsys.readouterr().out.count("\n|") >= len(record["rows"])
    CLAIMS[name](record)


@pytest.mark.parametrize("name", RECORDS)
def test_a_full_record_becomes_a_figure(name: str, tmp_path: Path):
    record = json.loads((ROOT / "benchmarks" / "results" / "paper" / f"{name}.json").read_text())
    assert not record["smoke"]
    importlib.import_module(f"benchmarks.paper.{name}").figure(record).savefig(
        tmp_path / "figure.png", dpi=130
    )
    assert 1e4 < (tmp_path / "figure.png").stat().st_size < 3e5
