import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_metric_learning.distances import (
    CosineSimilarity,
    DotProductSimilarity,
    LpDistance,
    SNRDistance,
)
from pytorch_metric_learning.losses import MultiSimilarityLoss, TripletMarginLoss
from pytorch_metric_learning.utils.loss_and_miner_utils import get_all_pairs_indices

from pml_tacl import ContrastiveClusteringLoss, ContrastiveClusteringMiner
from tests import references as slow

# Distances that have a zero: a cosine is compared as 1 - cosine.
DISTANCES = {
    "cosine": (CosineSimilarity, lambda a, b: 1 - slow.cosine(a, b)),
    "l2": (LpDistance, slow.DISTANCES["l2"]),
    "l1": (lambda: LpDistance(p=1), slow.DISTANCES["l1"]),
    "l2 squared": (lambda: LpDistance(power=2), slow.DISTANCES["l2 squared"]),
    "snr": (SNRDistance, slow.DISTANCES["snr"]),
}


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def nearest_others(embedding, label, centroids, measure, count):
    ranked = sorted((measure(embedding, c), y) for y, c in centroids.items() if y != label)
    return ranked[:count]


def expected(embeddings, labels, reference, ref_labels, centroids, measure, count, most):
    """Sets of positive and negative pairs, by loops."""
    same_set = reference is embeddings
    rows = slow.as_array(embeddings)

    def is_sure(e, y):
        if y not in centroids:
            return False
        others = nearest_others(e, y, centroids, measure, 1)
        return not others or measure(e, centroids[y]) <= most * others[0][0]

    sure = [is_sure(e, y) for e, y in zip(rows, labels, strict=True)]
    positives, negatives = set(), set()
    for i, (e, y) in enumerate(zip(rows, labels, strict=True)):
        if not sure[i]:
            continue
        hard = {label for _, label in nearest_others(e, y, centroids, measure, count)}
        for j, other in enumerate(ref_labels):
            if other < 0 or (same_set and (i == j or not sure[j])):
                continue
            if other == y:
                positives.add((i, j))
            elif other in hard:
                negatives.add((i, j))
    return positives, negatives


def pairs(mined):
    a1, p, a2, n = (x.tolist() for x in mined)
    positives, negatives = list(zip(a1, p, strict=True)), list(zip(a2, n, strict=True))
    assert len(set(positives)) == len(positives)
    assert len(set(negatives)) == len(negatives)
    return set(positives), set(negatives)


@pytest.mark.parametrize("p", [1, 2])
def test_centroids_of_the_references_are_means(p):
    rows = slow.as_array(normal(5, 4))
    centroids = slow.batch_means(rows, [0, 1, 0, -1, 1], p=p)
    assert sorted(centroids) == [0, 1]
    np.testing.assert_allclose(
        centroids[0], (slow.normalise(rows[0], p) + slow.normalise(rows[2], p)) / 2
    )


@slow.examples
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 12),
    st.sampled_from(sorted(DISTANCES)),
    st.sampled_from(["set", "batch", "reference", "set, reference"]),
    st.integers(1, 4),
    st.sampled_from([0.7, 0.95, 1.0, 1.5]),
)
def test_pairs_are_those_of_the_loops(seed, n, name, centroids_of, count, most):
    make, measure = DISTANCES[name]
    embeddings, labels = normal(n, 4, seed=seed), normal(n, seed=seed + 1)
    labels = (labels * 1.5 + 1).round().clamp(-1, 3).long()
    reference, ref_labels = embeddings, labels
    if "reference" in centroids_of:
        reference = normal(8, 4, seed=seed + 2)
        ref_labels = torch.tensor([0, 3, 1, -1, 0, 1, 3, 0])
    miner = ContrastiveClusteringMiner(count, most, distance=make())
    if "set" in centroids_of:
        centroids = normal(4, 4, seed=seed + 3)
        miner.set_centroids(centroids)
        centroids = {y: slow.normalise(c) for y, c in enumerate(slow.as_array(centroids))}
    else:
        p = 1 if name == "l1" else 2
        centroids = slow.batch_means(slow.as_array(reference), ref_labels.tolist(), p=p)
    given_reference = () if reference is embeddings else (reference, ref_labels)
    mined = pairs(miner(embeddings, labels, *given_reference))
    wanted = expected(
        embeddings, labels.tolist(), reference, ref_labels.tolist(), centroids, measure, count, most
    )
    assert mined == wanted


