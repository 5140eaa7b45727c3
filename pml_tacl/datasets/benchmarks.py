"""PML's benchmark data sets with what training needs: RGB images and zero-based labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from pytorch_metric_learning import datasets as pml_datasets

from pml_tacl.datasets.image_files import load_rgb


class _Ready:
    """Mixed in front of a PML data set: load_rgb for images, labels counted from zero."""

    paths: list[str]
    labels: npt.NDArray[np.int64]
    transform: Any
    target_transform: Any

    def generate_split(self) -> None:
        super().generate_split()  # type: ignore[misc]
        # PML keeps the files' own ids: from 1, or from 101 in CUB's test half.
        self.class_ids, labels = np.unique(self.labels, return_inverse=True)
        self.labels = labels.astype(np.int64)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image = load_rgb(self.paths[index])
        label = int(self.labels[index])
        return (
            image if self.transform is None else self.transform(image),
            label if self.target_transform is None else self.target_transform(label),
        )


class CUB(_Ready, pml_datasets.CUB):  # type: ignore[misc]
    """Caltech-UCSD Birds 200-2011, classes 1 to 100 for training and 101 to 200 for testing.

    As ``pytorch_metric_learning.datasets.CUB``, but every image is RGB (it holds grey ones) and
    ``labels`` are int64 from zero in each split; ``class_ids[label]`` is the id in the files.

    Args:
        root: Folder that holds ``CUB_200_2011/``.
        split: ``"train"``, ``"test"`` or ``"train+test"``.
        transform: Applied to the PIL RGB image.
        target_transform: Applied to the label.
        download: Fetch the data if ``root`` is missing or empty.

    Raises:
        ValueError: If ``root`` is missing and ``download`` is not set, or ``split`` is unknown.

    Example:
        >>> birds = CUB("data/cub", split="test")  # doctest: +SKIP
    """


class Cars196(_Ready, pml_datasets.Cars196):  # type: ignore[misc]
    """Stanford Cars, classes 1 to 98 for training and 99 to 196 for testing.

    As ``pytorch_metric_learning.datasets.Cars196``, but every image is RGB and ``labels`` are
    int64 from zero in each split; ``class_ids[label]`` is the id in the files.

    Args:
        root: Folder that holds ``names.csv``, ``anno_train.csv``, ``anno_test.csv``, ``car_data/``.
        split: ``"train"``, ``"test"`` or ``"train+test"``.
        transform: Applied to the PIL RGB image.
        target_transform: Applied to the label.
        download: Fetch the data if ``root`` is missing or empty.

    Raises:
        ValueError: If ``root`` is missing and ``download`` is not set, or ``split`` is unknown.

    Example:
        >>> cars = Cars196("data/cars", split="train")  # doctest: +SKIP
    """


class StanfordOnlineProducts(_Ready, pml_datasets.StanfordOnlineProducts):  # type: ignore[misc]
    """Stanford Online Products, 11318 product classes for training and 11316 for testing.

    As ``pytorch_metric_learning.datasets.StanfordOnlineProducts``, but every image is RGB and
    ``labels`` are int64 from zero in each split; ``class_ids[label]`` is the id in the files.

    Args:
        root: Folder that holds ``Stanford_Online_Products/``.
        split: ``"train"``, ``"test"`` or ``"train+test"``.
        transform: Applied to the PIL RGB image.
        target_transform: Applied to the label.
        download: Fetch the data if ``root`` is missing or empty.

    Raises:
        ValueError: If ``root`` is missing and ``download`` is not set, or ``split`` is unknown.

    Example:
        >>> products = StanfordOnlineProducts("data/sop", split="test")  # doctest: +SKIP
    """
