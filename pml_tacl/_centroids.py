"""Cluster centres as the contrastive clustering loss and its miner hold and compare them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity, DotProductSimilarity
from torch import Tensor


class NearestCentres(NamedTuple):
    """Distances of N embeddings to their own and to the k nearest other centres.

    For a similarity the signs are turned, so that less is always nearer.
    """

    own: Tensor  # (N,)
    others: Tensor  # (N, k), ascending
    columns: Tensor  # (N, k), which centres ``others`` are
    own_column: Tensor  # (N,)
    ref_column: Tensor  # (M,), the centre of each reference element
    has_own: Tensor  # (N,) bool, False for noise and for labels that the reference lacks


class Centroids:
    """Mixin: centres that are set, or else averaged over the labels of a batch.

    A plain attribute, kept by ``state_dict`` as extra state: record-keeper would dump a buffer
    at every step, and the number of centres changes with each clustering.
    """

    centroids: Tensor | None = None
    distance: BaseDistance
    collect_stats: bool

    def set_centroids(self, centroids: Tensor | None) -> None:
        """Set the centres that pseudo-labels index; None goes back to means of the batch.

        Args:
            centroids: (K, D), scaled to unit norm here.

        Raises:
            ValueError: if the shape is not (K, D) or a row is zero or not finite.
        """
        if centroids is None:
            self.centroids = None
            return
        centroids = torch.as_tensor(centroids).detach()
        if centroids.ndim != 2 or len(centroids) == 0:
            raise ValueError(f"centroids must be (K, D) with K >= 1, got {tuple(centroids.shape)}")
        norms = centroids.float().norm(dim=1)
        bad = ~(norms.isfinite() & (norms > 0))
        if bad.any():
            raise ValueError(
                f"centroids must be finite and not zero, got {int(bad.sum())} bad rows of "
                f"{len(centroids)}"
            )
        self.centroids = F.normalize(centroids.float(), dim=1)

    def get_extra_state(self) -> dict[str, Tensor | None]:
        return {"centroids": self.centroids}

    def set_extra_state(self, state: dict[str, Tensor | None]) -> None:
        centroids = state["centroids"]
        if centroids is not None and self.centroids is not None:
            centroids = centroids.to(self.centroids.device)
        self.centroids = centroids

    def nearest_centres(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor,
        ref_labels: Tensor,
        num_negatives: int,
    ) -> NearestCentres:
        """Compare embeddings (N, D) with their own and the nearest other centres.

        Raises:
            ValueError: if a label has no centroid or the dimensions disagree.
        """
        labels, ref_labels = labels.long(), ref_labels.long()
        if self.centroids is None:
            centres, own, ref_own, usable = self._batch_means(labels, ref_emb, ref_labels)
            has_own = own >= 0
            own = own.clamp(min=0)
        else:
            centres = self._set_centres(embeddings, labels)
            own, ref_own, usable = labels.clamp(min=0), ref_labels, None
            has_own = labels >= 0

        wide = torch.promote_types(embeddings.dtype, torch.float32)
        sign = -1 if self.distance.is_inverted else 1
        rows = self._is_plain_similarity()
        if rows:
            # The gradient reaches only the chosen centres: the matrix need not carry one.
            unit = self.distance.maybe_normalize(embeddings.to(wide))
            centres = centres.to(wide)
            if self.centroids is None:
                centres = self.distance.maybe_normalize(centres)
            mat = sign * (unit.detach() @ centres.detach().T)
        else:
            mat = sign * self.distance(embeddings, centres.to(embeddings.dtype)).to(wide)

        ranked = mat.detach().clone() if mat.requires_grad else mat
        if usable is not None:
            ranked = ranked.masked_fill(~usable, torch.inf)
        ranked = ranked.scatter(1, own[:, None], torch.inf)
        num_negatives = min(num_negatives, ranked.shape[1])
        nearest, columns = ranked.topk(num_negatives, dim=1, largest=False)
        if rows:
            own_distance = sign * (unit * centres[own]).sum(dim=1)
            others = sign * (unit.unsqueeze(1) * centres[columns]).sum(dim=2)
        else:
            own_distance = mat.gather(1, own[:, None]).squeeze(1)
            others = mat.gather(1, columns)
        others = torch.where(nearest.isfinite(), others, torch.inf)
        return NearestCentres(own_distance, others, columns, own, ref_own, has_own)

    def _is_plain_similarity(self) -> bool:
        distance = self.distance
        return (
            type(distance) in (CosineSimilarity, DotProductSimilarity)
            and distance.power == 1
            and distance.p == 2
            and not distance.collect_stats  # its records are made in its own forward
        )

    def _set_centres(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        assert self.centroids is not None
        if self.centroids.device != embeddings.device:
            self.centroids = self.centroids.to(embeddings.device)
        if self.centroids.shape[1] != embeddings.shape[1]:
            raise ValueError(
                f"embeddings have {embeddings.shape[1]} dimensions and the centroids "
                f"{self.centroids.shape[1]}: call set_centroids with centres of this model"
            )
        # On a GPU the question would stall the queue; there the indexing itself complains.
        if labels.device.type == "cpu" and not torch.compiler.is_compiling() and len(labels):
            largest = int(labels.max())
            if largest >= len(self.centroids):
                raise ValueError(
                    f"labels must index the {len(self.centroids)} centroids, got label {largest}: "
                    "set the centroids and the labels of the same clustering"
                )
        return self.centroids

    def _batch_means(
        self, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One row per reference element, of which the first of each label stands for the label."""
        same = (ref_labels[:, None] == ref_labels[None]) & (ref_labels >= 0)[None]
        first = same.int().argmax(dim=1)
        wide = torch.promote_types(ref_emb.dtype, torch.float32)
        with torch.autocast(ref_emb.device.type, enabled=False):
            members = same.to(wide)
            unit = self.distance.maybe_normalize(ref_emb.to(wide))
            means = (members @ unit) / members.sum(dim=1, keepdim=True).clamp(min=1)
        usable = (first == torch.arange(len(first), device=first.device)) & (ref_labels >= 0)
        found = (labels[:, None] == ref_labels[None]) & usable[None]
        own = torch.where(found.any(dim=1), found.int().argmax(dim=1), -1)
        return means, own, torch.where(ref_labels >= 0, first, -1), usable
