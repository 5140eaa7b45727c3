"""Centroids that follow the embeddings of a training step, of the loss and of the miner."""

import numpy as np
import pytest
import torch
from pytorch_metric_learning.distances import LpDistance

from pml_tacl import ContrastiveClusteringLoss, ContrastiveClusteringMiner
from tests import references as slow

LABELS = torch.tensor([0, 3, -1, 3, 0, 3, 1])
PARTS = [ContrastiveClusteringLoss, ContrastiveClusteringMiner]


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def part(make=ContrastiveClusteringLoss, dtype=torch.float32, **kwargs):
    made = make(**kwargs)
    made.set_centroids(normal(5, 6, seed=1, dtype=dtype))
    return made


@pytest.mark.parametrize("make", PARTS)
@pytest.mark.parametrize("momentum", [0, 0.3, 0.9])
def test_the_formula(make, momentum):
    moving, embeddings = part(make, torch.float64), normal(7, 6, dtype=torch.float64)
    before = slow.as_array(moving.centroids.clone())
    moving.move_centroids(embeddings, LABELS, momentum)
    for label, (old, new) in enumerate(zip(before, slow.as_array(moving.centroids), strict=True)):
        members = [
            slow.normalise(e)
            for e, y in zip(slow.as_array(embeddings), LABELS.tolist(), strict=True)
            if y == label
        ]
        if members:
            mean = slow.normalise(np.sum(members, axis=0))
            old = slow.normalise(momentum * old + (1 - momentum) * mean)
        np.testing.assert_allclose(new, old, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_types_strides_distances_and_autocast(dtype):
    embeddings = normal(7, 6, dtype=dtype)
    expected, got = part(), part(distance=LpDistance())
    expected.move_centroids(embeddings.float(), LABELS, 0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got.move_centroids(embeddings.T.contiguous().T, LABELS.int(), 0.3)
    torch.testing.assert_close(got.centroids, expected.centroids, rtol=0, atol=1e-6)
    assert got.centroids.dtype == torch.float32


def test_order_of_the_batch_and_double_rows_change_nothing():
    embeddings, order = normal(7, 6), torch.tensor([4, 2, 6, 0, 5, 3, 1])
    expected, got = part(), part()
    expected.move_centroids(embeddings, LABELS, 0.3)
    got.move_centroids(embeddings[order].repeat(2, 1), LABELS[order].repeat(2), 0.3)
    torch.testing.assert_close(got.centroids, expected.centroids, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("embeddings", "labels"),
    [
        (normal(0, 6), torch.empty(0, dtype=torch.long)),
        (normal(2, 6), torch.tensor([-1, -1])),
        (torch.full((2, 6), torch.nan), torch.tensor([0, 1])),
        (torch.zeros(2, 6), torch.tensor([0, 1])),
        (torch.tensor([[1.0] * 6, [-1.0] * 6]), torch.tensor([2, 2])),
    ],
    ids=["empty", "noise", "NaN", "zero", "opposites"],
)
def test_what_has_no_mean_moves_no_centroid(embeddings, labels):
    moving = part()
    before = moving.centroids.clone()
    moving.move_centroids(embeddings, labels, 0)
    assert torch.equal(moving.centroids, before)


def test_a_momentum_of_1_keeps_every_bit_and_a_batch_of_one_moves():
    moving = part()
    before = moving.centroids.clone()
    moving.move_centroids(normal(7, 6), LABELS, 1)
    assert torch.equal(moving.centroids, before)
    moving.move_centroids(normal(1, 6), torch.tensor([2]))
    assert (moving.centroids != before).any(dim=1).tolist() == [False, False, True, False, False]


def test_means_of_a_batch_need_no_moving():
    loss = ContrastiveClusteringLoss()
    loss.move_centroids(normal(7, 6), LABELS)
    assert loss.centroids is None


def test_gradients_are_those_of_the_centroids_before():
    loss, embeddings = part(), normal(7, 6).requires_grad_()
    expected = torch.autograd.grad(part()(embeddings, LABELS), embeddings)
    value = loss(embeddings, LABELS)
    got = torch.autograd.grad(value, embeddings)
    loss.move_centroids(embeddings, LABELS)
    assert not loss.centroids.requires_grad
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("make", PARTS)
def test_neither_a_loaded_state_nor_what_was_set_moves_along(make):
    given = torch.nn.functional.normalize(normal(5, 6, seed=1))
    first, second = make(), make()
    first.set_centroids(given)
    state, before = first.state_dict(), given.clone()
    second.load_state_dict(state)
    second.move_centroids(normal(7, 6), LABELS, 0)
    torch.testing.assert_close(first.centroids, before)
    assert not torch.equal(second.centroids, first.centroids)
    first.move_centroids(normal(7, 6), LABELS, 0)
    assert torch.equal(given, before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: part().move_centroids(normal(7, 6), LABELS, 1.5), r"in \[0, 1\], got 1.5"),
        (lambda: part().move_centroids(normal(7, 6), LABELS, float("nan")), "got nan"),
        (lambda: part().move_centroids(normal(7, 5), LABELS), "5 dimensions and the centroids 6"),
        (lambda: part().move_centroids(normal(7, 6), LABELS + 2), "5 centroids, got label 5"),
        (lambda: part().move_centroids(normal(7, 6), LABELS[:5]), r"\(5,\) do not fit .*\(7, 6\)"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
