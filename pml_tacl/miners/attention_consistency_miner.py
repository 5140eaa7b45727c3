from typing import Any

import torch
from torch import Tensor

from pml_tacl.utils.checks import check_count
from pml_tacl.utils.errors import InputError
from pml_tacl.utils.pml_compat import Needs, PairMiner, Pairs
from pml_tacl.utils.precision import wide_dtype, without_autocast


class AttentionConsistencyMiner(PairMiner):
    """Miner of matched pairs for :class:`AttentionConsistencyLoss`.

    The miner takes feature maps and averages each map over its cells. It pairs each image with the
    ``pairs_per_anchor`` images of the same pseudo-label whose averaged features are nearest. There
    are no negative pairs: the third and fourth tensors of the output are empty. Images with the
    label -1 (noise) and images that are alone in their cluster get no pair. The idea is from Li et
    al. 2020; the definition is our own.

    Args:
        pairs_per_anchor: number of images that each image is paired with; all images of its
            pseudo-label if there are fewer.
        **kwargs: ``distance`` between the averaged features (default CosineSimilarity) and
            ``collect_stats``, as in any PML miner.

    Raises:
        ValueError: if ``pairs_per_anchor`` is not an integer of at least 1. When called: if the
            feature maps are not (N, C, H, W).
    """

    needs: Needs = "feature_maps"

    def __init__(self, pairs_per_anchor: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_count("pairs_per_anchor", pairs_per_anchor, 1)
        self.pairs_per_anchor = pairs_per_anchor
        self.add_to_recordable_attributes(name="pairs_per_anchor", is_stat=False)

    def check_input(self, embeddings: Tensor, ref_emb: Tensor) -> None:
        if embeddings.ndim != 4 or ref_emb.ndim != 4:
            raise InputError(
                f"feature_maps must be (N, C, H, W), got {tuple(embeddings.shape)} and, as "
                f"reference, {tuple(ref_emb.shape)}"
            )

    def pairs(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor
    ) -> Pairs:
        same_set = ref_emb is embeddings
        with without_autocast(embeddings.device):
            pooled = _pool(embeddings)
            mat = self.distance(pooled, pooled if same_set else _pool(ref_emb))
        matched = (labels[:, None] == ref_labels) & (labels >= 0)[:, None]
        if same_set:
            matched.fill_diagonal_(False)
        mat = torch.where(matched, -mat if self.distance.is_inverted else mat, torch.inf)
        nearest, columns = mat.topk(min(self.pairs_per_anchor, mat.shape[1]), largest=False)
        anchors, rank = torch.where(nearest.isfinite())
        empty = anchors.new_empty(0)
        return anchors, columns[anchors, rank], empty, empty.clone()


def _pool(feature_maps: Tensor) -> Tensor:
    return feature_maps.mean(dim=(2, 3), dtype=wide_dtype(feature_maps))
