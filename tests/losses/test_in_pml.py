"""What PML asks of every loss, asked of ours, as its own tests do."""

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
from pytorch_metric_learning.utils.loss_and_miner_utils import get_all_pairs_indices

from pml_tacl import (
    AttentionConsistencyLoss,
    ContrastiveClusteringLoss,
    ContrastiveClusteringMiner,
)
from tests.losses.batch import CENTROIDS, CLEAN, EMBEDDINGS, LABELS, MAPS, POINTS


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
    memory = torch.cat([EMBEDDINGS, torch.randn(20, 6, generator=torch.Generator().manual_seed(1))])
    memory_labels = torch.cat([LABELS, torch.arange(20) % 5])
    loss = ContrastiveClusteringLoss()
    pairs = get_all_pairs_indices(LABELS, memory_labels)
    assert loss(EMBEDDINGS, LABELS, pairs, memory, memory_labels) > 0
    alone = loss(EMBEDDINGS, LABELS, None, EMBEDDINGS.clone(), LABELS.clone())
    torch.testing.assert_close(alone, loss(EMBEDDINGS, LABELS))
