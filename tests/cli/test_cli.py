"""The command line: what it says, its exit codes, and that no error ends in a traceback."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LONG, ROOT, SOLIDS, ring

import mdsens as ms
from mdsens import cli
from mdsens._util import tables
from mdsens.cli import doctor, moduli_report, report
from mdsens.implicit.linear.result import SolveStats

PACKING = """
description = "sixteen discs"
units = "reduced"
seed = 1
dimension = 2
count = 16
species = [0.5, 0.5]
box = {{ packing_fraction = {fraction} }}
[positions]
kind = "random"
[potential]
kind = "soft_sphere"
[parameters]
sigma = {sigma}
epsilon = 1.0
alpha = 2.0
"""


def packing(folder: Path, fraction: float = 0.98, sigma: str = "[1.0, 0.7]") -> str:
    path = folder / "packing.toml"
    path.write_text(PACKING.format(fraction=fraction, sigma=sigma))
    return str(path)


class Outcome:
    """Exit code and what was said, of a command in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *argv: object):
        try:
            self.code = cli.main([str(part) for part in argv])
        except SystemExit as stop:
            self.code = stop.code
        self.out, self.err = capsys.readouterr()
        assert "Traceback" not in self.out + self.err
        # all but the verdict, which is one line
        assert max(map(len, self.out.splitlines()[:-1]), default=0) <= 100
        if self.code == cli.BAD_INPUT and "usage:" not in self.err:
            assert len(self.err.splitlines()) == 1, self.err


