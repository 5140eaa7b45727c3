"""Photographs in class folders, in thirds or halves that share no class."""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pml_tacl.datasets import ImageFiles
from pml_tacl.utils.errors import InputError

SPLITS = ("train", "validation", "test")
QUERIES = "queries.txt"
_SEED = 2020


class Listed(NamedTuple):
    """List of files, classes and queries (None: all images, each against all others)."""

    paths: list[str]
    labels: np.ndarray
    queries: np.ndarray | None = None


def sets_in(root: Path) -> list[str]:
    """Return the names of the data sets below a folder.

    Raises:
        ValueError: if there are none.
    """
    if not root.is_dir():
        raise InputError(f"ROOT must be a folder with a folder for each data set, got {root}")
    names = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise InputError(f"ROOT={root} contains no folder: give ROOT/NAME/CLASS/FILE")
    return names


def chosen(root: Path, sets: list[str] | None) -> list[str]:
    """Return the data sets of --sets, or all if it is not given.

    Raises:
        ValueError: if there is no such data set below the folder.
    """
    there = sets_in(root)
    for name in sets or ():
        if name not in there:
            raise InputError(f"--sets {name} is not in {root}")
    return sets or there


@cache
def listed(root: Path, split: str) -> Listed:
    """Return the images of a split.

    Two layouts. CLASS/FILE: the classes are shuffled with a fixed seed and cut in thirds.
    train/CLASS/FILE and test/CLASS/FILE: given halves; validation is the last third of the
    training half's classes, which "train-for-test" holds as well.

    Args:
        root: folder of the data set. A file `queries.txt` in it names the images that search
            among the others of their split, a path below the class folders' parent in each line.
        split: one of SPLITS, or "train-for-test": what a run that measures the test part trains
            on.

    Raises:
        ValueError: if no two classes can be told apart, or no class has two images.
    """
    halves = root / "train", root / "test"
    if all(half.is_dir() for half in halves):
        base = halves[1] if split == "test" else halves[0]
    else:
        base = root
    beside = [QUERIES] if (base / QUERIES).is_file() else []
    found = ImageFiles(base, labels="folder", progress=False, exclude=beside)
    names = [found.classes[i] for i in np.random.default_rng(_SEED).permutation(len(found.classes))]
    count = len(names)
    if base == root:
        part = SPLITS.index(split.removesuffix("-for-test"))
        first, last = count * part // 3, count * (part + 1) // 3
    elif split in ("test", "train-for-test"):
        first, last = 0, count
    else:
        first, last = (0, count * 2 // 3) if split == "train" else (count * 2 // 3, count)
    kept = {name: label for label, name in enumerate(names[first:last])}
    rows = [row for row, label in enumerate(found.labels) if found.classes[label] in kept]
    labels = np.array([kept[found.classes[found.labels[row]]] for row in rows], np.int64)
    _check(root, split, count, labels)
    asked = _queries(root)
    unknown = sorted(asked - set(found.names)) if base == root or split == "test" else []
    if unknown:
        raise InputError(f"{root / QUERIES} names {unknown[0]}, which is not an image of {base}")
    queries = np.array([found.names[row] in asked for row in rows]) if asked else None
    if queries is not None and (split.startswith("train") or not queries.any() or queries.all()):
        queries = None
    if queries is not None and not np.isin(labels[queries], labels[~queries]).any():
        raise InputError(
            f"{root}: no image in {QUERIES} has another of its class to find in the {split} part"
        )
    return Listed([str(found.paths[row]) for row in rows], labels, queries)


def _queries(root: Path) -> set[str]:
    path = root / QUERIES
    if not path.is_file():
        return set()
    return {line.strip() for line in path.read_text("utf-8-sig").splitlines()} - {""}


def _check(root: Path, split: str, count: int, labels: np.ndarray) -> None:
    classes, sizes = np.unique(labels, return_counts=True)
    if split.startswith("train") and len(labels) >= 2:
        return
    if len(classes) < 2:
        raise InputError(
            f"{root} has {count} classes, and {len(classes)} of them in the {split} part: at "
            "least 2 must be told apart; give at least 6 folders of classes"
        )
    if sizes.max() < 2:
        raise InputError(f"{root} has no class with 2 images in the {split} part: nothing to find")
