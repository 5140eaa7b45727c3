"""What the documentation says is run as it stands there."""

import argparse
import ast
import doctest
import importlib
import inspect
import re
import runpy
import shlex
from pathlib import Path

import PIL.Image
import pytest
import torch
from torchvision.transforms import v2

import pml_tacl
from pml_tacl.cli.main import COMMANDS, main

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
BESIDE = [ROOT / "CHANGELOG.md", ROOT / "examples" / "README.md"]  # read on GitHub alone
PARTS = {
    found: page
    for page in PAGES
    for found in re.findall(r"^::: pml_tacl\.(\w+)$", page.read_text("utf-8"), re.M)
    if found in pml_tacl.__all__
}
PACKAGE = ROOT / "pml_tacl"
SOURCES = {p.relative_to(PACKAGE).as_posix(): p.read_text("utf-8") for p in PACKAGE.rglob("*.py")}
# A block that needs data or processes is marked by this comment, with the reason.
FENCE = re.compile(
    r"^(?P<skip> *<!-- not run: .+ -->\n)?"
    r"^(?P<indent> *)```(?P<kind>\S*)\n(?P<code>.*?)^(?P=indent)```$",
    re.M | re.S,
)


def blocks(page, language, marked=False):
    return [
        re.sub(rf"^{found['indent']}", "", found["code"], flags=re.M)
        for found in FENCE.finditer(page.read_text("utf-8"))
        if found["kind"] == language and bool(found["skip"]) == marked
    ]


def pages_with_code():
    """The pages with blocks of Python; those that train are slow, but for the first."""
    for page, name in zip(PAGES, IDS, strict=True):
        code = "".join(blocks(page, "python"))
        trains = name != "README.md" and re.search(r"\.train\(.*\d", code)
        if code:
            yield pytest.param(page, id=name, marks=[pytest.mark.slow] if trains else [])


@pytest.mark.parametrize("name", pml_tacl.__all__)
def test_every_part_has_a_page(name):
    assert name in PARTS, f"no page in docs/components/ has the line '::: pml_tacl.{name}'"


# The pages' images are noise, of which clusters may well be uneven.
@pytest.mark.filterwarnings("ignore:one cluster contains:UserWarning")
@pytest.mark.usefixtures("few_channels")
@pytest.mark.parametrize("page", list(pages_with_code()))
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write
    names = {"__name__": "page"}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)
    if page.name == "README.md":
        assert names["loss"].isfinite()
        assert names["embeddings"].shape == (16, 512)