def test_it_leaves_out_what_lies_nearer_to_another_centroid():
    miner = ContrastiveClusteringMiner(collect_stats=True)
    miner.set_centroids(torch.eye(2))
    embeddings = torch.tensor([[1.0, 0.1], [1.0, 0.2], [0.9, 1.0], [0.1, 1.0], [0.2, 1.0]])
    labels = torch.tensor([0, 0, 0, 1, -1])  # the third is on the wrong side, the last is noise
    a1, p, a2, n = miner(embeddings, labels)
    assert set(zip(a1.tolist(), p.tolist(), strict=True)) == {(0, 1), (1, 0)}
    wanted = {(0, 3), (1, 3), (3, 0), (3, 1)}
    assert set(zip(a2.tolist(), n.tolist(), strict=True)) == wanted
    assert (miner.num_ambiguous, miner.num_pos_pairs, miner.num_neg_pairs) == (1, 2, 4)


@pytest.mark.parametrize("loss", [MultiSimilarityLoss(), TripletMarginLoss()])
@pytest.mark.parametrize("with_centroids", [False, True])
def test_pml_s_losses_take_its_pairs(loss, with_centroids):
    embeddings = normal(20, 6).float().requires_grad_()
    labels = torch.arange(20) // 4
    miner = ContrastiveClusteringMiner(2, 1.5)
    miner.set_centroids(normal(5, 6, seed=1) if with_centroids else None)
    loss(embeddings, labels, miner(embeddings, labels)).backward()
    assert embeddings.grad.abs().sum() > 0


def test_all_clusters_and_no_ambiguity_give_all_pairs():
    embeddings, labels = normal(20, 6), torch.arange(20) // 4
    mined = ContrastiveClusteringMiner(100, 1e6)(embeddings, labels)
    for got, wanted in zip(mined, get_all_pairs_indices(labels), strict=True):
        assert got.tolist() == wanted.tolist()


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("centroids", [None, torch.eye(3, 4)])
def test_no_image_and_one_give_no_pair(n, centroids):
    miner = ContrastiveClusteringMiner()
    miner.set_centroids(centroids)
    for mined in (
        miner(torch.ones(n, 4), torch.zeros(n, dtype=torch.long)),
        miner(torch.ones(n, 4), torch.zeros(n, dtype=torch.long), torch.ones(0, 4), torch.ones(0)),
    ):
        assert [x.shape for x in mined] == [(0,)] * 4
        assert all(x.dtype == torch.long for x in mined)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", DISTANCES)
def test_floating_types_and_autocast_give_the_same_pairs(name, dtype):
    embeddings, labels = normal(20, 16).to(dtype), torch.arange(20) // 4
    miner = ContrastiveClusteringMiner(2, 1.2, distance=DISTANCES[name][0]())
    wanted = pairs(miner(embeddings.double(), labels))
    assert all(wanted)
    assert pairs(miner(embeddings, labels)) == wanted
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pairs(miner(embeddings, labels)) == wanted


def test_it_keeps_no_graph():
    embeddings = normal(8, 4).requires_grad_()
    for x in ContrastiveClusteringMiner(max_ambiguity=9.0)(embeddings, torch.arange(8) // 2):
        assert not x.requires_grad


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ContrastiveClusteringMiner(0), "num_negatives must be an integer .* 1, got 0"),
        (lambda: ContrastiveClusteringMiner(2.5), "num_negatives must be an integer .* got 2.5"),
        (
            lambda: ContrastiveClusteringMiner(max_ambiguity=0),
            "max_ambiguity must be a number above 0, got 0",
        ),
        (
            lambda: ContrastiveClusteringMiner(max_ambiguity=float("nan")),
            "max_ambiguity must be a number above 0, got nan",
        ),
        (
            lambda: ContrastiveClusteringMiner(
                distance=DotProductSimilarity(normalize_embeddings=False)
            ),
            "distance must not be a similarity without normalisation",
        ),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_no_limit_of_ambiguity_leaves_no_image_out():
    miner = ContrastiveClusteringMiner(max_ambiguity=float("inf"), collect_stats=True)
    miner(normal(8, 4), torch.arange(8) // 2)
    assert miner.num_ambiguous == 0


def test_centroids_are_checked_as_in_the_loss():
    for make in (ContrastiveClusteringMiner, ContrastiveClusteringLoss):
        x = make()
        x.set_centroids(torch.eye(2, 4))
        with pytest.raises(ValueError, match="the 2 centroids, got label 3"):
            x(torch.ones(4, 4), torch.arange(4))
