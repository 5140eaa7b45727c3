"""Self-taught metric learning (Kim et al., CVPR 2022), from the formulas of the paper.

The teacher is a moving average of the student. It measures how similar two images are by distance
and by shared context (k-reciprocal neighbours). This similarity pulls and pushes the embeddings of
the student. The second, larger head of the student teaches the first head.
"""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from retrieval_parts.batches import Batch
    from retrieval_parts.state import Training


def pairwise_similarity(embeddings: Tensor, sigma: float) -> Tensor:
    """Return (N, N) in (0, 1]: `exp(-|a - b|^2 / sigma)` of embeddings (N, D)."""
    return torch.exp(-torch.cdist(embeddings, embeddings).square() / sigma)


def contextual_similarity(similarity: Tensor, same_image: Tensor, neighbours: int) -> Tensor:
    """Return (N, N) in [0, 1]: the fraction of k-reciprocal neighbours that two rows share.

    With R(i) the rows j such that i and j are among each other's k nearest, `w~_ij = |R(i) and
    R(j)| / |R(i)|` for j in R(i), else 0; then averaged over the k / 2 nearest rows of i (query
    expansion), and made symmetric.

    Args:
        similarity: (N, N).
        same_image: (N, N) bool; views of one image are nearest of all.
        neighbours: k, the row itself counted.
    """
    k = min(neighbours, len(similarity))
    nearest = similarity.masked_fill(same_image, 1.0).topk(k, dim=1).indices
    near = torch.zeros_like(similarity).scatter_(1, nearest, 1.0)
    mutual = near * near.T
    shared = mutual * (mutual @ mutual) / mutual.sum(1, keepdim=True).clamp_min(1)
    expanded = shared[nearest[:, : max(1, round(k / 2))]].mean(1)
    return (expanded + expanded.T) / 2


def relative_distances(embeddings: Tensor) -> Tensor:
    """Return (N, N): distances divided by the mean of each row."""
    distance = torch.cdist(embeddings, embeddings)
    return distance / distance.mean(1, keepdim=True).clamp_min(1e-12)


def relaxed_contrastive(embeddings: Tensor, similarity: Tensor, delta: float) -> Tensor:
    """Pull pairs with weight `similarity`; push pairs nearer than `delta` with the rest to 1."""
    n = len(embeddings)
    distance = relative_distances(embeddings)
    pull = similarity * distance.square()
    push = (1 - similarity) * F.relu(delta - distance).square()
    return (pull + push).masked_fill(
        torch.eye(n, dtype=torch.bool, device=distance.device), 0
    ).sum() / (n * (n - 1))


def self_distillation(embeddings: Tensor, teaching: Tensor) -> Tensor:
    """Return the KL divergence between softmaxes of negated relative distances in two spaces."""
    target = F.log_softmax(-relative_distances(teaching).detach(), 1)
    found = F.log_softmax(-relative_distances(embeddings), 1)
    return F.kl_div(found, target, reduction="batchmean", log_target=True)


class SelfTaught:
    """Loss of a run, with the second head of student and teacher."""

    def __init__(self, run: "Training") -> None:
        self.run = run
        features = run.model.trunk.num_features
        self.head = nn.Linear(features, max(1024, features)).to(run.device)
        self.teacher_head = copy.deepcopy(self.head).requires_grad_(False)

    def __call__(self, output: Any, embeddings: Tensor, batch: "Batch") -> Tensor:
        config = self.run.config
        with torch.no_grad():
            self.run.teacher.eval()
            pooled = self.run.teacher.trunk(batch.images).features.mean((2, 3))
            taught = F.normalize(self.teacher_head(pooled))
            rows = torch.cat([batch.rows] * 2)
            by_distance = pairwise_similarity(taught, config.stml_sigma)
            same = (rows[:, None] == rows).to(taught.device)
            by_context = contextual_similarity(by_distance, same, config.stml_neighbours)
            similarity = (by_distance + by_context) / 2
        large = F.normalize(self.head(output.features.mean((2, 3))))
        contrast = [
            relaxed_contrastive(e, similarity, config.stml_delta) for e in (embeddings, large)
        ]
        return sum(contrast) / 2 + self_distillation(embeddings, large)
