"""The functional core against loops in float64, its gradients, its edges and its complaints."""

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from pml_tacl import functional as core
from tests import references as slow

TEMPERATURES = [None, 0.2]


def maps(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def some_points(n, g, seed=0):
    """Some inside, some outside of the second view."""
    generator = torch.Generator().manual_seed(seed)
    return 2.6 * torch.rand(n, g, 2, dtype=torch.float64, generator=generator) - 1.3


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_cross_image_attention_is_the_formula(temperature):
    first, other = maps(3, 5, 2, 4), maps(3, 5, 3, 2, seed=1)
    attention = core.cross_image_attention(first, other, temperature)
    for p in range(3):
        expected = slow.cross_image_attention(first[p].numpy(), other[p].numpy(), temperature)
        np.testing.assert_allclose(attention[p], expected, rtol=1e-12)


def test_soft_maximum_tends_to_the_hard_one_from_below():
    first, other = maps(2, 5, 3, 3), maps(2, 5, 3, 3, seed=1)
    hard = core.cross_image_attention(first, other)
    for temperature in (1.0, 0.1, 0.01):
        soft = core.cross_image_attention(first, other, temperature)
        assert (soft <= hard).all()
        assert (hard - soft).max() <= temperature * np.log(9) + 1e-12


def test_an_image_finds_itself_everywhere():
    first = maps(2, 5, 3, 3)
    torch.testing.assert_close(
        core.cross_image_attention(first, first), torch.ones(2, 3, 3, dtype=torch.float64)
    )


def test_sampling_is_bilinear_and_zero_where_not_visible():
    values, points = maps(3, 4, 5), some_points(3, 30)
    read, visible = core.sample_at_points(values, points)
    for n in range(3):
        for g in range(30):
            expected = slow.sample(values[n].numpy(), *points[n, g].tolist())
            assert visible[n, g] == (expected is not None)
            assert read[n, g] == pytest.approx(0.0 if expected is None else expected, abs=1e-12)
    assert 0 < visible.double().mean() < 1


def test_sampling_reads_every_channel():
    values, points = maps(2, 3, 4, 5), some_points(2, 7)
    read, _ = core.sample_at_points(values, points)
    assert read.shape == (2, 3, 7)
    for c in range(3):
        torch.testing.assert_close(read[:, c], core.sample_at_points(values[:, c], points)[0])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_attention_consistency_is_the_formula(temperature, weighted):
    first, second, points = maps(4, 5, 2, 3), maps(4, 5, 3, 2, seed=1), some_points(4, 6)
    weights = maps(4, 6, seed=2).abs() if weighted else None
    anchors, positives = torch.tensor([0, 1, 2, 0, 3]), torch.tensor([1, 0, 2, 3, 0])
    losses = core.attention_consistency(
        first, second, points, anchors, positives, weights, temperature
    )
    for loss, i, j in zip(losses, anchors.tolist(), positives.tolist(), strict=True):
        expected = slow.attention_consistency(
            first.numpy(),
            second.numpy(),
            points.numpy(),
            i,
            j,
            None if weights is None else weights.numpy(),
            temperature,
        )
        assert loss == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("own_batch", [False, True])
def test_background_score_is_the_formula(temperature, labelled, own_batch):
    images = maps(4, 5, 2, 3)
    labels = torch.tensor([0, 1, 0, -1]) if labelled else None
    others = images if own_batch else maps(3, 5, 3, 2, seed=1)
    other_labels = labels if own_batch else (torch.tensor([1, 2, -1]) if labelled else None)
    common = core.background_score(
        images,
        labels,
        None if own_batch else others,
        None if own_batch else other_labels,
        temperature,
    )
    if not labelled:  # every image is a cluster of its own
        labels = torch.arange(4)
        other_labels = labels if own_batch else torch.arange(10, 13)
    expected = slow.background_score(
        images.numpy(), labels.tolist(), others.numpy(), other_labels.tolist(), temperature
    )
    np.testing.assert_allclose(common, expected, rtol=1e-12)


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 100])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_chunk_size_changes_no_value(chunk_size, temperature):
    first, second = maps(4, 5, 3, 3), maps(4, 5, 2, 3, seed=1)
    points, labels = some_points(4, 9), torch.tensor([0, 1, 1, 2])
    anchors, positives = torch.arange(4).repeat(2), torch.tensor([1, 2, 3, 0, 2, 3, 0, 1])

    def run(size):
        a, b = (x.clone().requires_grad_() for x in (first, second))
        losses = core.attention_consistency(
            a, b, points, anchors, positives, None, temperature, size
        )
        losses.sum().backward()
        common = core.background_score(first, labels, temperature=temperature, chunk_size=size)
        return losses, a.grad, b.grad, common

    for whole, chunked in zip(run(None), run(chunk_size), strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradients_are_those_of_finite_differences(temperature):
    first = maps(3, 4, 2, 3).requires_grad_()
    second = maps(3, 4, 3, 2, seed=1).requires_grad_()
    points, weights = some_points(3, 6), maps(3, 6, seed=2).abs().requires_grad_()
    # Image 0 is anchor twice, and both sides of a pair; image 2 is a reference alone.
    anchors, positives = torch.tensor([0, 1, 0, 0]), torch.tensor([1, 0, 2, 0])
    assert gradcheck(
        lambda a, b, w: core.attention_consistency(
            a, b, points, anchors, positives, w, temperature
        ),
        (first, second, weights),
    )
    other = maps(3, 4, 1, 4, seed=3).requires_grad_()
    assert gradcheck(lambda a, b: core.cross_image_attention(a, b, temperature), (first, other))


def test_gradient_of_contrastive_clustering():
    own, others = maps(5, seed=1).requires_grad_(), maps(5, 3, seed=2).requires_grad_()
    valid = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 0]]).bool()
    assert gradcheck(lambda a, b: core.contrastive_clustering(a, b, 0.3), (own, others))
    assert gradcheck(lambda a, b: core.contrastive_clustering(a, b, 0.3, valid), (own, others))


