"""Compiled code kept in a folder: which folder, how much of it, two processes at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mdsens._util import compilation
from mdsens.cli import commands

RELAX = """
import sys
import mdsens as ms
ms.enable_x64()
ms.enable_compilation_cache(sys.argv[1])
eq = ms.minimize(ms.load_system("seed_packing_2d", count=16), progress=False)
print(repr(float(eq.positions.sum())))
"""


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """The folders that the command line chooses, in an environment that names none."""
    folders: list[Path] = []
    monkeypatch.setattr(compilation, "keep_compiled", folders.append)
    for name in ("JAX_COMPILATION_CACHE_DIR", "MDSENS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return folders


def test_the_option_comes_before_the_environment_and_that_before_the_default(
    kept: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    commands._keep_compiled(None)
    monkeypatch.setenv("MDSENS_CACHE", str(tmp_path / "named"))
    commands._keep_compiled(None)
    commands._keep_compiled(str(tmp_path / "given"))
    assert kept == [tmp_path / "caches" / "mdsens", tmp_path / "named", tmp_path / "given"]
    assert all(folder.is_dir() for folder in kept)
    monkeypatch.setenv("MDSENS_CACHE", "none")
    commands._keep_compiled(None)
    commands._keep_compiled("none")
    # jax's own variable is read by jax
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "jax"))
    commands._keep_compiled(str(tmp_path / "given"))
    assert len(kept) == 3


def test_a_folder_that_cannot_be_written_is_no_error(
    kept: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
):
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(in_the_way))
    commands._keep_compiled(None)
    assert capsys.readouterr().err == ""
    commands._keep_compiled(str(in_the_way / "folder"))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "cannot be written" in lines[0] and not kept


def test_a_relative_folder_of_caches_is_none(monkeypatch: pytest.MonkeyPatch):
    """As its specification says: such a path is ignored."""
    monkeypatch.setenv("XDG_CACHE_HOME", "caches")
    assert compilation.cache_folder() == Path.home() / ".cache" / "mdsens"


def test_the_oldest_files_make_room(tmp_path: Path):
    for age in range(10):
        for name in (f"{age}-cache", f"{age}-other"):
            (tmp_path / name).write_bytes(bytes(100))
            os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    compilation._delete_oldest(tmp_path, 1000)
    assert len(list(tmp_path.iterdir())) == 20
    compilation._delete_oldest(tmp_path, 800)
    left = {path.name for path in tmp_path.glob("*-cache")}
    assert left == {f"{age}-cache" for age in range(6)}
    assert len(list(tmp_path.glob("*-other"))) == 10
    compilation._delete_oldest(tmp_path / "missing", 0)


def test_two_processes_at_once_share_a_folder(tmp_path: Path):
    folder = tmp_path / "kept"
    variables = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-c", RELAX, str(folder)]

    def started() -> subprocess.Popen[str]:
        return subprocess.Popen(command, stdout=subprocess.PIPE, env=variables, text=True)

    both = [started(), started()]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    # and what they have left serves a third one
    third = started()
    outputs.append(third.communicate()[0])
    assert third.returncode == 0 and len(set(outputs)) == 1 and float(outputs[0]) != 0.0
