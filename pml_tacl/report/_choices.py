"""Select queries and clusters for the page, and compute coordinates of the map."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pml_tacl.clustering.unit_embeddings import FloatArray, IntArray
from pml_tacl.report._sources import ImageSet
from pml_tacl.utils.neighbours import nearest_others

NEIGHBOURS = 8
_QUERIES = 4000  # enough to find the extremes, with a search of about a second
_COMPONENTS = 50
_NOISE = -1


class Query(NamedTuple):
    """A query with its neighbours, nearest first.

    Attributes:
        row: index of the query.
        rows: indices of the neighbours.
        similarities: cosine similarities of the neighbours.
        right: for each neighbour whether it has the class of the query; None without labels.
    """

    row: int
    rows: list[int]
    similarities: list[float]
    right: list[bool] | None


class Cluster(NamedTuple):
    """A cluster with its members, nearest to the centroid first.

    Attributes:
        number: number of the cluster.
        rows: indices of the members.
        tightness: mean cosine similarity of the members to the centroid.
        purity: share of the most frequent class in [0, 1]; None without labels.
        majority: index of the most frequent class; None without labels.
    """

    number: int
    rows: IntArray
    tightness: float
    purity: float | None
    majority: int | None


def best_and_worst(
    images: ImageSet, count: int, seed: int = 0
) -> tuple[list[Query], list[Query], int]:
    """Find the queries with the best and the worst retrieval, each of a different class.

    With labels, queries are ranked by the average precision of their neighbours; ties are broken
    by higher mean similarity. Without labels they are ranked by mean similarity alone, and each is
    of a different cluster.

    Args:
        images: images to choose from.
        count: largest number of best and of worst queries.
        seed: seed of the sample, if there are many queries.

    Returns:
        The best queries, the worst queries, and the number of queries compared.
    """
    queries = np.arange(len(images))
    groups = images.clusters if images.labels is None else images.labels
    if images.labels is not None:  # queries need another image of their class
        members = np.bincount(images.labels)[images.labels]
        queries = np.flatnonzero(members > 1)
    if len(queries) > _QUERIES:
        queries = np.sort(np.random.default_rng(seed).choice(queries, _QUERIES, replace=False))
    k = min(NEIGHBOURS, len(images) - 1)
    if not len(queries) or k < 1:
        return [], [], 0
    similarities, rows = nearest_others(images.embeddings, queries, k)
    right: npt.NDArray[np.bool_] | None = None
    score = similarities.mean(axis=1)
    if images.labels is not None:
        right = images.labels[rows] == images.labels[queries, None]
        found = np.cumsum(right, axis=1) / np.arange(1, k + 1)
        precision = (found * right).sum(axis=1) / k
        best_order = np.lexsort((-score, -precision))
        worst_order = np.lexsort((-score, precision))
    else:
        best_order, worst_order = np.argsort(-score), np.argsort(score)

    def chosen(order: IntArray) -> list[Query]:
        taken: list[Query] = []
        seen: set[int] = set()
        for at in order:
            group = int(groups[queries[at]]) if groups is not None else int(at)
            if group not in seen:
                seen.add(group)
                verdicts = None if right is None else right[at].tolist()
                row, found = int(queries[at]), rows[at].tolist()
                taken.append(Query(row, found, similarities[at].tolist(), verdicts))
            if len(taken) == count:
                break
        return taken

    return chosen(best_order), chosen(worst_order), len(queries)


def clusters_of(images: ImageSet) -> list[Cluster]:
    """Return all clusters except noise, sorted by number."""
    labels = images.clusters
    if labels is None:
        return []
    found = []
    order = np.argsort(labels, kind="stable")
    numbers, starts = np.unique(labels[order], return_index=True)
    for number, rows in zip(numbers, np.split(order, starts[1:]), strict=True):
        if number == _NOISE:
            continue
        members = images.embeddings[rows]
        centre = members.mean(axis=0)
        centre /= max(float(np.linalg.norm(centre)), 1e-12)
        near = members @ centre
        purity = majority = None
        if images.labels is not None:
            counts = np.bincount(images.labels[rows])
            majority, purity = int(counts.argmax()), float(counts.max() / len(rows))
        rows = rows[np.argsort(-near, kind="stable")]
        found.append(Cluster(int(number), rows, float(near.mean()), purity, majority))
    return found


def ranked_clusters(clusters: list[Cluster], count: int) -> dict[str, list[Cluster]]:
    """Return the largest, the purest (or tightest) and the most mixed (or loosest) clusters.

    Very small clusters are excluded from the last two. Without labels tightness replaces purity.
    """
    usual = float(np.median([len(c.rows) for c in clusters])) if clusters else 0.0
    some = [c for c in clusters if len(c.rows) >= max(3, min(5, usual))] or clusters
    largest = sorted(clusters, key=lambda c: (-len(c.rows), c.number))
    if clusters and clusters[0].purity is not None:
        good = sorted(some, key=lambda c: (-(c.purity or 0), -len(c.rows), c.number))
        bad = sorted(some, key=lambda c: (c.purity or 0, -len(c.rows), c.number))
        names = ("Largest", "Purest", "Most mixed")
    else:
        good = sorted(some, key=lambda c: (-c.tightness, c.number))
        bad = sorted(some, key=lambda c: (c.tightness, c.number))
        names = ("Largest", "Tightest", "Loosest")
    return dict(zip(names, (largest[:count], good[:count], bad[:count]), strict=True))


def sample_of(groups: IntArray, cap: int, first: list[int], seed: int = 0) -> IntArray:
    """Choose the points of the map: all if possible, else group by group up to ``cap`` points.

    Args:
        groups: (N,) group of each point.
        cap: largest number of points.
        first: groups that are taken first; the others follow in random order.
        seed: seed of the random order.

    Returns:
        Indices of the points, ascending.
    """
    if len(groups) <= cap:
        return np.arange(len(groups))
    others = np.random.default_rng(seed).permutation(np.setdiff1d(np.unique(groups), first))
    rank = {int(group): at for at, group in enumerate([*first, *others.tolist()])}
    ranks = np.array([rank[int(group)] for group in groups])
    return np.sort(np.argsort(ranks, kind="stable")[:cap])


def project(embeddings: FloatArray, seed: int = 0) -> tuple[FloatArray, str]:
    """Project embeddings to the plane, with t-SNE if scikit-learn is installed, else with PCA.

    Returns:
        Coordinates (N, 2) in [0, 1], and the name of the method for the page.
    """
    count = len(embeddings)
    centred = embeddings - embeddings.mean(axis=0)
    axes = np.linalg.svd(centred, full_matrices=False)[2]
    places, how = centred @ axes[:2].T, "PCA"
    if places.shape[1] < 2:
        places = np.pad(places, ((0, 0), (0, 2 - places.shape[1])))
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        how = "PCA, since scikit-learn is not installed"
    else:
        kept = min(_COMPONENTS, *centred.shape)
        if count >= 10 and kept >= 2:
            shape = TSNE(
                init="pca", perplexity=min(30.0, (count - 1) / 3), random_state=seed, max_iter=600
            )
            places = shape.fit_transform(np.ascontiguousarray(centred @ axes[:kept].T))
            how = f"t\u2011SNE of the first {kept} principal components"
    low, spread = places.min(axis=0), np.ptp(places, axis=0)
    spread[spread == 0] = 1.0
    return np.asarray((places - low) / spread, dtype=np.float32), how
