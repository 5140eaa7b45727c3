"""Which pictures an epoch reads, in which order and with which random numbers."""

from collections.abc import Iterator
from typing import Any

import torch
from pytorch_metric_learning.samplers import MPerClassSampler
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, Sampler

from pml_tacl.trainers._views import TwoViews
from pml_tacl.utils.signals import ShieldedLoader


def draw_order(
    labels: Tensor, clustered: bool, size: int, images_per_cluster: int, batch_size: int
) -> Tensor:
    """Draw an epoch from the global random state.

    Args:
        labels: (N,) pseudo-labels, -1 for noise.
        clustered: whether to draw by clusters; else every picture alike.
        size: pictures in the epoch.
        images_per_cluster: in a batch.
        batch_size: pictures in a batch.

    Returns:
        (size, 2) int64: index of each picture and the seed of its views.
    """
    if clustered:
        chosen = torch.where(labels >= 0)[0]
        sampler = MPerClassSampler(labels[chosen], images_per_cluster, batch_size, size)
        index = chosen[list(sampler)]
    else:
        index = torch.tensor(list(RandomSampler(labels, num_samples=size)))  # type: ignore[arg-type]
    return torch.stack([index, torch.randint(2**63 - 1, (len(index),))], dim=1)


class _Items(Sampler[tuple[int, int]]):
    def __init__(self, order: Tensor) -> None:
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self.order[:, 0].tolist(), self.order[:, 1].tolist(), strict=True)


def make_loader(views: TwoViews, order: Tensor, batch_size: int, **kwargs: Any) -> DataLoader[Any]:
    """A loader of the pictures of an order, or of what is left of it.

    Args:
        views: what to read.
        order: as :func:`draw_order` gives it.
        batch_size: pictures in a batch.
        **kwargs: of the DataLoader.
    """
    return ShieldedLoader(
        views,
        batch_size,
        sampler=_Items(order),
        generator=torch.Generator(),  # the global one would be a draw ahead after resuming
        **kwargs,
    )
