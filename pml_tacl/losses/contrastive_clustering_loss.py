from typing import Any

import torch
from pytorch_metric_learning.distances import CosineSimilarity
from torch import Tensor

from pml_tacl.clustering.centroids import Centroids, NearestCentroids
from pml_tacl.functional import contrastive_clustering
from pml_tacl.utils.checks import check_count, check_number
from pml_tacl.utils.errors import InputError
from pml_tacl.utils.labels import pseudo_labels
from pml_tacl.utils.pml_compat import BaseMetricLossFunction, as_pml_gives, loss_dict, miner_weights


class ContrastiveClusteringLoss(Centroids, BaseMetricLossFunction):
    """Triplet loss between embeddings and cluster centroids.

    ``l_i = [ d(e_i, c_y) - mean_k d(e_i, c_k) + margin ]_+``: the positive is the centroid of the
    image's own cluster, and the negatives are the ``num_negatives`` nearest other centroids. The
    idea is from Li et al. 2020 (ECCV), *Unsupervised Deep Metric Learning with Transformed
    Attention Consistency and Contrastive Clustering Loss*; the definition is our own.

    Set the centroids with :meth:`set_centroids`. If none are set, the centroid of a label is the
    mean of its embeddings in the batch (or in ``ref_emb``, if given), and gradients flow through
    it. Embeddings with the label -1 (noise) are ignored. If an ``indices_tuple`` is given, each
    embedding is weighted by how often it occurs in it, as in PML's classification losses.

    Args:
        margin: margin of the triplet loss, in the unit of the distance; a cosine distance lies in
            [0, 2].
        num_negatives: number of nearest other centroids that an embedding is compared with; all of
            them if there are fewer.
        **kwargs: ``distance`` (default CosineSimilarity, which works in every floating type),
            ``reducer``, ``embedding_regularizer``, ``collect_stats``: as in any PML loss.

    Raises:
        ValueError: if ``margin`` is negative or not finite, or ``num_negatives`` is not an integer
            of at least 1. When called: if labels are missing, not integers or below -1, if a label
            has no centroid, if dimensions differ, or if ``ref_emb`` is given although centroids
            are set.

    Example:
        >>> import torch
        >>> from pml_tacl import ContrastiveClusteringLoss
        >>> loss_func = ContrastiveClusteringLoss(margin=0.2)
        >>> loss = loss_func(torch.randn(8, 16), torch.tensor([0, 0, 1, 1, 2, 2, -1, -1]))
    """

    def __init__(self, margin: float = 0.2, num_negatives: int = 5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_number("margin", margin, 0)
        check_count("num_negatives", num_negatives, 1)
        self.margin = margin
        self.num_negatives = num_negatives
        self.add_to_recordable_attributes(list_of_names=["margin", "num_negatives"], is_stat=False)
        self.add_to_recordable_attributes(
            list_of_names=["own_centroid_distance", "other_centroid_distance"], is_stat=True
        )

    def forward(
        self,
        embeddings: Tensor,
        labels: Any = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Any = None,
    ) -> Any:
        """Return the reduced loss of the embeddings.

        Args:
            embeddings: (N, D).
            labels: (N,) pseudo-labels, whole numbers of any type; -1 is noise.
            indices_tuple: the output of a miner; it weights the embeddings.
            ref_emb: (M, D) embeddings whose means are used as centroids; allowed only if no
                centroids are set.
            ref_labels: (M,) labels of ``ref_emb``.

        Returns:
            The (N,) losses after the reducer: a scalar for most reducers.
        """
        labels = None if labels is None else pseudo_labels(labels)
        ref_labels = None if ref_labels is None else pseudo_labels(ref_labels, "ref_labels")
        loss = super().forward(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        return as_pml_gives(loss, embeddings)

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: tuple[Tensor, ...] | None,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
    ) -> dict[str, Any]:
        using_ref = ref_emb is not embeddings
        if labels is None:
            raise InputError("labels are required: the pseudo-labels (N,) of the embeddings")
        if ref_labels is None:
            raise InputError("ref_labels are required with ref_emb: they define its centroids")
        if using_ref and self.centroids is not None:
            raise InputError(
                "ref_emb must be None while centroids are set: leave it out, or call "
                "set_centroids(None) to compute the centroids from it"
            )
        if len(embeddings) == 0 or len(ref_emb) == 0:
            return dict(self.zero_losses())

        near = self.nearest_centroids(embeddings, labels, ref_emb, ref_labels, self.num_negatives)
        losses = contrastive_clustering(near.own, near.others, self.margin, near.valid)
        weights = miner_weights(indices_tuple, len(losses), losses, using_ref)
        if weights is not None:
            losses = losses * weights
        if self.collect_stats:
            self._set_stats(near)
        indices = torch.arange(len(losses), device=losses.device)
        return loss_dict(losses, indices, "element", near.has_own, self.reducer) or dict(
            self.zero_losses()
        )

    def _set_stats(self, near: NearestCentroids) -> None:
        """Record mean distances over embeddings that have a centroid.

        They have the sign of the distance; without such embeddings they stay at 0.
        """
        valid = near.has_own.unsqueeze(1).expand_as(near.others)
        if near.valid is not None:
            valid = valid & near.valid
        sign = -1 if self.distance.is_inverted else 1
        if near.has_own.any():
            self.own_centroid_distance = sign * near.own.detach()[near.has_own].mean().item()
        if valid.any():
            self.other_centroid_distance = sign * near.others.detach()[valid].mean().item()

    def get_default_distance(self) -> CosineSimilarity:
        return CosineSimilarity()
