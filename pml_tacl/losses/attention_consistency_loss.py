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
    "embedding_regularizer": "feature maps have no norm of embeddings",
}


class AttentionConsistencyLoss(BaseMetricLossFunction):
    """Transformed attention consistency (TAC): attention to a matched image follows a transform.

    For a matched pair (i, j), the attention of i seen against j and the attention of a
    transformed view of i against the same j must agree, place by place, where the transform puts
    each place: ``l_ij = mean over visible u of (A(i|j)[u] - A(i'|j)[T u])^2``. After Li et al.
    2020 (ECCV); definition ours, see :func:`pml_tacl.functional.attention_consistency`.

    Matched pairs are the positive pairs of ``indices_tuple`` (triplets or pairs of any miner),
    else the pairs of the same label. A pair with label -1 (noise) is ignored.

    Args:
        temperature: None for the hard maximum, else t > 0 softens it.
        max_pairs: at most this many of the same-label pairs, neighbours in the batch first;
            a tuple given is used whole.
        chunk_size: pairs compared at once; None fits them to the device. Never changes a value.
        **kwargs: ``reducer`` and ``collect_stats``, as of any PML loss.

    Raises:
        ValueError: if an argument is out of range, or ``distance`` or ``embedding_regularizer``
            is given (the definition fixes the cosine; feature maps have no embedding norm); in
            the call, if shapes disagree, a label is no whole number or below -1, or both labels
            and indices_tuple are missing.

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
                raise InputError(f"{name} must be left out: {why}, got {got}")
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
        """Reduced loss of the matched pairs.

        Args:
            feature_maps: (N, C, H, W) of the first views.
            transformed_feature_maps: (N, C, H', W') of the second views.
            points: (N, H*W, 2), where each cell of the first view lies in the second, in
                grid_sample coordinates (align_corners=False); outside [-1, 1] is not visible.
            labels: (N,) pseudo-labels, whole numbers of any type; -1 is noise.
            indices_tuple: from a miner; its positive pairs are the matched pairs.
            weights: (N, H*W) non-negative weight of each cell (kept share under a background
                swap); None for ones.

        Returns:
            What the reducer makes of the (P,) losses: a scalar for most reducers.
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
            raise InputError("labels and indices_tuple cannot both be None: nothing is matched")

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
    """Up to ``max_pairs`` pairs of the same label >= 0, those nearest in the batch first.

    Returns:
        (P,) anchors, (P,) positives and (P,) bool, which of them are pairs: on a GPU their
        number is not asked for, and the places left over hold pairs that do not count.
    """
    n = len(labels)
    index = torch.arange(n, device=labels.device)
    apart = (index - index[:, None]) % max(n, 1)
    matched = (labels[:, None] == labels) & (labels >= 0) & (apart > 0)
    count = min(max_pairs, n * (n - 1))
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        count = min(count, int(matched.sum()))
    # No two ranks alike: every device takes the same pairs.
    rank = torch.where(matched, apart * n + index[:, None], n * n).flatten()
    nearest, flat = rank.topk(count, largest=False)
    return flat // max(n, 1), flat % max(n, 1), nearest < n * n
