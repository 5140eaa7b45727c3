"""Second-order pooling: the covariance of the channels, weighted by attention."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pml_tacl.functional import covariance_pooling

CHANNELS = 64


class Covariance(nn.Module):
    """Covariance pooling of feature maps after a reduction of channels; the result has unit norm.

    After Lin et al. 2015 (bilinear CNN). A 1 x 1 convolution reduces the maps to at most 64
    channels, so any backbone gives at most 2080 features. `fit` sets the convolution to the
    principal directions of the maps; this reduction lost no accuracy.

    Args:
        channels: C of the maps.

    Attributes:
        num_features: number of features in the result.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        reduced = min(channels, CHANNELS)
        self.num_features = reduced * (reduced + 1) // 2
        self.reduce = nn.Conv2d(channels, reduced, 1, bias=False)
        nn.init.orthogonal_(self.reduce.weight)

    def forward(self, feature_maps: Tensor, weights: Tensor) -> Tensor:
        """Return features (N, num_features) of maps (N, C, H, W) with weights (N, H, W)."""
        return F.normalize(covariance_pooling(self.reduce(feature_maps), weights), dim=1)

    @torch.no_grad()
    def fit(self, second_moments: Tensor) -> None:
        """Set the convolution to the principal directions of centred second moments (C, C)."""
        rows = principal_directions(second_moments, self.reduce.out_channels)
        self.reduce.weight.copy_(rows[:, :, None, None])


def symmetric_eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, ascending, and eigenvectors (F, F) in columns of a symmetric matrix."""
    try:
        values, vectors = torch.linalg.eigh(matrix)
    # It may fail to converge for features of few images that are mostly zero.
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        found = np.linalg.eigh(matrix.cpu().numpy())
        values, vectors = (torch.from_numpy(part).to(matrix) for part in found)
    return values, vectors


def principal_directions(second_moments: Tensor, count: int) -> Tensor:
    """Return `count` principal directions (count, C) of second moments (C, C), largest last."""
    vectors = symmetric_eigen(second_moments.double())[1]
    return vectors[:, -count:].T