def test_contrastive_clustering_is_the_formula():
    own, others = maps(6, seed=1), maps(6, 3, seed=2)
    expected = [
        max(0.0, a - sum(row) / 3 + 0.3)
        for a, row in zip(own.tolist(), others.tolist(), strict=True)
    ]
    losses = core.contrastive_clustering(own, others, 0.3)
    np.testing.assert_allclose(losses, expected, rtol=1e-12)
    # What is not valid may hold anything; the rest decides.
    valid = torch.tensor([True, False, True]).expand(6, 3)
    others[:, 1] = torch.inf
    torch.testing.assert_close(
        core.contrastive_clustering(own, others, 0.3, valid),
        core.contrastive_clustering(own, others[:, [0, 2]], 0.3),
    )


def test_no_other_centre_gives_zero_with_a_graph():
    own = maps(3).requires_grad_()
    nothing = torch.zeros(3, 2, dtype=torch.bool)
    for others, valid in ((maps(3, 0), None), (maps(3, 2), nothing)):
        loss = core.contrastive_clustering(own, others, 0.3, valid)
        assert loss.tolist() == [0, 0, 0]
        assert torch.autograd.grad(loss.sum(), own)[0].tolist() == [0, 0, 0]


def test_a_pair_without_a_visible_cell_gives_zero_with_a_graph():
    first, second = maps(2, 4, 2, 2).requires_grad_(), maps(2, 4, 2, 2, seed=1).requires_grad_()
    points = torch.zeros(2, 4, 2, dtype=torch.float64)
    points[0] = 3.0
    pair = torch.tensor([0, 1]), torch.tensor([1, 0])
    losses = core.attention_consistency(first, second, points, *pair)
    assert losses[0] == 0
    assert losses[1] > 0
    for gradient in torch.autograd.grad(losses[0], (first, second)):
        assert (gradient == 0).all()


def test_no_pairs_and_one_image():
    first, second = maps(1, 4, 2, 2).requires_grad_(), maps(1, 4, 2, 2, seed=1).requires_grad_()
    points, none = some_points(1, 4), torch.empty(0, dtype=torch.long)
    losses = core.attention_consistency(first, second, points, none, none)
    assert losses.shape == (0,)
    for gradient in torch.autograd.grad(losses.sum(), (first, second)):
        assert (gradient == 0).all()
    assert core.cross_image_attention(first[:0], first[:0]).shape == (0, 2, 2)
    assert (core.background_score(first) == 0).all()
    assert core.background_score(first[:0]).shape == (0, 2, 2)


def test_a_zero_vector_is_like_nothing_and_takes_no_gradient():
    first, other = maps(1, 4, 1, 2), maps(1, 4, 1, 2, seed=1)
    first[..., 0] = 0
    first.requires_grad_()
    attention = core.cross_image_attention(first, other)
    assert attention[0, 0, 0] == 0
    gradient = torch.autograd.grad(attention.sum(), first)[0]
    assert (gradient[..., 0] == 0).all()
    assert (gradient[..., 1] != 0).any()


def test_the_gradient_cannot_be_differentiated_once_more():
    first = maps(1, 4, 2, 2).requires_grad_()
    attention = core.cross_image_attention(first, maps(1, 4, 2, 2, seed=1))
    gradient = torch.autograd.grad(attention.square().sum(), first, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


FIRST, POINTS, PAIR = maps(2, 4, 2, 3), some_points(2, 6), torch.tensor([0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: core.cross_image_attention(FIRST[0], FIRST), r"must be \(P, C, H, W\), got \(4,"),
        (lambda: core.cross_image_attention(FIRST, FIRST[:1]), r"agree in P and C, got \(2, 4"),
        (lambda: core.cross_image_attention(FIRST, FIRST, 0.0), "temperature must be positive"),
        (lambda: core.cross_image_attention(FIRST, FIRST, None, 0), "chunk_size must be at least"),
        (lambda: core.background_score(FIRST, temperature=-1.0), "temperature must be positive"),
        (lambda: core.background_score(FIRST, references=FIRST[:, :3]), "have the 4 channels"),
        (lambda: core.sample_at_points(FIRST, POINTS[:1]), r"\(N, G, 2\) with the same N"),
        (lambda: core.sample_at_points(FIRST[0, 0], POINTS), r"maps must be \(N, H, W\)"),
        (
            lambda: core.attention_consistency(FIRST, FIRST[:, :3], POINTS, PAIR, PAIR),
            "with the same N and C",
        ),
        (
            lambda: core.attention_consistency(FIRST, FIRST, POINTS[:, :5], PAIR, PAIR),
            r"points must be \(2, 6, 2\).*grid must be \(2, 3\)",
        ),
        (
            lambda: core.attention_consistency(FIRST, FIRST, POINTS, PAIR, PAIR, POINTS),
            r"weights must be \(2, 6\)",
        ),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
