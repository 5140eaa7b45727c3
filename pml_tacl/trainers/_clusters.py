"""The embedding pass of a trainer: when it is due, and what it makes of the clusters found."""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset

from pml_tacl.evaluation import embed
from pml_tacl.trainers._views import OneView, describe

_LOGGER = logging.getLogger(__name__)
_SAMPLE = 1000  # pictures that stand for all when it is asked how far the embeddings have moved


class _Whole(nn.Module):
    def __init__(self, trainer: Any) -> None:
        super().__init__()
        self.trunk, self.embedder = trainer.models["trunk"], trainer.models["embedder"]
        self.dtype = trainer.amp_dtype

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype is not None):
            embeddings: Tensor = self.embedder(self.trunk(images))
        return embeddings.float()


def embed_pictures(trainer: Any, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Embed pictures as the evaluation sees them, in the trainer's precision.

    Args:
        trainer: an :class:`UnsupervisedTrainer`.
        index: (M,) of the pictures; None for all.

    Returns:
        Embeddings (M, D) float32, NaN for pictures that cannot be read, and which can: (M,) bool.
    """
    pictures: Any = OneView(trainer.dataset, trainer.eval_transform)
    if index is not None:
        pictures = Subset(pictures, index.tolist())
    embeddings, found = embed(
        _Whole(trainer),
        pictures,
        batch_size=max(64, trainer.batch_size),
        num_workers=trainer.dataloader_num_workers,
        progress=trainer.progress,
    )
    for unread in (-1 - found[found < 0]).tolist():
        try:
            trainer.dataset[unread]
        except OSError as error:
            trainer.unreadable.add(describe(unread, error))
    embeddings[found < 0] = torch.nan
    return embeddings, found >= 0


def clustering_is_due(trainer: Any) -> bool:
    """Whether the epoch that begins needs another clustering."""
    since = trainer.epoch - trainer.warmup_epochs - 1
    if since < 0 or trainer.centroids is None:
        return bool(since >= 0)
    if since % trainer.recluster_every:
        return False
    if trainer.recluster_when_moved is None or trainer.moved_from is None:
        return True
    now, readable = embed_pictures(trainer, _sample(len(trainer.labels)))
    distance = 1 - F.cosine_similarity(now, trainer.moved_from)
    moved = float(distance[readable & distance.isfinite()].mean())
    _LOGGER.info("epoch %d: embeddings have moved by %.4f", trainer.epoch, moved)
    threshold: float = trainer.recluster_when_moved
    return not moved < threshold


def relabel(trainer: Any) -> None:
    """Embed all pictures, cluster the readable ones, and hand over the pseudo-labels."""
    embeddings, readable = embed_pictures(trainer)
    rows = embeddings if readable.all() else embeddings[readable]
    found = trainer.labeler(rows, trainer.centroids)
    labels = torch.full((len(readable),), -1)
    labels[readable] = found.labels.cpu().long()
    trainer.set_pseudo_labels(labels, found.centroids)
    trainer.embeddings = embeddings
    trainer.moved_from = embeddings[_sample(len(labels))].clone()
    _LOGGER.info(
        "epoch %d: %d clusters, %d pictures are noise",
        trainer.epoch,
        len(found.centroids),
        int((labels < 0).sum()),
    )


def _sample(count: int) -> Tensor:
    size = min(_SAMPLE, count)
    return torch.arange(size) * count // size  # evenly over the data set
