import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pml_tacl.trainers import data
from pml_tacl.trainers.data import draw_order
from pml_tacl.trainers.order import draw_by_clusters


def draw(labels, per_cluster=4, batch=16, batches=50, seed=0):
    labels = np.asarray(labels)
    generator = np.random.default_rng(seed)
    return draw_by_clusters(labels, per_cluster, batch, batches * batch, generator)


@st.composite
def draws(draw_from):
    sizes = draw_from(st.lists(st.integers(1, 12), min_size=1, max_size=12))
    noise = draw_from(st.integers(0, 5))
    seed = draw_from(st.integers(0, 2**31))
    labels = np.repeat(np.arange(len(sizes)), sizes)
    labels = np.concatenate([labels, np.full(noise, -1)])
    labels = np.random.default_rng(seed).permutation(labels)
    per_cluster = draw_from(st.integers(1, 5))
    of_batch = draw_from(st.integers(1, len(sizes)))
    return labels, per_cluster, per_cluster * of_batch, draw_from(st.integers(1, 30)), seed


@given(draws())
@settings(max_examples=60, deadline=None)
def test_each_batch_holds_so_many_images_of_each_of_its_clusters(case):
    labels, per_cluster, batch, batches, seed = case
    order = draw(labels, per_cluster, batch, batches, seed).reshape(batches, -1, per_cluster)
    groups = labels[order]
    assert (groups >= 0).all()
    assert (groups == groups[..., :1]).all()
    sizes = np.bincount(labels[labels >= 0])
    given_by = {cluster: [] for cluster in range(len(sizes))}
    for row in order:
        clusters = labels[row[:, 0]]
        assert len(set(clusters)) == len(clusters)
        for cluster, images in zip(clusters, row, strict=True):
            given_by[cluster].extend(images)
            _, times = np.unique(images, return_counts=True)
            most, least = -(-per_cluster // sizes[cluster]), per_cluster // sizes[cluster]
            assert times.max() <= most
            assert len(times) == min(per_cluster, sizes[cluster])
            assert times.min() >= max(1, least)
    for cluster, images in given_by.items():
        # All images of a cluster come before one comes again.
        for start in range(0, len(images), sizes[cluster]):
            once = images[start : start + sizes[cluster]]
            assert len(set(once)) == len(once)


def test_a_seed_gives_the_same_order_and_another_seed_another():
    labels = np.arange(300) % 30
    assert np.array_equal(draw(labels), draw(labels))
    assert not np.array_equal(draw(labels), draw(labels, seed=1))


def test_images_and_clusters_are_drawn_equally_often():
    labels = np.arange(400) % 10
    order = draw(labels, 2, 8, 5000)
    clusters = np.bincount(labels[order], minlength=10) / len(order)
    assert clusters == pytest.approx(0.1, abs=0.005)
    firsts = np.stack([draw(labels, 2, 8, 1, seed) for seed in range(4000)]).ravel()
    # 32 000 draws of 400 images: 80 each, and 5 standard deviations are 45.
    assert abs(np.bincount(firsts, minlength=400) - 80).max() < 45
    pairs = labels[order].reshape(-1, 4, 2)[..., 0]
    together = (pairs == 0).any(axis=1) & (pairs == 1).any(axis=1)
    assert together.mean() == pytest.approx(4 * 3 / (10 * 9), abs=0.02)


def test_labels_may_have_gaps():
    order = draw(np.repeat([3, 1000, 70], 5), 2, 6, 20)
    assert set(order) == set(range(15))


@pytest.mark.parametrize(
    ("message", "sizes"),
    [
        ("images_per_cluster=3", {"per_cluster": 3}),
        ("images_per_cluster=4 needs 4 clusters, got 2", {}),
    ],
)
def test_what_cannot_be_drawn_is_refused(message, sizes):
    with pytest.raises(ValueError, match=message):
        draw(np.arange(40) % 2, **sizes)


def test_a_million_images_take_less_than_100_megabytes():
    labels = torch.randint(10_000, (1_000_000,), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    tracemalloc.start()
    order = draw_order(labels, True, 1_000_000 // 32 * 32, 4, 32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # NumPy's arrays; torch's are the seeds (8 MB) and the order (16 MB).
    assert peak + 24e6 < 100e6
    assert order.shape == (1_000_000, 2)
    seen = np.bincount(order[:, 0].numpy(), minlength=1_000_000) > 0
    assert seen.mean() > 0.85  # PML's draws leave out 37 %


@pytest.mark.parametrize("clustered", [False, True])
def test_many_images_are_drawn_in_arrays_from_the_global_state(monkeypatch, clustered):
    labels = torch.arange(64) % 8
    labels[5] = -1
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    of_pml = draw_order(labels, clustered, 96, 4, 16)
    monkeypatch.setattr(data, "ORDER_OF_PML_UP_TO", 63)
    torch.manual_seed(0)
    first, after = draw_order(labels, clustered, 96, 4, 16), torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(draw_order(labels, clustered, 96, 4, 16), first)
    assert torch.equal(torch.get_rng_state(), after)
    assert not torch.equal(draw_order(labels, clustered, 96, 4, 16), first)
    assert first.shape == of_pml.shape
    assert not torch.equal(first, of_pml)
    assert len(first[:, 1].unique()) == 96
    if clustered:
        assert 5 not in first[:, 0]
    else:
        assert len(first[:64, 0].unique()) == 64  # the next pass begins when one has ended