@pytest.mark.parametrize("file", sorted(file for file in SOURCES if ">>>" in SOURCES[file]))
def test_examples_of_docstrings_run(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = ".".join(["pml_tacl", *Path(file).with_suffix("").parts]).removesuffix(".__init__")
    module = importlib.import_module(name)
    # Its own names and these, not all that it imports: a reader of the page does not see that.
    own = {k: v for k, v in vars(module).items() if getattr(v, "__module__", None) == name}
    assert doctest.testmod(module, globs={**own, "torch": torch, "PIL": PIL, "v2": v2}).failed == 0


def test_few_blocks_are_not_run_and_none_hides():
    unrun = [block for page in PAGES for block in blocks(page, "python", marked=True)]
    assert len(unrun) <= 4
    for block in unrun:
        compile(block, "page", "exec")
    kinds = {found["kind"] for p in PAGES for found in FENCE.finditer(p.read_text("utf-8"))}
    assert kinds <= {"python", "bash", "text", "math", "yaml", ""}


@pytest.mark.parametrize("page", [*PAGES, *BESIDE], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_are_good(page):
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


def commands():
    """Each line that runs a script of ours, in a page's blocks and text and atop the scripts."""
    texts = {page: page.read_text("utf-8") for page in (*PAGES, *BESIDE)}
    for script in (*ROOT.glob("examples/*.py"), *ROOT.glob("benchmarks/*.py")):
        texts[script] = ast.get_docstring(ast.parse(script.read_text("utf-8"))) or ""
    line = r"\b(?:python|torchrun) (?:[^\n`]* )?((?:examples|benchmarks)/\w+\.py\b[^\n`|&;>]*)"
    return [
        pytest.param(shlex.split(found, comments=True), id=f"{path.relative_to(ROOT)}: {found}")
        for path, text in sorted(texts.items())
        for found in re.findall(line, text.replace("\\\n", " "))
    ]


def parses(script):
    """Whether it reads arguments, itself or by a script beside it."""
    code = script.read_text("utf-8")
    beside = (path for path in script.parent.glob("*.py") if f"\nfrom {path.stem} import" in code)
    of_package = re.search(r"^from pml_tacl\.cli\.\w+ import .*\bmain$", code, re.M)
    return "parse_args(" in code or bool(of_package) or any(map(parses, beside))


def console_commands():
    """Each line of a page's block that runs pml-tacl, or the module, and the examples of --help."""
    texts = {}
    for page in (*PAGES, *BESIDE):
        texts[str(page.relative_to(ROOT))] = "".join(blocks(page, "bash"))
    line = r"^(?:pml-tacl|(?:python|torchrun [^\n]*)-m pml_tacl) +([^\n`|&;>]*)"
    return [
        pytest.param(shlex.split(found, comments=True), id=f"{name}: {found}")
        for name, text in texts.items()
        for found in re.findall(line, text.replace("\\\n", " "), re.M)
    ]


class Parsed(BaseException):
    """Ends a script once its arguments are found good."""


def parse_and_end(monkeypatch):
    """Let every parser end the script once it has parsed in full, without abbreviations."""
    parser = argparse.ArgumentParser
    parse = parser.parse_args

    def parse_args(self, words=None):
        assert not self.allow_abbrev
        parse(self, words)
        raise Parsed

    make = parser.__init__

    def in_full(self, *arguments, **settings):
        make(self, *arguments, **{**settings, "allow_abbrev": False})

    monkeypatch.setattr(parser, "parse_args", parse_args)
    monkeypatch.setattr(parser, "parse_intermixed_args", parse_args)
    monkeypatch.setattr(parser, "__init__", in_full)


@pytest.mark.parametrize("words", commands())
def test_commands_that_are_shown_are_understood(words, monkeypatch):
    script = ROOT / words[0]
    if not parses(script):  # it would run
        assert not words[1:]
        return
    parse_and_end(monkeypatch)
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.syspath_prepend(script.parent)
    with pytest.raises(Parsed):
        runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("words", console_commands())
def test_console_commands_that_are_shown_are_understood(words, monkeypatch):
    parse_and_end(monkeypatch)
    with pytest.raises(Parsed):
        main(words)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_console_command_has_a_page_and_its_help_an_example_that_works(
    name, monkeypatch, capsys
):
    page = (ROOT / "docs" / "commands" / f"{name}.md").read_text("utf-8")
    assert f"\npml-tacl {name} " in page
    with pytest.raises(SystemExit):
        main([name, "--help"])
    example = capsys.readouterr().out.partition("\nexample: pml-tacl ")[2]
    parse_and_end(monkeypatch)
    with pytest.raises(Parsed):
        main(shlex.split(example))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_page_of_a_command_names_its_flags_and_no_others(name, monkeypatch):
    found = {}

    def parse_args(self, *_):
        found["flags"] = {flag for action in self._actions for flag in action.option_strings}
        raise Parsed

    for method in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, method, parse_args)
    with pytest.raises(Parsed):
        main([name])
    page = (ROOT / "docs" / "commands" / f"{name}.md").read_text("utf-8")
    rows = "".join(re.findall(r"^\| (`-[^|]*)\|", page, re.M))
    said = re.findall(r"(?<![\w-])--?[a-z][\w-]*", rows)
    assert len(set(said)) == len(said)
    assert set(said) == found["flags"] - {"-h", "--help"}


def test_commands_are_found_where_they_stand():
    shown = {case.id.partition(":")[0] for case in commands()}
    assert {"README.md", "docs/project/new_loss.md", "docs/many-processes.md"} <= shown


def test_every_page_is_in_the_navigation():
    # mkdocs --strict says the same, where it is installed. docs/hooks.py lists the components.
    named = set(re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    pages = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}
    assert named == {page for page in pages if not page.startswith("components/")}


def test_ci_runs_the_tests_the_linters_and_the_documentation():
    check = (ROOT / ".ci" / "check").read_text()
    for command in (
        "python -m pytest -n auto --dist loadfile",
        "ruff check",
        "ruff format --check",
        "mypy",
        "mkdocs build --strict",
    ):
        assert check.count(command) == 1, command


def test_every_public_name_loads_and_is_documented():
    assert sorted(pml_tacl.__all__) == list(pml_tacl.__all__)
    for name in pml_tacl.__all__:
        assert len(getattr(pml_tacl, name).__doc__) > 100, name
        page = PARTS[name].read_text("utf-8")
        for part in (
            f"::: pml_tacl.{name}\n",
            "```math",
            "## Defaults, and why",
        ):
            assert part in page, (name, part)
        assert "## With PML" in page
        assert blocks(PARTS[name], "python")
    assert set(pml_tacl.__all__) <= set(dir(pml_tacl))
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = pml_tacl.Nothing


@pytest.mark.parametrize("name", PARTS)
def test_tables_of_defaults_say_what_the_signature_says(name):
    section = PARTS[name].read_text("utf-8").partition("## Defaults, and why")[2].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", section, re.M)
    parameters = inspect.signature(getattr(pml_tacl, name)).parameters
    defaults = {p.name: p.default for p in parameters.values() if p.default is not p.empty}
    assert defaults.keys() <= {argument for argument, _ in rows}
    for argument, said in rows:
        said = said.strip("` ")
        if argument in parameters:
            assert eval(said) == defaults[argument], argument
        else:  # of PML's base classes
            part = getattr(pml_tacl, name)()
            assert said.removeprefix("PML's `") == type(getattr(part, argument)).__name__, argument


def test_names_that_the_reference_shows_are_there():
    for page in PAGES:
        for name in re.findall(r"^::: (pml_tacl\S*)$", page.read_text("utf-8"), re.M):
            module, _, attribute = name.rpartition(".")
            try:
                importlib.import_module(name)
            except ImportError:
                assert hasattr(importlib.import_module(module), attribute), name


def test_every_public_name_has_a_reference():
    shown = {n for p in PAGES for n in re.findall(r"^::: (\S+)$", p.read_text("utf-8"), re.M)}
    steps = {"pml_tacl.report.read_run", "pml_tacl.report.report_html"}  # of write_report
    modules = {re.split(r"[/.]", file)[0] for file in SOURCES if not file.startswith("_")}
    for module in sorted(modules):
        of = f"pml_tacl.{module}"
        home = importlib.import_module(of)
        for name in getattr(home, "__all__", vars(home)):
            thing = getattr(home, name)
            own = hasattr(home, "__all__") or getattr(thing, "__module__", None) == of
            if own and name[0] != "_" and (inspect.isclass(thing) or inspect.isfunction(thing)):
                assert {of, f"{of}.{name}", f"pml_tacl.{name}"} & (shown | steps), f"{of}.{name}"


def test_every_drawing_is_made_by_the_script_and_shown(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    made = {draw.__name__ for draw in importlib.import_module("figures").DRAWINGS}
    parts = ROOT / "docs" / "images" / "parts"
    assert made == {path.stem for path in parts.iterdir()}
    shown = "".join(page.read_text("utf-8") for page in PAGES)
    assert all(f"images/parts/{name}.png" in shown for name in made)


def messages():
    """Every string of the package, with an ellipsis for what is filled in."""
    for path in (ROOT / "pml_tacl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r"%[ds]|%\.\df", "…", node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
                yield "".join(parts)


def test_troubleshooting_quotes_what_the_code_says():
    guides = ROOT / "docs" / "guides"
    pages = (guides / "troubleshooting.md", guides / "several_gpus.md")
    said = list(messages())
    quoted = [line for p in pages for block in blocks(p, "text") for line in block.splitlines()]
    assert len(quoted) > 15
    assert [line for line in quoted if not any(line in message for message in said)] == []
