"""Second-order pooling: which features fire together, at the places that attention keeps."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pml_tacl.functional import covariance_pooling

CHANNELS = 64


class Covariance(nn.Module):
    """Feature maps to the covariance of a few of their directions, of unit length.

    After Lin et al. 2015 (bilinear CNN). A 1 x 1 convolution reduces the maps to at most 64
    channels, so that any backbone gives at most 2080 numbers; `fit` sets it to the principal
    directions of the maps, by which no accuracy was lost.

    Args:
        channels: C of the maps.

    Attributes:
        num_features: numbers in the result.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        reduced = min(channels, CHANNELS)
        self.num_features = reduced * (reduced + 1) // 2
        self.reduce = nn.Conv2d(channels, reduced, 1, bias=False)
        nn.init.orthogonal_(self.reduce.weight)

    def forward(self, feature_maps: Tensor, weights: Tensor) -> Tensor:
        """(N, num_features) of maps (N, C, H, W) and weights (N, H, W)."""
        return F.normalize(covariance_pooling(self.reduce(feature_maps), weights), dim=1)

    @torch.no_grad()
    def fit(self, second_moments: Tensor) -> None:
        """Takes the principal directions of (C, C) second moments of centred features."""
        rows = principal_directions(second_moments, self.reduce.out_channels)
        self.reduce.weight.copy_(rows[:, :, None, None])


def principal_directions(second_moments: Tensor, count: int) -> Tensor:
    """Return the `count` main directions (count, C) of (C, C) second moments, the largest last."""
    vectors: Tensor = torch.linalg.eigh(second_moments.double()).eigenvectors
    return vectors[:, -count:].T
