import numpy as np
import pytest
import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.miners import MultiSimilarityMiner, TripletMarginMiner
from pytorch_metric_learning.regularizers import LpRegularizer
from torch.autograd import gradcheck

from pml_tacl import AttentionConsistencyLoss, AttentionConsistencyMiner
from tests import references as slow

LABELS = torch.tensor([0, 1, 0, -1, 1, 0, -1])
MATCHED = [(0, 2), (2, 0), (0, 5), (5, 0), (2, 5), (5, 2), (1, 4), (4, 1)]


def batch(n=7, c=4, h=2, w=3, dtype=torch.float64):
    """Two views and points, some of which are not visible."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(n, c, h, w, dtype=torch.float64, generator=generator)
    second = torch.randn(n, c, w, h, dtype=torch.float64, generator=generator)
    points = 2.6 * torch.rand(n, h * w, 2, dtype=torch.float64, generator=generator) - 1.3
    return first.to(dtype), second.to(dtype), points


def expected(pairs, weights=None, temperature=None):
    first, second, points = (slow.as_array(x) for x in batch())
    weights = None if weights is None else weights.numpy()
    return np.array(
        [
            slow.attention_consistency(first, second, points, i, j, weights, temperature)
            for i, j in pairs
        ]
    )


@pytest.mark.parametrize("temperature", [None, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_formula_over_pairs_of_the_same_label(weighted, temperature):
    weights = torch.rand(7, 6, dtype=torch.float64) if weighted else None
    value = AttentionConsistencyLoss(temperature)(*batch(), LABELS, weights=weights)
    losses = expected(MATCHED, weights, temperature)
    assert value == pytest.approx(losses.mean(), rel=1e-12)


def test_the_formula_over_a_miner_s_pairs():
    anchors, positives = torch.tensor([0, 3, 1, 0]), torch.tensor([1, 2, 1, 6])
    none = torch.empty(0, dtype=torch.long)
    loss = AttentionConsistencyLoss(max_pairs=1)  # which bounds only pairs of its own choice
    chosen = expected([(0, 1), (3, 2), (1, 1), (0, 6)])
    for mined in ((anchors, positives, none, none), (anchors, positives, positives)):
        assert loss(*batch(), indices_tuple=mined) == pytest.approx(chosen.mean(), rel=1e-12)
    # With labels, a pair with noise is left out.
    value = loss(*batch(), LABELS, (anchors, positives, none, none))
    assert value == pytest.approx(chosen[[0, 2]].mean(), rel=1e-12)


def test_labels_beside_a_tuple_change_nothing_without_noise():
    # As PML asks of every loss that can do without labels.
    first, second, points = batch(12)
    labels, loss = torch.arange(12) // 3, AttentionConsistencyLoss()
    pooled = first.mean(dim=(2, 3))
    miners = (MultiSimilarityMiner(), TripletMarginMiner(), AttentionConsistencyMiner())
    for miner, features in zip(miners, (pooled, pooled, first), strict=True):
        mined = miner(features, labels)
        assert len(mined[0]) > 0
        with_labels = loss(first, second, points, labels, mined)
        without = loss(first, second, points, indices_tuple=mined)
        assert with_labels == without > 0
    with pytest.raises(ValueError, match="cannot both be None"):
        loss(first, second, points)


def test_max_pairs_takes_neighbours_in_the_batch_first():
    value = AttentionConsistencyLoss(max_pairs=3)(*batch(), LABELS)
    # apart by 2: (0, 2), (5, 0); by 3: (1, 4) before (2, 5)
    losses = expected([(0, 2), (5, 0), (1, 4)])
    assert value == pytest.approx(losses.mean(), rel=1e-12)


def test_gradients():
    first, second, points = batch()
    weights = torch.rand(7, 6, dtype=torch.float64, requires_grad=True)
    loss = AttentionConsistencyLoss()
    assert gradcheck(
        lambda a, b, w: loss(a, b, points, LABELS, weights=w),
        (first.requires_grad_(), second.requires_grad_(), weights),
    )


@pytest.mark.parametrize(
    ("labels", "mined"),
    [
        (torch.arange(7), None),
        (torch.full((7,), -1), None),
        (None, (torch.empty(0, dtype=torch.long),) * 4),
        (torch.full((7,), -1), (torch.arange(7),) * 3),
    ],
)
def test_no_matched_pair_gives_zero_with_a_graph(labels, mined):
    first, second, points = batch()
    first.requires_grad_()
    value = AttentionConsistencyLoss()(first, second, points, labels, mined)
    value.backward()
    assert value == 0
    assert (first.grad == 0).all()


def test_one_image_and_none():
    for n in (1, 0):
        first, second, points = (x[:n] for x in batch())
        value = AttentionConsistencyLoss()(first.requires_grad_(), second, points, LABELS[:n])
        value.backward()
        assert value == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_floating_type_is_reduced_in_fp32(dtype):
    first, second, points = batch(c=32, dtype=dtype)
    first.requires_grad_()
    low = AttentionConsistencyLoss()(first, second, points, LABELS)
    low.backward()
    high = AttentionConsistencyLoss()(first.double(), second.double(), points, LABELS)
    assert low.dtype == torch.float32
    assert first.grad.dtype == dtype
    assert first.grad.isfinite().all()
    torch.testing.assert_close(low.double(), high, rtol=2e-2, atol=1e-4)


def test_autocast_and_layout_change_nothing():
    first, second, points = batch(c=32, dtype=torch.float32)
    loss = AttentionConsistencyLoss()
    plain = loss(first, second, points, LABELS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = loss(first, second, points, LABELS)
    torch.testing.assert_close(cast, plain, rtol=0, atol=0)
    last = (x.contiguous(memory_format=torch.channels_last) for x in (first, second))
    torch.testing.assert_close(loss(*last, points, LABELS), plain)
    sparse = torch.stack([first, first], dim=-1)[..., 0]
    assert not sparse.is_contiguous()
    torch.testing.assert_close(loss(sparse, second, points, LABELS), plain)


FIRST, SECOND, POINTS = batch()


def call(first=FIRST, second=SECOND, points=POINTS, labels=LABELS, *rest):
    return lambda: AttentionConsistencyLoss()(first, second, points, labels, *rest)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda: AttentionConsistencyLoss(temperature=0),
            "temperature must be a finite number above 0 or None, got 0",
        ),
        (lambda: AttentionConsistencyLoss(temperature="a"), "temperature must be .* got 'a'"),
        (
            lambda: AttentionConsistencyLoss(max_pairs=0),
            "max_pairs must be an integer of at least 1, got 0",
        ),
        (lambda: AttentionConsistencyLoss(max_pairs=None), "max_pairs must be .* got None"),
        (
            lambda: AttentionConsistencyLoss(chunk_size=0),
            "chunk_size must be an integer of at least 1 or None, got 0",
        ),
        (lambda: AttentionConsistencyLoss(chunk_size=1.5), "chunk_size must be .* got 1.5"),
        (
            lambda: AttentionConsistencyLoss(distance=LpDistance()),
            "distance must be left out, got LpDistance: attention is compared by cosine$",
        ),
        (
            lambda: AttentionConsistencyLoss(embedding_regularizer=LpRegularizer()),
            "embedding_regularizer must be left out, got LpRegularizer",
        ),
        (call(second=SECOND[:, :2]), r"with the same N and C, got \(7, 4, 2, 3\) and \(7, 2"),
        (call(first=FIRST[0], labels=LABELS[:4]), r"must be \(N, C, H, W\)"),
        (call(points=POINTS[:, :3]), r"points must be \(7, 6, 2\).*grid must be \(2, 3\)"),
        (call(labels=LABELS[:3]), r"feature_maps of \(7, 4, 2, 3\), got \(3,\)"),
        (call(FIRST, SECOND, POINTS, LABELS, None, POINTS), r"weights must be \(7, 6\), got"),
        (call(FIRST, SECOND, POINTS, None, (LABELS,)), "3 tensors.*or 4.*got 1"),
        # Shapes are wrong whether or not there is a pair to find out with.
        (call(points=POINTS[:, :3], labels=torch.arange(7)), r"points must be \(7, 6, 2\)"),
    ],
)
def test_wrong_arguments_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
