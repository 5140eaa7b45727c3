"""Fitting the projection of a model to the images of a data set."""

import logging
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from pml_tacl.models import AttentionEmbedder, Projection
from pml_tacl.utils.errors import InputError

_LOGGER = logging.getLogger(__name__)


def fit_to(
    model: nn.Module,
    dataset: Dataset[Any],
    num_workers: int = 0,
    max_images: int = 10_000,
    progress: bool = True,
) -> bool:
    """Fit the projection of an :class:`AttentionEmbedder`, if it has one that is fitted.

    Where images are too few or all look the same, the model goes on with the backbone's own
    embedding, and a warning says so.

    Args:
        model: any; others than an AttentionEmbedder are left alone.
        dataset: items (image as the model takes it, anything).
        num_workers: processes that read the images.
        max_images: a random sample of so many is used, if there are more.
        progress: show a bar.

    Returns:
        Whether the projection is fitted.
    """
    if not isinstance(model, AttentionEmbedder):
        return False
    if not isinstance(model.embedder.projection, Projection):
        return False
    count = len(dataset)  # type: ignore[arg-type]
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:max_images]
    loader = DataLoader(
        Subset(dataset, chosen.tolist()),
        64,
        num_workers=num_workers,
        generator=torch.Generator(),  # a loader draws from it, and the training must not notice
    )
    try:
        model.fit_projection(loader, max_images, progress)
    except InputError as error:
        model.reset_projection()
        _LOGGER.warning("searching with the backbone's own embedding: %s", error)
        return False
    return True
