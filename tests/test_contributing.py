"""The loss and the test of docs/project/new_loss.md, as the files that a contributor makes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
TEST = "test_centroid_pull_loss.py"


@pytest.fixture
def files(tmp_path):
    """The loss, its test, and what `pml_tacl/__init__.py` would say of it."""
    page = (ROOT / "docs" / "project" / "new_loss.md").read_text("utf-8")
    loss, test = re.findall(r"```python\n(.*?)```", page, re.S)
    (tmp_path / "centroid_pull_loss.py").write_text(loss)
    (tmp_path / TEST).write_text(test)
    named = "import pml_tacl\nfrom centroid_pull_loss import CentroidPullLoss\n"
    (tmp_path / "conftest.py").write_text(
        f"{named}\npml_tacl.CentroidPullLoss = CentroidPullLoss\n"
    )
    return tmp_path


def run(folder, *arguments):
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_the_test_passes_and_fails_for_a_broken_loss(warm, files):
    words = ["-m", "pytest", "-q", TEST]
    done = warm.run(words, cwd=files)
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout
    loss = (files / "centroid_pull_loss.py").read_text()
    assert loss.count(" - self.margin") == 1
    (files / "centroid_pull_loss.py").write_text(loss.replace(" - self.margin", ""))
    assert "2 failed, 2 passed" in warm.run(words, cwd=files).stdout


def test_both_are_as_the_linter_wants_them(files):
    pytest.importorskip("ruff")
    settings = ("--no-cache", "--config", ROOT / "pyproject.toml", "centroid_pull_loss.py", TEST)
    for check in (
        ("check", "--config=lint.isort.known-first-party=['pml_tacl']"),
        ("format", "--check"),
    ):
        done = run(files, "ruff", *check, *settings)
        assert done.returncode == 0, done.stdout + done.stderr
