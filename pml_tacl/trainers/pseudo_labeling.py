"""Pseudo-labels of a training: the embedding pass, the clusters, and what is reset with them."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from pml_tacl.clustering import PseudoLabeler
from pml_tacl.clustering.centroids import Centroids, CentroidTable
from pml_tacl.distributed.inference import embed_distributed
from pml_tacl.evaluation import embed
from pml_tacl.trainers.data import OneView, Unreadable, describe
from pml_tacl.trainers.forward import in_precision
from pml_tacl.utils.errors import InputError
from pml_tacl.utils.labels import pseudo_labels

_LOGGER = logging.getLogger(__name__)
_SAMPLE = 1000  # images that stand for all when it is asked how far the embeddings have moved


class _Embedding(nn.Module):
    def __init__(self, models: Mapping[str, nn.Module], dtype: torch.dtype | None) -> None:
        super().__init__()
        self.trunk, self.embedder, self.dtype = models["trunk"], models["embedder"], dtype

    def forward(self, images: Tensor) -> Tensor:
        with in_precision(images.device, self.dtype):
            embeddings: Tensor = self.embedder(self.trunk(images))
        return embeddings.float()


@dataclass
class EmbeddingPass:
    """Embed images as the evaluation sees them, in the training's precision.

    Attributes:
        models: "trunk" and "embedder".
        images: evaluation views of the data set.
        amp_dtype: of autocast; None for none.
        batch_size: images at once, on each rank.
        num_workers: processes that read images.
        progress: show a bar.
        file: that all ranks see, for the embeddings of all images
            (:func:`pml_tacl.distributed.inference.embed_together`); None keeps them in memory.
    """

    models: Mapping[str, nn.Module]
    images: OneView
    amp_dtype: torch.dtype | None
    batch_size: int
    num_workers: int
    progress: bool
    file: Path | None = None

    def __call__(self, index: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        """Embed images; all ranks share the work. Collective.

        Args:
            index: (M,) of the images; None for all.

        Returns:
            On the first rank embeddings (M, D) float32, and where each is from, (M,) int64: for
            an image that cannot be read, -1 - its index. None on the others.
        """
        views: Dataset[tuple[Tensor, int]] = self.images
        return embed_distributed(
            _Embedding(self.models, self.amp_dtype),
            views if index is None else Subset(views, index.tolist()),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            progress=self.progress,
            file=self.file if index is None else None,
        )

    def readable(
        self, found: tuple[Tensor, Tensor] | None, unreadable: Unreadable
    ) -> tuple[Tensor, Tensor]:
        """Try unreadable images again, since storage has bad moments, and note what stays so.

        Returns:
            Embeddings, NaN for images that cannot be read, and which can: (M,) bool.
        """
        assert found is not None
        embeddings, index = found
        missing = (index < 0).nonzero()[:, 0]
        if len(missing):
            unread = -1 - index[missing]
            again, now = embed(
                _Embedding(self.models, self.amp_dtype),
                Subset(self.images, unread.tolist()),
                batch_size=self.batch_size,
                num_workers=self.num_workers,
                progress=False,
            )
            embeddings[missing] = torch.where((now < 0)[:, None], torch.nan, again)
            index[missing] = now
            for image, place in zip(unread.tolist(), now.tolist(), strict=True):
                if place >= 0:
                    _LOGGER.warning("image %d was unreadable for a moment: read again", image)
                else:
                    unreadable.add(self._trouble(image))
        return embeddings, index >= 0

    def _trouble(self, image: int) -> str:
        try:
            self.images.dataset[image]
        except OSError as error:
            return describe(image, error)
        return f"image {image}: unreadable in two passes, and read in between"


def cluster(
    labeler: PseudoLabeler, embeddings: Tensor, readable: Tensor, centroids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Cluster embeddings (N, D) of readable images, from centroids if there are some.

    Returns:
        Labels (N,), -1 for noise and for unreadable images, and centroids (K, D).
    """
    rows = embeddings if readable.all() else embeddings[readable]
    clusters = labeler(rows, None if centroids is None else centroids.cpu())
    labels = torch.full((len(readable),), -1)
    labels[readable] = pseudo_labels(clusters.labels).cpu()
    return labels, clusters.centroids


def sample(count: int, most: int = _SAMPLE) -> Tensor:
    """Return the index of the images that stand for all `count`, evenly over the data set.

    Args:
        count: images.
        most: that stand for them.
    """
    size = min(most, count)
    return torch.arange(size) * count // size


def distance_moved(embeddings: Tensor, readable: Tensor, before: Tensor) -> float:
    """Return the mean cosine distance of embeddings (M, D) from where they were, in [0, 2]."""
    distance = 1 - F.cosine_similarity(embeddings, before)
    return float(distance[readable & distance.isfinite()].mean())


def check_clusters(clusters: int, batch_size: int, images_per_cluster: int) -> None:
    """Raise ValueError for fewer clusters than a batch needs."""
    needed = batch_size // images_per_cluster
    if clusters < needed:
        raise InputError(
            f"{clusters} clusters are fewer than the {needed} that a batch of {batch_size} with "
            f"images_per_cluster={images_per_cluster} needs: lower batch_size, raise "
            "images_per_cluster or ask for more clusters"
        )


@runtime_checkable
class TakesCentroids(Protocol):
    """A loss or miner of the user's that is given the centroids whenever they change."""

    def set_centroids(self, centroids: Tensor | None) -> object: ...


@runtime_checkable
class RemembersLabels(Protocol):
    """A loss that remembers pseudo-labels, as PML's CrossBatchMemory."""

    def reset_queue(self) -> object: ...


def modules_of(*parts: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """Iterate over every module in losses and miners, however deep, each once."""
    seen: set[nn.Module] = set()
    for part in (part for each in parts for part in each.values()):
        for module in part.modules():
            if module not in seen:
                seen.add(module)
                yield module


def share_centroids(table: CentroidTable, *parts: Mapping[str, nn.Module]) -> bool:
    """Let every loss and miner that compares with centroids, also within others, use a table.

    Those that are not ours are given its centroids by ``set_centroids``.

    Args:
        table: the one owner of the centroids.
        *parts: losses and miners by name.

    Returns:
        Whether any of ours compares with it.
    """
    shared = False
    for module in modules_of(*parts):
        if isinstance(module, Centroids):
            module.share_centroids(table)
            shared = True
        elif isinstance(module, TakesCentroids):
            module.set_centroids(table.values)
    return shared


def forget_labels(*parts: Mapping[str, nn.Module]) -> None:
    """Empty every memory of earlier pseudo-labels."""
    for module in modules_of(*parts):
        if isinstance(module, RemembersLabels):
            module.reset_queue()
