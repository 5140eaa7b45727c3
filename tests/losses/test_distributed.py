"""Two processes take the gradients that one takes of the joined batch."""

import pytest
import torch
from pytorch_metric_learning.utils import loss_and_miner_utils
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pml_tacl import AttentionConsistencyLoss, ContrastiveClusteringLoss
from tests.processes import join, leave, together

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

WORLD, EACH = 2, 6
# The matched pairs of the attention loss lie within a process, as many in each.
LABELS = torch.tensor([[0, 1, 0, -1, 1, 0], [2, 3, 3, 2, -1, 2]])
MODES = ["means", "centroids", "efficient"]


class Model(nn.Module):
    """Both views' maps and the first's embeddings, in one pass."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Conv2d(3, 8, 3, stride=2)
        self.embedder = nn.Linear(8, 5)

    def forward(self, views):
        maps = self.trunk(views.flatten(0, 1)).unflatten(0, views.shape[:2])
        return maps[0], maps[1], self.embedder(maps[0].mean(dim=(2, 3)))


def parts():
    """The model, each process's views (2, N, 3, 9, 9), and points."""
    torch.manual_seed(0)
    views = torch.randn(WORLD, 2, EACH, 3, 9, 9)
    return Model(), views, 2.4 * torch.rand(WORLD, EACH, 16, 2) - 1.2


def losses(mode):
    centroid_loss = ContrastiveClusteringLoss(margin=1.0, num_negatives=2)
    if mode == "centroids":
        centroid_loss.set_centroids(torch.eye(4, 5))
    return centroid_loss, AttentionConsistencyLoss()


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


def one_of_two(rank, world, folder):
    join(rank, world, folder)
    model, views, points = parts()
    model = DistributedDataParallel(model)
    found = {}
    for mode in MODES:
        centroid_loss, attention_loss = losses(mode)
        centroid_loss = DistributedLossWrapper(centroid_loss, efficient=mode == "efficient")
        first, second, embeddings = model(views[rank])
        loss = centroid_loss(embeddings, LABELS[rank])
        loss = loss + attention_loss(first, second, points[rank], LABELS[rank])
        model.zero_grad()
        loss.backward()
        found[mode] = gradients(model)
    leave(found, folder)


def efficient_loss(centroid_loss, embeddings):
    """Each process's own embeddings against everyone's, as DistributedLossWrapper has it."""
    total = 0
    for own in range(WORLD):
        current, labels = embeddings.unflatten(0, (WORLD, EACH))[own], LABELS[own]
        others = embeddings.unflatten(0, (WORLD, EACH))[1 - own].detach()
        reference, ref_labels = torch.cat([current, others]), torch.cat([labels, LABELS[1 - own]])
        pairs = loss_and_miner_utils.get_all_pairs_indices(labels, ref_labels)
        pairs = loss_and_miner_utils.remove_self_comparisons(
            pairs, torch.arange(EACH), WORLD * EACH
        )
        total = total + centroid_loss(current, labels, pairs, reference, ref_labels)
    return total


def test_gradients_of_two_processes_are_those_of_one(warm, tmp_path):
    found = together(warm, one_of_two, WORLD, tmp_path)
    model, views, points = parts()
    for mode in MODES:
        centroid_loss, attention_loss = losses(mode)
        first, second, embeddings = model(views.transpose(0, 1).flatten(1, 2))
        if mode == "efficient":
            loss = efficient_loss(centroid_loss, embeddings)
        else:
            loss = centroid_loss(embeddings, LABELS.flatten())
        loss = loss + attention_loss(first, second, points.flatten(0, 1), LABELS.flatten())
        model.zero_grad()
        loss.backward()
        for rank in range(WORLD):
            for got, expected in zip(found[rank][mode], gradients(model), strict=True):
                assert expected.abs().max() > 0
                difference = (got - expected).abs().max() / expected.abs().max()
                assert difference <= 1e-5
