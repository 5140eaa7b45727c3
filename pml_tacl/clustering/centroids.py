"""Cluster centroids of the contrastive clustering loss and its miner."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity, DotProductSimilarity
from torch import Tensor
from torch.autograd.function import once_differentiable

from pml_tacl.utils.checks import check_number
from pml_tacl.utils.errors import InputError
from pml_tacl.utils.labels import pseudo_labels
from pml_tacl.utils.pml_compat import Needs
from pml_tacl.utils.precision import at_least_float32, without_autocast


class NearestCentroids(NamedTuple):
    """Distances of N embeddings to their own and to the k nearest other centroids.

    For a similarity the signs are inverted, so that smaller is always nearer.
    """

    own: Tensor  # (N,)
    others: Tensor  # (N, k), ascending
    columns: Tensor  # (N, k), indices of the centroids in ``others``
    valid: Tensor | None  # (N, k) bool, which of ``others`` exist; None for all
    ref_column: Tensor  # (M,), the centroid of each reference element
    has_own: Tensor  # (N,) bool, False for noise and for labels missing in the reference


class CentroidTable:
    """Owner of the centroids (K, D); losses and miners hold a reference to it.

    All losses and miners that share a table see every change of it. During training, they share
    the table of the trainer.

    Attributes:
        values: (K, D), of unit norm; None if no centroids are set.
    """

    def __init__(self) -> None:
        self.values: Tensor | None = None

    def set(self, centroids: Tensor | None) -> None:
        """Set the centroids, or remove them.

        Args:
            centroids: (K, D), scaled to unit norm here; None removes them.

        Raises:
            ValueError: if the shape is not (K, D) or a row is zero or not finite.
        """
        if centroids is None:
            self.values = None
            return
        centroids = torch.as_tensor(centroids).detach()
        if centroids.ndim != 2 or len(centroids) == 0:
            raise InputError(f"centroids must be (K, D) with K >= 1, got {tuple(centroids.shape)}")
        centroids = at_least_float32(centroids)
        norms = centroids.norm(dim=1)
        bad = ~(norms.isfinite() & (norms > 0))
        if bad.any():
            raise InputError(
                f"centroids must be finite and not zero, got {int(bad.sum())} bad rows of "
                f"{len(centroids)}"
            )
        self.values = F.normalize(centroids, dim=1)

    @torch.no_grad()
    def move(self, embeddings: Tensor, labels: Tensor, momentum: float = 0.0) -> None:
        """Move the centroids towards the embeddings of a training step, in place.

        See :meth:`Centroids.move_centroids`.
        """
        labels = pseudo_labels(labels)
        check_number("momentum", momentum, 0, 1)
        if labels.shape != embeddings.shape[:1]:
            raise InputError(
                f"labels {tuple(labels.shape)} do not fit embeddings {tuple(embeddings.shape)}: "
                "give one for each"
            )
        if self.values is None or momentum == 1 or len(embeddings) == 0:
            return
        self.beside(embeddings, labels)
        with without_autocast(embeddings.device):
            own = labels.clamp(min=0)
            unit = F.normalize(embeddings.to(self.values.dtype), dim=1)
            same = (labels[:, None] == labels) & (labels >= 0)
            before = self.values[own]
            mean = F.normalize(same.to(unit.dtype) @ unit, dim=1)
            moved = F.normalize(momentum * before + (1 - momentum) * mean, dim=1)
            first = same.byte().argmax(dim=1) == torch.arange(len(labels), device=labels.device)
            # Leave a centroid where it is if the mean is empty, zero or NaN.
            moves = first & (labels >= 0) & (moved.norm(dim=1) > 0.5)
            # At most one term per centroid is non-zero, so the order of the sum does not matter.
            steps = torch.where(moves[:, None], moved - before, torch.zeros_like(moved))
            self.values.index_add_(0, own, steps)

    def beside(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return the centroids on the device and in the dtype of embeddings.

        Raises:
            ValueError: if dimensions differ, or a label has no centroid.
        """
        assert self.values is not None
        if self.values.device != embeddings.device:
            self.values = self.values.to(embeddings.device)
        if self.values.shape[1] != embeddings.shape[1]:
            raise InputError(
                f"embeddings have {embeddings.shape[1]} dimensions and the centroids "
                f"{self.values.shape[1]}: call set_centroids with centroids of this model"
            )
        # On a GPU this check would synchronise; there the indexing itself raises.
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            largest = int(labels.max())
            if largest >= len(self.values):
                raise InputError(
                    f"labels must index the {len(self.values)} centroids, got label {largest}: "
                    "set the centroids and the labels of the same clustering"
                )
        return self.values.to(embeddings.dtype)


