"""What the README shows runs, and what it names is there."""

from __future__ import annotations

import re
from pathlib import Path

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
    assert len(blocks) == 1
    names: dict = {}
    exec(compile(blocks[0], "README.md", "exec"), names)
    assert names["v"].disagreement(names["r"].value) < 1e-6
    assert (tmp_path / "response.png").stat().st_size > 10_000
    assert "CONVERGED" in capsys.readouterr().out


def test_links_lead_somewhere():
    targets = re.findall(r'\]\(([^)#:]+)\)|src="([^":]+)"', TEXT)
    paths = [(a or b).rstrip("/") for a, b in targets]
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
