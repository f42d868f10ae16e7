"""A module imports from above itself and never from below: read from the sources, function bodies included."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import mdsens as ms

PACKAGE = Path(ms.__file__).parent

# From the top; what stands in one row may not import each other.
ORDER = [
    # how results are shown, and what they have: leaves that know only text
    ["implicit._attributes", "_cache_warnings"],
    ["_tables"],
    # the mathematics: knows no particle
    ["implicit.status"],
    ["implicit._traceable", "implicit._tree", "implicit._krylov", "implicit._sparse"],
    ["implicit._given", "implicit._dense", "implicit._normal", "implicit._polynomials", "implicit.operators"],
    ["implicit._rounds"],
    ["implicit.linear", "implicit._closures"],
    ["implicit.eigen"],
    ["implicit.root"],
    ["implicit.evidence"],
    ["implicit.projections"],
    ["implicit.proximal", "implicit.conic"],
    ["implicit.optimality"],
    ["implicit.degeneracy"],
    ["implicit"],
    # what a user gives, as numbers
    ["_checks", "_memory", "_members", "_progress"],
    # the physics: what a system is
    ["parameters", "boxes", "unknowns", "pair_trial"],
    ["laws"],
    ["constraints._base"],
    ["constraints._positions", "constraints._totals"],
    ["constraints"],
    ["nested"],
    ["electrostatics"],
    ["potentials", "smoothing"],
    ["neighbours"],
    ["system"],
    ["slopes", "strains", "batches", "breakpoints", "not_finite"],
    ["lagrangian"],
    ["contacts"],
    ["block_rows"],
    ["rigid_motions"],
    ["stationarity"],
    ["stiffness", "scales"],
    ["stability"],
    ["constrained"],
    ["kkt"],
    ["newton"],
    ["observables._pairs"],
    ["observables._state", "observables._structure", "observables._charges"],
    ["observables"],
    # the root and its derivative
    ["minimisers"],
    ["enthalpy"],
    ["_loop", "climbing"],
    ["_runs", "_pressed", "_held", "bands"],
    ["relaxation"],
    ["packing", "saddles"],
    ["linearization"],
    ["doors"],
    ["sensitivity"],
    ["barriers", "equilibration"],
    ["certificate._parts"],
    ["certificate._record"],
    ["certificate._space"],
    ["certificate._derivative"],
    ["certificate._certify"],
    ["certificate"],
    ["verify._difference_records", "verify._settling"],
    ["verify._differences", "verify._breaks", "verify._findings", "verify._pushing"],
    ["verify._adjoint", "verify._pairs", "verify._configurations", "verify._unrolled"],
    ["verify._laws"],
    ["verify"],
    # built on it
    ["elasticity", "modes"],
    ["design._features", "design._variables", "design._step"],
    ["design._history", "design._response"],
    ["design._members"],
    ["design._proposal"],
    ["design._fit"],
    ["design"],
    # the edges: files, structures, figures, the terminal
    ["files", "fields"],
    ["structures"],
    ["starts"],
    ["specification"],
    ["design_specification"],
    ["storage"],
    ["io"],
    ["plots._style", "plots._view"],
    ["plots._legend"],
    ["plots._map", "plots._curves", "plots._moduli"],
    ["plots._design"],
    ["plots"],
    ["_doctor", "_report"],
    ["_arguments", "_elastic_report", "_design_report"],
    ["cli"],
    ["__main__"],
]
ROW = {name: row for row, names in enumerate(ORDER) for name in names}
EDGES = {name for name, row in ROW.items() if row >= ROW["files"]}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


class Import(NamedTuple):
    """One imported name: the module, and where it is imported."""

    module: str  # absolute, as far as it names a module of ours
    line: int
    inside: bool  # of a function
    typing: bool  # under TYPE_CHECKING


def resolve(name: str) -> str:
    """``mdsens.contacts.network`` is a name in ``mdsens.contacts``."""
    while name.startswith("mdsens.") and name.removeprefix("mdsens.") not in MODULES:
        name = name.rpartition(".")[0]
    return name


def imports_of(source: str) -> Iterator[Import]:
    def walk(node: ast.AST, inside: bool, typing: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(resolve(alias.name), node.lineno, inside, typing)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: import by the full name"
            for alias in node.names:
                yield Import(resolve(f"{node.module}.{alias.name}"), node.lineno, inside, typing)
        inside |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing |= isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside, typing)

    return walk(ast.parse(source), False, False)


IMPORTS = {name: list(imports_of(path.read_text())) for name, path in MODULES.items()}


def own(name: str) -> list[Import]:
    """The imports of a module from this package, without the prefix."""
    return [
        i._replace(module=i.module.removeprefix("mdsens.")) for i in IMPORTS[name] if i.module.split(".")[0] == "mdsens"
    ]


def below(importer: str, imported: str) -> bool:
    """Whether the import goes down, or sideways, in the order."""
    return ROW[imported] >= ROW[importer]


def test_every_module_has_its_place():
    unplaced = set(MODULES) - set(ROW) - {"__init__"}
    assert not unplaced, f"say in ORDER, and in the design, where {sorted(unplaced)} belong"


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"__init__"}))
def test_imports_come_from_above(name):
    for found in own(name):
        if found.module == "mdsens":  # the public names: what an edge that faces the user may use
            assert name in ("cli", "__main__"), f"line {found.line} imports the whole package"
        else:
            assert not below(name, found.module), f"line {found.line} imports {found.module}, which stands below {name}"


def test_the_mathematics_knows_no_particle():
    for name in MODULES:
        if name.split(".")[0] == "implicit":
            for found in own(name):
                assert found.module.split(".")[0] == "implicit", f"{name}, line {found.line}: {found.module}"
            assert not any(i.module.split(".")[0] == "jax_md" for i in IMPORTS[name])


@pytest.mark.parametrize("package", ["ase", "matplotlib"])
def test_only_edges_touch(package):
    users = {name for name, found in IMPORTS.items() if any(i.module.split(".")[0] == package for i in found)}
    assert users and users <= EDGES, users - EDGES


@pytest.mark.parametrize("package", ["jax_md", "ase", "matplotlib", "tqdm"])
def test_slow_imports_are_inside_functions(package):
    for name, found in IMPORTS.items():
        for i in found:
            if i.module.split(".")[0] == package:
                assert i.inside or i.typing, f"{name}, line {i.line}: {i.module} is imported with the package"


def test_jax_md_has_few_doors():
    doors = {name for name, found in IMPORTS.items() if any(i.module.split(".")[0] == "jax_md" for i in found)}
    assert doors == {"minimisers", "_doctor"}  # minimisers, the check of an installation


def test_these_checks_can_fail():
    source = "import jax_md\nfrom mdsens import verify\ndef f():\n    from mdsens.contacts import network\n"
    found = list(imports_of(source))
    assert [i.module for i in found] == ["jax_md", "mdsens.verify", "mdsens.contacts"]
    assert [i.inside for i in found] == [False, False, True]
    assert below("contacts", "verify") and below("boxes", "potentials") and not below("verify", "contacts")


# ── what a law's documentation says ──


@pytest.mark.parametrize("make", [
    ms.potentials.soft_sphere,
    ms.potentials.lennard_jones,
    ms.potentials.morse,
    ms.potentials.harmonic_morse,
    lambda: ms.potentials.harmonic_bonds([[0, 1]]),
])  # fmt: skip
def test_a_law_documents_its_equation_and_every_parameter(make):
    law = make()
    text = inspect.getdoc(getattr(ms.potentials, law.name)) or ""
    assert "phi(r) =" in text
    for name in law.parameters:
        assert f"``{name}``" in text, f"{law.name} does not say what {name} is"


def test_every_public_name_of_the_potentials_is_documented():
    for name in ms.potentials.__all__:
        assert inspect.getdoc(getattr(ms.potentials, name)), name
