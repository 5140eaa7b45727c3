"""All uses of PML's internals. A port to another PML version changes only this file."""

from typing import Any, Literal

import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import (
    CrossBatchMemory,
    MarginLoss,
    MultipleLosses,
    SelfSupervisedLoss,
)
from pytorch_metric_learning.losses.base_metric_loss_function import BaseMetricLossFunction
from pytorch_metric_learning.miners.base_miner import BaseMiner
from pytorch_metric_learning.reducers import (
    ClassWeightedReducer,
    DoNothingReducer,
    MeanReducer,
    MultipleReducers,
)
from pytorch_metric_learning.utils import common_functions as c_f
from torch import Tensor, nn

from pml_tacl.utils.errors import InputError
from pml_tacl.utils.labels import pseudo_labels

__all__ = [
    "BaseMetricLossFunction",
    "BaseMiner",
    "CrossBatchMemory",
    "MultipleLosses",
    "Needs",
    "PairMiner",
    "Pairs",
    "SelfSupervisedLoss",
    "as_pml_gives",
    "called_by_step",
    "classes_of",
    "dimensions_of",
    "gathers_itself",
    "loss_dict",
    "miner_weights",
    "needs_of",
    "positive_pairs",
    "reduce_without_noise",
    "to_device",
]

to_device = c_f.to_device
Pairs = tuple[Tensor, Tensor, Tensor, Tensor]

Needs = Literal["pairs", "labels", "views", "feature_maps"]
"""Inputs of a loss in a training step, declared by the loss's class attribute ``needs``.

- "pairs": embeddings of both views, their labels, and the pairs of the tuple miner or None. This
  is the default for losses without the attribute, such as PML's metric losses.
- "labels": the same without pairs, for losses that choose hard examples themselves.
- "views": embeddings of the views, and embeddings of the transformed views, in the same order.
- "feature_maps": feature maps of both views, points, labels, matched pairs of the attention miner
  or None, and weights of the cells or None, see :class:`AttentionConsistencyLoss`. A miner with
  this value is called with feature maps and labels of the first views.
"""


def needs_of(module: nn.Module) -> Needs:
    """Return the inputs that a loss or miner needs."""
    needs: Needs = "views" if isinstance(module, SelfSupervisedLoss) else "pairs"
    if isinstance(module, CrossBatchMemory):  # it takes indices of a batch for those of the memory
        needs = "labels"
    return getattr(module, "needs", needs)


def called_by_step(loss: nn.Module) -> tuple[nn.Module, Needs]:
    """Return the loss that a training step calls, and the inputs that it needs.

    A loss with centroids is called directly instead of through PML's wrappers. SelfSupervisedLoss
    renumbers the labels of the batch, and CrossBatchMemory passes stored embeddings as reference:
    neither works with centroids.
    """
    inner = loss
    while isinstance(inner, SelfSupervisedLoss | CrossBatchMemory):
        inner = inner.loss
    has_centroids = getattr(inner, "centroids", None) is not None and hasattr(inner, "needs")
    found = inner if has_centroids else loss
    return found, needs_of(found)


class PairMiner(BaseMiner):
    """Base class of pair miners. It accepts labels of any dtype, and empty batches.

    Subclasses implement ``pairs``, which is called only if batch and reference are not empty.
    """

    def forward(
        self,
        embeddings: Tensor,
        labels: Any,
        ref_emb: Tensor | None = None,
        ref_labels: Any = None,
    ) -> Pairs:
        """Return pairs (anchors, positives, anchors, negatives).

        Args:
            embeddings: (N, D), or (N, C, H, W) for a miner of feature maps.
            labels: (N,) pseudo-labels, integers in any dtype; -1 is noise.
            ref_emb: (M, ...), source of positives and negatives; None for the batch itself.
            ref_labels: (M,) pseudo-labels of ``ref_emb``.
        """
        ref_labels = None if ref_labels is None else pseudo_labels(ref_labels, "ref_labels")
        found: Pairs = super().forward(embeddings, pseudo_labels(labels), ref_emb, ref_labels)
        return found

    def mine(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor
    ) -> Pairs:
        self.check_input(embeddings, ref_emb)
        if len(embeddings) == 0 or len(ref_emb) == 0:
            empty = torch.empty(0, dtype=torch.long, device=embeddings.device)
            return empty, empty.clone(), empty.clone(), empty.clone()
        return self.pairs(embeddings, labels, ref_emb, ref_labels)

    def check_input(self, embeddings: Tensor, ref_emb: Tensor) -> None:
        """Raise InputError for invalid shapes; to be overridden."""

    def pairs(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor
    ) -> Pairs:
        """Return the pairs of a batch and a reference, which are the same tensor by default."""
        raise NotImplementedError

    def get_default_distance(self) -> CosineSimilarity:
        return CosineSimilarity()


def classes_of(module: nn.Module) -> int | None:
    """Return the number of classes of a loss or reducer; None if it accepts any label."""
    if isinstance(module, ClassWeightedReducer):
        return len(module.weights)
    if isinstance(module, MarginLoss):
        return int(module.beta.numel()) if module.beta.numel() > 1 else None
    number = getattr(module, "num_classes", None)
    if isinstance(number, int) and number > 0:
        return number
    # Two losses of PML have a num_classes that stays 0.
    proxies, columns = getattr(module, "proxies", None), getattr(module, "W", None)
    if number == 0 and isinstance(proxies, Tensor):
        return len(proxies)
    return int(columns.shape[1]) if number == 0 and isinstance(columns, Tensor) else None


