import numpy as np
import pytest
import torch
from pytorch_metric_learning.distances import (
    CosineSimilarity,
    DotProductSimilarity,
    LpDistance,
    SNRDistance,
)
from pytorch_metric_learning.losses import MultipleLosses, MultiSimilarityLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner, TripletMarginMiner
from pytorch_metric_learning.utils.loss_and_miner_utils import convert_to_weights
from torch.autograd import gradcheck

from pml_tacl import ContrastiveClusteringLoss
from tests import references as slow

# Name in the references: (distance, does it normalise, with which norm).
DISTANCES = {
    "cosine": (CosineSimilarity, True, 2),
    "cosine cubed": (lambda: CosineSimilarity(power=3), True, 2),
    "l1-normalised dot": (lambda: DotProductSimilarity(p=1), True, 1),
    "dot": (lambda: DotProductSimilarity(normalize_embeddings=False), False, 2),
    "l2": (LpDistance, True, 2),
    "l2 squared": (lambda: LpDistance(power=2), True, 2),
    "l1": (lambda: LpDistance(p=1), True, 1),
    "euclidean": (lambda: LpDistance(normalize_embeddings=False), False, 2),
    "snr": (SNRDistance, True, 2),
}
LABELS = torch.tensor([0, 1, 2, 1, 0, -1, 3, 2, -1])


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)


def expected(embeddings, labels, centroids, num_negatives=2, margin=0.6, distance="cosine"):
    """Slow losses of the embeddings whose label has a centroid."""
    return np.array(
        [
            slow.contrastive_clustering(e, y, centroids, num_negatives, margin, distance)
            for e, y in zip(slow.as_array(embeddings), labels.tolist(), strict=True)
            if y in centroids
        ]
    )


def set_centroids(centroids, unit=True):
    rows = slow.as_array(centroids)
    return {y: slow.normalise(row) if unit else row for y, row in enumerate(rows)}


@pytest.mark.parametrize("num_negatives", [1, 2, 50])
@pytest.mark.parametrize("name", DISTANCES)
def test_the_formula_with_centroids_set(name, num_negatives):
    embeddings, centroids = normal(9, 6), normal(5, 6, seed=1)
    loss = ContrastiveClusteringLoss(0.6, num_negatives, distance=DISTANCES[name][0]())
    loss.set_centroids(3 * centroids)  # scaled to unit norm
    losses = expected(embeddings, LABELS, set_centroids(centroids), num_negatives, distance=name)
    assert len(losses) == 7
    assert (losses > 0).any()
    assert loss(embeddings, LABELS) == pytest.approx(losses.mean(), rel=1e-9)


@pytest.mark.parametrize("name", DISTANCES)
def test_the_formula_with_means_of_the_batch(name):
    distance, normalised, p = DISTANCES[name]
    embeddings = normal(9, 6)
    loss = ContrastiveClusteringLoss(0.6, 2, distance=distance())
    centroids = slow.batch_means(slow.as_array(embeddings), LABELS.tolist(), normalised, p)
    losses = expected(embeddings, LABELS, centroids, distance=name)
    assert loss(embeddings, LABELS) == pytest.approx(losses.mean(), rel=1e-9)


@pytest.mark.parametrize("name", DISTANCES)
def test_the_formula_with_means_of_a_reference_set(name):
    distance, normalised, p = DISTANCES[name]
    embeddings, reference = normal(9, 6), normal(7, 6, seed=1)
    reference_labels = torch.tensor([1, 7, -1, 2, 2, 7, 1])  # lacks 0 and 3
    loss = ContrastiveClusteringLoss(0.6, 2, distance=distance())
    centroids = slow.batch_means(slow.as_array(reference), reference_labels.tolist(), normalised, p)
    losses = expected(embeddings, LABELS, centroids, distance=name)
    assert len(losses) == 4
    value = loss(embeddings, LABELS, ref_emb=reference, ref_labels=reference_labels)
    assert value == pytest.approx(losses.mean(), rel=1e-9)


@pytest.mark.parametrize("name", DISTANCES)
def test_gradients(name):
    embeddings = normal(9, 6).requires_grad_()
    reference = normal(9, 6, seed=1).requires_grad_()
    # A margin at which no loss is near the hinge.
    loss = ContrastiveClusteringLoss(20.0, 2, distance=DISTANCES[name][0]())
    assert gradcheck(lambda e: loss(e, LABELS), embeddings)
    assert gradcheck(
        lambda e, r: loss(e, LABELS, ref_emb=r, ref_labels=LABELS), (embeddings, reference)
    )
    loss.set_centroids(normal(5, 6, seed=2))
    assert gradcheck(lambda e: loss(e, LABELS), embeddings)