def process(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "100",
        "PYTHONIOENCODING": "ascii",
    }
    return subprocess.run(
        [sys.executable, "-m", "mdsens", *argv],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_sensitivity_of_the_dimer_as_a_process(tmp_path: Path):
    done = process("sensitivity", "dimer", "--wrt", "sigma", "--out", "r.npz", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        r"good: agrees with finite differences to \de-\d\d", done.stdout.splitlines()[-1]
    )
    assert "lennard_jones" in done.stdout and done.stderr == ""
    assert [path.name for path in tmp_path.iterdir()] == ["r.npz"]
    # 2^(1/6) sigma apart: each end moves half of that, along the line
    with np.load(tmp_path / "r.npz") as file:
        apart = file["value"][0, 1] - file["value"][0, 0]
        np.testing.assert_allclose(np.linalg.norm(apart), 2 ** (1 / 6), rtol=1e-10)
        assert file["wrt"].tolist() == ["sigma"] and file["status"].tolist() == ["CONVERGED"]
        assert file["finite_difference_error"][0] < 1e-7  # their step leaves them a noise of 3e-9


def test_a_bad_name_as_a_process(tmp_path: Path):
    done = process("relax", "dimmer", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("mdsens: ") and done.stderr.endswith("did you mean 'dimer'?\n")


def test_unjammed_packing_is_not_trusted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "r.npz"
    done = Outcome(
        capsys, "sensitivity", packing(tmp_path, fraction=0.2), "--wrt", "sigma[0]", "--out", out
    )
    assert done.code == 3
    assert "contacts           0" in done.out
    assert done.err.startswith("mdsens: ") and "raise the packing fraction" in done.err
    assert len(done.err.splitlines()) == 1
    assert not out.exists()


def test_every_component_in_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out, figure = tmp_path / "r.npz", tmp_path / "largest.png"
    done = Outcome(
        capsys, "sensitivity", packing(tmp_path), "--wrt", "sigma", "--plot", figure, "--out", out
    )
    assert done.code == 0, done.out + done.err
    assert "Sensitivity dR/d sigma[0]" in done.out and "Sensitivity dR/d sigma[1]" in done.out
    assert "packing fraction  0.98; the box" in done.out
    assert "of the non-affine part, against finite differences" in done.out
    with np.load(out) as file:
        sizes = np.linalg.norm(file["nonaffine"], axis=(1, 2))
    assert f"largest.png: sigma[{sizes.argmax()}]" in done.out
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "largest.png",
        "packing.toml",
        "r.npz",
    ]


def test_components_of_one_value_a_particle_are_ranked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    system = packing(tmp_path, sigma="{ uniform = [0.8, 1.2] }")
    done = Outcome(capsys, "sensitivity", system, "--wrt", "sigma", "--seed", "2")
    assert done.code == 0, done.out + done.err
    rows = re.findall(r"^ +(sigma\[\d+\]) +[\d.]+ +([\d.]+) ", done.out, re.MULTILINE)
    norms = [float(norm) for _, norm in rows]
    assert len(rows) == 10 and norms == sorted(norms, reverse=True)
    assert f"Sensitivity dR/d {rows[0][0]}" in done.out

    ms.enable_x64()
    eq = ms.minimize(ms.load_system(system, seed=2), tolerance=1e-12)
    # (n, d, n): of particle i by the diameter of k
    moved = np.asarray(ms.jacobian(eq, "sigma").nonaffine)
    others = np.array([np.linalg.norm(np.delete(moved[:, :, k], k, axis=0)) for k in range(16)])
    assert f"sigma[{others.argmax()}]" == rows[0][0]
    assert norms[0] == pytest.approx(others.max(), rel=1e-4)


def test_verify_shows_both_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    done = Outcome(capsys, "verify", packing(tmp_path), "--wrt", "sigma[1]")
    assert done.code == 0, done.out + done.err
    (row,) = [line.split() for line in done.out.splitlines() if line.split()[:1] == ["sigma[1]"]]
    _, error, _, _, forward, adjoint, gap = row
    assert float(error) < 1e-6 and float(gap) < 1e-9
    assert float(forward) == pytest.approx(float(adjoint), rel=1e-6)


ROW = """
description = "three in a row"
units = "reduced"
dimension = 2
box = "open"
[positions]
kind = "list"
values = [[-1.1, 0.0], [0.0, 0.0], [1.1, 0.0]]
[potential]
kind = "lennard_jones"
[parameters]
sigma = 1.0
epsilon = 1.0
"""
RODS = """
description = "four rods"
units = "reduced"
dimension = 2
box = "open"
[positions]
kind = "list"
values = [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]
[potential]
kind = "harmonic_bonds"
bonds = [[0, 1], [1, 2], [2, 3], [3, 0]]
[parameters]
stiffness = 1.0
length = 1.0
"""
SIZES = """
description = "discs and a small one"
units = "reduced"
dimension = 2
count = 41
species = [20, 20, 1]
box = { packing_fraction = 0.98 }
[positions]
kind = "random"
[potential]
kind = "soft_sphere"
[parameters]
sigma = [1.0, 0.7, 0.05]
epsilon = 1.0
alpha = 2.0
"""


@pytest.mark.parametrize(
    ("system", "options", "name", "says", "code"),
    [
        ("dimer", ["--wrt", "sigma"], "CONVERGED", "good: nothing found against it", 0),
        ("seed_packing_2d", ["--max-steps", "50"], "MAX_STEPS_REACHED", "raise max_steps", 3),
        (ROW, ["--wrt", "sigma"], "CONVERGED", "good", 0),  # a saddle, which relaxing leaves
        (RODS, ["--wrt", "length"], "FLOPPY", "not rigid", 3),
        (
            PACKING.format(fraction=0.2, sigma="[1.0, 0.7]"),
            [],
            "UNJAMMED",
            "raise the packing fraction",
            3,
        ),
        (SIZES, ["--particle", "40"], "NULL_COMPONENT_DROPPED", "good, but see the warning", 0),
        (SIZES, ["--particle", "40", "--strict"], "NULL_COMPONENT_DROPPED", "on rattlers", 3),
    ],
    ids=["good", "unconverged", "left a saddle", "floppy", "unjammed", "rattler", "strict"],
)
def test_certify_tells_each_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], system, options, name, says, code
):
    if "\n" in system:
        (tmp_path / "mine.toml").write_text(system)
        system = tmp_path / "mine.toml"
    stored = tmp_path / "found.json"
    done = Outcome(capsys, "certify", system, *options, "--json", stored)
    assert done.code == code, done.out + done.err
    assert says in done.out.splitlines()[-1] and done.err == ""
    page = json.loads(stored.read_text())
    assert page["status"] == name and name in done.out
    found = [f["status"] for f in page["findings"]]
    assert [f for f in found if f != "SHAPE_HELD"] == ([] if name == "CONVERGED" else [name])


