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
    """Fit the projection of an :class:`AttentionEmbedder`, if it has one that can be fitted.

    If there are too few images, or all look the same, log a warning and use the backbone's
    embedding without a projection.

    Args:
        model: any model; one that is not an AttentionEmbedder is not changed.
        dataset: items (image as the model takes it, anything).
        num_workers: processes that read images.
        max_images: largest number of images used; if there are more, a random sample of this size.
        progress: show a progress bar.

    Returns:
        Whether the projection was fitted.
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
        generator=torch.Generator(),  # keeps the global random state of the training unchanged
    )
    try:
        model.fit_projection(loader, max_images, progress)
    except InputError as error:
        model.reset_projection()
        _LOGGER.warning(
            "the projection was not fitted, so searches use the backbone's own embedding (%s)",
            error,
        )
        return False
    return True
