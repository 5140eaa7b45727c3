"""What must hold for any features, labels and transforms."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_metric_learning.distances import LpDistance

from pml_tacl import functional as core
from pml_tacl.losses import ContrastiveClusteringLoss
from pml_tacl.losses.attention_consistency_loss import same_label_pairs
from tests.references import examples, grid_points

seeds = st.integers(0, 2**32 - 1)
sides = st.integers(1, 4)
temperatures = st.sampled_from([None, 0.05, 0.5])


class Draws:
    """Random tensors in float64 from one seed that hypothesis chooses."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def features(self, *shape):
        """Normal, or else few values: then there are ties, and places that are zero."""
        if self.integers(2, 1) == 1:
            return self.normal(*shape)
        return self.integers(2, *shape, low=-1).double()

    def integers(self, high, *shape, low=0):
        return torch.randint(low, high, shape, generator=self.generator)

    def order(self, n):
        return torch.randperm(n, generator=self.generator)

    def points(self, n, g):
        return 2.6 * torch.rand(n, g, 2, generator=self.generator, dtype=torch.float64) - 1.3


def centroid_losses(embeddings, labels, centroids=None, distance=None, **kwargs):
    """(N,) losses before any reduction; noise left at 0."""
    loss = ContrastiveClusteringLoss(distance=distance, **kwargs)
    loss.set_centroids(centroids)
    near = loss.nearest_centroids(embeddings, labels, embeddings, labels, loss.num_negatives)
    losses = core.contrastive_clustering(near.own, near.others, loss.margin, near.valid)
    return torch.where(near.has_own, losses, 0.0)


@examples
@given(seeds, st.integers(2, 12), st.integers(1, 6), st.integers(1, 4), st.booleans())
def test_relabelling_the_clusters_changes_nothing(seed, n, k, num_negatives, means):
    draw = Draws(seed)
    embeddings, labels = draw.normal(n, 5), draw.integers(k, n, low=-1)
    centroids, order = draw.normal(k, 5), draw.order(k)
    renamed = torch.where(labels >= 0, order.argsort()[labels], -1)
    before = centroid_losses(
        embeddings, labels, None if means else centroids, num_negatives=num_negatives, margin=1.0
    )
    after = centroid_losses(
        embeddings,
        renamed,
        None if means else centroids[order],
        num_negatives=num_negatives,
        margin=1.0,
    )
    torch.testing.assert_close(after, before)


@examples
@given(seeds, st.integers(2, 12), st.booleans())
def test_permuting_the_batch_permutes_the_centroid_losses(seed, n, means):
    draw = Draws(seed)
    embeddings, labels, order = draw.normal(n, 5), draw.integers(4, n, low=-1), draw.order(n)
    centroids = None if means else draw.normal(4, 5)
    before = centroid_losses(embeddings, labels, centroids, margin=1.0)
    after = centroid_losses(embeddings[order], labels[order], centroids, margin=1.0)
    torch.testing.assert_close(after, before[order])


@examples
@given(seeds, st.integers(1, 8), st.integers(1, 6), st.floats(1e-6, 1e6), st.booleans())
def test_scaling_embeddings_changes_no_centroid_loss(seed, n, k, scale, means):
    draw = Draws(seed)
    embeddings, labels = draw.normal(n, 5), draw.integers(k, n)
    centroids = None if means else draw.normal(k, 5)
    scales = torch.full((n, 1), scale, dtype=torch.float64)
    scales[0] = 1.0
    torch.testing.assert_close(
        centroid_losses(embeddings * scales, labels, centroids, margin=1.0),
        centroid_losses(embeddings, labels, centroids, margin=1.0),
    )


@examples
@given(
    seeds, st.integers(1, 8), st.integers(2, 6), st.integers(1, 5), st.floats(0, 1),
    st.sampled_from([1, 2]),
)  # fmt: skip
def test_moving_towards_the_own_centroid_never_raises_the_loss(
    seed, n, k, num_negatives, way, norm
):
    # Along a straight line, d(e, c_y) falls by the whole step; no other distance can fall by
    # more. That is the triangle inequality, so it takes a metric: not the cosine, see below.
    draw = Draws(seed)
    embeddings, labels, centroids = draw.normal(n, 5), draw.integers(k, n), draw.normal(k, 5)
    options = {
        "centroids": centroids,
        "distance": LpDistance(p=norm, normalize_embeddings=False),
        "num_negatives": num_negatives,
        "margin": 0.5,
    }
    own = torch.nn.functional.normalize(centroids, dim=1)[labels]
    before = centroid_losses(embeddings, labels, **options)
    after = centroid_losses(torch.lerp(embeddings, own, way), labels, **options)
    assert (after <= before + 1e-9).all()


def test_moving_towards_the_own_centroid_may_raise_the_loss_of_the_cosine():
    centroids = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    beyond = torch.tensor([[0.98, -0.17]])  # on the far side of its centroid
    label = torch.tensor([0])
    away = centroid_losses(beyond, label, centroids, margin=1.2)
    at_centroid = centroid_losses(centroids[:1], label, centroids, margin=1.2)
    assert at_centroid > away


@examples
@given(seeds, st.integers(1, 6), st.floats(-2, 2), st.floats(0, 2))
def test_a_smaller_own_distance_never_raises_the_loss(seed, k, margin, less):
    draw = Draws(seed)
    own, others = draw.normal(6), draw.normal(6, k)
    nearer = core.contrastive_clustering(own - less, others, margin)
    assert (nearer <= core.contrastive_clustering(own, others, margin)).all()
    assert (nearer >= 0).all()


