"""A module imports from above itself and never from below:
read from the sources, function bodies included.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT, long_tests

import mdsens as ms

PACKAGE = Path(ms.__file__).parent

# The rooms from the bottom: each imports from itself and from those before it alone. A room is the
# deepest of these names that a module is in.
ORDER = [
    "_util",
    "implicit.linear",
    "implicit",
    "implicit.conditions",
    "constraints",
    "potentials",
    "model",
    "mechanics",
    "observables",
    "relaxation",
    "packing",
    "sensitivity",
    "sensitivity.certificate",
    "saddles",
    "modes",
    "elasticity",
    "verify",
    "design",
    "io",
    "plots",
    "cli",
    "__main__",
]
EDGES = {"io", "plots", "cli"}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
MODULES["mdsens"] = MODULES.pop("__init__")
# The names that a package promises come from all of its parts,
# those of the rooms within it as well.
NAMES_ONLY = {name for name, path in MODULES.items() if path.name == "__init__.py"}


def room(name: str) -> str:
    """The room that a module is in."""
    while name not in ORDER:
        name, _, last = name.rpartition(".")
        assert name or not last, (
            "a module in no room: say in ORDER, and in docs/architecture.md, where it belongs"
        )
    return name


class Import(NamedTuple):
    """One imported name: the module, and where it is imported."""

    module: str  # absolute, as far as it names a module of ours
    line: int
    inside: bool  # of a function
    typing: bool  # under TYPE_CHECKING


def resolve(name: str) -> str:
    """``mdsens.mechanics.contacts.network`` is a name in ``mdsens.mechanics.contacts``."""
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


def within_mdsens(name: str) -> list[Import]:
    """The imports of a module from this package, without the prefix."""
    return [
        i._replace(module=i.module.removeprefix("mdsens."))
        for i in IMPORTS[name]
        if i.module.split(".")[0] == "mdsens"
    ]


def allowed(importer: str, imported: str) -> bool:
    """Whether a module may import another: within its room, or from one before it."""
    return ORDER.index(room(imported)) <= ORDER.index(room(importer))


def test_every_room_is_there():
    assert {room(name) for name in MODULES if name != "mdsens"} == set(ORDER)


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"mdsens"}))
def test_a_module_imports_from_its_room_and_those_below(name):
    for found in within_mdsens(name):
        if found.module == "mdsens":  # the public names, for what faces the user
            assert room(name) in ("cli", "__main__"), f"line {found.line} imports the whole package"
        elif name not in NAMES_ONLY or not room(found.module).startswith(f"{name}."):
            assert allowed(name, found.module), (
                f"line {found.line} imports {found.module}, which stands above {name}"
            )


def test_what_is_private_stays_in_its_room():
    """A module or name that begins with an underscore is used in its own package alone."""
    crossed = []
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("mdsens"):
                continue
            for alias in node.names:
                parts = [*str(node.module).split("."), alias.name]
                private = [k for k, part in enumerate(parts) if part.startswith("_")]
                private = [k for k in private if parts[k] not in ("_util", "__version__")]
                owner = "".join(f"{part}." for part in parts[: private[0]]) if private else ""
                if private and not f"mdsens.{name}.".startswith(owner):
                    crossed.append(f"{name} imports {'.'.join(parts)}")
    assert not crossed


def test_every_file_is_on_the_page_of_the_architecture():
    page = (ROOT / "docs" / "architecture.md").read_text()
    names = {path.stem for path in MODULES.values()} - {"__init__", "__main__"}
    missing = {name for name in names if f"`{name}`" not in page and f"`{name}.py`" not in page}
    assert not missing


def test_no_module_imports_itself_by_way_of_others():
    edges = {
        name: {
            found.module for found in within_mdsens(name) if not found.inside and not found.typing
        }
        for name in MODULES
    }
    floors = {}

    def floor(name: str, above: tuple[str, ...] = ()) -> int:
        assert name not in above, " imports ".join([*above[above.index(name) :], name])
        if name not in floors:
            floors[name] = 1 + max(
                (floor(other, (*above, name)) for other in edges[name] - {name}), default=0
            )
        return floors[name]

    for name in set(MODULES) - NAMES_ONLY:
        floor(name)


def test_the_mathematics_knows_no_particle():
    for name in MODULES:
        if name.split(".")[0] == "implicit":
            for found in within_mdsens(name):
                assert found.module.split(".")[0] in (
                    "implicit",
                    "_util",
                ), f"{name}, line {found.line}: {found.module}"
            assert not any(i.module.split(".")[0] == "jax_md" for i in IMPORTS[name])


@pytest.mark.parametrize("package", ["ase", "matplotlib"])
def test_only_edges_touch(package):
    users = {
        room(name)
        for name, found in IMPORTS.items()
        if any(i.module.split(".")[0] == package for i in found)
    }
    assert users and users <= EDGES, users - EDGES


@pytest.mark.parametrize("package", ["jax_md", "ase", "matplotlib", "tqdm"])
def test_slow_imports_are_inside_functions(package):
    for name, found in IMPORTS.items():
        for i in found:
            if i.module.split(".")[0] == package:
                assert i.inside or i.typing, (
                    f"{name}, line {i.line}: {i.module} is imported with the package"
                )


def test_jax_md_is_imported_in_two_places():
    users = {
        name
        for name, found in IMPORTS.items()
        if any(i.module.split(".")[0] == "jax_md" for i in found)
    }
    # its minimizers; the check of an installation
    assert users == {"relaxation.jax_md", "cli.doctor"}


def test_these_checks_can_fail():
    source = (
        "import jax_md\nfrom mdsens import verify\ndef f():\n    from mdsens.mechanics.contacts"
        " import network\n"
    )
    found = list(imports_of(source))
    assert [i.module for i in found] == ["jax_md", "mdsens.verify", "mdsens.mechanics.contacts"]
    assert [i.inside for i in found] == [False, False, True]
    assert allowed("verify.records", "mechanics.contacts") and not allowed(
        "mechanics.contacts", "verify.records"
    )
    assert allowed("implicit.root", "implicit.linear.operators")
    assert not allowed("implicit.linear.operators", "implicit.root")


# ── what a potential's documentation says ──


@pytest.mark.parametrize(
    "make",
    [
        ms.potentials.soft_sphere,
        ms.potentials.lennard_jones,
        ms.potentials.morse,
        ms.potentials.harmonic_morse,
        lambda: ms.potentials.harmonic_bonds([[0, 1]]),
    ],
)
def test_a_potential_documents_its_equation_and_every_parameter(make):
    potential = make()
    text = inspect.getdoc(getattr(ms.potentials, potential.name)) or ""
    assert "phi(r) =" in text
    for name in potential.parameters:
        assert f"``{name}``" in text, f"{potential.name} does not say what {name} is"


def test_every_public_name_of_the_potentials_is_documented():
    for name in ms.potentials.__all__:
        assert inspect.getdoc(getattr(ms.potentials, name)), name


# ── the tests themselves ──


def test_the_long_tests_are_there():
    for name in long_tests():
        path, _, function = name.partition("::")
        source = (ROOT / path).read_text()
        assert f"def {function.partition('[')[0]}(" in source, f"tests/long.txt names {name}"
