"""The objective of each method, from losses of PML and of this package."""

from typing import Any

import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss, NTXentLoss, SelfSupervisedLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner
from torch import Tensor

from pml_tacl import (
    AttentionConsistencyLoss,
    AttentionConsistencyMiner,
    ContrastiveClusteringLoss,
)
from retrieval_parts.batches import Batch
from retrieval_parts.state import Training, follow
from retrieval_parts.stml import SelfTaught


class Losses:
    """Objective of a run on both views of a batch."""

    def __init__(self, run: Training) -> None:
        config = run.config
        self.run = run
        self.metric = MultiSimilarityLoss()
        self.miner = MultiSimilarityMiner() if config.miner == "ms" else None
        self.clustering = ContrastiveClusteringLoss(config.ccl_margin, config.ccl_negatives)
        self.attention = AttentionConsistencyLoss(config.tac_temperature or None)
        self.pairs = AttentionConsistencyMiner(config.tac_pairs)
        self.views_loss = SelfSupervisedLoss(NTXentLoss(config.ntxent_temperature))
        self.embedded: tuple[Tensor, Tensor] | None = None
        self.self_taught = SelfTaught(run) if config.metric == "stml" else None

    def parameters(self) -> list[torch.nn.Parameter]:
        return [] if self.self_taught is None else list(self.self_taught.head.parameters())

    def follow(self, momentum: float) -> None:
        if self.self_taught is not None:
            follow(self.self_taught.teacher_head, self.self_taught.head, momentum)

    def __call__(self, batch: Batch) -> Tensor:
        config, model = self.run.config, self.run.model
        output = model.trunk(batch.images)
        embeddings = model.embedder(output)
        labels = torch.cat([batch.labels] * 2)
        total = embeddings.sum() * 0
        if config.metric == "ms":
            mined = None if self.miner is None else self.miner(embeddings, labels)
            total = total + self.metric(embeddings, labels, mined)
        elif config.metric == "ntxent":
            total = total + self.views_loss(*embeddings.chunk(2))
        elif self.self_taught is not None:
            total = total + self.self_taught(output, embeddings, batch)
        # During warm-up there are no centroids, and each image is its own cluster.
        if config.ccl > 0 and self.run.centroids is not None:
            total = total + config.ccl * self.clustering(embeddings, labels)
            self.embedded = embeddings.detach(), labels
        if config.tac > 0:
            total = total + config.tac * self._attention(output.feature_maps, batch)
        return total

    def move_centroids(self) -> None:
        """Move the centroids after a step; the next clustering starts from them."""
        if self.embedded is not None:
            self.clustering.move_centroids(*self.embedded, self.run.config.ccl_momentum)
            self.run.centroids = self.clustering.centroids

    def _attention(self, maps: Tensor, batch: Batch) -> Tensor:
        first, second = maps.chunk(2)
        if self.run.centroids is None:  # match each image with itself
            index = torch.arange(len(batch.labels), device=maps.device)
            pairs: Any = (index, index, index[:0], index[:0])
        else:
            pairs = self.pairs(first, batch.labels)
        points = batch.views.points
        return self.attention(first, second, points, batch.labels, pairs, batch.weights)
