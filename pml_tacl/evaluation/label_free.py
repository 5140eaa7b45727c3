"""Quality of embeddings, measured without labels."""

import torch
from torch import Tensor
from torch.nn import functional as F

from pml_tacl.utils.checks import check_count
from pml_tacl.utils.errors import InputError
from pml_tacl.utils.precision import full_float32

_CHUNK = 1024


@torch.no_grad()
def mutual_neighbours(
    embeddings: Tensor, k: int = 10, max_images: int = 10_000, seed: int = 0
) -> float:
    """Return the fraction of k nearest neighbours that are mutual.

    A neighbour j of i is mutual if i is also among the k nearest of j. The fraction is high if
    images form groups, and low if there are hubs or noise. Compare it only between embeddings of
    the same images, and in the learned space, because whitening changes it. It follows Jégou et
    al. 2007 (contextual dissimilarity) and Radovanović et al. 2010 (hubs). Choosing between
    networks by this fraction is our own idea; docs/results.md has measurements.

    Args:
        embeddings: (N, D), of any norm; embeddings with NaN or infinite values are ignored.
        k: neighbours of each image; at most N - 1 are used.
        max_images: if there are more images, use a random sample of this size.
        seed: seed of the sample.

    Returns:
        The fraction in [0, 1]; 0 for fewer than 3 images.

    Raises:
        ValueError: if k or max_images is below 1, or embeddings are not (N, D).
    """
    check_count("k", k, 1)
    check_count("max_images", max_images, 1)
    if embeddings.ndim != 2:
        raise InputError(f"embeddings must be (N, D), got shape {tuple(embeddings.shape)}")
    embeddings = embeddings[embeddings.isfinite().all(1)]
    if len(embeddings) > max_images:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(embeddings), generator=generator)[:max_images]
        embeddings = embeddings[chosen.to(embeddings.device)]
    count = len(embeddings)
    k = min(k, count - 1)
    if count < 3:
        return 0.0
    unit = F.normalize(embeddings.float(), dim=1)
    nearest = torch.empty(count, k, dtype=torch.long, device=unit.device)
    with full_float32(unit.device):
        for start in range(0, count, _CHUNK):
            similar = unit[start : start + _CHUNK] @ unit.T
            rows = torch.arange(len(similar), device=unit.device)
            similar[rows, rows + start] = -torch.inf
            nearest[start : start + _CHUNK] = similar.topk(k, dim=1).indices
    mutual = 0
    for start in range(0, count, _CHUNK):
        found = nearest[start : start + _CHUNK]  # (n, k)
        own = torch.arange(start, start + len(found), device=unit.device)
        mutual += int((nearest[found] == own[:, None, None]).any(2).sum())
    return mutual / (count * k)
