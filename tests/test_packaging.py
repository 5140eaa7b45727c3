"""What the package declares, and what importing it costs."""

import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import pml_tacl

pytestmark = pytest.mark.slow

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = PYPROJECT["project"]
# Libraries that cost time, and may be missing where nothing of theirs is used.
WATCHED = ("faiss", "matplotlib", "pytorch_metric_learning", "record_keeper", "timm", "torch")


# Names in an order in which each needs what the one before it has already loaded. What is loaded
# in the first list stays for each of the others, which know nothing of each other.
NEEDS = [
    [
        ("", set()),
        ("SiameseTransform, BackgroundSwap", {"torch"}),
    ],
    [
        ("ContrastiveClusteringLoss", {"torch", "pytorch_metric_learning"}),
        ("AttentionConsistencyLoss", {"torch", "pytorch_metric_learning"}),
        ("ContrastiveClusteringMiner", {"torch", "pytorch_metric_learning"}),
        ("RetrievalCalculator", {"torch", "faiss", "pytorch_metric_learning"}),
        (
            "UnsupervisedTrainer",
            {"torch", "faiss", "pytorch_metric_learning", "timm", "record_keeper"},
        ),
    ],
    [("AttentionEmbedder", {"torch", "timm"})],
    [("KMeansPseudoLabeler", {"torch", "faiss"})],
]
# A process is forked for each list but the first, so that torch is imported once.
IMPORTS = """
import os, sys

def load(names):
    exec(f"from pml_tacl import {names}" if names else "import pml_tacl")
    print(*[m for m in WATCHED if m in sys.modules], flush=True)

for names in NEEDS[0]:
    load(names)
for branch in NEEDS[1:]:
    child = os.fork()
    if child == 0:
        for names in branch:
            load(names)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_a_name_imports_no_more_than_it_needs():
    needs = [[names for names, _ in steps] for steps in NEEDS]
    code = f"WATCHED, NEEDS = {WATCHED!r}, {needs!r}\n{IMPORTS}"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)
    found = done.stdout.decode().splitlines()
    for (names, expected), line in zip(chain(*NEEDS), found, strict=True):
        assert set(line.split()) <= expected, names


def test_version_stands_in_one_voice():
    assert PROJECT["version"] == pml_tacl.__version__
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {pml_tacl.__version__}\n" in citation
    assert f"## {pml_tacl.__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def lowest_of(requirement):
    return next(
        Version(s.version) for s in Requirement(requirement).specifier if s.operator in (">=", "==")
    )


def test_the_lowest_versions_that_ci_installs_are_those_declared():
    lines = (ROOT / ".ci" / "lowest.txt").read_text("utf-8").splitlines()
    pinned = {Requirement(line).name: lowest_of(line) for line in lines if line[:1] != "#"}
    declared = {Requirement(line).name: lowest_of(line) for line in PROJECT["dependencies"]}
    assert declared == {name: pinned.get(name) for name in declared}
    extras = [r for extra in PROJECT["optional-dependencies"].values() for r in extra]
    for name in pinned.keys() - declared.keys():
        assert pinned[name] in [lowest_of(r) for r in extras if Requirement(r).name == name], name
    assert PROJECT["requires-python"] == ">=3.10"
    assert "wanted=(3.10)" in (ROOT / ".ci" / "versions").read_text("utf-8")


def test_the_public_workflow_runs_the_stages_of_ci():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8")
    stages = set(re.findall(r"^stage (\w+)", (ROOT / ".ci" / "run").read_text("utf-8"), re.M))
    assert stages == set(re.findall(r"bash \.ci/(\w+)", workflow))
