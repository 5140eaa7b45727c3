from typing import Any

import torch
from pytorch_metric_learning.distances import CosineSimilarity
from torch import Tensor

from pml_tacl.functional import attention_consistency
from pml_tacl.utils.checks import check_count, check_number
from pml_tacl.utils.errors import InputError
from pml_tacl.utils.labels import pseudo_labels
from pml_tacl.utils.pml_compat import (
    BaseMetricLossFunction,
    Needs,
    loss_dict,
    positive_pairs,
    reduce_without_noise,
    to_device,
)

_FIXED = {
    "distance": "attention is compared by cosine",
    "embedding_regularizer": "this loss gets feature maps, and no embeddings to regularize",
}


class AttentionConsistencyLoss(BaseMetricLossFunction):
    """Transformed attention consistency (TAC) loss between two views of an image.

    The attention A(i|j) of image i to image j says how well each cell of i matches its best cell in
    j. The loss compares it with the attention A(i'|j) of i', a transformed view of i, to the same
    image j. The two should agree at corresponding cells:
    ``l_ij = mean over visible u of (A(i|j)[u] - A(i'|j)[T u])^2``, where T u is the position of
    cell u in the transformed view. The idea is from Li et al. 2020 (ECCV); the definition is our
    own, see :func:`pml_tacl.functional.attention_consistency`.

    The pairs (i, j) are matched pairs: images that count as the same class. They are the
    positive pairs of ``indices_tuple`` (triplets or pairs from any miner). If it is not given, they
    are all pairs of images with the same label. Pairs with the label -1 (noise) are ignored.

    Args:
        temperature: how the best cell in j is chosen. None takes the largest cosine; t > 0 takes
            a soft maximum over all cells.
        max_pairs: largest total number of pairs with the same label. If there are more, pairs of
            images that are close to each other in the batch are used first. It does not limit
            the pairs of ``indices_tuple``.
        chunk_size: number of pairs compared at once; None chooses it for the device. It does not
            change the result.
        **kwargs: ``reducer`` and ``collect_stats``, as in any PML loss.

    Raises:
        ValueError: if an argument is out of range, or if ``distance`` or
            ``embedding_regularizer`` is given (attention is always compared by cosine, and the
            loss gets no embeddings to regularize). When called: if shapes do not match, if a label
            is not an integer or is below -1, or if both labels and indices_tuple are missing.

    Example:
        >>> import torch
        >>> from pml_tacl import AttentionConsistencyLoss
        >>> maps, flipped = torch.randn(4, 8, 7, 7), torch.randn(4, 8, 7, 7)
        >>> points = torch.rand(4, 49, 2) * 2 - 1
        >>> loss = AttentionConsistencyLoss()(maps, flipped, points, torch.tensor([0, 0, 1, 1]))
    """

    needs: Needs = "feature_maps"

    def __init__(
        self,
        temperature: float | None = None,
        max_pairs: int = 256,
        chunk_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        for name, why in _FIXED.items():
            if kwargs.get(name) is not None:
                got = type(kwargs[name]).__name__
                raise InputError(f"{name} must be left out, got {got}: {why}")
        super().__init__(**kwargs)
        if temperature is not None:
            check_number("temperature", temperature, 0, above=True, alternative="or None")
        check_count("max_pairs", max_pairs, 1)
        if chunk_size is not None:
            check_count("chunk_size", chunk_size, 1, "or None")
        self.temperature = temperature
        self.max_pairs = max_pairs
        self.chunk_size = chunk_size
        self.add_to_recordable_attributes(list_of_names=["temperature", "max_pairs"], is_stat=False)
        self.add_to_recordable_attributes(list_of_names=["num_pairs"], is_stat=True)

    def forward(
        self,
        feature_maps: Tensor,
        transformed_feature_maps: Tensor,
        points: Tensor,
        labels: Any = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Return the reduced loss of the matched pairs.

        Args:
            feature_maps: (N, C, H, W) of the first views.
            transformed_feature_maps: (N, C, H', W') of the second views.
            points: (N, H*W, 2), position of each cell of the first view in the second view, in
                grid_sample coordinates (align_corners=False). If a point is outside [-1, 1], the
                second view does not show the cell, and the cell is left out.
            labels: (N,) pseudo-labels, whole numbers of any type; -1 is noise.
            indices_tuple: the output of a miner; its positive pairs are the matched pairs.
            weights: (N, H*W) non-negative weight of each cell, such as `cell_weights` of a
                background swap; None gives all cells the weight 1.

        Returns:
            The (P,) losses after the reducer: a scalar for most reducers.
        """
        self.reset_stats()
        if labels is not None:
            labels = pseudo_labels(labels)
            if labels.shape != (len(feature_maps),):
                raise InputError(
                    f"labels must be (N,) for feature_maps of {tuple(feature_maps.shape)}, got "
                    f"{tuple(labels.shape)}"
                )
            labels = to_device(labels, feature_maps)
        if indices_tuple is not None:
            anchors, positives = positive_pairs(indices_tuple, feature_maps.device)
            valid = torch.ones_like(anchors, dtype=torch.bool)
            if labels is not None:
                valid = (labels[anchors] >= 0) & (labels[positives] >= 0)
        elif labels is not None:
            anchors, positives, valid = same_label_pairs(labels, self.max_pairs)
        else:
            raise InputError("labels and indices_tuple cannot both be None: give one of them")

        losses = attention_consistency(
            feature_maps,
            transformed_feature_maps,
            points,
            anchors,
            positives,
            weights,
            self.temperature,
            self.chunk_size,
        )
        if self.collect_stats:
            self.num_pairs = int(valid.sum())
        pairs = loss_dict(losses, [anchors, positives], "pos_pair", valid, self.reducer)
        reduced: Tensor = reduce_without_noise(
            self.reducer, pairs or self.zero_losses(), feature_maps, labels
        )
        return reduced

    def get_default_distance(self) -> CosineSimilarity:
        return CosineSimilarity()


def same_label_pairs(labels: Tensor, max_pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return up to ``max_pairs`` pairs of the same label >= 0, nearest in the batch first.

    Returns:
        (P,) anchors, (P,) positives and (P,) bool, which of them are valid pairs. On a GPU the
        number of pairs is not read back, so the remaining entries are invalid pairs.
    """
    n = len(labels)
    index = torch.arange(n, device=labels.device)
    apart = (index - index[:, None]) % max(n, 1)
    matched = (labels[:, None] == labels) & (labels >= 0) & (apart > 0)
    count = min(max_pairs, n * (n - 1))
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        count = min(count, int(matched.sum()))
    # All ranks differ, so every device selects the same pairs.
    rank = torch.where(matched, apart * n + index[:, None], n * n).flatten()
    nearest, flat = rank.topk(count, largest=False)
    return flat // max(n, 1), flat % max(n, 1), nearest < n * n
