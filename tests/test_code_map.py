"""The script that draws the map of the code: imports, arrows and circles of a small package."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("code_map", ROOT / "docs" / "code_map.py")
code_map = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(code_map)


@pytest.fixture
def package(tmp_path):
    files = {
        "__init__.py": '"""A package."""',
        "top.py": "import os\nimport numpy as np\n"
        "from small.a import one, two\nimport small.b.three",
        "a/__init__.py": "from .one import x",
        "a/one.py": '"""Hold one.\n\nMore."""\nfrom ..b import three\nx = 1',
        "a/two.py": 'class Two:\n    """Count to two\n    at most."""',
        "b/__init__.py": "",
        "b/three.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
        "    from small import top\ndef f():\n    from small.a.one import x\n    return x",
    }
    for name, text in files.items():
        path = tmp_path / "small" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "small"


def test_reads_summaries_imports_and_libraries(package):
    modules = code_map.read_package(package)
    assert modules["top.py"].uses == {"a/one.py", "a/two.py", "b/three.py"}
    assert modules["top.py"].libraries == {"numpy"}
    assert modules["a/one.py"].uses == {"b/three.py"}
    assert modules["a/__init__.py"].uses == {"a/one.py"}
    # Inside a function, and not for type checkers.
    assert modules["b/three.py"].uses == {"a/one.py"}
    assert modules["b/three.py"].at_import == set()
    assert modules["a/one.py"].summary == "Hold one."
    assert modules["a/two.py"].summary == "`Two`: Count to two at most."


def test_counts_arrows_and_circles(package):
    modules = code_map.read_package(package)
    graph, folders = code_map.module_graph(modules), code_map.folder_graph(modules)
    assert (len(graph), code_map.arrows(graph)) == (7, 6)
    assert code_map.circles(graph) == [["a/one.py", "b/three.py"]]
    assert code_map.circles(code_map.module_graph(modules, at_import=True)) == []
    assert folders == {"__init__.py": set(), "top.py": {"a", "b"}, "a": {"b"}, "b": {"a"}}
    assert code_map.circles(folders) == [["a", "b"]]


def test_writes_between_the_markers_and_keeps_the_rest(package):
    page = f"before\n{code_map.BEGIN}\nold\n{code_map.END}\nafter\n"
    once = code_map.with_map(page, package)
    assert once.startswith("before\n")
    assert once.endswith("after\n")
    assert "\nold\n" not in once
    assert "| modules | 7 | 6 | 1 | 0 |" in once
    assert code_map.with_map(once, package) == once
    with pytest.raises(ValueError, match="page must have"):
        code_map.with_map("no markers", package)
