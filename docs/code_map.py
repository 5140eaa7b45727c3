"""Print the modules of the package and the graph of their imports, and write the map of the code.

python docs/code_map.py                # update docs/project/code_map.md
python docs/code_map.py --counts       # print the numbers of the import graph alone
python docs/code_map.py --counts --package OTHER_CHECKOUT/pml_tacl
"""

import argparse
import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "project" / "code_map.md"
BEGIN, END = "<!-- begin docs/code_map.py -->", "<!-- end docs/code_map.py -->"
Graph = Mapping[str, set[str]]


class Module(NamedTuple):
    """One file of the package."""

    path: str  # below the package's folder, with slashes
    summary: str  # first line of its docstring, or of its first public class or function
    uses: set[str]  # paths of the modules of the package that it imports, also inside functions
    at_import: set[str]  # those of ``uses`` that are imported when the module is imported
    libraries: set[str]  # top-level packages outside the package and the standard library


def read_package(package: Path) -> dict[str, Module]:
    """Read each module of a package folder; the keys are the paths below it."""
    files = {p.relative_to(package).as_posix(): p for p in sorted(package.rglob("*.py"))}
    home = {_dotted(package.name, path): path for path in files}
    return {path: _read(path, file, package.name, home) for path, file in files.items()}


def folder_of(path: str) -> str:
    """Return the folder of a module below the package, or the module itself at the root."""
    return path.split("/")[0]


def folder_graph(modules: Mapping[str, Module], at_import: bool = False) -> dict[str, set[str]]:
    """Return, for each folder or root module, the others that it imports."""
    graph: dict[str, set[str]] = {folder_of(path): set() for path in modules}
    for path, module in modules.items():
        used = module.at_import if at_import else module.uses
        graph[folder_of(path)] |= {folder_of(other) for other in used} - {folder_of(path)}
    return graph


def module_graph(modules: Mapping[str, Module], at_import: bool = False) -> dict[str, set[str]]:
    """Return, for each module, the others that it imports."""
    return {path: m.at_import if at_import else m.uses for path, m in modules.items()}


def arrows(graph: Graph) -> int:
    """Count the imports between different nodes of a graph."""
    return sum(map(len, graph.values()))


def circles(graph: Graph) -> list[list[str]]:
    """Return the groups of nodes that import one another, directly or through others."""
    reached = {node: _reachable(graph, node) for node in graph}
    groups = {
        tuple(sorted(other for other in found if node in reached[other]))
        for node, found in reached.items()
        if node in found
    }
    return [list(group) for group in sorted(groups)]


def counts(modules: Mapping[str, Module]) -> str:
    """Return the table of the numbers of modules, arrows and circles."""
    rows = [
        "| graph | nodes | arrows | circles | circles at import time |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, make in (("modules", module_graph), ("folders", folder_graph)):
        graph = make(modules)
        rows.append(
            f"| {name} | {len(graph)} | {arrows(graph)} | {len(circles(graph))} "
            f"| {len(circles(make(modules, at_import=True)))} |"
        )
    return "\n".join(rows)


def generated(package: Path) -> str:
    """Return the generated part of the page, in Markdown."""
    modules = read_package(package)
    folders = folder_graph(modules)
    lines = [counts(modules), "", *circle_lines(modules, "- ")]
    lines += ["", "| folder | imports |", "| --- | --- |"]
    lines += [f"| {_code([f])} | {_code(sorted(used))} |" for f, used in sorted(folders.items())]
    of_folder: dict[str, list[Module]] = defaultdict(list)
    for module in modules.values():
        of_folder["" if "/" not in module.path else folder_of(module.path)].append(module)
    for folder, own in sorted(of_folder.items()):
        lines += ["", f"### `{package.name}/{folder}`", ""]
        lines += [
            "| module | contents | imports from the package | libraries |",
            "|" + " --- |" * 4,
        ]
        lines += [
            f"| `{module.path.removeprefix(folder + '/')}` | {module.summary} "
            f"| {_code(sorted(module.uses))} | {', '.join(sorted(module.libraries))} |"
            for module in own
        ]
    return "\n".join(lines)


def circle_lines(modules: Mapping[str, Module], before: str = "") -> list[str]:
    """Return a line for each circle of the graph of modules and of the graph of folders."""
    return [
        f"{before}circle of {name}: {_code(circle)}"
        for name, make in (("modules", module_graph), ("folders", folder_graph))
        for circle in circles(make(modules))
    ]


def with_map(page: str, package: Path) -> str:
    """Return the page with the part between the markers generated anew."""
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"page must have the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{generated(package)}\n\n{END}{after}"


def _dotted(package: str, path: str) -> str:
    return ".".join([package, *path.removesuffix(".py").split("/")]).removesuffix(".__init__")


def _read(path: str, file: Path, package: str, home: Mapping[str, str]) -> Module:
    tree = ast.parse(file.read_text("utf-8"))
    used: dict[bool, set[str]] = defaultdict(set)
    libraries = set()
    for node, inside in _imports(tree, False):
        for name in _names(node, _dotted(package, path), path.endswith("__init__.py"), home):
            if name in home:
                used[inside].add(home[name])
            elif (top := name.split(".")[0]) not in sys.stdlib_module_names | {package}:
                libraries.add(top)
    everywhere = (used[False] | used[True]) - {path}
    return Module(path, _summary(tree), everywhere, used[False] - {path}, libraries)


def _imports(tree: ast.AST, inside: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Yield the imports but those for type checkers, and whether each is inside a function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, inside
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from _imports(other, inside)
        else:
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(node, inside or function)


def _names(
    node: ast.Import | ast.ImportFrom, module: str, is_package: bool, home: Mapping[str, str]
) -> list[str]:
    """Return the modules that an import names; of the package, the most exact ones."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + is_package]
        base = ".".join([*parts, *([base] if base else [])])
    full = [f"{base}.{alias.name}" for alias in node.names]
    return [name if name in home else base for name in full]


def _summary(tree: ast.Module) -> str:
    if text := ast.get_docstring(tree):
        return _line(text)
    for node in tree.body:
        kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, kinds) and node.name[0] != "_" and (text := ast.get_docstring(node)):
            return f"`{node.name}`: {_line(text)}"
    return ""


def _line(docstring: str) -> str:
    first = docstring.strip().split("\n\n")[0]
    return re.sub(r":\w+:`", "`", " ".join(first.split())).replace("``", "`").replace("|", "\\|")


def _reachable(graph: Graph, start: str) -> set[str]:
    found: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += graph[node]
    return found


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--package", type=Path, default=ROOT / "pml_tacl", help="package folder")
    parser.add_argument("--counts", action="store_true", help="print the numbers, write nothing")
    arguments = parser.parse_args()
    if arguments.counts:
        modules = read_package(arguments.package)
        print("\n".join([counts(modules), *circle_lines(modules)]))
    else:
        PAGE.write_text(with_map(PAGE.read_text("utf-8"), arguments.package), "utf-8")


if __name__ == "__main__":
    main()
