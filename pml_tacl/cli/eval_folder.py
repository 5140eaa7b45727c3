"""Reading and validating a folder of labelled test images."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pml_tacl.datasets.image_files import ImageFiles
from pml_tacl.utils.errors import InputError

_LOGGER = logging.getLogger(__name__)


def images_to_test_on(
    folder: str | Path,
    trained_on: ImageFiles | None = None,
    transform: Callable[[Image.Image], Any] | None = None,
    progress: bool = True,
    needed: bool = True,
) -> ImageFiles:
    """Read a folder whose sub-folders are classes, and print the number of classes and images.

    Args:
        folder: folder with a sub-folder for each class.
        trained_on: training images; at least one test image must not be among them.
        transform: transform of the PIL RGB image.
        progress: show a progress bar while the images are checked.
        needed: raise if no class has two images. False logs a warning instead, and training
            continues without the test, see :func:`can_measure`.

    Returns:
        The images, with labels.

    Raises:
        ValueError: if retrieval cannot be measured: images outside sub-folders, fewer than two
            classes, no class with two images, or only training images; also the errors of
            :class:`pml_tacl.datasets.ImageFiles`.
    """
    images = ImageFiles(folder, labels="folder", transform=transform, progress=progress)
    where = f"eval_folder={str(folder)!r}"
    sizes = np.bincount(images.labels)
    if len(sizes) < 2:
        raise InputError(
            f"{where} contains one class, {images.classes[0]!r}: every neighbour would be right; "
            "give a folder with a sub-folder for each of several classes"
        )
    if not can_measure(images):
        lacking = (
            f"{where} contains {len(sizes)} classes of one image each, so no query has a match"
        )
        if needed:
            raise InputError(f"{lacking}: give at least two images of a class")
        _LOGGER.warning("%s; training continues without this test", lacking)
    same = 0 if trained_on is None else len(_places(images) & _places(trained_on))
    if trained_on is not None and same == len(images):
        raise InputError(
            f"{where} contains only training images of {str(trained_on.root)!r}: put labelled "
            "images aside, outside of that folder"
        )
    lone = int((sizes == 1).sum())
    notes = [f"classes with only one image, which has no match: {lone}"] if lone else []
    notes += [f"images that are also training images: {same}"] if same else []
    print("; ".join([f"testing on {len(images)} images of {len(sizes)} classes", *notes]))
    return images


def can_measure(images: ImageFiles) -> bool:
    """Return whether any class has two images, so that a query can have a match."""
    return bool(np.bincount(images.labels).max() >= 2)


def _places(images: ImageFiles) -> set[tuple[str, str]]:
    """Return the real folder, with links resolved, and the name of each file."""
    real = {folder: os.path.realpath(folder) for folder in {path.parent for path in images.paths}}
    return {(real[path.parent], path.name) for path in images.paths}
