from typing import Any

import torch
from torch import Tensor

from pml_tacl.clustering.centroids import Centroids
from pml_tacl.utils.checks import check_count, check_number
from pml_tacl.utils.errors import InputError
from pml_tacl.utils.pml_compat import PairMiner, Pairs


class ContrastiveClusteringMiner(Centroids, PairMiner):
    """Miner of hard pairs that leaves out images whose cluster is ambiguous.

    The positives of an image are the images of the same cluster. Its negatives are the images of
    the ``num_negatives`` other clusters whose centroids are nearest to it. The ambiguity of an
    image is its distance to its own centroid divided by its distance to the nearest other
    centroid. Images with an ambiguity above ``max_ambiguity``, or with the label -1 (noise), are
    not in any pair. Of the images in ``ref_emb``, if given, only those with the label -1 are left
    out.

    Set the centroids with :meth:`set_centroids`. If none are set, the centroid of a label is the
    mean of its embeddings in the batch (or in ``ref_emb``, if given). The idea is from Li et al.
    2020; the definition is our own.

    Args:
        num_negatives: number of other clusters that give negatives for an image; all of them if
            there are fewer.
        max_ambiguity: 1 leaves out the images that are nearer to another centroid than to their
            own; smaller values leave out more images.
        **kwargs: ``distance`` (default CosineSimilarity, compared as 1 - cosine) and
            ``collect_stats``, as in any PML miner.

    Raises:
        ValueError: if an argument is out of range, or if the distance is a similarity that does
            not normalise.
    """

    def __init__(self, num_negatives: int = 5, max_ambiguity: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_count("num_negatives", num_negatives, 1)
        check_number("max_ambiguity", max_ambiguity, 0, above=True, finite=False)
        if self.distance.is_inverted and not self.distance.normalize_embeddings:
            raise InputError(
                f"distance must not be a similarity without normalisation, got {self.distance}: "
                "ambiguity is a ratio of distances"
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
        if others.shape[1] > 0 and self.max_ambiguity != torch.inf:  # inf * 0 is NaN
            sure = sure & (own <= self.max_ambiguity * others[:, 0])
        if self.collect_stats:
            self.num_ambiguous = int((near.has_own & ~sure).sum())

        same_set = ref_emb is embeddings
        both = sure[:, None] & (sure if same_set else ref_labels >= 0)
        same = labels[:, None] == ref_labels
        # Invalid columns belong to the image's own cluster or to no reference.
        hard = (near.columns[:, :, None] == near.ref_column).any(dim=1)
        matched = same & both
        if same_set:
            matched.fill_diagonal_(False)
        a1, p = torch.where(matched)
        a2, n = torch.where(hard & both & ~same)
        return a1, p, a2, n
