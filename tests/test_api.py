"""Compare the public names and their signatures with tests/api.txt.

Write the file again after an intended change: python -m tests.test_api
"""

import difflib
import inspect
import pkgutil
from collections.abc import Iterator
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import pml_tacl

SNAPSHOT = Path(__file__).with_name("api.txt")
# These modules are public without an `__all__`.
MODULES = ("pml_tacl.duplicates", "pml_tacl.search")


def signature(thing: Any) -> str:
    """Return names, kinds and defaults of the arguments; annotations differ between Pythons."""
    arguments = inspect.signature(thing)
    plain = [p.replace(annotation=p.empty) for p in arguments.parameters.values()]
    return str(arguments.replace(parameters=plain, return_annotation=arguments.empty))


def public_names(module: ModuleType) -> list[str]:
    own = [n for n, thing in vars(module).items() if getattr(thing, "__module__", "") in MODULES]
    return sorted(getattr(module, "__all__", [name for name in own if not name.startswith("_")]))


def methods(cls: type) -> Iterator[tuple[str, str]]:
    """Yield the public methods and properties of a class that this package defines."""
    found = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("pml_tacl"):
            found |= vars(base)
    for name, value in sorted(found.items()):
        if name.startswith("_") and name != "__call__":
            continue
        if isinstance(value, property | cached_property):
            yield name, ""
        elif isinstance(value, classmethod | staticmethod) or inspect.isfunction(value):
            yield name, signature(getattr(cls, name))


def public_api() -> Iterator[str]:
    packages = [f"pml_tacl.{m.name}" for m in pkgutil.iter_modules(pml_tacl.__path__) if m.ispkg]
    for path in ("pml_tacl", *sorted([*packages, *MODULES])):
        module = import_module(path)
        for name in public_names(module):
            value = getattr(module, name)
            if not callable(value):
                yield f"{path}.{name}"
                continue
            yield f"{path}.{name}{signature(value)}"
            if isinstance(value, type) and path != "pml_tacl":
                yield from (f"{path}.{name}.{of}{text}" for of, text in methods(value))


def test_public_names_and_signatures_are_those_of_the_snapshot():
    pytest.importorskip("matplotlib")
    expected, found = SNAPSHOT.read_text("utf-8").splitlines(), list(public_api())
    changes = difflib.unified_diff(expected, found, "tests/api.txt", "the code", n=0, lineterm="")
    assert found == expected, "\n".join(
        ["", *changes, "If this is intended, write the file anew: python -m tests.test_api"]
    )


if __name__ == "__main__":
    SNAPSHOT.write_text("\n".join(public_api()) + "\n", "utf-8")