def test_default_and_general_path_agree():
    class Cosine(CosineSimilarity):
        """Not CosineSimilarity itself: takes the path of any distance."""

    embeddings = normal(9, 6).requires_grad_()
    results = []
    for distance in (CosineSimilarity(), Cosine(), DotProductSimilarity()):
        loss = ContrastiveClusteringLoss(0.6, 2, distance=distance)
        loss.set_centroids(normal(5, 6, seed=1))
        value = loss(embeddings, LABELS)
        results.append((value, *torch.autograd.grad(value, embeddings)))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_centroids_take_no_gradient_and_means_do():
    reference = normal(4, 6, seed=1).requires_grad_()
    loss = ContrastiveClusteringLoss(1.0)
    loss.set_centroids(reference)
    assert not loss.centroids.requires_grad
    loss.set_centroids(None)
    value = loss(normal(4, 6), torch.arange(4), ref_emb=reference, ref_labels=torch.arange(4))
    assert torch.autograd.grad(value, reference)[0].abs().sum() > 0


@pytest.mark.parametrize("centroids", [None, torch.eye(1, 6)])
def test_a_single_cluster_gives_zero_with_a_graph(centroids):
    loss, embeddings = ContrastiveClusteringLoss(), normal(3, 6).requires_grad_()
    loss.set_centroids(centroids)
    value = loss(embeddings, torch.zeros(3, dtype=torch.long))
    value.backward()
    assert value == 0
    assert (embeddings.grad == 0).all()


@pytest.mark.parametrize("centroids", [None, torch.eye(3, 6)])
@pytest.mark.parametrize("labels", [[], [-1, -1]])
def test_nothing_but_noise_gives_zero_with_a_graph(centroids, labels):
    loss, embeddings = ContrastiveClusteringLoss(), normal(len(labels), 6).requires_grad_()
    loss.set_centroids(centroids)
    value = loss(embeddings, torch.tensor(labels, dtype=torch.long))
    value.backward()
    assert value == 0
    assert (embeddings.grad == 0).all()


def test_labels_that_the_reference_lacks_are_left_out():
    embeddings, reference = normal(2, 6), normal(3, 6, seed=1)
    loss = ContrastiveClusteringLoss(1.0)
    both = loss(embeddings, torch.tensor([0, 5]), None, reference, torch.arange(3))
    one = loss(embeddings[:1], torch.tensor([0]), None, reference, torch.arange(3))
    torch.testing.assert_close(both, one)


@pytest.mark.parametrize("with_centroids", [False, True])
@pytest.mark.parametrize("miner", [MultiSimilarityMiner(), TripletMarginMiner(), None])
def test_miners_weigh_the_embeddings_as_in_pml(miner, with_centroids):
    embeddings, labels = normal(12, 6, dtype=torch.float32), torch.arange(12) // 3
    empty = torch.empty(0, dtype=torch.long)
    mined = miner(embeddings, labels) if miner else (empty, empty, empty, empty)
    loss = ContrastiveClusteringLoss(0.6, 2)
    centroids = slow.batch_means(slow.as_array(embeddings), labels.tolist())
    if with_centroids:
        loss.set_centroids(normal(4, 6, seed=1))
        centroids = set_centroids(loss.centroids)
    weights = convert_to_weights(mined, labels, torch.float32).numpy()
    assert not miner or 0 < weights.min() < 1 or len(set(weights)) > 1
    losses = expected(embeddings, labels, centroids) * weights
    assert loss(embeddings, labels, mined) == pytest.approx(losses.mean(), rel=1e-5)


