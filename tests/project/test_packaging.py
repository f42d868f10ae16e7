"""What a user installs: the wheel holds the systems,
the package finds them there, and importing it is cheap.
"""

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import jax
import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mdsens._util import cache_warnings

SYSTEMS = ROOT / "systems"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS_INSTALLED_BY_MAKE = ("test", "dev")

# jax_md takes seconds to import and starts the backend;
# the other two are slow and belong to the edges.
HEAVY = ("jax_md", "ase", "matplotlib")
REPORT = f"""
import json, sys
import mdsens
bridge = sys.modules.get("jax._src.xla_bridge")
print(json.dumps({{
    "file": mdsens.__file__,
    "version": mdsens.__version__,
    "heavy": [name for name in {HEAVY} if name in sys.modules],
    "backend": bridge is not None and bridge.backends_are_initialized(),
}}))
"""


def run(*command: str | Path, **environment: str) -> str:
    """The standard output of a command, away from the checkout;
    what it says on failure is in the assertion.
    """
    done = subprocess.run(
        [str(part) for part in command],
        cwd=environment.get("PYTHONPATH", ROOT),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-qq",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        folder,
        ROOT,
    )
    (built,) = folder.glob("mdsens-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content alone;
    as PYTHONPATH it comes before the checkout of an editable install.
    """
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", folder, wheel)
    return folder


def last_json(output: str) -> Any:
    return json.loads(output.splitlines()[-1])


def test_wheel_holds_every_file_of_the_systems_and_nothing_of_the_checkout(wheel: Path):
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    tracked = run("git", "ls-files", "systems").split() if (ROOT / ".git").exists() else []
    wanted = {name.replace("systems/", "mdsens/_systems/", 1) for name in tracked}
    assert any(name.startswith("mdsens/_systems/") and name.endswith(".toml") for name in names)
    assert wanted <= set(names)
    tops = {name.split("/")[0] for name in names}
    assert tops == {"mdsens", f"mdsens-{PROJECT['version']}.dist-info"}


def test_installed_package_finds_the_bundled_systems(installed: Path):
    listing = (
        "import json, mdsens.io; print(json.dumps([mdsens.io.__file__,"
        " sorted(mdsens.io.bundled_systems())]))"
    )
    file, names = last_json(run(sys.executable, "-c", listing, PYTHONPATH=str(installed)))
    assert Path(file).is_relative_to(installed)
    assert names == sorted(path.stem for path in SYSTEMS.rglob("*.toml"))
    assert "seed_packing_2d" in names


def test_import_is_cheap_and_starts_no_backend(installed: Path):
    report = last_json(run(sys.executable, "-c", REPORT, PYTHONPATH=str(installed)))
    assert Path(report["file"]).is_relative_to(installed)
    assert report["version"] == PROJECT["version"]
    assert report["heavy"] == []
    assert not report["backend"]


@pytest.mark.parametrize("setting", [{}, {"JAX_DEFAULT_MATMUL_PRECISION": "high"}])
def test_importing_changes_no_setting_of_jax(setting: dict[str, str]):
    code = """
import jax
before = dict(jax.config.values)
import mdsens
print({k: (v, jax.config.values[k]) for k, v in before.items() if jax.config.values[k] != v})
"""
    assert run(sys.executable, "-c", code, **setting).strip() == "{}"


def test_help_is_cheap_and_starts_no_backend(installed: Path):
    after_help = f"""
import sys
from mdsens.cli import main
sys.argv = ["mdsens", "--help"]
try:
    code = main()
except SystemExit as stop:
    code = stop.code
assert not code, code
{REPORT}"""
    report = last_json(run(sys.executable, "-c", after_help, PYTHONPATH=str(installed)))
    assert report["heavy"] == []
    assert not report["backend"]


def test_command_is_installed(installed: Path):
    assert "usage: mdsens" in run(installed / "bin" / "mdsens", "--help", PYTHONPATH=str(installed))


def pinned_versions(python: str) -> dict[str, str]:
    """Package -> version in constraints.txt for a Python."""
    lines = (
        line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()
    )
    pins = [Requirement(line) for line in lines if line]
    chosen = [
        pin for pin in pins if pin.marker is None or pin.marker.evaluate({"python_version": python})
    ]
    versions = {
        str(canonicalize_name(pin.name)): str(pin.specifier).removeprefix("==") for pin in chosen
    }
    assert len(versions) == len(chosen), "a package is pinned twice"
    return versions


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_every_requirement_is_met_by_a_tested_version(python: str):
    versions = pinned_versions(python)
    extras = [
        line
        for extra in EXTRAS_INSTALLED_BY_MAKE
        for line in PROJECT["optional-dependencies"][extra]
    ]
    requirements = [Requirement(line) for line in PROJECT["dependencies"] + extras]
    unmet = [
        str(requirement)
        for requirement in requirements
        if requirement.name != PROJECT["name"]
        and not requirement.specifier.contains(
            versions.get(canonicalize_name(requirement.name), "0")
        )
    ]
    assert unmet == []


@pytest.mark.parametrize("package", ["jax", "jaxlib"])
@pytest.mark.parametrize("version", ["0.10.2", "0.11.0", "0.11.1"])
def test_miscompiling_versions_are_excluded(package: str, version: str):
    (requirement,) = (r for r in map(Requirement, PROJECT["dependencies"]) if r.name == package)
    assert not requirement.specifier.contains(version)


def test_make_refuses_an_old_python_with_the_remedy(tmp_path: Path):
    # On a copy: what is under test removes .venv where it does not refuse.
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\necho 3.10.13\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "test", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "needs Python 3.11 or later" in done.stderr and "3.10.13" in done.stderr
    assert "make test PYTHON=python3.11" in done.stderr
    assert not (tmp_path / ".venv").exists()


MINIMIZERS = """
import sys
from mdsens.relaxation import Fire
from mdsens.mechanics.units import Limits
from mdsens.relaxation.jax_md import jax_md_minimize as module
Fire().functions(lambda R: R, lambda R, dR: R + dR, Limits(1.0, 1.0, 1.0))
assert not [name for name in sys.modules if name.split(".")[0] in ("jax_md", "flax", "haiku")]
import jax_md
assert jax_md.energy.soft_sphere and jax_md.minimize.fire_descent and jax_md.__file__
assert module() is module()
"""


def test_minimizers_come_without_the_rest_of_jax_md_and_leave_it_importable():
    run(sys.executable, "-c", MINIMIZERS)


CACHED = """
import subprocess, sys
import jax
import mdsens as ms
ms.enable_x64()
jax.jit(lambda x: x + 1.0)(1.0)  # a compilation before the cache is there
ms.enable_compilation_cache(sys.argv[1])
ms.minimize(ms.load_system("seed_packing_2d", count=16), progress=False)
for script in sys.argv[2:]:
    subprocess.run([sys.executable, "-c", script, sys.argv[1]], check=True)
"""


def test_compilation_cache_serves_the_next_process(tmp_path: Path):
    """In silence, in a process and in one that it starts:
    XLA alone warns of each part that it loads.
    """
    folder = tmp_path / "cache"
    variables = {
        k: v
        for k, v in os.environ.items()
        if k not in ("TF_CPP_MIN_LOG_LEVEL", "JAX_COMPILATION_CACHE_DIR")
    }

    def minimize(*more: str) -> str:
        command = [sys.executable, "-c", CACHED, str(folder), *more]
        return subprocess.run(
            command, capture_output=True, text=True, env=variables, check=True
        ).stderr

    assert minimize() == ""
    # what compiles in an instant is kept now and again
    kept = sorted(folder.glob("steps_on_list-*-cache"))
    assert minimize(CACHED) == ""
    assert kept and sorted(folder.glob("steps_on_list-*-cache")) == kept


def test_warnings_are_off_while_code_is_loaded_and_then_alone(monkeypatch: pytest.MonkeyPatch):
    levels: list[int] = []
    monkeypatch.setattr(cache_warnings, "_set_level", levels.append)
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "1")
    jax.monitoring.record_event(cache_warnings.REQUESTED)
    assert levels == [3]
    jax.monitoring.record_event_duration_secs(cache_warnings.COMPILED, 0.1)
    assert levels == [3, 1] and not cache_warnings._loading_threads
    # of what no cache was asked for, this sets nothing
    jax.monitoring.record_event_duration_secs(cache_warnings.COMPILED, 0.1)
    assert levels == [3, 1]
