"""What the README shows runs, and what it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 7
    names: dict = {}
    for block in blocks:  # one after the other in one namespace, as a reader would
        exec(compile(block, "README.md", "exec"), names)
    assert names["v"].disagreement(names["r"].value) < 1e-6
    assert (tmp_path / "response.png").stat().st_size > 10_000
    slopes = names["slopes"]["sigma"]
    # larger discs in the same box press harder
    assert slopes.shape == (32,) and float(slopes.sum()) > 0
    assert names["by_diameter"].shape == (32,)
    assert names["design"].status.name == "CONVERGED"
    assert names["softer"][:2].sum() < 0  # more pressure, a smaller cell
    bond, floor, pinned = (
        np.asarray(names["rest"].multipliers[k]) for k in ("bond", "floor", "pinned")
    )
    assert bond.shape == (2,) and np.abs(bond).max() > 1e-3  # they show something
    # nothing else holds it
    assert floor.sum() > 1e-2 and np.allclose(pinned[0], [0.0, -floor.sum()], atol=1e-12)
    assert set(names["tighter"].multipliers) == {"pinned", "bond", "floor"}
    assert "CONVERGED" in capsys.readouterr().out


def test_links_lead_somewhere():
    targets = re.findall(r'\]\(([^)#:]+)\)|src="([^":]+)"', TEXT)
    paths = [a or b for a, b in targets]
    assert len(paths) >= 4
    assert [p for p in paths if not (ROOT / p).exists()] == []


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = re.findall(r"\bmake ([a-z]+)\b", TEXT)
    assert {"demo", "test", "help"} <= set(named)
    assert [t for t in named if not re.search(rf"^{t}:", makefile, flags=re.MULTILINE)] == []


def test_calls_exist():
    import mdsens as ms

    for dotted in set(re.findall(r"\bms\.([a-zA-Z_]\w*(?:\.[a-zA-Z_]\w*)?)", TEXT)):
        found = ms
        for name in dotted.split("."):
            found = getattr(found, name)


def test_solvers_and_constraints_exist():
    from mdsens import constraints, implicit

    for row in re.findall(r"^\| ((?:`[A-Z]\w+`(?:, )?)+) \|", TEXT, flags=re.MULTILINE):
        for name in re.findall(r"`(\w+)`", row):
            assert hasattr(implicit, name) or hasattr(constraints, name)
    assert hasattr(implicit, "root") and hasattr(implicit, "fixed_point")
