"""Pseudo-labels: embedding pass, clustering, and updates of the losses and miners."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from pml_tacl.clustering import KMeansPseudoLabeler, PseudoLabeler, PseudoLabels
from pml_tacl.clustering.centroids import Centroids, CentroidTable
from pml_tacl.clustering.unit_embeddings import UnitRows
from pml_tacl.distributed.collectives import broadcast, gather_rows
from pml_tacl.distributed.inference import embed_distributed
from pml_tacl.distributed.session import rank, run_on_main, world_size
from pml_tacl.distributed.store import EmbeddingFile
from pml_tacl.evaluation import embed
from pml_tacl.trainers.data import OneView, Unreadable, describe
from pml_tacl.trainers.forward import in_precision
from pml_tacl.utils.errors import InputError
from pml_tacl.utils.labels import pseudo_labels

_LOGGER = logging.getLogger(__name__)
_SAMPLE = 1000  # images in the sample that measures how far the embeddings have moved


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
    """Embedding of images with the evaluation transform, in the precision of the training.

    Attributes:
        models: "trunk" and "embedder".
        images: evaluation views of the data set.
        amp_dtype: autocast type; None for no autocast.
        batch_size: images per batch on each rank.
        num_workers: processes that read images.
        progress: show a progress bar.
        file: file for the embeddings of all images, on a disk that all ranks can access (see
            :func:`pml_tacl.distributed.inference.embed_distributed`); None keeps them in memory.
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
            index: (M,) indices of the images; None for all.

        Returns:
            On the main process embeddings (M, D) float32 and the index of each image, (M,) int64;
            the index of an unreadable image is -1 - index. None on the other processes.
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
        """Read unreadable images a second time, and record those that fail again.

        Storage may fail temporarily, so one retry avoids false reports.

        Args:
            found: embeddings and indices from a call of this object.
            unreadable: the record of unreadable images, which is updated.

        Returns:
            Embeddings (M, D), NaN for unreadable images, and (M,) bool, True for readable images.

        Raises:
            OSError: for more unreadable images than allowed.
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
                    _LOGGER.warning("image %d was unreadable at first: the retry worked", image)
                else:
                    unreadable.add(self._trouble(image))
        return embeddings, index >= 0

    def _trouble(self, image: int) -> str:
        try:
            self.images.dataset[image]
        except OSError as error:
            return describe(image, error)
        return f"image {image}: unreadable in two passes, but readable afterwards"


def cluster(
    labeler: PseudoLabeler,
    embeddings: Tensor | None,
    readable: Tensor | None,
    centroids: Tensor | None,
    file: Path | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Cluster the embeddings of readable images on the main process. Collective.

    If k-means clusters embeddings in a file, all ranks assign images to the centroids. Labels and
    centroids equal those of a single process.

    Args:
        labeler: the clustering algorithm.
        embeddings: (N, D); None on the other processes.
        readable: (N,) bool; None on the other processes.
        centroids: (K, D) to start from; None for a cold start.
        file: file of the embeddings; None if they are in memory only.

    Returns:
        On the main process labels (N,), -1 for noise and for unreadable images, and centroids
        (K, D). None on the other processes.
    """
    start = None if centroids is None else centroids.cpu()
    index = None
    if readable is not None and not readable.all():
        index = readable.nonzero()[:, 0]
    found: list[PseudoLabels] = []

    def call() -> None:
        assert embeddings is not None
        rows = embeddings if index is None else embeddings[index]
        found.append(labeler(rows, start))

    if file is not None and type(labeler) is KMeansPseudoLabeler:
        found = _k_means(labeler, file, index, start)
    else:
        run_on_main(call, "clustering")
    if readable is None:
        return None
    labels = pseudo_labels(found[0].labels).cpu()
    if index is not None:
        labels = torch.full((len(readable),), -1).index_copy(0, index, labels)
    return labels, found[0].centroids


def _k_means(
    labeler: KMeansPseudoLabeler, file: Path, index: Tensor | None, start: Tensor | None
) -> list[PseudoLabels]:
    """Cluster rows of a file; return the result on the main process only. Collective."""
    index = broadcast([index])[0]
    rows = UnitRows(
        "embeddings",
        EmbeddingFile(file).rows,
        labeler.chunk_size,
        None if index is None else index.numpy(),
        check=False,
    )
    learned: list[Tensor | None] = [None]

    def learn() -> None:
        learned[0] = torch.from_numpy(labeler._learn(rows, start))

    run_on_main(learn, "clustering")
    centroids = broadcast(learned)[0]
    assert centroids is not None
    own = labeler._assign(rows, centroids.numpy(), rank(), world_size())
    labels = gather_rows(torch.from_numpy(own), len(rows), labeler.chunk_size)
    found: list[PseudoLabels] = []

    def finish() -> None:
        assert labels is not None
        found.append(labeler._finish(rows, labels.numpy(), len(centroids)))

    run_on_main(finish, "clustering")
    return found


def sample(count: int, most: int = _SAMPLE) -> Tensor:
    """Return indices of images, spread evenly over a data set.

    Args:
        count: number of images in the data set.
        most: largest number of indices.

    Returns:
        (min(count, most),) int64, ascending.
    """
    size = min(most, count)
    return torch.arange(size) * count // size


def distance_moved(embeddings: Tensor, readable: Tensor, before: Tensor) -> float:
    """Return the mean cosine distance, in [0, 2], between new and earlier embeddings (M, D)."""
    distance = 1 - F.cosine_similarity(embeddings, before)
    return float(distance[readable & distance.isfinite()].mean())


class UnusableClusters(InputError):
    """The clusters of the current embeddings cannot be trained on."""


@contextmanager
def clusters_named() -> Iterator[None]:
    """Raise an InputError of the block as UnusableClusters."""
    try:
        yield
    except InputError as error:
        raise UnusableClusters(str(error)) from error


def check_clusters(clusters: int, batch_size: int, images_per_cluster: int) -> None:
    """Raise ValueError if there are fewer clusters than a batch needs."""
    needed = batch_size // images_per_cluster
    if clusters < needed:
        raise InputError(
            f"a batch of {batch_size} with images_per_cluster={images_per_cluster} needs {needed} "
            f"clusters, got {clusters}: lower batch_size, raise images_per_cluster or ask for more "
            "clusters"
        )


@runtime_checkable
class TakesCentroids(Protocol):
    """A user-defined loss or miner that receives the centroids whenever they change."""

    def set_centroids(self, centroids: Tensor | None) -> object: ...


@runtime_checkable
class RemembersLabels(Protocol):
    """A loss that stores earlier pseudo-labels, such as PML's CrossBatchMemory."""

    def reset_queue(self) -> object: ...


def modules_of(*parts: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """Iterate over all modules in losses and miners, nested ones included, each once."""
    seen: set[nn.Module] = set()
    for part in (part for each in parts for part in each.values()):
        for module in part.modules():
            if module not in seen:
                seen.add(module)
                yield module


def share_centroids(table: CentroidTable, *parts: Mapping[str, nn.Module]) -> bool:
    """Give the table of centroids to all losses and miners that use centroids, nested ones too.

    User-defined losses and miners receive the centroids through ``set_centroids``.

    Args:
        table: the owner of the centroids.
        *parts: losses and miners by name.

    Returns:
        Whether any loss or miner of this package uses the table.
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
    """Clear every memory of earlier pseudo-labels."""
    for module in modules_of(*parts):
        if isinstance(module, RemembersLabels):
            module.reset_queue()