def dimensions_of(module: nn.Module) -> int | None:
    """Return the embedding dimensions of a PML loss; None if it accepts any."""
    if not isinstance(module, BaseMetricLossFunction | CrossBatchMemory):
        return None
    for name in ("embedding_size", "descriptors_dim"):
        number = getattr(module, name, None)
        if isinstance(number, int) and number > 0:
            return number
    for name, axis in (("proxies", 1), ("W", 0), ("fc", 0)):
        tensor = getattr(module, name, None)
        if isinstance(tensor, Tensor):
            return int(tensor.shape[axis])
    return None


def gathers_itself(module: nn.Module) -> bool:
    """Return whether a loss or miner gathers the batches of all processes itself."""
    from pytorch_metric_learning.utils import distributed

    wrappers = (distributed.DistributedLossWrapper, distributed.DistributedMinerWrapper)
    return isinstance(module, wrappers)


def as_pml_gives(reduced: Any, embeddings: Tensor) -> Any:
    """Convert a reduced loss to the dtype of the embeddings, like PML, except under autocast.

    Losses are computed in at least fp32. The dtype matters for MultipleLosses, which adds losses
    in place in the dtype of the first.
    """
    return c_f.to_dtype(reduced, tensor=embeddings) if isinstance(reduced, Tensor) else reduced


def positive_pairs(indices_tuple: tuple[Tensor, ...], device: torch.device) -> list[Tensor]:
    """Return anchors and positives of PML's triplets (a, p, n) or pairs (a1, p, a2, n).

    Raises:
        ValueError: if the tuple has another length.
    """
    if len(indices_tuple) not in (3, 4):
        raise InputError(
            f"indices_tuple must have 3 tensors (triplets) or 4 (pairs), got {len(indices_tuple)}"
        )
    return [x.to(device) for x in indices_tuple[:2]]


def miner_weights(
    indices_tuple: tuple[Tensor, ...] | None, size: int, like: Tensor, using_ref: bool
) -> Tensor | None:
    """Compute PML's miner weights without synchronising a GPU: counts over the largest count.

    Returns:
        (size,) weights in [0, 1], or None if all weights are 1 in PML.
    """
    if indices_tuple is None or all(len(x) == 0 for x in indices_tuple):
        return None
    anchors = (
        [indices_tuple[0], *indices_tuple[2:3]] if len(indices_tuple) == 4 else indices_tuple[:1]
    )
    chosen = torch.cat([x.to(like.device) for x in (anchors if using_ref else indices_tuple)])
    counts = torch.zeros(size, device=like.device, dtype=like.dtype)
    counts = counts.index_add(0, chosen, torch.ones_like(chosen, dtype=like.dtype))
    return counts / counts.max()


def loss_dict(
    losses: Tensor,
    indices: Tensor | list[Tensor],
    reduction_type: str,
    valid: Tensor,
    reducer: nn.Module,
) -> dict[str, dict[str, Any]] | None:
    """Return PML's loss dictionary of the valid losses; None if there are none.

    Selecting the valid losses synchronises a GPU. For a MeanReducer this is avoided: invalid
    losses become 0, and the others are scaled so that the mean is that of the valid losses.
    """
    if isinstance(reducer, MultipleReducers):
        named = reducer.reducers
        reducer = named["loss"] if "loss" in named else reducer.default_reducer  # noqa: SIM401
    if type(reducer) is MeanReducer and not reducer.collect_stats:
        if len(losses) == 0:
            return None
        scale = len(losses) / valid.sum(dtype=losses.dtype).clamp(min=1)
        losses = torch.where(valid, losses * scale, 0.0)
    else:
        keep = valid.nonzero().squeeze(1)
        if len(keep) == 0:
            return None
        losses = losses[keep]
        indices = indices[keep] if isinstance(indices, Tensor) else [i[keep] for i in indices]
    return {
        "loss": {
            "losses": losses,
            "indices": indices,
            "reduction_type": reduction_type,
            "divisor": len(losses),
        }
    }


def reduce_without_noise(
    reducer: nn.Module,
    losses: dict[str, dict[str, Any]],
    feature_maps: Tensor,
    labels: Tensor | None,
) -> Any:
    """Reduce pair losses as if the batch contained no images labelled -1.

    Some reducers divide by the batch size and use nothing else of the feature maps. So a single
    number stands for each map, which also keeps the graph of a zero loss.
    """
    stand_ins = feature_maps[:, 0, 0, :1]
    if labels is not None and not isinstance(reducer, (MeanReducer, DoNothingReducer)):
        clean = labels >= 0
        position = clean.cumsum(0) - 1
        stand_ins, labels = stand_ins[clean], labels[clean]
        losses = {
            name: {**loss, "indices": [position[i] for i in loss["indices"] or ()] or None}
            for name, loss in losses.items()
        }
    return reducer(losses, stand_ins, labels)
