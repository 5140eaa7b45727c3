"""What PML asks of every loss, asked of ours, as its own tests do."""

import copy
import doctest
import io
import pickle
import sqlite3
import sys

import pytest
import torch
from pytorch_metric_learning.losses import CrossBatchMemory, MultipleLosses, TripletMarginLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner, TripletMarginMiner
from pytorch_metric_learning.reducers import (
    AvgNonZeroReducer,
    ClassWeightedReducer,
    DivisorReducer,
    DoNothingReducer,
    MeanReducer,
    MultipleReducers,
    PerAnchorReducer,
    SumReducer,
    ThresholdReducer,
)
from pytorch_metric_learning.regularizers import LpRegularizer
from pytorch_metric_learning.utils import common_functions
from pytorch_metric_learning.utils.loss_and_miner_utils import get_all_pairs_indices
from record_keeper import RecordKeeper, RecordWriter
from torch import nn

from pml_tacl import (
    AttentionConsistencyLoss,
    AttentionConsistencyMiner,
    ContrastiveClusteringLoss,
    ContrastiveClusteringMiner,
)

GENERATOR = torch.Generator().manual_seed(0)
LABELS = torch.tensor([0, -1, 1, 0, 2, 1, -1, 2, 0, 3])
CLEAN = LABELS >= 0
EMBEDDINGS = torch.randn(10, 6, generator=GENERATOR)
CENTROIDS = torch.randn(4, 6, generator=GENERATOR)
MAPS = torch.randn(2, 10, 4, 2, 2, generator=GENERATOR)
POINTS = 2.4 * torch.rand(10, 4, 2, generator=GENERATOR) - 1.2


def of_means(chosen=slice(None), labels=LABELS, **kwargs):
    loss = ContrastiveClusteringLoss(margin=0.5, **kwargs)
    return loss, loss(EMBEDDINGS[chosen], labels[chosen])


def of_centroids(chosen=slice(None), labels=LABELS, **kwargs):
    loss = ContrastiveClusteringLoss(margin=0.5, **kwargs)
    loss.set_centroids(CENTROIDS)
    return loss, loss(EMBEDDINGS[chosen], labels[chosen])


def of_attention(chosen=slice(None), labels=LABELS, **kwargs):
    loss = AttentionConsistencyLoss(**kwargs)
    return loss, loss(MAPS[0][chosen], MAPS[1][chosen], POINTS[chosen], labels[chosen])


LOSSES = [of_means, of_centroids, of_attention]
REDUCERS = {
    "mean": MeanReducer,
    "mean with stats": lambda: MeanReducer(collect_stats=True),
    "sum": SumReducer,
    "average non-zero": AvgNonZeroReducer,
    "threshold": lambda: ThresholdReducer(low=0.05, high=0.6),
    "class-weighted": lambda: ClassWeightedReducer(torch.tensor([1.0, 2.0, 5.0, 0.5])),
    "per anchor": PerAnchorReducer,
    "per anchor, summed": lambda: PerAnchorReducer(reducer=SumReducer()),
    "divisor": DivisorReducer,
    "several": lambda: MultipleReducers({"loss": SumReducer()}),
    "several, default": lambda: MultipleReducers({}),
    "several, per anchor": lambda: MultipleReducers({"loss": PerAnchorReducer()}),
}


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("make", LOSSES)
def test_noise_might_as_well_not_be_there(make, reducer):
    value = make(reducer=REDUCERS[reducer]())[1]
    torch.testing.assert_close(value, make(CLEAN, reducer=REDUCERS[reducer]())[1])
    assert value > 0


@pytest.mark.parametrize("make", LOSSES)
def test_reducers_reduce_the_single_losses(make):
    raw = make(reducer=DoNothingReducer())[1]["loss"]
    losses = raw["losses"]
    anchors = raw["indices"] if make is not of_attention else raw["indices"][0]
    assert (LABELS[anchors] >= 0).all()
    assert len(losses) == len(anchors) == {of_attention: 10}.get(make, 8)
    weights = torch.tensor([1.0, 2.0, 5.0, 0.5])
    expected = {
        "mean": losses.mean(),
        "sum": losses.sum(),
        "average non-zero": losses[losses > 0].mean(),
        "threshold": losses[(losses > 0.05) & (losses < 0.6)].mean(),
        "class-weighted": (losses * weights[LABELS[anchors]]).mean(),
        "divisor": losses.mean(),
        "several": losses.sum(),
        "per anchor": losses.mean(),
    }
    if make is of_attention:  # the mean of each anchor's, over all images but noise
        each = torch.zeros(10).index_add(0, anchors, losses) / anchors.bincount(minlength=10)
        expected["per anchor"] = each.nan_to_num()[CLEAN].mean()
    for name, value in expected.items():
        torch.testing.assert_close(make(reducer=REDUCERS[name]())[1], value)


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("make", LOSSES)
def test_no_loss_at_all_is_zero_with_a_graph_for_every_reducer(make, reducer, monkeypatch):
    for name, tensor in (("EMBEDDINGS", EMBEDDINGS), ("MAPS", MAPS)):
        monkeypatch.setitem(globals(), name, tensor.clone().requires_grad_())
    value = make(labels=torch.full((10,), -1), reducer=REDUCERS[reducer]())[1]
    value.backward()
    assert value == 0
    gradient = MAPS.grad if make is of_attention else EMBEDDINGS.grad
    assert (gradient == 0).all()


