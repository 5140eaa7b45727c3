"""The embedding pass of a trainer: when it is due, and what it makes of the clusters found."""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset

from pml_tacl.distributed.collectives import from_first
from pml_tacl.distributed.inference import embed_together
from pml_tacl.distributed.session import check_same, is_first, on_first
from pml_tacl.distributed.training import equalise
from pml_tacl.evaluation import embed
from pml_tacl.trainers._forward import in_precision
from pml_tacl.trainers._views import OneView, describe
from pml_tacl.utils.labels import pseudo_labels

_LOGGER = logging.getLogger(__name__)
_SAMPLE = 1000  # pictures that stand for all when it is asked how far the embeddings have moved


class _Whole(nn.Module):
    def __init__(self, trainer: Any) -> None:
        super().__init__()
        self.trunk, self.embedder = trainer.models["trunk"], trainer.models["embedder"]
        self.dtype = trainer.amp_dtype

    def forward(self, images: Tensor) -> Tensor:
        with in_precision(images.device, self.dtype):
            embeddings: Tensor = self.embedder(self.trunk(images))
        return embeddings.float()


def embed_pictures(trainer: Any, index: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
    """Embed pictures as the evaluation sees them, in the trainer's precision.

    Args:
        trainer: an :class:`UnsupervisedTrainer`.
        index: (M,) of the pictures; None for all.

    Returns:
        Embeddings (M, D) float32 and where each is from, (M,) int64: for a picture that cannot be
        read, -1 - its index. None but on the first of many processes, which share the work.
    """
    equalise(trainer)
    pictures: Any = OneView(trainer.dataset, trainer.eval_transform)
    if index is not None:
        pictures = Subset(pictures, index.tolist())
    return embed_together(
        _Whole(trainer),
        pictures,
        **_settings(trainer),
    )


def _settings(trainer: Any) -> dict[str, Any]:
    return {
        "batch_size": max(64, trainer.batch_size),
        "num_workers": trainer.dataloader_num_workers,
        "progress": trainer.progress,
    }


def clustering_is_due(trainer: Any) -> bool:
    """Whether the epoch that begins needs another clustering."""
    since = trainer.epoch - trainer.warmup_epochs - 1
    if since < 0 or trainer.centroids is None:
        return bool(since >= 0)
    if since % trainer.recluster_every:
        return False
    if trainer.recluster_when_moved is None or trainer.moved_from is None:
        return True
    found = embed_pictures(trainer, _sample(len(trainer.labels)))

    def have_moved() -> bool:
        now, readable = _told(trainer, found)
        distance = 1 - F.cosine_similarity(now, trainer.moved_from)
        moved = float(distance[readable & distance.isfinite()].mean())
        _LOGGER.info("epoch %d: embeddings have moved by %.4f", trainer.epoch, moved)
        threshold: float = trainer.recluster_when_moved
        return not moved < threshold

    return on_first(have_moved, "comparing embeddings")


def relabel(trainer: Any) -> None:
    """Embed all pictures, cluster the readable ones, and hand over the pseudo-labels.

    Of many processes the first clusters; all end with its labels and centroids.
    """
    found = embed_pictures(trainer)
    made: list[Tensor | None] = [None, None, None]
    seen: list[Tensor] = []

    def cluster() -> None:
        embeddings, readable = _told(trainer, found)
        rows = embeddings if readable.all() else embeddings[readable]
        initial = None if trainer.centroids is None else trainer.centroids.cpu()
        seen.append(rows)
        clusters = trainer.labeler(rows, initial)
        labels = torch.full((len(readable),), -1)
        labels[readable] = pseudo_labels(clusters.labels).cpu()
        trainer.embeddings = embeddings
        made[:] = labels, clusters.centroids, embeddings[_sample(len(labels))].clone()

    on_first(cluster, "clustering")
    if trainer.guard is not None:
        trainer.guard.look(trainer, seen[0] if seen else None)
    labels, centroids, moved_from = from_first(made)
    assert labels is not None
    assert centroids is not None
    check_same("pseudo-labels", [labels, centroids], "a network or memory is at fault, resume")
    trainer.set_pseudo_labels(labels, centroids)
    trainer.moved_from = moved_from
    if is_first():
        _LOGGER.info(
            "epoch %d: %d clusters, %d pictures are noise",
            trainer.epoch,
            len(centroids),
            int((labels < 0).sum()),
        )


def _told(trainer: Any, found: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Embeddings, NaN for images that cannot be read, and which can; those are told of.

    What could not be read in the pass is tried again, since storage has bad moments.
    """
    assert found is not None
    embeddings, index = found
    missing = (index < 0).nonzero()[:, 0]
    if len(missing):
        unread = -1 - index[missing]
        pictures = Subset(OneView(trainer.dataset, trainer.eval_transform), unread.tolist())
        again, now = embed(_Whole(trainer), pictures, **_settings(trainer) | {"progress": False})
        embeddings[missing] = torch.where((now < 0)[:, None], torch.nan, again)
        index[missing] = now
        for image, place in zip(unread.tolist(), now.tolist(), strict=True):
            if place >= 0:
                _LOGGER.warning("picture %d was unreadable for a moment: read again", image)
            else:
                trainer.unreadable.add(_trouble(trainer, image))
    return embeddings, index >= 0


def _trouble(trainer: Any, image: int) -> str:
    try:
        trainer.dataset[image]
    except OSError as error:
        return describe(image, error)
    return f"picture {image}: unreadable in two passes, and read in between"


def _sample(count: int) -> Tensor:
    size = min(_SAMPLE, count)
    return torch.arange(size) * count // size  # evenly over the data set
