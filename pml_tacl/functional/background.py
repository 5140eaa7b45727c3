"""Background estimated from each image's own border, and second-order pooling."""

import torch
from torch import Tensor
from torch.nn import functional as nnf

from pml_tacl.utils.errors import InputError
from pml_tacl.utils.precision import at_least_float32, without_autocast


@torch.no_grad()
def border_similarity(feature_maps: Tensor) -> Tensor:
    """Return how similar each cell is to the border of its own image; high means background.

    ``B_i[u] = mean of cos(F_i[u], F_i[v]) over the outermost cells v``. Computed without
    gradient. Using the border as a sample of the background is a prior from saliency detection
    (Wei et al. 2012, "Geodesic saliency using background priors"); this definition is our own.
    It needs no other image and no training, and the foreground need not be in the centre.

    Args:
        feature_maps: (N, C, H, W).

    Returns:
        (N, H, W) in [-1, 1], at least fp32.

    Raises:
        ValueError: if feature_maps are not (N, C, H, W).
    """
    if feature_maps.ndim != 4:
        raise InputError(f"feature_maps must be (N, C, H, W), got {tuple(feature_maps.shape)}")
    cells = nnf.normalize(at_least_float32(feature_maps), dim=1)  # (N, C, H, W)
    inner = cells[:, :, 1:-1, 1:-1]
    height, width = cells.shape[-2:]
    count = height * width - inner.shape[-2] * inner.shape[-1]
    around = (cells.sum((2, 3)) - inner.sum((2, 3))) / count  # (N, C)
    with without_autocast(cells.device):
        return torch.einsum("nchw,nc->nhw", cells, around)


def foreground_scores(background: Tensor) -> Tensor:
    """Negate background scores (N, H, W) and standardise them within each image.

    High values mean foreground. An image with constant scores gets zeros.
    """
    rare = -at_least_float32(background.detach())
    rare = rare - rare.mean(dim=(1, 2), keepdim=True)
    deviation = rare.square().mean(dim=(1, 2), keepdim=True).sqrt()
    # The scores are cosines, so deviations below 1e-6 are rounding errors.
    return torch.where(deviation > 1e-6, rare / deviation.clamp_min(1e-12), 0.0)


def covariance_pooling(feature_maps: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the covariance of the channels over the cells of each image (second-order pooling).

    ``C = sum over u of w[u] (F[u] - mean) (F[u] - mean)^T`` with ``sum of w = 1``; the mean has
    the same weights. After Lin et al. 2015 (bilinear CNN), centred.

    Args:
        feature_maps: (N, C, H, W).
        weights: (N, H, W), non-negative; None gives all cells the same weight.

    Returns:
        (N, C * (C + 1) / 2), the upper triangle in row-major order, at least fp32.

    Raises:
        ValueError: if the shapes do not match.
    """
    if feature_maps.ndim != 4:
        raise InputError(f"feature_maps must be (N, C, H, W), got {tuple(feature_maps.shape)}")
    n, channels, height, width = feature_maps.shape
    if weights is not None and weights.shape != (n, height, width):
        raise InputError(
            f"weights must have the shape {(n, height, width)}, got {tuple(weights.shape)}"
        )
    with without_autocast(feature_maps.device):
        cells = at_least_float32(feature_maps).flatten(2)  # (N, C, H * W)
        share = cells.new_ones(n, 1, height * width)
        if weights is not None:
            share = weights.flatten(1)[:, None].to(cells.dtype)
        share = share / share.sum(2, keepdim=True).clamp_min(1e-12)
        apart = cells - (cells * share).sum(2, keepdim=True)
        covariance = (apart * share) @ apart.transpose(1, 2)  # (N, C, C)
    row, column = torch.triu_indices(channels, channels, device=cells.device)
    return covariance[:, row, column]
