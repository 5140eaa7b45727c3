"""Copies, checkpoints, statistics and records of the losses and miners."""

import copy
import io
import pickle
import sqlite3

import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.reducers import MeanReducer
from pytorch_metric_learning.regularizers import LpRegularizer
from pytorch_metric_learning.utils import common_functions
from record_keeper import RecordKeeper, RecordWriter
from torch import nn

from pml_tacl import (
    AttentionConsistencyLoss,
    AttentionConsistencyMiner,
    ContrastiveClusteringLoss,
    ContrastiveClusteringMiner,
)
from tests.losses.batch import CENTROIDS, CLEAN, EMBEDDINGS, LABELS, MAPS, POINTS


def everything():
    """Losses and miners, with and without centroids."""
    made = [
        ContrastiveClusteringLoss(0.3, 2),
        ContrastiveClusteringLoss(0.3, 2, embedding_regularizer=LpRegularizer()),
        AttentionConsistencyLoss(0.2, 9, 2),
        ContrastiveClusteringMiner(3, 0.9),
        AttentionConsistencyMiner(2),
    ]
    for x in made[:2] + made[3:4]:
        x.set_centroids(CENTROIDS)
    return made


def results_of(x):
    if isinstance(x, AttentionConsistencyLoss):
        return (x(*MAPS, POINTS, LABELS),)
    if isinstance(x, AttentionConsistencyMiner):
        return x(MAPS[0], LABELS)
    result = x(EMBEDDINGS, LABELS)
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("x", everything(), ids=lambda x: type(x).__name__)
def test_copies_do_the_same(clone, x):
    for got, expected in zip(results_of(clone(x)), results_of(x), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def saved(x):
    file = io.BytesIO()
    torch.save(x.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("make", [ContrastiveClusteringLoss, ContrastiveClusteringMiner])
@pytest.mark.parametrize("before", [None, 2, 4, 7])
@pytest.mark.parametrize("stored", [None, 4])
def test_state_dict_brings_centroids_of_any_number(make, stored, before):
    x, y = make(), make()
    x.set_centroids(None if stored is None else torch.randn(stored, 6))
    y.set_centroids(None if before is None else torch.randn(before, 6))
    y.load_state_dict(saved(x))
    assert (x.centroids is None) == (y.centroids is None)
    for got, expected in zip(results_of(y), results_of(x), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert list(y.parameters()) == list(y.buffers()) == []


def test_stats_of_the_centroid_loss():
    loss = ContrastiveClusteringLoss(num_negatives=3, collect_stats=True)
    loss.set_centroids(CENTROIDS)
    loss(EMBEDDINGS, LABELS)
    unit = nn.functional.normalize
    similarity = (unit(EMBEDDINGS) @ unit(CENTROIDS).T)[CLEAN]
    labels = LABELS[CLEAN, None]
    others = similarity.scatter(1, labels, -2).topk(3).values.mean()
    assert loss.own_centroid_distance == pytest.approx(similarity.gather(1, labels).mean().item())
    assert loss.other_centroid_distance == pytest.approx(others.item())
    loss(EMBEDDINGS, torch.full((10,), -1))
    assert loss.own_centroid_distance == loss.other_centroid_distance == 0
    # In a batch of three clusters there are two others to compare with.
    three, two = (ContrastiveClusteringLoss(num_negatives=k, collect_stats=True) for k in (3, 2))
    three(EMBEDDINGS[:6], LABELS[:6])
    two(EMBEDDINGS[:6], LABELS[:6])
    assert three.other_centroid_distance == two.other_centroid_distance != 0


def test_stats_of_pairs_reducer_and_distance():
    loss = AttentionConsistencyLoss(collect_stats=True)
    loss(*MAPS, POINTS, LABELS)
    assert loss.num_pairs == 10
    loss = ContrastiveClusteringLoss(
        reducer=MeanReducer(collect_stats=True), distance=CosineSimilarity(collect_stats=True)
    )
    loss.set_centroids(CENTROIDS)
    loss(EMBEDDINGS, LABELS)
    assert loss.reducer.losses_size == CLEAN.sum()
    norm = EMBEDDINGS.norm(dim=1).mean().item()
    assert loss.distance.initial_avg_query_norm == pytest.approx(norm)
    assert not hasattr(loss, "own_centroid_distance")


def test_record_keeper_logs_numbers_and_never_a_list(tmp_path):
    losses = dict(zip("abcde", everything(), strict=True))
    for x in losses.values():
        x.collect_stats = True
    writer = RecordWriter(str(tmp_path))
    keeper = RecordKeeper(
        record_writer=writer,
        attributes_to_search_for=common_functions.list_of_recordable_attributes_list_names(),
    )
    for step in (1, 2):
        for x in losses.values():
            results_of(x)
        keeper.update_records(losses, step, recursive_types=[nn.Module, dict])
    assert not writer.records_that_are_lists
    keeper.save_records()
    with sqlite3.connect(tmp_path / "logs.db") as logs:
        tables = {name for (name,) in logs.execute("SELECT name FROM sqlite_master")}
        rows = logs.execute("SELECT margin, num_negatives FROM a_ContrastiveClusteringLoss")
        assert rows.fetchall() == [(0.3, 2), (0.3, 2)]
    assert {"c_AttentionConsistencyLoss", "d_ContrastiveClusteringMiner"} <= tables