@pytest.fixture
def single_by_default() -> Iterator[None]:
    """As a process starts: in single precision, until something turns double precision on."""
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", True)


def test_single_precision_is_a_warning(capsys: pytest.CaptureFixture[str], single_by_default: None):
    options = ("--wrt", "sigma", "--single", "--tolerance", "1e-5")
    done = Outcome(capsys, "certify", "dimer", *options)
    assert done.code == 0, done.err
    assert "SINGLE_PRECISION" in done.out and "ms.enable_x64()" in done.out
    assert Outcome(capsys, "certify", "dimer", *options, "--strict").code == 3


def test_sensitivity_shows_the_certificate_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    done = Outcome(capsys, "sensitivity", packing(tmp_path), "--wrt", "sigma")
    assert done.code == 0
    assert done.out.count("Is it a minimum?") == done.out.count("Is it stable?") == 1
    assert (
        done.out.count("How wrong can the derivative be?")
        == done.out.count("How far does it reach?")
        == 2
    )


def test_a_warning_fails_a_strict_sensitivity(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "mine.toml").write_text(SIZES)
    for strict, code in (([], 0), (["--strict"], 3)):
        done = Outcome(capsys, "sensitivity", tmp_path / "mine.toml", "--wrt", "sigma[2]", *strict)
        assert done.code == code, done.out + done.err
        assert (
            "NULL_COMPONENT_DROPPED  " in done.out and "1.0e+00 of it, without effect" in done.out
        )


def test_relax_stores_what_load_gives_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out, frame = tmp_path / "eq.npz", tmp_path / "eq.extxyz"
    done = Outcome(
        capsys, "relax", "dimer", "--out", out, "--extxyz", frame, "--tolerance", "1e-10"
    )
    assert done.code == 0 and "tolerance 1e-10" in done.out
    eq = ms.io.load(out)
    assert np.linalg.norm(eq.positions[0] - eq.positions[1]) == pytest.approx(
        2 ** (1 / 6), abs=1e-9
    )
    assert frame.read_text().startswith("2\n")


def test_a_response_that_disagrees_is_not_trusted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    right = report.jvp

    def wrong(*args, **options):
        response = right(*args, **options)
        return dataclasses.replace(response, value=1.01 * response.value)

    monkeypatch.setattr(report, "jvp", wrong)
    done = Outcome(capsys, "sensitivity", "dimer", "--wrt", "sigma")
    assert done.code == 3
    assert done.out.splitlines()[-1].startswith(
        "not to be trusted: sigma: finite differences disagree by 1e-02"
    )
    done = Outcome(capsys, "verify", "dimer", "--wrt", "sigma")
    assert done.code == 3 and "forward and adjoint differ" in done.out
    done = Outcome(capsys, "sensitivity", "dimer", "--wrt", "sigma", "--no-check")
    assert done.code == 0 and "not checked" in done.out


def test_contacts_that_change_within_the_step_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    right = report.finite_difference
    monkeypatch.setattr(
        report,
        "finite_difference",
        lambda *a, **k: dataclasses.replace(right(*a, **k), network_changed=True),
    )
    done = Outcome(capsys, "sensitivity", "dimer", "--wrt", "sigma")
    assert done.code == 3 and "contacts changed within" in done.out.splitlines()[-1]


