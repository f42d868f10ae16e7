"""The public names of mdsens: what a user can reach without a leading underscore.

Sphinx's configuration makes a page for each, and a test checks that none is without one.
"""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import mdsens as ms

__all__ = ["canonical_paths", "namespaces", "path_of"]


def namespaces() -> dict[str, ModuleType]:
    """Return the public modules by their path, the package first, then those it promises."""
    found: dict[str, ModuleType] = {"mdsens": ms}
    for path, module in found.copy().items():
        _add_modules(found, path, module)
    return found


def _add_modules(found: dict[str, ModuleType], path: str, module: ModuleType) -> None:
    for name in module.__all__:
        value = getattr(module, name)
        if isinstance(value, ModuleType) and value not in found.values():
            found[f"{path}.{name}"] = value
            _add_modules(found, f"{path}.{name}", value)


def canonical_paths() -> dict[str, Any]:
    """Return every public object that is no module, by the shortest path that leads to it.

    An object that several modules promise has one page, under the first of these modules.
    """
    found: dict[str, Any] = {}
    for path, module in namespaces().items():
        for name in module.__all__:
            value = getattr(module, name)
            if not isinstance(value, ModuleType) and path_of(value, found) is None:
                found[f"{path}.{name}"] = value
    return found


def path_of(value: Any, paths: dict[str, Any]) -> str | None:
    """Return the path under which an object has its page; None where it has none."""
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        return None  # constants may be equal without being the same
    return next((path for path, known in paths.items() if known is value), None)