class Centroids:
    """Mixin for losses and miners that compare embeddings with centroids.

    The centroids are those that were set. If none are set, they are the means of the labels in
    the batch. The table is a plain attribute, and ``state_dict`` stores it as extra state. It is
    not a buffer, because record-keeper would write a buffer at every step, and because the number
    of centroids changes with each clustering.
    """

    needs: Needs = "labels"  # centroids decide what is hard, not a miner's pairs
    distance: BaseDistance
    collect_stats: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.centroid_table = CentroidTable()

    @property
    def centroids(self) -> Tensor | None:
        """Return the centroids (K, D) of unit norm; None for means of the batch."""
        return self.centroid_table.values

    @centroids.setter
    def centroids(self, values: Tensor | None) -> None:
        self.centroid_table.values = values

    def share_centroids(self, table: CentroidTable) -> None:
        """Use the centroids of a shared table from now on, including its later changes."""
        self.centroid_table = table

    def set_centroids(self, centroids: Tensor | None) -> None:
        """Set the centroids that pseudo-labels index; None restores means of the batch.

        Args:
            centroids: (K, D), scaled to unit norm here.

        Raises:
            ValueError: if the shape is not (K, D) or a row is zero or not finite.
        """
        self.centroid_table.set(centroids)

    def move_centroids(self, embeddings: Tensor, labels: Tensor, momentum: float = 0.0) -> None:
        """Move the centroids towards the embeddings of a training step, in place.

        The embeddings change during training, so the centroids of the last clustering become
        outdated. Each centroid c with embeddings e in the batch becomes
        ``normalize(momentum * c + (1 - momentum) * normalize(sum of its e))``; the others stay.
        Call it after ``backward``, which still needs the old values. It does nothing if no
        centroids are set. In distributed training each rank must pass the embeddings and labels
        of all ranks; otherwise the centroids of the ranks differ.

        Args:
            embeddings: (N, D), scaled to unit norm here.
            labels: (N,) whole numbers, which index the centroids; -1 is noise and moves none.
            momentum: in [0, 1]: 0 replaces a centroid by the mean of the batch, 1 keeps it.

        Raises:
            ValueError: if the momentum is out of range, or embeddings or labels do not fit the
                centroids or each other.
        """
        self.centroid_table.move(embeddings, labels, momentum)

    def get_extra_state(self) -> dict[str, Tensor | None]:
        return {"centroids": self.centroids}

    def set_extra_state(self, state: dict[str, Tensor | None]) -> None:
        centroids = state["centroids"]
        if centroids is not None:
            device = centroids.device if self.centroids is None else self.centroids.device
            centroids = centroids.to(device, copy=True)  # keep the given state unchanged
        self.centroid_table.values = centroids

    def nearest_centroids(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor,
        ref_labels: Tensor,
        num_negatives: int,
    ) -> NearestCentroids:
        """Return distances of embeddings (N, D) to their own and nearest other centroids, in fp32.

        Raises:
            ValueError: if a label has no centroid or the dimensions differ.
        """
        with without_autocast(embeddings.device):
            embeddings = at_least_float32(embeddings)
            if self.centroids is None:
                reference = ref_emb.to(embeddings.dtype), ref_labels
                return self._nearest_means(embeddings, labels, reference, num_negatives)
            return self._nearest_centroids(embeddings, labels, ref_labels, num_negatives)

    def _nearest_centroids(
        self, embeddings: Tensor, labels: Tensor, ref_labels: Tensor, num_negatives: int
    ) -> NearestCentroids:
        centroids = self.centroid_table.beside(embeddings, labels)
        own = labels.clamp(min=0)
        num_negatives = min(num_negatives, len(centroids) - 1)
        if self._is_plain_similarity():
            own_distance, others, columns = _NearestSimilarities.apply(
                embeddings, centroids, own, num_negatives, self.distance.normalize_embeddings
            )
        else:
            mat = self.distance(embeddings, centroids)
            own_distance, others, columns = self._nearest(
                mat, own, num_negatives, mat.detach().clone()
            )
        return NearestCentroids(own_distance, others, columns, None, ref_labels, labels >= 0)

    def _nearest_means(
        self, embeddings: Tensor, labels: Tensor, reference: tuple[Tensor, Tensor], count: int
    ) -> NearestCentroids:
        """Compare with the means of each label in the reference.

        There is one centroid per reference element; only the first element of each label counts.
        """
        ref_emb, ref_labels = reference
        same = (ref_labels[:, None] == ref_labels) & (ref_labels >= 0)
        first = same.byte().argmax(dim=1)
        members = same.to(ref_emb.dtype)
        means = members @ self.distance.maybe_normalize(ref_emb)
        means = means / members.sum(dim=1, keepdim=True).clamp(min=1)
        stands = (first == torch.arange(len(first), device=first.device)) & (ref_labels >= 0)
        found = (labels[:, None] == ref_labels) & stands
        own, has_own = found.byte().argmax(dim=1), found.any(dim=1)
        mat = self.distance(embeddings, means)
        ranked = mat.detach().masked_fill(~stands, self._farthest())
        near = self._nearest(mat, own, min(count, len(ref_labels)), ranked)
        # Embeddings without an own centroid are ignored later, so their others do not matter.
        rank = torch.arange(near[1].shape[1], device=near[1].device)
        valid = rank < stands.sum() - 1
        return NearestCentroids(*near, valid.expand_as(near[1]), first, has_own)

    def _nearest(
        self, mat: Tensor, own: Tensor, num_negatives: int, ranked: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the own distance, the nearest other distances and their columns.

        Overwrites ``ranked``.
        """
        own = own.unsqueeze(1)
        ranked.scatter_(1, own, self._farthest())
        columns = ranked.topk(num_negatives, dim=1, largest=self.distance.is_inverted).indices
        sign = -1 if self.distance.is_inverted else 1
        return sign * mat.gather(1, own).squeeze(1), sign * mat.gather(1, columns), columns

    def _farthest(self) -> float:
        return -torch.inf if self.distance.is_inverted else torch.inf

    def _is_plain_similarity(self) -> bool:
        distance = self.distance
        return (
            type(distance) in (CosineSimilarity, DotProductSimilarity)
            and distance.power == 1
            and distance.p == 2
            and not distance.collect_stats  # it records its statistics in its own forward
        )


class _NearestSimilarities(torch.autograd.Function):
    """Negated similarity to the own and to the most similar other centroids, which are fixed.

    Only the selected centroids contribute to the gradient. The backward pass therefore stores
    neither the (N, K) matrix nor the normalised embeddings.
    """

    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, centroids: Tensor, own: Tensor, count: int, normalize: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        own = own.unsqueeze(1)
        similarity = embeddings @ centroids.T
        own_value = similarity.gather(1, own)
        similarity.scatter_(1, own, -torch.inf)
        # Scaling a row does not change the order of its entries.
        value, columns = similarity.topk(count, dim=1)
        values = torch.cat([own_value, value], dim=1)
        inverse_norms = None
        if normalize:
            norms = torch.linalg.vector_norm(embeddings, dim=1, keepdim=True)
            inverse_norms = norms.clamp_(min=1e-12).reciprocal_()
            values *= inverse_norms
        ctx.save_for_backward(embeddings, centroids, own, columns, values, inverse_norms)
        ctx.mark_non_differentiable(columns)
        distances = values.neg()
        return distances[:, 0].clone(), distances[:, 1:].clone(), columns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_own: Tensor, grad_others: Tensor, _: None) -> tuple[Any, ...]:
        embeddings, centroids, own, columns, values, inverse_norms = ctx.saved_tensors
        weights = torch.cat([grad_own.unsqueeze(1), grad_others], dim=1).neg_()
        chosen = torch.cat([own, columns], dim=1)
        along = None
        if inverse_norms is not None:
            weights *= inverse_norms
            along = (weights * values).sum(dim=1, keepdim=True).mul_(inverse_norms)
        grad = F.embedding_bag(chosen, centroids, per_sample_weights=weights, mode="sum")
        if along is not None:
            grad.addcmul_(embeddings, along, value=-1)
        return grad, None, None, None, None