def test_a_system_that_does_not_relax_is_not_trusted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    system = Path(packing(tmp_path))
    system.write_text(system.read_text() + "[relaxation]\nmax_steps = 5\n")
    done = Outcome(capsys, "relax", system, "--out", tmp_path / "eq.npz")
    assert done.code == 3 and "step limit" in done.err
    assert not (tmp_path / "eq.npz").exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["sensitivity", "seed_paking_2d", "--wrt", "sigma"], "did you mean 'seed_packing_2d'?"),
        (["sensitivity", "dimer", "--wrt", "sgima"], "did you mean 'sigma'?"),
        (["sensitivity", "seed_packing_2d", "--wrt", "sigma[2]"], "indices go from 0 to 1"),
        (["sensitivity", "seed_packing_2d", "--wrt", "sigma[-1]"], "indices go from 0 to 1"),
        (
            ["sensitivity", "seed_packing_2d", "--wrt", "sigma[0,1]"],
            "sigma is 2 numbers: write sigma[i]",
        ),
        (["verify", "dimer", "--wrt", "sigma[0]"], "sigma is one number: write sigma."),
        (
            ["sensitivity", "silicon_carbide", "--wrt", "R[0,1]"],
            "R is a number for each triple of species: write R[i,j,k]",
        ),
        (["sensitivity", "silicon_carbide", "--wrt", "R[0,1,2]"], "indices go from 0 to 1"),
        (["sensitivity", "dimer", "--wrt", "sigma[a]"], "'sigma[a]' names no parameter component"),
        (["sensitivity", "dimer", "--wrt", "sigma", "--plot", "a.txt"], "ends in .png"),
        (["sensitivity", "dimer", "--wrt", "sigma", "--out", "a.txt"], "ends in .npz"),
        (
            ["sensitivity", "dimer", "--wrt", "sigma", "--out", "nowhere/a.npz"],
            "there is no folder nowhere",
        ),
        (["relax", "dimer", "--extxyz", "nowhere/a.xyz"], "there is no folder nowhere"),
        (["relax", "dimer", "--tolerance", "0"], "not a positive number"),
        (["relax", "dimer", "--seed", "-1"], "seed is -1"),
        (["relax", "dimer", "--seed", "x"], "invalid int value"),
        (["sensitivity", "dimer"], "required: --wrt"),
        (["relax", "cut.toml"], "no whole TOML file"),
        (["relax", "nowhere/system.toml"], "there is no file"),
        ([], "examples:"),
        (["sensitivty"], "invalid choice"),
    ],
)
def test_bad_input_is_named(
    argv: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    Path("cut.toml").write_text(PACKING[:120])
    done = Outcome(capsys, *argv)
    assert done.code == 2 and said in done.err and done.out == ""


def test_internal_errors_and_interrupts_end_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def fail(error: BaseException):
        def systems():
            raise error

        monkeypatch.setattr(ms.io, "bundled_systems", systems)

    fail(RuntimeError("two\nlines"))
    done = Outcome(capsys, "systems")
    assert done.code == 1
    assert (
        done.err == "mdsens: internal error: RuntimeError: two lines (set MDSENS_DEBUG=1 for the"
        " traceback)\n"
    )
    fail(KeyboardInterrupt())
    assert Outcome(capsys, "systems").code == 130
    fail(RuntimeError("seen"))
    monkeypatch.setenv("MDSENS_DEBUG", "1")
    with pytest.raises(RuntimeError, match="seen"):
        cli.main(["systems"])


def test_systems_lists_every_one_with_a_line(capsys: pytest.CaptureFixture[str]):
    done = Outcome(capsys, "systems")
    assert done.code == 0
    for name, description in ms.io.bundled_systems().items():
        assert re.search(rf"^  {name} +{re.escape(description[:20])}", done.out, re.MULTILINE)


def test_help_and_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert "examples:" in Outcome(capsys, "--help").out
    for name in ("sensitivity", "relax", "verify", "systems", "doctor"):
        done = Outcome(capsys, name, "--help")
        assert done.code == 0 and done.out.startswith(f"usage: mdsens {name}")
    assert Outcome(capsys, "--version").out == f"mdsens {ms.__version__}\n"


def test_doctor_passes_here_and_reports_lost_pairs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    done = Outcome(capsys, "doctor")
    assert done.code == 0 and done.out.splitlines()[-1].startswith("good")
    assert "float64" in done.out and "jaxlib" in done.out
    # what jax 0.10.2 gave for the first of the ways
    monkeypatch.setattr(
        doctor, "energies", lambda: [("all pairs", 18.26, 0.0), ("a list", 4.93, 0.73)]
    )
    done = Outcome(capsys, "doctor")
    assert done.code == 3 and "pairs are lost by a list" in done.out


def test_species_pairs_change_together():
    sigma = np.array([[1.0, 0.8], [0.8, 0.88]])
    system = ms.System.create(
        np.random.default_rng(0).random((6, 3)) * 6,
        6.0,
        ms.potentials.lennard_jones(),
        {"sigma": sigma, "epsilon": 1.0},
        species=[0, 0, 0, 1, 1, 1],
    )
    (both,) = report.components(system, "sigma", (1, 0))
    np.testing.assert_array_equal(both.direction["sigma"], [[0, 1], [1, 0]])
    labels = [part.label for part in report.components(system, "sigma", None)]
    assert labels == ["sigma[0,0]", "sigma[0,1]", "sigma[1,1]"]


def test_the_arrays_of_a_tree_of_parameters_are_listed_by_their_paths():
    potential = ms.potentials.from_energy(lambda R, p, d: jnp.sum(R**2), ("k", "weights"))
    tree = {"layers": [{"w": np.array([[1.0, -2.0]]), "b": 0.5}], "none": np.zeros((0, 3))}
    system = ms.System.create(np.eye(2), None, potential, {"k": 2.0, "weights": tree})
    lines = [line.split(None, 1) for line in report.system("two", system, {}).splitlines()]
    assert ["k", "2"] in lines and ["weights.layers.0.b", "0.5"] in lines
    assert ["weights.layers.0.w", "shape (1, 2), from -2 to 1"] in lines
    assert ["weights.none", "no numbers"] in lines


def test_numbers_of_a_column_have_the_same_decimals():
    assert tables.numbers([12.3456789, -0.001]) == ["12.346", "-0.001"]
    assert tables.numbers([1e-9, 0.0]) == ["1.0000e-09", "0.0000e+00"]
    assert tables.numbers([0.0]) == ["0.0000"]
    assert tables.numbers([]) == []


def test_a_release_of_jax_that_computes_wrongly_is_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(jax, "__version__", "0.10.2")
    assert cli.main(["relax", "dimer"]) == 2
    error = capsys.readouterr().err
    assert "jax 0.10.2" in error and "install another release" in error and error.count("\n") == 1


# ── elastic moduli, and a pressure ──


def test_moduli_and_their_derivatives(tmp_path: Path, capsys):
    given = packing(tmp_path)
    table, figure = tmp_path / "m.json", tmp_path / "m.png"
    found = Outcome(capsys, "moduli", given, "--wrt", "sigma", "--json", table, "--plot", figure)
    assert (
        found.code == cli.GOOD and found.out.splitlines()[-1] == "good: stable against every strain"
    )
    assert figure.stat().st_size > 1000
    stored = json.loads(table.read_text())
    eq = ms.minimize(ms.load_system(given))
    m = ms.elasticity.moduli(eq)
    np.testing.assert_allclose(stored["tensor"], m.tensor, rtol=1e-8, atol=1e-12)
    want = ms.elasticity.gradient(lambda m: m.poisson, eq).value["sigma"]
    for k in range(2):
        assert stored["derivatives"][f"sigma[{k}]"]["nu"] == pytest.approx(float(want[k]), rel=1e-5)
    assert f"{float(m.shear):.6g}" in found.out and "sigma[1]" in found.out


@LONG
def test_moduli_at_a_pressure(tmp_path: Path, capsys):
    given = packing(tmp_path)
    found = Outcome(capsys, "moduli", given, "--pressure", "0.02", "--shape", "--wrt", "pressure")
    assert found.code == cli.GOOD and "0.02, to which the size and shape" in " ".join(
        found.out.split()
    )
    row = next(
        line
        for line in found.out.splitlines()
        if line.split()[:1] == ["pressure"] and len(line.split()) == 10
    )
    assert float(row.split()[1]) == pytest.approx(1.0, abs=1e-4)  # dP/dP


def test_relaxing_to_a_pressure(tmp_path: Path, capsys):
    stored = tmp_path / "eq.npz"
    found = Outcome(capsys, "relax", packing(tmp_path), "--pressure", "0.01", "--out", stored)
    assert found.code == cli.GOOD
    eq = ms.io.load(stored)
    assert float(ms.observables.pressure(eq.system)) == pytest.approx(0.01, abs=1e-11)


def test_sensitivities_and_certificates_at_a_pressure(tmp_path: Path, capsys):
    given, stored, figure = packing(tmp_path), tmp_path / "r.npz", tmp_path / "r.png"
    how = ("--pressure", "0.02", "--wrt", "pressure")
    found = Outcome(capsys, "sensitivity", given, *how, "--out", stored, "--plot", figure)
    assert found.code == cli.GOOD and "agrees with finite differences" in found.out
    assert "stiffness of the cell" in found.out and "of which the volume's" in found.out
    table = tmp_path / "c.json"
    assert Outcome(capsys, "certify", given, *how, "--json", table).code == cli.GOOD
    assert json.loads(table.read_text())["cell"]["pressure"] == 0.02
    checked = Outcome(capsys, "verify", given, *how)
    assert checked.code == cli.GOOD and "with its adjoint" in checked.out
    with np.load(stored) as file:
        assert (
            file["strain"].shape == (1, 3)
            and file["value"].shape == (1, 16, 2)
            and file["pressure"] == 0.02
        )


RING = """
description = "a closed ring of springs at rest"
dimension = 2
box = {{ lengths = [20.0, 20.0] }}
[positions]
kind = "list"
values = {places}
[potential]
kind = "harmonic_bonds"
bonds = {bonds}
[parameters]
stiffness = 1.0
length = {length}
"""


def test_moduli_say_what_they_are_of(tmp_path: Path, capsys):
    """Of a ring at rest there are none;
    of discs of a negative shear modulus no ratio means anything.
    """
    rest, path, table = ring(), tmp_path / "ring.toml", tmp_path / "m.json"
    bonds = [[k, (k + 1) % 30] for k in range(30)]
    length = float(rest.params["length"])
    path.write_text(
        RING.format(places=np.asarray(rest.positions).tolist(), bonds=bonds, length=length)
    )
    none = Outcome(
        capsys, "moduli", path, "--json", table, "--wrt", "length", "--plot", tmp_path / "m.png"
    )
    assert (
        none.code == cli.UNTRUSTED
        and "FLOPPY" in none.out
        and "not rigid" in none.out.splitlines()[-1]
    )
    stored = json.loads(table.read_text(), parse_constant=pytest.fail)  # no NaN, which JSON has not
    assert (
        stored["status"] == "FLOPPY"
        and stored["derivatives"]["length"]["nu"] is None
        and not np.any(stored["tensor"])
    )
    discs = packing(tmp_path, 0.9, "[1.0, 1.4]")
    unstable, held = (
        ("moduli", discs, "--seed", SOLIDS[kind]) for kind in ("unstable", "sheared away")
    )
    bad = Outcome(capsys, *unstable)
    assert (
        bad.code == cli.UNTRUSTED
        and "the bulk or the shear modulus is not positive" in bad.out.splitlines()[-1]
    )
    warned, strict = Outcome(capsys, *held), Outcome(capsys, *held, "--strict")
    assert (warned.code, strict.code) == (cli.GOOD, cli.UNTRUSTED) and "SHAPE_HELD" in warned.out
    assert warned.out.splitlines()[-1].startswith(
        "good, but see the warning: some strain of the cell"
    )


def test_a_derivative_in_the_cell_holds_where_the_cell_alone_holds_the_shape(
    tmp_path: Path, capsys
):
    given = (packing(tmp_path, 0.9, "[1.0, 1.4]"), "--seed", SOLIDS["unstable"])
    found = Outcome(capsys, "sensitivity", *given, "--wrt", "sigma[1]")
    assert found.code == cli.GOOD and found.out.splitlines()[-1].endswith("(see the warning)")
    assert "UNSTABLE" in found.out and Outcome(capsys, "certify", *given).code == cli.UNTRUSTED


def test_moduli_that_are_not_to_be_had(tmp_path: Path, capsys):
    loose = Outcome(capsys, "moduli", packing(tmp_path, fraction=0.4))
    assert loose.code == cli.UNTRUSTED and "no contact carries force" in loose.err
    shape = Outcome(capsys, "moduli", packing(tmp_path), "--shape")
    assert shape.code == cli.BAD_INPUT and "--shape goes with --pressure" in shape.err
    what = Outcome(capsys, "moduli", packing(tmp_path), "--wrt", "pressure")
    assert what.code == cli.BAD_INPUT and "give the pressure as well" in what.err
    open_ends = Outcome(capsys, "moduli", "dimer")
    assert open_ends.code == cli.BAD_INPUT and "give the system a box" in open_ends.err
    slab = Outcome(capsys, "moduli", "copper_surface")
    assert slab.code == cli.BAD_INPUT and "not periodic along cell vector 3" in slab.err


def cubic_moduli(c11: float, c12: float, c44: float, affine: float) -> ms.elasticity.Moduli:
    """Moduli of a cubic crystal without stress, in eV / Å^3 from GPa; nothing is computed."""

    def tensor(shear: float) -> jax.Array:
        one = np.eye(3)
        pairs = np.einsum("ij,kl->ijkl", one, one)
        swaps = np.einsum("ik,jl->ijkl", one, one) + np.einsum("il,jk->ijkl", one, one)
        cube = np.einsum("ia,ja,ka,la->ijkl", one, one, one, one)
        value = c12 * pairs + shear * swaps + (c11 - c12 - 2 * shear) * cube
        # some round-off, as computed tensors have it
        return jnp.asarray((value - 1e-13 * (value == 0)) * ms.elasticity.GPa)

    zeros = jnp.zeros(6)
    return ms.elasticity.Moduli(
        tensor=tensor(c44),
        affine=tensor(affine),
        stress=jnp.zeros((3, 3)),
        nonaffine=jnp.zeros((6, 2, 3)),
        stats=SolveStats(zeros.astype(jnp.int32), zeros, zeros, zeros),
        round_off=jnp.asarray(1e-14),
    )


def test_elastic_constants_are_shown_in_gpa():
    silicon = cubic_moduli(151.42, 76.42, 56.45, 109.76)
    found = np.asarray(silicon.voigt) / ms.elasticity.GPa
    assert (found[0, 0], found[0, 1], found[3, 3]) == pytest.approx((151.42, 76.42, 56.45))
    reduced, shown = (moduli_report.page(silicon, in_gpa) for in_gpa in (False, True))
    assert shown.startswith(reduced) and "GPa" not in reduced
    tables_in_gpa = shown[len(reduced) :].split("without internal strain")
    assert re.search(r"yy +76.42 +151.42 +76.42 +0.00 +0.00 +0.00\n", tables_in_gpa[0])
    assert re.search(r"xy +0.00 +0.00 +0.00 +0.00 +0.00 +56.45$", tables_in_gpa[0], re.MULTILINE)
    assert tables_in_gpa[1].endswith("109.76") and "-0.00" not in shown[len(reduced) :]
    # where nothing moves inside the cell there is one table
    fcc = moduli_report.page(cubic_moduli(176.0, 125.0, 82.0, 82.0), True)
    assert fcc.count("GPa") == 1


@pytest.mark.parametrize(
    ("units", "dimension", "expected"),
    [
        ("Å and eV", 3, True),
        ("eV, \N{ANGSTROM SIGN}", 3, True),
        ("lengths in angstrom, energies in eV", 3, True),
        ("Å and eV", 2, False),
        ("reduced: sigma and epsilon are 1", 3, False),
        ("Å and kcal/mol", 3, False),
        ("Å and meV", 3, False),
        ("", 3, False),
    ],
)
def test_gpa_are_for_units_of_ev_and_angstrom(units: str, dimension: int, expected: bool):
    assert moduli_report.in_gpa(units, dimension) is expected


@LONG
def test_moduli_of_silicon(capsys):
    found = Outcome(capsys, "moduli", "silicon")
    assert found.code == cli.GOOD and "particles       n = 8 in 3-D, all Si" in found.out
    assert re.search(r"B in GPa\n.*\n +xx +151.42 +76.42 +76.42 ", found.out)
    assert "109.76" in found.out.split("without internal strain")[1]
