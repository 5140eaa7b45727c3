from typing import Any

import torch
from torch import Tensor

from pml_tacl.clustering.centroids import Centroids
from pml_tacl.utils.checks import check_count, check_number
from pml_tacl.utils.errors import InputError
from pml_tacl.utils.pml_compat import PairMiner, Pairs


class ContrastiveClusteringMiner(Centroids, PairMiner):
    """Pairs that cluster centroids call hard, of images whose cluster is sure.

    Positives are images of the same cluster, negatives those of the ``num_negatives`` other
    clusters with the nearest centroids. An image is left out, in every role, if its ambiguity, the
    distance to its own centroid over that to the nearest other one, is above ``max_ambiguity``, or
    if its label is -1. Of ``ref_emb``, if given, only those labelled -1 are left out. Centroids:
    :meth:`set_centroids`, else means of the batch (of ``ref_emb``, if given). After Li et al.
    2020; definition ours.

    Args:
        num_negatives: nearest other centroids per image; all of them if there are fewer.
        max_ambiguity: 1 leaves out what lies nearer to another centroid; less asks for more.
        **kwargs: ``distance`` (default CosineSimilarity, compared as 1 - cosine) and
            ``collect_stats``, as of any PML miner.

    Raises:
        ValueError: if an argument is out of range or the distance has no zero (a similarity
            that does not normalise).
    """

    def __init__(self, num_negatives: int = 5, max_ambiguity: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_count("num_negatives", num_negatives, 1)
        check_number("max_ambiguity", max_ambiguity, 0, above=True, finite=False)
        if self.distance.is_inverted and not self.distance.normalize_embeddings:
            raise InputError(
                f"distance must normalise or be a true distance, got {self.distance}: ambiguity "
                "is a ratio of distances"
            )
        self.num_negatives = num_negatives
        self.max_ambiguity = max_ambiguity
        self.add_to_recordable_attributes(
            list_of_names=["num_negatives", "max_ambiguity"], is_stat=False
        )
        self.add_to_recordable_attributes(name="num_ambiguous", is_stat=True)

    def pairs(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor
    ) -> Pairs:
        near = self.nearest_centroids(embeddings, labels, ref_emb, ref_labels, self.num_negatives)
        own, others = near.own, near.others
        if self.distance.is_inverted:
            own, others = (1 + own).clamp(min=0), (1 + others).clamp(min=0)
        sure = near.has_own
        if near.valid is not None:
            others = torch.where(near.valid, others, torch.inf)
        if others.shape[1] > 0:
            sure = sure & (own <= self.max_ambiguity * others[:, 0])
        if self.collect_stats:
            self.num_ambiguous = int((near.has_own & ~sure).sum())

        same_set = ref_emb is embeddings
        both = sure[:, None] & (sure if same_set else ref_labels >= 0)
        same = labels[:, None] == ref_labels
        # Columns that are not valid are of the own cluster or of no reference.
        hard = (near.columns[:, :, None] == near.ref_column).any(dim=1)
        matched = same & both
        if same_set:
            matched.fill_diagonal_(False)
        a1, p = torch.where(matched)
        a2, n = torch.where(hard & both & ~same)
        return a1, p, a2, n
