"""Benchmarks of metric learning, with RGB images and zero-based labels.

CUB, Cars196 and Stanford Online Products build on PML's classes; In-shop is our own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from PIL import Image
from pytorch_metric_learning import datasets as pml_datasets
from pytorch_metric_learning.datasets.base_dataset import BaseDataset

from pml_tacl.datasets.image_files import load_rgb
from pml_tacl.utils.errors import InputError

_PARTS = ("train", "query", "gallery")  # of In-shop


class Benchmark(BaseDataset):  # type: ignore[misc]
    """Base class of the benchmarks; use one of its subclasses.

    The training half and the test half have different classes. All images are converted to RGB
    (CUB and Cars contain some grey images).

    Args:
        root: Folder with the data set as it was published; see the subclass.
        split: ``"train"``, ``"test"``, ``"train+test"``, or one that the subclass adds.
        transform: Applied to the PIL RGB image.
        target_transform: Applied to the label.
        download: Download the data if ``root`` is missing or empty.

    Attributes:
        paths: Files of the images.
        labels: Zero-based class of each image within its half, int64 (N,).
        class_ids: Class in the published files by label: ``class_ids[labels]``.

    Raises:
        ValueError: If ``split`` is unknown, or an annotation file differs from the published one.
        FileNotFoundError: If ``root`` does not contain the data set; the message names the missing
            file and the source of the data set.
    """

    DOWNLOAD_URL: ClassVar[str]  # as in PML's classes
    _NAME: ClassVar[str]
    _NEEDED: ClassVar[tuple[str, ...]]
    _CAN_DOWNLOAD: ClassVar[bool] = True

    paths: list[str]
    labels: npt.NDArray[np.int64]

    def __init__(
        self,
        root: str | Path,
        split: str = "train+test",
        transform: Callable[[Image.Image], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
        download: bool = False,
    ) -> None:
        splits = self.get_available_splits()
        if split not in splits:
            raise InputError(f"split must be one of {', '.join(splits)}, got {split!r}")
        self.root = root
        if not (download and self._CAN_DOWNLOAD):
            self._require(*self._NEEDED)
        super().__init__(str(root), split, transform, target_transform, download)

    def generate_split(self) -> None:
        self._require(*self._NEEDED)
        super().generate_split()
        # PML keeps the ids of the files, which start at 1, or at 101 in the test half of CUB.
        self._set(self.paths, np.asarray(self.labels, np.int64))

    def _set(
        self,
        paths: list[str],
        ids: npt.NDArray[np.int64],
        every_id: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """Store the images, and number their classes among ``every_id`` (default: ``ids``)."""
        if not len(ids):
            raise InputError(
                f"root={str(self.root)!r} lists no image of split={self.split!r}: give another "
                f"split, or get {self._NAME} again from {self.DOWNLOAD_URL}"
            )
        self.paths = paths
        self._require(str(Path(paths[0]).relative_to(self.root)))
        self.class_ids = np.unique(ids if every_id is None else every_id)
        self.labels = np.searchsorted(self.class_ids, ids).astype(np.int64)

    def _require(self, *names: str) -> None:
        for name in names:
            if not Path(self.root, name).is_file():
                how = ", or with download=True into an empty folder" if self._CAN_DOWNLOAD else ""
                raise FileNotFoundError(
                    f"root={str(self.root)!r} contains no {name}: get {self._NAME} from "
                    f"{self.DOWNLOAD_URL}{how}"
                )

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, label = load_rgb(self.paths[index]), int(self.labels[index])
        return (
            image if self.transform is None else self.transform(image),
            label if self.target_transform is None else self.target_transform(label),
        )


class CUB(Benchmark, pml_datasets.CUB):  # type: ignore[misc]
    """Caltech-UCSD Birds 200-2011: species 1 to 100 for training, 101 to 200 for testing.

    ``root`` contains ``CUB_200_2011/`` with ``images/``, ``images.txt`` and
    ``image_class_labels.txt``. 5864 and 5924 images. Arguments: see :class:`Benchmark`.

    Example:
        >>> birds = CUB("data/cub", split="test")  # doctest: +SKIP
    """

    _NAME = "CUB-200-2011"
    _NEEDED = ("CUB_200_2011/images.txt", "CUB_200_2011/image_class_labels.txt")


class Cars196(Benchmark, pml_datasets.Cars196):  # type: ignore[misc]
    """Stanford Cars: models 1 to 98 for training, 99 to 196 for testing.

    ``root`` contains ``names.csv``, ``anno_train.csv``, ``anno_test.csv``, and
    ``car_data/car_data/`` with ``train/`` and ``test/`` (a different split, of which both parts are
    read). 8054 and 8131 images. Arguments: see :class:`Benchmark`.

    Example:
        >>> cars = Cars196("data/cars", split="train")  # doctest: +SKIP
    """

    _NAME = "Stanford Cars"
    _NEEDED = ("names.csv", "anno_train.csv", "anno_test.csv")


class StanfordOnlineProducts(Benchmark, pml_datasets.StanfordOnlineProducts):  # type: ignore[misc]
    """Stanford Online Products: 11318 products for training, 11316 others for testing.

    ``root`` contains ``Stanford_Online_Products/`` with ``Ebay_train.txt``, ``Ebay_test.txt`` and
    a folder for each kind of product. 59551 and 60502 images. Arguments: see :class:`Benchmark`.

    Example:
        >>> products = StanfordOnlineProducts("data/sop", split="test")  # doctest: +SKIP
    """

    _NAME = "Stanford Online Products"
    _NEEDED = (
        "Stanford_Online_Products/Ebay_train.txt",
        "Stanford_Online_Products/Ebay_test.txt",
    )


class InShop(Benchmark):
    """DeepFashion In-shop Clothes Retrieval: 3997 items for training, 3985 others for testing.

    ``root`` contains ``Eval/list_eval_partition.txt`` and ``Img/img/`` (or ``img/``, if ``img.zip``
    was unpacked beside ``Eval/``). There are 25882 images for training. In the test half, 14218
    queries search for the same item among 12612 images of the gallery. Arguments: see
    :class:`Benchmark`. Further splits are ``"query"`` and ``"gallery"``, with common labels;
    ``"test"`` is both. The data set is available on request only; there is no ``download=True``.

    Example:
        >>> query = InShop("data/inshop", split="query")  # doctest: +SKIP
        >>> gallery = InShop("data/inshop", split="gallery")  # doctest: +SKIP
        >>> evaluate(model, query, reference=gallery)  # doctest: +SKIP
    """

    _NAME = "In-shop Clothes Retrieval"
    _NEEDED = ("Eval/list_eval_partition.txt",)
    _CAN_DOWNLOAD = False
    DOWNLOAD_URL = "https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html"

    def get_available_splits(self) -> list[str]:
        return [*super().get_available_splits(), "query", "gallery"]

    def generate_split(self) -> None:
        test = {"query", "gallery"}
        parts = {"test": test, "train+test": test | {"train"}}.get(self.split, {self.split})
        # Queries and gallery share their labels, even if an item is missing in one of them.
        half = parts | test if parts & test else parts
        folder = Path(self.root, "Img") if Path(self.root, "Img").is_dir() else Path(self.root)
        images = [row for row in self._rows() if row[2] in half]
        chosen = [(str(folder / name), item) for name, item, part in images if part in parts]
        ids = np.array([item for _, item in chosen], np.int64)
        self._set([path for path, _ in chosen], ids, np.array([item for _, item, _ in images]))

    def download_and_remove(self) -> None:
        raise NotImplementedError(f"{self._NAME} is available on request at {self.DOWNLOAD_URL}")

    def _rows(self) -> list[tuple[str, int, str]]:
        """Return (file, item, part) of each image; skip the count and the line of titles."""
        path = Path(self.root, *self._NEEDED)
        lines = path.read_text(encoding="utf-8").splitlines()
        try:
            split = (line.rsplit(maxsplit=2) for line in lines[2:] if line.strip())
            rows = [(name, int(item.removeprefix("id_")), part) for name, item, part in split]
            whole = len(rows) == int(lines[0]) and {part for *_, part in rows} <= set(_PARTS)
        except (ValueError, IndexError):
            whole = False
        if not whole:
            raise InputError(
                f"{path} is damaged: it must contain a count, a line of titles, and that many "
                f"lines of image, item and {' or '.join(_PARTS)}; get it again from "
                f"{self.DOWNLOAD_URL}"
            )
        return rows
