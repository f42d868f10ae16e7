"""The documentation site: its examples run, and nothing that a user can reach is without a page."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import mdsens as ms
from mdsens.implicit import Result
from mdsens.mechanics.explanations import EXPLANATIONS

DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS / "_extensions"))
public_names = importlib.import_module("public_names")
PAGES = sorted(
    page
    for folder in ("start", "guides", "theory")
    for page in (DOCS / folder).glob("*.md")
    if "```python" in page.read_text(encoding="utf-8")
)
MODULES = [
    info.name
    for info in pkgutil.walk_packages(ms.__path__, "mdsens.")
    if "__main__" not in info.name
]


@pytest.mark.parametrize("page", PAGES, ids=[f"{page.parent.name}-{page.stem}" for page in PAGES])
def test_examples_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    names: dict = {"__name__": "page"}
    for block in re.finditer(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        # the line numbers of the page, for the traceback of an example that fails
        lines = "\n" * text.count("\n", 0, block.start(1))
        exec(compile(lines + block[1], str(page), "exec"), names)


def test_only_what_needs_a_gpu_is_shown_without_being_run():
    hidden = []
    for page in DOCS.glob("*/*.md"):
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"^```text\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
        hidden += [page.stem for block in blocks if re.search(r"^ *print\(", block, re.MULTILINE)]
    assert set(hidden) <= {"gpu"}


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str):
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert failed == 0


def test_every_status_is_explained():
    assert set(EXPLANATIONS) == set(ms.Status)
    # an error of a linear solve names its status, too
    assert set(Result.__members__) <= set(ms.Status.__members__)
    for status in ms.Status:
        page = ms.explain(status.name)
        assert page.status is status and page is ms.explain(int(status))
        # every failure and warning says what to do about it
        assert page.remedies or status.severity < 2, status.name


def test_what_has_a_status_is_explained_and_what_has_none_is_refused():
    error = ms.ConvergenceError("stopped", ms.Status.FLOPPY)
    assert ms.explain(error).status is ms.Status.FLOPPY
    assert "ms.explain('FLOPPY')" in str(error)
    eq = ms.minimize(ms.load_system("dimer"), progress=False)
    assert ms.explain(eq).status is ms.Status.CONVERGED
    assert "FLOPPY (failure, code 18)" in str(ms.explain("floppy"))
    with pytest.raises(ms.InputError, match="did you mean 'FLOPPY'"):
        ms.explain("FLOPY")
    for nothing in (1.5, [], None):
        with pytest.raises(ms.InputError, match="has no status"):
            ms.explain(nothing)


def test_every_public_name_is_explained():
    paths = public_names.canonical_paths()
    assert {"mdsens.jvp", "mdsens.System", "mdsens.elasticity.moduli"} <= set(paths)
    bare = [p for p, v in paths.items() if callable(v) and not inspect.getdoc(v)]
    assert bare == []


def test_references_to_the_api_lead_somewhere():
    named = set()
    for page in DOCS.rglob("*.md"):
        named |= set(
            re.findall(
                r"\{(?:func|class|meth|mod|obj|attr)\}`~?([\w.]+)`",
                page.read_text(encoding="utf-8"),
            )
        )
    for path in named:
        value = ms
        for part in path.split(".")[1:]:
            value = getattr(value, part)


def test_links_between_pages_lead_somewhere():
    made = {"reference/statuses.md", "reference/cli.md", "reference/api/index"}
    missing = []
    for page in DOCS.rglob("*.md"):
        for target in re.findall(
            r"\]\(([^)#:\s]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8")
        ):
            path = (page.parent / target).resolve()
            known = str(path.relative_to(DOCS)) in made if path.is_relative_to(DOCS) else False
            if not (
                path.exists()
                or known
                or (path.suffix == ".ipynb" and (ROOT / "notebooks" / path.name).exists())
            ):
                missing.append(f"{page.name}: {target}")
    assert missing == []
