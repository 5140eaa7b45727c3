"""Photographs of CUB, Cars196, SOP and In-shop from local folders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torchvision.transforms import v2
from tqdm import tqdm

from pml_tacl.datasets import CUB, Cars196, StanfordOnlineProducts, load_rgb


class Listed(NamedTuple):
    """List of files, classes and queries (None: all images, each against all others)."""

    paths: list[str]
    labels: np.ndarray
    queries: np.ndarray | None = None


def _of_pml(dataset: Callable[..., Any]) -> Callable[[Path, str], Listed]:
    def listed(root: Path, split: str) -> Listed:
        found = dataset(str(root), split=split)
        return Listed(list(found.paths), np.asarray(found.labels))

    return listed


def _in_shop(root: Path, split: str) -> Listed:
    """Read the list of the In-shop benchmark: a count, a heading, then file, item and split."""
    lines = next(root.rglob("list_eval_partition.txt")).read_text().splitlines()[2:]
    rows = [line.split() for line in lines if line.strip()]
    wanted = ("train",) if split == "train" else ("query", "gallery")
    rows = [row for row in rows if row[2] in wanted]
    base = next(path for path in (root, *root.iterdir()) if (path / rows[0][0]).is_file())
    _, labels = np.unique([row[1] for row in rows], return_inverse=True)
    queries = None if split == "train" else np.array([row[2] == "query" for row in rows])
    return Listed([str(base / row[0]) for row in rows], labels, queries)


# The folder of each under the root that the user names; each has an official test half.
PHOTOS: dict[str, Callable[[Path, str], Listed]] = {
    "cub": _of_pml(CUB),
    "cars196": _of_pml(Cars196),
    "sop": _of_pml(StanfordOnlineProducts),
    "inshop": _in_shop,
}


def listed(name: str, root: Path, split: str) -> Listed:
    """Return the files of a split; validation is the last third of the training classes.

    Raises:
        FileNotFoundError: if the data set is missing.
    """
    folder = root / name
    if not folder.is_dir():
        raise FileNotFoundError(f"dataset={name!r}: there is no folder {folder}")
    if split == "test":
        return PHOTOS[name](folder, "test")
    found = PHOTOS[name](folder, "train")
    border = (int(found.labels.max()) + 1) * 2 // 3
    kept = found.labels < border if split == "train" else found.labels >= border
    paths = [path for path, keep in zip(found.paths, kept, strict=True) if keep]
    return Listed(paths, found.labels[kept] - (0 if split == "train" else border))


def read(paths: list[str], size: int) -> np.ndarray:
    """Return images (N, size, size, 3) uint8, with the shorter side resized, then cropped."""
    shrink = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)])
    images = np.empty((len(paths), size, size, 3), np.uint8)
    for row, path in enumerate(tqdm(paths, "reading photographs", leave=False)):
        images[row] = np.asarray(shrink(load_rgb(path)))
    return images