@pytest.mark.parametrize("miner", [MultiSimilarityMiner(), TripletMarginMiner()])
def test_with_a_reference_only_anchors_weigh(miner):
    embeddings, labels = normal(12, 6, dtype=torch.float32), torch.arange(12) // 3
    reference, ref_labels = normal(20, 6, seed=1, dtype=torch.float32), torch.arange(20) // 5
    mined = miner(embeddings, labels, reference, ref_labels)
    weights = convert_to_weights(mined, labels, torch.float32, using_ref=True).numpy()
    centroids = slow.batch_means(slow.as_array(reference), ref_labels.tolist())
    losses = expected(embeddings, labels, centroids) * weights
    value = ContrastiveClusteringLoss(0.6, 2)(embeddings, labels, mined, reference, ref_labels)
    assert value == pytest.approx(losses.mean(), rel=1e-5)


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("with_centroids", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_floating_type_is_reduced_in_fp32(dtype, with_centroids, name):
    embeddings = normal(9, 16, dtype=dtype)
    values = []
    for given in (embeddings, embeddings.double()):
        loss = ContrastiveClusteringLoss(20.0, 2, distance=DISTANCES[name][0]())
        loss.set_centroids(normal(5, 16, seed=1) if with_centroids else None)
        given = given.requires_grad_()
        value = loss(given, LABELS)
        values.append((value, *torch.autograd.grad(value, given)))
    (low, low_gradient), (high, high_gradient) = values
    # As PML's losses, in the dtype of the embeddings; all before that one rounding is fp32.
    assert low.dtype == low_gradient.dtype == dtype
    rounding = max(1e-5, torch.finfo(dtype).eps)
    torch.testing.assert_close(low.double(), high, rtol=rounding, atol=1e-6)
    torch.testing.assert_close(low_gradient.double(), high_gradient, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_multiple_losses_add_up_beside_pmls_own_in_any_type(dtype):
    # They are added in place, into the first loss's dtype.
    embeddings, similarity = normal(9, 16, dtype=dtype), MultiSimilarityLoss()
    clustering = ContrastiveClusteringLoss()
    both = MultipleLosses([similarity, clustering])(embeddings, LABELS)
    assert both.dtype == dtype
    assert both == similarity(embeddings, LABELS) + clustering(embeddings, LABELS)


@pytest.mark.parametrize("with_centroids", [False, True])
def test_autocast_changes_nothing(with_centroids):
    embeddings, loss = normal(9, 6, dtype=torch.float32), ContrastiveClusteringLoss()
    loss.set_centroids(normal(5, 6, seed=1) if with_centroids else None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = loss(embeddings, LABELS)
    torch.testing.assert_close(cast, loss(embeddings, LABELS), rtol=0, atol=0)


def test_strides_and_label_types_change_nothing():
    embeddings, loss = normal(9, 6, dtype=torch.float32), ContrastiveClusteringLoss(0.6)
    loss.set_centroids(normal(5, 6, seed=1))
    value = loss(embeddings, LABELS)
    assert loss(embeddings.T.contiguous().T, LABELS) == pytest.approx(value.item())
    assert loss(embeddings, LABELS.int()) == pytest.approx(value.item())


def test_nan_is_not_hidden():
    embeddings, loss = normal(9, 6), ContrastiveClusteringLoss()
    embeddings[0] = torch.nan
    assert loss(embeddings, LABELS).isnan()
    loss.set_centroids(normal(5, 6, seed=1))
    assert loss(embeddings, LABELS).isnan()


CALL = (torch.randn(4, 6), torch.arange(4))


def with_centroids(centroids):
    loss = ContrastiveClusteringLoss()
    loss.set_centroids(centroids)
    return loss


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ContrastiveClusteringLoss(margin=-0.1),
            "margin must be a finite number of at least 0, got -0.1",
        ),
        (lambda: ContrastiveClusteringLoss(margin=float("nan")), "finite number .* got nan"),
        (lambda: ContrastiveClusteringLoss(margin=float("inf")), "finite number .* got inf"),
        (lambda: ContrastiveClusteringLoss(margin="a"), "margin must be .* got 'a'"),
        (lambda: ContrastiveClusteringLoss(margin=True), "margin must be .* got True"),
        (
            lambda: ContrastiveClusteringLoss(num_negatives=0),
            "num_negatives must be an integer of at least 1, got 0",
        ),
        (lambda: ContrastiveClusteringLoss(num_negatives=2.5), "num_negatives must .* got 2.5"),
        (lambda: with_centroids(torch.ones(6)), r"must be \(K, D\) with K >= 1, got \(6,\)"),
        (lambda: with_centroids(torch.ones(0, 6)), r"K >= 1, got \(0, 6\)"),
        (lambda: with_centroids(torch.eye(5, 6) - torch.eye(5, 6)[:1]), "got 1 bad rows of 5"),
        (lambda: with_centroids(torch.full((2, 6), torch.nan)), "finite and not zero"),
        (lambda: with_centroids(torch.eye(3, 6))(*CALL), "the 3 centroids, got label 3"),
        (lambda: with_centroids(torch.eye(5))(*CALL), "have 6 dimensions and the centroids 5"),
        (
            lambda: with_centroids(torch.eye(5, 6))(*CALL, None, CALL[0].clone(), CALL[1]),
            "must be None while centroids",
        ),
        (lambda: ContrastiveClusteringLoss()(CALL[0]), "labels are required"),
        (
            lambda: ContrastiveClusteringLoss()(*CALL, ref_emb=CALL[0].clone()),
            "ref_labels are required",
        ),
        (lambda: ContrastiveClusteringLoss()(CALL[0], torch.arange(3)), "must equal number of"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_misspelt_argument_is_refused():
    with pytest.raises(TypeError, match="num_negative"):
        ContrastiveClusteringLoss(num_negative=3)
