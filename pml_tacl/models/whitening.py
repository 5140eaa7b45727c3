"""A start for the projection that needs no label: principal directions, each of variance 1."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pml_tacl.utils.checks import check_count, check_number
from pml_tacl.utils.modes import evaluating

if TYPE_CHECKING:
    from pml_tacl.models.attention_embedder import AttentionEmbedder


@torch.no_grad()
def whiten(
    model: "AttentionEmbedder",
    batches: Iterable[Tensor | Sequence[Tensor]],
    max_images: int = 10_000,
    shrinkage: float = 0.1,
    progress: bool = True,
) -> None:
    """Sets the projection of a model to a whitening of what it pools.

    With l and V the eigenvalues and eigenvectors of the covariance of the pooled features, the
    rows become `v / sqrt(l + shrinkage * mean(l))` for the largest l, and the bias takes their
    mean off: frequent directions no longer outweigh rare ones. After Jégou and Chum 2012. The
    reducing convolution of covariance pooling is set to the principal directions of the maps
    before. Where D is more than there are directions, the last rows are zero.

    Args:
        model: its projection is overwritten, in place.
        batches: images (N, C, H, W) as the model takes them, or sequences that start with them.
        max_images: how many are used, the first ones.
        shrinkage: above 0.
        progress: show a bar.

    Raises:
        ValueError: without a projection or images, for images that look all the same, or for an
            argument out of its range.
    """
    check_count("max_images", max_images, least=2)
    check_number("shrinkage", shrinkage, 0, above=True)
    projection = model.embedder.projection
    if not isinstance(projection, nn.Linear):
        raise ValueError("embedding_dim is None: there is no projection to whiten with")
    device = projection.weight.device
    with evaluating(model):
        if model.embedder.covariance is not None:
            _, moments = _moments(
                batches, max_images, lambda x: _places(model, x.to(device)), progress
            )
            model.embedder.covariance.fit(moments)
        mean, moments = _moments(
            batches,
            max_images,
            lambda x: model.embedder.pool(model.trunk(x.to(device)))[0],
            progress,
        )
    values, vectors = torch.linalg.eigh(moments)
    values = values.clamp_min(0).flip(0)[: projection.out_features]
    floor = shrinkage * moments.trace() / len(moments)
    gains = (values + floor).clamp_min(1e-24).rsqrt()
    # Of about unit length before it is normalised, so that the learning rate means the same.
    gains = gains / (values * gains.square()).sum().clamp_min(1e-24).sqrt()
    rows = vectors.flip(1).T[: projection.out_features] * gains[:, None]
    projection.weight.zero_()
    projection.weight[: len(rows)] = rows.to(projection.weight)
    if projection.bias is not None:
        projection.bias.zero_()
        projection.bias[: len(rows)] = -(rows @ mean).to(projection.bias)


def _places(model: "AttentionEmbedder", images: Tensor) -> Tensor:
    maps: Tensor = model.trunk(images).feature_maps
    return maps.movedim(1, -1).flatten(0, 2)


def _moments(
    batches: Iterable[Tensor | Sequence[Tensor]],
    max_images: int,
    features: Callable[[Tensor], Tensor],
    progress: bool,
) -> tuple[Tensor, Tensor]:
    """Mean (F,) and covariance (F, F), float64, of rows (n, F) that images give."""
    count = images_seen = 0
    total = outer = torch.zeros((), dtype=torch.float64)
    for batch in tqdm(batches, "whitening", disable=not progress):
        images = batch if isinstance(batch, Tensor) else batch[0]
        images = images[: max_images - images_seen]
        rows = features(images).double()
        total, outer = total.to(rows) + rows.sum(0), outer.to(rows) + rows.T @ rows
        count, images_seen = count + len(rows), images_seen + len(images)
        if images_seen >= max_images:
            break
    if images_seen < 2:
        raise ValueError(f"batches hold {images_seen} images, and whitening needs at least 2")
    mean = total / count
    covariance = outer / count - mean[:, None] * mean
    if not torch.isfinite(covariance).all():
        raise ValueError("features are NaN or infinite: check the images and the weights")
    if not covariance.any():
        raise ValueError(
            f"batches hold {images_seen} images whose features are all the same: give other "
            "images, or larger ones"
        )
    return mean, covariance