@pytest.mark.parametrize("make", [ContrastiveClusteringLoss, AttentionConsistencyLoss])
@pytest.mark.parametrize("reducer", [ThresholdReducer(low=0), MeanReducer(), AvgNonZeroReducer()])
def test_setting_reducers(make, reducer):
    assert type(make(reducer=reducer).reducer) is type(reducer)
    assert type(make().reducer) is MeanReducer


@pytest.mark.parametrize("reducer", [None, SumReducer(), ThresholdReducer(low=0.1)])
@pytest.mark.parametrize("make", [of_means, of_centroids])
def test_embedding_regularizer(make, reducer):
    loss, value = make(
        reducer=reducer, embedding_regularizer=LpRegularizer(), embedding_reg_weight=0.3
    )
    assert type(loss.reducer) is MultipleReducers
    assert set(loss.reducer.reducers) == {"loss", "embedding_reg_loss"}
    expected = make(reducer=reducer)[1] + 0.3 * EMBEDDINGS.norm(dim=1).mean()
    torch.testing.assert_close(value, expected)
    # It stays where no embedding has a loss.
    value = make(labels=torch.full((10,), -1), embedding_regularizer=LpRegularizer())[1]
    torch.testing.assert_close(value, EMBEDDINGS.norm(dim=1).mean())


@pytest.mark.parametrize("mine", [get_all_pairs_indices, None])
def test_losses_that_need_labels_say_so(mine):
    labels = torch.randint(0, 3, (10,), generator=torch.Generator().manual_seed(0))
    tuples = [get_all_pairs_indices(labels)] if mine else []
    tuples += [m(EMBEDDINGS, labels) for m in (MultiSimilarityMiner(), TripletMarginMiner())]
    for loss, _ in (of_means(), of_centroids()):
        for pairs in tuples:
            with pytest.raises(ValueError, match="labels are required"):
                loss(EMBEDDINGS, indices_tuple=pairs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("named", [False, True])
def test_among_multiple_losses(named, dtype):
    embeddings = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    embeddings.requires_grad_()
    labels = torch.arange(40) % 8
    other, ours, miner = TripletMarginLoss(0.1), ContrastiveClusteringLoss(), MultiSimilarityMiner()
    if dtype != torch.float32:  # PML's own cannot do every type
        other = ContrastiveClusteringLoss(margin=1.0)
    own_miner = ContrastiveClusteringMiner()
    if named:
        together = MultipleLosses(
            {"other": other, "ours": ours},
            weights={"other": 1, "ours": 0.23},
            miners={"ours": own_miner},
        )
    else:
        together = MultipleLosses([other, ours], miners=None, weights=[1, 0.23])
    mined = own_miner(embeddings, labels) if named else miner(embeddings, labels)
    value = together(embeddings, labels) if named else together(embeddings, labels, mined)
    value.backward()
    first = other(embeddings, labels) if named else other(embeddings, labels, mined)
    torch.testing.assert_close(value, first + 0.23 * ours(embeddings, labels, mined))
    assert embeddings.grad.abs().sum() > 0


def test_cross_batch_memory_refuses_ours_by_name_and_its_pattern_works():
    with pytest.raises(Exception, match="not supported for ContrastiveClusteringLoss"):
        CrossBatchMemory(ContrastiveClusteringLoss(), embedding_size=6)
    memory = torch.cat([EMBEDDINGS, torch.randn(20, 6, generator=GENERATOR)])
    memory_labels = torch.cat([LABELS, torch.arange(20) % 5])
    loss = ContrastiveClusteringLoss()
    pairs = get_all_pairs_indices(LABELS, memory_labels)
    assert loss(EMBEDDINGS, LABELS, pairs, memory, memory_labels) > 0
    alone = loss(EMBEDDINGS, LABELS, None, EMBEDDINGS.clone(), LABELS.clone())
    torch.testing.assert_close(alone, loss(EMBEDDINGS, LABELS))


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


def test_stats():
    loss, _ = of_centroids(collect_stats=True)
    unit = nn.functional.normalize
    similarity = unit(EMBEDDINGS) @ unit(CENTROIDS).T
    similarity, labels = similarity[CLEAN], LABELS[CLEAN]
    own = similarity.gather(1, labels[:, None]).mean().item()
    others = similarity.scatter(1, labels[:, None], -2).topk(3).values.mean().item()
    assert loss.own_centre_distance == pytest.approx(own, rel=1e-5)
    assert loss.other_centre_distance == pytest.approx(others, rel=1e-5)
    loss(EMBEDDINGS, torch.full((10,), -1))
    assert loss.own_centre_distance == loss.other_centre_distance == 0
    assert of_attention(collect_stats=True)[0].num_pairs == 10
    plain = ContrastiveClusteringLoss()
    plain(EMBEDDINGS, LABELS)
    assert not hasattr(plain, "own_centre_distance")
    with_reducer_stats, _ = of_means(reducer=MeanReducer(collect_stats=True))
    assert with_reducer_stats.reducer.losses_size == CLEAN.sum()


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


@pytest.mark.parametrize("make", [ContrastiveClusteringLoss, AttentionConsistencyLoss])
def test_examples_of_the_docstrings_run(make):
    results = doctest.testmod(sys.modules[make.__module__])
    assert results.attempted > 0
    assert results.failed == 0
