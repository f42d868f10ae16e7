"""Pages that are made from the code: the API, the statuses, the command line.

They are written before Sphinx reads its sources, into ``docs/reference/``, where git ignores them.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import re
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

from docutils import nodes
from public_names import canonical_paths, namespaces, path_of
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util import logging

import mdsens as ms
from mdsens.cli.arguments import parser as command_line
from mdsens.mechanics.explanations import EXPLANATIONS

logger = logging.getLogger(__name__)

# Width of the help of the commands, in characters.
WIDTH = 100


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the functions of this extension with Sphinx."""
    app.connect("config-inited", write_pages)
    # before napoleon, which makes fields of the sections
    app.connect("autodoc-process-docstring", as_plain_text, priority=100)
    app.connect("missing-reference", link_to_public_name)
    app.connect("build-finished", find_missing_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def write_pages(app: Sphinx, _config: Config) -> None:
    """Write all pages that are made from the code."""
    reference = Path(app.srcdir) / "reference"
    pages = {"statuses.md": statuses(), "cli.md": command_pages()}
    pages |= {f"api/{name}.rst": text for name, text in api_pages().items()}
    for stale in (reference / "api").glob("*.rst"):
        if f"api/{stale.name}" not in pages:
            stale.unlink()
    for name, text in pages.items():
        file = reference / name
        file.parent.mkdir(parents=True, exist_ok=True)
        # an unchanged page keeps its time, so that Sphinx does not read it again
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")


def api_pages() -> dict[str, str]:
    """Return a page for each public module and each public name, by name."""
    paths = canonical_paths()
    modules = namespaces()
    pages = {path: module_page(path, module, paths) for path, module in modules.items()}
    pages |= {path: object_page(path, value) for path, value in paths.items()}
    tree = "\n".join(f"   {path}" for path in modules)
    pages["index"] = (
        f"API\n===\n\n{INTRODUCTION}\n\n"
        + table_of([(path, first_line(module)) for path, module in modules.items()])
        + f"\n.. toctree::\n   :hidden:\n\n{tree}\n"
    )
    return pages


INTRODUCTION = (
    "Every public name has a page of its own. The package is imported as ``import mdsens as ms``;\n"
    "names of the modules below are reached as ``ms.elasticity.moduli``."
)


def module_page(path: str, module: ModuleType, paths: dict[str, Any]) -> str:
    """Return the page of a public module: its docstring, and its names with their first lines."""
    rows, own = [], []
    for name in module.__all__:
        value = getattr(module, name)
        if isinstance(value, ModuleType):
            target = next(p for p, m in namespaces().items() if m is value)
        else:
            target = path_of(value, paths) or f"{path}.{name}"
        rows.append((target, first_line(value)))
        if target == f"{path}.{name}" and not isinstance(value, ModuleType):
            own.append(target)
    tree = "\n".join(f"   {target}" for target in own)
    contents = f"\n.. toctree::\n   :hidden:\n\n{tree}\n" if own else ""
    return f"{path}\n{'=' * len(path)}\n\n.. automodule:: {path}\n\n{table_of(rows)}{contents}"


def object_page(path: str, value: Any) -> str:
    """Return the page of a public class, function or constant."""
    if inspect.isclass(value):
        options = "   :members:\n"
        # the fields stand in the docstring of the class
        if fields := fields_in(inspect.getdoc(value) or ""):
            options += f"   :exclude-members: {', '.join(fields)}\n"
        kind = "class"
    elif inspect.isroutine(value) or callable(value):
        kind, options = "function", ""
    else:
        # of a dict the keys, such as the names of features; a number as it is
        shown = (
            ", ".join(f"``{key}``" for key in value) if isinstance(value, dict) else f"{value!r}"
        )
        return f"{path}\n{'=' * len(path)}\n\n.. py:data:: {path}\n\n   {shown}\n"
    return f"{path}\n{'=' * len(path)}\n\n.. auto{kind}:: {path}\n{options}"


def fields_in(docstring: str) -> list[str]:
    """Return the names that the section "Attributes" of a docstring explains."""
    section = re.search(r"^Attributes:\n((?:(?:  .*)?\n?)*)", docstring, flags=re.MULTILINE)
    names = re.findall(r"^  (\w+(?:, \w+)*):", section[1] if section else "", flags=re.MULTILINE)
    return [name for group in names for name in group.split(", ")]


def as_plain_text(
    _app: Sphinx, _what: str, _name: str, _obj: Any, _options: Any, lines: list[str]
) -> None:
    """Show the formulas of a docstring as they are, and protect their characters in its text.

    Lines that are indented by four are formulas or code. In the text, the characters in |x*| would
    be taken for markup.
    """
    plain: list[str] = []
    literal = False
    margin = 0
    for line in lines:
        indent = len(line) - len(line.lstrip())
        starts = indent >= 4 and margin == 0 and bool(plain) and not plain[-1]
        if starts and not literal:
            plain += ["::", ""]
        if line.strip():
            literal = starts or (literal and indent >= 4)
            margin = 0 if literal else indent
        code = literal or line.lstrip().startswith((">>>", "..."))
        plain.append(line if code else escaped(line))
    lines[:] = plain


def escaped(line: str) -> str:
    """Escape what reStructuredText takes for emphasis or a substitution, outside of code."""
    parts = line.split("``")
    parts[::2] = [re.sub(r"([*|])", r"\\\1", part) for part in parts[::2]]
    return "``".join(parts)


def table_of(rows: list[tuple[str, str]]) -> str:
    """Return a table of pages with a line on each."""
    lines = [".. list-table::", "   :widths: 35 65", ""]
    for target, line in rows:
        link = f":doc:`{target} </reference/api/{target}>`"
        lines += [f"   * - {link}", f"     - {escaped(line)}"]
    return "\n".join(lines) + "\n"


def first_line(value: Any) -> str:
    """Return the first sentence of a docstring, on one line."""
    if not (inspect.ismodule(value) or inspect.isclass(value) or callable(value)):
        return f"A constant, ``{type(value).__name__}``."
    text = (inspect.getdoc(value) or "").split("\n\n")[0]
    return " ".join(text.split())


def statuses() -> str:
    """Return the page of all outcomes, each with its cause and remedies."""
    parts = [
        "# Statuses\n",
        "Every result carries a status: an outcome with a sentence that names the cause and the"
        " remedy. A *failure* raises an error unless `throw=False`; a *warning* comes with a result"
        " that can be used with the restriction stated. The same text is printed by"
        " `ms.explain(...)`, which takes a status, its name, a result, or the error that was"
        " raised.\n",
        "| status | kind | in short |\n| --- | --- | --- |",
    ]
    for status in sorted(EXPLANATIONS, key=lambda s: (s.severity, s)):
        short = status.sentence.split(";")[0].split(":")[0]
        anchor = status.name.lower()
        parts.append(f"| [{status.name}](#{anchor}) | {EXPLANATIONS[status].kind} | {short} |")
    for status in sorted(EXPLANATIONS):
        page = EXPLANATIONS[status]
        parts += [
            f"\n({status.name.lower()})=\n## {status.name}\n",
            f"*{page.kind}, code {int(status)}; from {page.origin}*\n",
            f"> {status.sentence}.\n",
            f"{page.cause}\n",
            "\n".join(f"- {remedy}" for remedy in page.remedies),
        ]
    return "\n".join(parts) + "\n"


def command_pages() -> str:
    """Return the page of the command line: the help of each command, as it prints it."""
    os.environ["COLUMNS"] = str(WIDTH)
    parser = command_line(defaultdict(lambda: lambda _: 0), argparse.Action)
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    parts = [
        "# Command line\n",
        "`mdsens` is installed with the package. Every command prints a page of text, can store"
        " its result (`--out`) and draw a figure (`--plot`). The exit code is 0 for a result"
        " that can be used, 2 for invalid input, and 3 for a result that cannot be trusted.\n",
        f"```text\n{parser.format_help()}```\n",
    ]
    for name, command in groups[0].choices.items():
        parts.append(f"## mdsens {name}\n\n```text\n{command.format_help()}```\n")
    return "\n".join(parts)


def find_missing_pages(app: Sphinx, exception: Exception | None) -> None:
    """Warn of each name that a public module promises and no page of the built site explains.

    The names are read from the text of the modules, the entries from Sphinx: neither from the list
    that the pages were made from.
    """
    if exception is not None:
        return
    entries = set(app.env.get_domain("py").data["objects"])
    explained = [value_at(entry) for entry in entries if entry.startswith("mdsens.")]
    missing, waiting = [], ["mdsens"]
    while waiting:
        path = waiting.pop()
        for name in promised(value_at(path)):
            value = value_at(f"{path}.{name}")
            if isinstance(value, ModuleType):
                waiting.append(f"{path}.{name}")
            elif f"{path}.{name}" not in entries and not any(value is v for v in explained):
                missing.append(f"{path}.{name}")
    if missing:
        logger.warning("public names without a page: %s", ", ".join(sorted(missing)))


def promised(module: ModuleType) -> list[str]:
    """Return the names of ``__all__`` as they stand in a module's file."""
    names: list[str] = []
    for node in ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8")).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if target is None or ast.unparse(target) != "__all__":
            continue
        value = node.value
        if isinstance(value, ast.Attribute):  # += state.__all__
            names += promised(getattr(module, ast.unparse(value.value)))
        else:
            names += ast.literal_eval(value)
    return names


def value_at(path: str) -> Any:
    """Return what a dotted path that begins with the package leads to, None if to nothing."""
    value: Any = ms
    for part in path.split(".")[1:]:
        value = getattr(value, part, None)
    return value


def link_to_public_name(app: Sphinx, env: Any, node: Any, contnode: Any) -> nodes.Node | None:
    """Resolve a reference to where a name is defined, as in an annotation, to its public page."""
    if node.get("refdomain") != "py":
        return None
    path = _public_path(str(node.get("reftarget", "")))
    if path is None:
        # types in signatures that have no page; a reference in a page that people wrote is an error
        return contnode if node["refdoc"].startswith("reference/api/") else None
    domain = env.get_domain("py")
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", path, node, contnode)


def _public_path(target: str) -> str | None:
    """Return the path under which a name of the package has its page; None where it has none."""
    value = value_at(target) if target.startswith("mdsens.") else None
    path = path_of(value, canonical_paths())
    return None if path == target else path
