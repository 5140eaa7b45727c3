"""The data sets that a trainer reads: two views of each picture, or one for evaluation."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset


class TwoViews(Dataset[Any]):
    """(view, transformed view, points, index) of each picture."""

    def __init__(
        self, dataset: Dataset[Any], transform: Callable[[Any], tuple[Tensor, Tensor, Tensor]]
    ) -> None:
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, int]:
        return (*self.transform(self.dataset[index][0]), index)


class OneView(Dataset[Any]):
    """(evaluation view, index) of each picture."""

    def __init__(self, dataset: Dataset[Any], transform: Callable[[Any], Tensor]) -> None:
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.dataset[index][0]), index
