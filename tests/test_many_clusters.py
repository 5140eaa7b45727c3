"""k-means in two levels beside k-means of all clusters at once."""

import numpy as np
import pytest
import torch

from pml_tacl.clustering import KMeansPseudoLabeler, kmeans

COUNT, PER_CLASS, D = 6_000, 12, 24
CLUSTERS = COUNT // PER_CLASS


def classes(seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(COUNT) // PER_CLASS)
    centroids = rng.standard_normal((CLUSTERS, D), dtype=np.float32)
    rows = centroids[labels] + 0.6 * rng.standard_normal((COUNT, D), dtype=np.float32)
    return rows, labels


@pytest.fixture
def two_levels(monkeypatch):
    monkeypatch.setattr(kmeans, "TWO_LEVELS_ABOVE", CLUSTERS - 1)


@pytest.fixture(scope="module")
def exact():
    return KMeansPseudoLabeler(CLUSTERS)(classes()[0])


def purity(labels, truth):
    pairs, counts = np.unique(np.stack([labels, truth]), axis=1, return_counts=True)
    largest = np.zeros(labels.max() + 1)
    np.maximum.at(largest, pairs[0], counts)
    return largest.sum() / len(labels)


def test_two_levels_lose_little_quality(two_levels, exact):
    rows, truth = classes()
    found = KMeansPseudoLabeler(CLUSTERS)(rows)
    assert found.centroids.shape[0] > 0.97 * CLUSTERS
    assert found.distances.mean() < 1.03 * exact.distances.mean()
    ours, theirs = (purity(x.labels.numpy(), truth) for x in (found, exact))
    assert ours > theirs - 0.03
    # Labels and centroids agree: each centroid is the mean of its members.
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for cluster in (0, 7):
        mean = unit[found.labels.numpy() == cluster].mean(axis=0)
        assert np.allclose(mean / np.linalg.norm(mean), found.centroids[cluster], atol=1e-5)
    own = (unit * found.centroids.numpy()[found.labels]).sum(axis=1)
    nearest = (unit @ found.centroids.numpy().T).max(axis=1)
    assert (own < nearest - 1e-3).mean() < 0.05  # few look at the wrong cells


def test_they_are_the_same_each_time_and_follow_the_seed(two_levels):
    rows, _ = classes()
    first, again = (KMeansPseudoLabeler(CLUSTERS)(rows).labels for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, KMeansPseudoLabeler(CLUSTERS, seed=1)(rows).labels)


def test_labels_keep_their_meaning_from_given_centroids(two_levels):
    rows, _ = classes()
    first = KMeansPseudoLabeler(CLUSTERS)(rows)
    moved = rows + 0.02 * np.random.default_rng(1).standard_normal(rows.shape, dtype=np.float32)
    again = KMeansPseudoLabeler(CLUSTERS)(moved, first.centroids)
    similar = (first.centroids @ again.centroids.T).argmax(dim=1)
    if len(again.centroids) == len(first.centroids):
        assert (similar == torch.arange(len(similar))).float().mean() > 0.95
    assert again.distances.mean() < 1.02 * first.distances.mean()


def test_below_the_bound_nothing_changes(exact, monkeypatch):
    monkeypatch.setattr(kmeans, "TWO_LEVELS_ABOVE", CLUSTERS)
    found = KMeansPseudoLabeler(CLUSTERS)(classes()[0])
    assert torch.equal(found.labels, exact.labels)


def test_many_rows_are_learnt_from_a_sample(monkeypatch):
    rows, _ = classes()
    monkeypatch.setattr(kmeans, "_MOST_POINTS", 1000)
    monkeypatch.setattr(kmeans, "_POINTS_A_CLUSTER", 10)
    found, told = (KMeansPseudoLabeler(50, max_points=n)(rows) for n in (None, 1000))
    assert torch.equal(found.labels, told.labels)
    found, told = (KMeansPseudoLabeler(200, max_points=n)(rows) for n in (None, 2000))
    assert torch.equal(found.labels, told.labels)


@pytest.mark.parametrize("sizes", [[5, 0, 3, 12], [1, 1, 1], [40, 2]])
def test_shares_are_whole_and_fit(sizes):
    for number in range(1, sum(sizes) + 1):
        shares = kmeans._shares(number, sizes)
        assert sum(shares) == number
        assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
        exact = np.array(sizes) * number / sum(sizes)
        assert np.abs(np.array(shares) - exact).max() < 1
