"""What the documentation says is run as it stands there."""

import re
from pathlib import Path

import pytest

import pml_tacl

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=str)
def test_python_blocks_run_in_order(page):
    names = {"__name__": "readme"}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)
    if page.name == "README.md":
        assert names["loss"].isfinite()
        assert names["embeddings"].shape == (16, 64)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_to_files_are_good(page):
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


def test_every_script_that_the_readme_runs_is_there():
    lines = "\n".join(blocks(ROOT / "README.md", "bash"))
    scripts = re.findall(r"python (\S+\.py)", lines)
    assert scripts
    assert all((ROOT / script).is_file() for script in scripts)
    assert ROOT.joinpath(".ci", "run").read_text().count("python -m pytest") == 1


def test_every_public_name_loads_and_is_documented():
    assert sorted(pml_tacl.__all__) == list(pml_tacl.__all__)
    for name in pml_tacl.__all__:
        assert len(getattr(pml_tacl, name).__doc__) > 100, name
    assert set(pml_tacl.__all__) <= set(dir(pml_tacl))
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = pml_tacl.Nothing
