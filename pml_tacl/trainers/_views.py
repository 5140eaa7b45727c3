"""What a trainer reads: two views of each picture, or one for evaluation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from pml_tacl.functional import commonness, sample_at_points
from pml_tacl.transforms import SurroundingsSwap, cell_weights


class Batch(NamedTuple):
    """N pictures: both views (N, 3, S, S), points (N, G, 2) and pseudo-labels (N,)."""

    views: Tensor
    transformed: Tensor
    points: Tensor
    labels: Tensor


class TwoViews(Dataset[Any]):
    """(view, transformed view, points, index) of each picture; ValueError for NaN in it."""

    def __init__(
        self, dataset: Dataset[Any], transform: Callable[[Any], tuple[Tensor, Tensor, Tensor]]
    ) -> None:
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, int]:
        view, transformed, points = self.transform(self.dataset[index][0])
        return _finite(view, index), _finite(transformed, index), points, index


class OneView(Dataset[Any]):
    """(evaluation view, index) of each picture; ValueError for NaN in it."""

    def __init__(self, dataset: Dataset[Any], transform: Callable[[Any], Tensor]) -> None:
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return _finite(self.transform(self.dataset[index][0]), index), index


def _finite(image: Tensor, index: int) -> Tensor:
    # Here, where the picture is known: one NaN would spread to the batch through BatchNorm.
    if not torch.isfinite(image.sum()):
        raise ValueError(f"picture {index} of the data set is NaN or infinite: mend or remove it")
    return image


@torch.no_grad()
def swap_surroundings(
    swap: SurroundingsSwap, trunk: nn.Module, batch: Batch, grid: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Swap the surroundings of both views.

    A distinctive mask takes a pass of the trunk over the unswapped views, in evaluation mode.

    Returns:
        Both views (N, 3, S, S), and how far both kept each cell of the first: (N, H*W) in [0, 1].
    """
    common: list[Tensor | None] = [None, None]
    if swap.mask == "distinctive":
        training = {module: module.training for module in trunk.modules()}
        trunk.eval()
        maps = trunk(torch.cat([batch.views, batch.transformed])).feature_maps
        for module, mode in training.items():
            module.training = mode
        common = [commonness(part, batch.labels) for part in maps.chunk(2)]
    first = swap(batch.views, common[0])
    second = swap(batch.transformed, common[1])
    kept, _ = sample_at_points(second.masks, batch.points)
    return first.images, second.images, cell_weights(first.masks, grid) * kept
