"""What each loss of a training step is given."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pml_tacl.clustering.centroids import Centroids
from pml_tacl.distributed.collectives import mean_loss
from pml_tacl.losses import AttentionConsistencyLoss
from pml_tacl.trainers._forward import Features
from pml_tacl.trainers._views import Batch
from pml_tacl.utils.errors import InputError
from pml_tacl.utils.pml_compat import CrossBatchMemory, SelfSupervisedLoss


class Step(NamedTuple):
    """What the losses of one step see.

    Attributes:
        features: of (views, transformed views), 2N images of this process.
        batch: its N pictures.
        embeddings: (2M, D) of all processes' M pictures, both views.
        labels: (M,) of them.
        weights: (N, H*W) of the cells, or None.
        pairs: what the tuple miner found among the embeddings, or None.
        attention_miner: feature maps and labels of the first views -> pairs, or None.
        warming_up: whether every picture is its own cluster.
    """

    features: Features
    batch: Batch
    embeddings: Tensor
    labels: Tensor
    weights: Tensor | None
    pairs: Any
    attention_miner: nn.Module | None
    warming_up: bool


def loss_of(loss_func: nn.Module, step: Step) -> Any:
    """A loss of the step: each kind of loss gets what it understands."""
    if isinstance(loss_func, AttentionConsistencyLoss):
        return mean_loss(_attention_loss(loss_func, step))
    loss_func = _of_centres(loss_func)
    if isinstance(loss_func, SelfSupervisedLoss):
        return loss_func(*step.embeddings.chunk(2))
    # Centres say themselves what is hard; a miner's pairs are for the others.
    pairs = None if isinstance(loss_func, Centroids) else step.pairs
    return loss_func(step.embeddings, torch.cat([step.labels] * 2), pairs)


def _of_centres(loss_func: nn.Module) -> nn.Module:
    """A loss that has centres of all images, from within PML's wrappers.

    Those number a batch by itself, or give what they remember as reference: neither fits centres.
    """
    inner = loss_func
    while isinstance(inner, SelfSupervisedLoss | CrossBatchMemory):
        inner = inner.loss
    return inner if isinstance(inner, Centroids) and inner.centroids is not None else loss_func


def _attention_loss(loss_func: AttentionConsistencyLoss, step: Step) -> Any:
    maps = step.features.feature_maps
    if maps is None:
        raise InputError(
            "AttentionConsistencyLoss needs a trunk with feature_maps: use AttentionEmbedder"
        )
    first, second = maps.chunk(2)
    labels = step.batch.labels
    pairs = None
    if step.warming_up:  # a picture is matched with itself, seen through the transform
        index = torch.arange(len(labels), device=labels.device)
        pairs = (index, index, index[:0], index[:0])
    elif step.attention_miner is not None:
        pairs = step.attention_miner(first, labels)
    return loss_func(first, second, step.batch.points, labels, pairs, step.weights)