@examples
@given(seeds, st.integers(2, 5), sides, sides, sides, sides, temperatures)
def test_permuting_the_batch_permutes_the_pair_losses(seed, n, h, w, h2, w2, temperature):
    draw = Draws(seed)
    first, second = draw.features(n, 6, h, w), draw.features(n, 6, h2, w2)
    points, order = draw.points(n, h * w), draw.order(n)
    anchors, positives = draw.integers(n, 7), draw.integers(n, 7)
    before = core.attention_consistency(
        first, second, points, anchors, positives, temperature=temperature
    )
    place = order.argsort()
    after = core.attention_consistency(
        first[order],
        second[order],
        points[order],
        place[anchors],
        place[positives],
        temperature=temperature,
    )
    torch.testing.assert_close(after, before)
    assert ((before >= 0) & (before <= 4)).all()


@examples
@given(seeds, sides, sides, st.integers(0, 3), st.booleans(), temperatures)
def test_an_exact_transform_of_equivariant_features_costs_nothing(
    seed, h, w, turns, flip, temperature
):
    draw = Draws(seed)
    first = draw.features(3, 6, h, w)

    def transform(x):
        x = x.rot90(turns, (-2, -1))
        return x.flip(-1) if flip else x

    # Where each cell went: the transform carries the cells' numbers along.
    landed = transform(torch.arange(h * w).view(1, h, w))[0]
    points = grid_points(*landed.shape)[landed.flatten().argsort()].expand(3, -1, -1)
    anchors, positives = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 2, 0, 0])
    losses = core.attention_consistency(
        first, transform(first), points, anchors, positives, temperature=temperature
    )
    assert (losses < 1e-28).all()
    if h * w > 1:  # and it is the transform that is asked for
        first, elsewhere = draw.normal(3, 6, h, w), points.roll(1, dims=1)
        wrong = core.attention_consistency(
            first, transform(first), elsewhere, anchors[:3], positives[:3]
        )
        assert (wrong > 1e-10).any()


@examples
@given(seeds, sides, sides, temperatures, st.booleans())
def test_a_cell_that_leaves_the_second_view_never_contributes(seed, h, w, temperature, weighted):
    draw = Draws(seed)
    first, second = draw.features(3, 6, h, w), draw.features(3, 6, 2, 3)
    points, weights = draw.points(3, h * w), None
    kept = (points.abs() <= 1).all(dim=-1)
    if weighted:
        weights = draw.integers(2, 3, h * w).double()
        kept &= weights > 0
    hidden = first.clone()
    hidden[0].view(6, -1)[:, ~kept[0]] = torch.nan
    lost = torch.where((points.abs() <= 1).all(dim=-1, keepdim=True), points, torch.nan)
    # Image 0 is seen against others; as a reference all of it counts.
    anchors, positives = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2])

    def run(view, where):
        a, b = view.requires_grad_(), second.clone().requires_grad_()
        losses = core.attention_consistency(a, b, where, anchors, positives, weights, temperature)
        return losses.detach(), *torch.autograd.grad(losses.sum(), (a, b))

    for clean, with_nan in zip(run(first, points), run(hidden, lost), strict=True):
        torch.testing.assert_close(with_nan, clean)


@examples
@given(seeds, st.floats(1e-6, 1e6), temperatures)
def test_scaling_features_changes_no_attention(seed, scale, temperature):
    draw = Draws(seed)
    first, second, points = draw.features(2, 6, 2, 3), draw.features(2, 6, 3, 2), draw.points(2, 6)
    scales = torch.where(draw.normal(2, 1, 2, 3) > 0, scale, 1.0)  # each place its own
    pair = torch.tensor([0, 1]), torch.tensor([1, 0])
    torch.testing.assert_close(
        core.attention_consistency(
            first * scales, second * scale, points, *pair, temperature=temperature
        ),
        core.attention_consistency(first, second, points, *pair, temperature=temperature),
    )
    torch.testing.assert_close(
        core.background_score(first * scales, temperature=temperature),
        core.background_score(first, temperature=temperature),
    )


@examples
@given(seeds, sides, sides, temperatures)
def test_attention_is_bounded_and_blind_to_where_things_are(seed, h, w, temperature):
    draw = Draws(seed)
    first, other = draw.features(3, 6, h, w), draw.features(3, 6, w, h)
    attention = core.cross_image_attention(first, other, temperature)
    assert attention.abs().max() <= 1 + 1e-12
    shuffled = other.flatten(2)[..., draw.order(h * w)].view_as(other)
    torch.testing.assert_close(core.cross_image_attention(first, shuffled, temperature), attention)


@examples
@given(seeds, st.integers(0, 10), st.integers(1, 60))
def test_matched_pairs_are_all_pairs_of_a_cluster_nearest_in_the_batch_first(seed, n, most):
    labels = Draws(seed).integers(3, n, low=-1)
    anchors, positives, valid = same_label_pairs(labels, most)
    got = {(i, j) for i, j in zip(anchors.tolist(), positives.tolist(), strict=True)}
    every = {
        (i, j)
        for i in range(n)
        for j in range(n)
        if i != j and labels[i] == labels[j] and labels[i] >= 0
    }
    assert valid.all()
    assert len(got) == len(anchors) == min(most, len(every))
    assert got <= every
    apart = sorted((j - i) % n for i, j in every)
    assert sorted((j - i) % n for i, j in got) == apart[: len(got)]
