"""Pseudo-labels from embeddings, by spherical k-means (faiss) or any other clusterer."""

import warnings
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import faiss
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pml_tacl.clustering.unit_embeddings import Embeddings, FloatArray, IntArray, UnitRows
from pml_tacl.utils.checks import check_count
from pml_tacl.utils.errors import InputError
from pml_tacl.utils.neighbours import flat_index

# Below this mean cosine distance to the mean direction, embeddings differ only by rounding.
_COLLAPSED = 1e-6
_MOST_CLUSTERS = 10_000
_CHUNK = 16384  # rows in memory at once
# Default for max_points, the sample that k-means trains on: a million, or 50 per cluster if more.
_MOST_POINTS, _POINTS_A_CLUSTER = 1_000_000, 50
TWO_LEVELS_ABOVE = 20_000
"""Largest number of clusters for which k-means has a single level.

The cost of k-means is proportional to points times clusters. On two cores 10 000 clusters take
minutes, and 100 000 take hours (docs/scaling.md).
"""
_CELLS_SEARCHED = 8  # cells of an inverted file that are searched for the nearest centroid
_ROUNDS = 5  # rounds of k-means over all centroids, after the second level


class PseudoLabels(NamedTuple):
    """Labels, centroids and distances found by a clusterer.

    Attributes:
        labels: (N,) int64, in {-1, 0..K'-1}; -1 is noise, and every other label has a member.
        centroids: (K', D) float32, unit norm; row `y` is the normalised mean of the normalised
            members of cluster `y`.
        distances: (N,) float32 in [0, 2], cosine distance (1 - cosine) to the own centroid; for
            noise, to the nearest centroid.
    """

    labels: Tensor
    centroids: Tensor
    distances: Tensor


@runtime_checkable
class PseudoLabeler(Protocol):
    """Protocol of a clusterer: any callable that turns embeddings into pseudo-labels.

    `initial_centroids` are the centroids of the previous call, possibly moved by training, or
    None. A clusterer may ignore them.

    Example:
        HDBSCAN from scikit-learn. Images that it labels as noise (-1) are ignored by the losses.

        >>> import numpy as np
        >>> from sklearn.cluster import HDBSCAN
        >>> def hdbscan(embeddings, initial_centroids=None):
        ...     labels = HDBSCAN(min_cluster_size=5, copy=True).fit_predict(embeddings)
        ...     return pseudo_labels_from(labels, embeddings)
        >>> rng = np.random.default_rng(0)
        >>> blobs = np.repeat(np.eye(3, 8), 20, axis=0) + 0.05 * rng.standard_normal((60, 8))
        >>> hdbscan(blobs).labels.unique().tolist()
        [0, 1, 2]
    """

    def __call__(
        self, embeddings: Embeddings, initial_centroids: Embeddings | None = None
    ) -> PseudoLabels:
        """Cluster embeddings (N, D)."""


def pseudo_labels_from(
    labels: Tensor | npt.ArrayLike,
    embeddings: Embeddings,
    *,
    min_cluster_size: int = 1,
    chunk_size: int = _CHUNK,
) -> PseudoLabels:
    """Turn the integer labels of any clusterer into `PseudoLabels`.

    Labels are renumbered to 0..K'-1 in ascending order.

    Args:
        labels: (N,) integers; negative labels are noise.
        embeddings: (N, D), array (also a memory map) or tensor on any device; normalised here.
        min_cluster_size: clusters with fewer members become noise.
        chunk_size: number of embeddings held in memory at once.

    Returns:
        PseudoLabels on the device of `embeddings` (CPU for arrays).

    Raises:
        ValueError: if shapes do not match, labels are not integers, embeddings are NaN, infinite
            or zero, or all labels are noise.
    """
    check_count("min_cluster_size", min_cluster_size, 1)
    check_count("chunk_size", chunk_size, 1)
    rows = UnitRows("embeddings", embeddings, chunk_size)
    given = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if given.shape != (len(rows),):
        raise InputError(
            f"labels must have the shape ({len(rows)},) of the embeddings, got {given.shape}"
        )
    if given.dtype.kind not in "iu":
        raise InputError(
            f"labels must be integers, got dtype {given.dtype}: convert them to integers"
        )
    found, numbers = np.unique(given, return_inverse=True)
    return _summarise(numbers, found >= 0, rows, min_cluster_size)


class KMeansPseudoLabeler:
    """Spherical k-means (faiss) that returns pseudo-labels.

    Embeddings are L2-normalised first. On a CPU, calls with the same seed, number of threads and
    faiss build return the same result. If the installed faiss supports GPUs, they are used, and
    results may vary. Empty clusters are removed, and the others are renumbered 0..K'-1 in order.
    At the end, each centroid is set to the normalised mean of its members. The members are not
    assigned again after that, so some embeddings may be slightly nearer to another centroid.

    For more than ``TWO_LEVELS_ABOVE`` (20 000) clusters, k-means has two levels. A first k-means
    divides the embeddings into about sqrt(K) groups, where K is the number of clusters, and each
    group is clustered separately. A few iterations over all centroids follow, which compare each
    embedding with nearby centroids only. The time then grows with sqrt(K) instead of K, and
    clusters are slightly less compact.

    Args:
        num_clusters: at least 2, or "auto": a tenth of the images, at least 2 and at most
            10 000. About ten images per cluster give enough positive pairs. Splitting a class into
            several clusters does less harm than merging two classes into one. The upper limit keeps
            the time proportional to the number of images.
        num_iterations: number of iterations of k-means.
        seed: seed of k-means and of the sample.
        max_points: largest number of embeddings that k-means trains on. If there are more, it
            trains on a random sample and assigns all embeddings afterwards. None means a million,
            or 50 per cluster if that is more. A normalised copy of the sample, one chunk, the
            centroids and the labels are held in memory.
        min_cluster_size: clusters with fewer members become noise: their images get the label -1.
            1 keeps all clusters: even a cluster of one image has a positive pair, its two views.
        chunk_size: number of embeddings that are checked and assigned at once.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> import torch
        >>> embeddings = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
        >>> labels, centroids, distances = KMeansPseudoLabeler(num_clusters=10)(embeddings)
        >>> labels.shape, centroids.shape, distances.shape
        (torch.Size([200]), torch.Size([10, 16]), torch.Size([200]))
    """

    def __init__(
        self,
        num_clusters: int | Literal["auto"] = 100,
        *,
        num_iterations: int = 20,
        seed: int = 0,
        max_points: int | None = None,
        min_cluster_size: int = 1,
        chunk_size: int = _CHUNK,
    ) -> None:
        if num_clusters != "auto":
            check_count("num_clusters", num_clusters, 2, 'or "auto"')
        check_count("num_iterations", num_iterations, 1)
        check_count("seed", seed, 0, most=2**31 - 1)
        if max_points is not None:
            check_count("max_points", max_points, 2, "or None")
        check_count("min_cluster_size", min_cluster_size, 1)
        check_count("chunk_size", chunk_size, 1)
        given = None if isinstance(num_clusters, str) else num_clusters
        if given is not None and max_points is not None and given > max_points:
            raise InputError(
                f"num_clusters={num_clusters} is more than max_points={max_points}: "
                "k-means needs a point for each cluster, raise max_points"
            )
        self.num_clusters = num_clusters
        self.num_iterations = num_iterations
        self.seed = seed
        self.max_points = max_points
        self.min_cluster_size = min_cluster_size
        self.chunk_size = chunk_size

    def __call__(
        self, embeddings: Embeddings, initial_centroids: Embeddings | None = None
    ) -> PseudoLabels:
        """Cluster embeddings.

        Args:
            embeddings: (N, D), a NumPy array (which may be a memory map) or a tensor on any
                device, of any float type.
            initial_centroids: (K0, D), centroids to start from, so that clusters keep their
                labels. If K0 is smaller than the number of clusters, the missing centroids are
                drawn from the embeddings. If it is larger, the centroids with the most members
                are kept, in their order.

        Returns:
            PseudoLabels on the device of `embeddings` (CPU for arrays).

        Raises:
            ValueError: if there are fewer embeddings than clusters, embeddings are NaN, infinite
                or zero, shapes are wrong, all embeddings have (nearly) the same direction, or
                all clusters are smaller than `min_cluster_size`.

        Warns:
            UserWarning: if less than half of the clusters have members, or one cluster contains
                more than half of the images.
        """
        rows = UnitRows("embeddings", embeddings, self.chunk_size, check=False)
        centroids = self._learn(rows, initial_centroids)
        return self._finish(rows, self._assign(rows, centroids), len(centroids))

    def _learn(self, rows: UnitRows, initial_centroids: Embeddings | None) -> FloatArray:
        """Check the embeddings and return the centroids (K, D) of k-means."""
        spread = rows.check()
        number = self.number_for(len(rows))
        if number > len(rows):
            raise InputError(
                f"num_clusters={number} is more than the number of embeddings, {len(rows)}: "
                "lower it or add images"
            )
        if spread < _COLLAPSED:
            raise InputError(
                f"all {len(rows)} embeddings are nearly identical (mean cosine distance to their "
                f"mean {spread:.1e}): the images are copies of one another, or the model has "
                "collapsed; check the images, and if they differ, lower the learning rate, raise "
                "the weight of the metric loss or go back to an earlier checkpoint"
            )
        start = self._start(rows, initial_centroids, number)
        points = self._points(rows, number)
        train = self._train_levels if number > TWO_LEVELS_ABOVE else self._train
        return train(points, number, start)

    def _assign(
        self, rows: UnitRows, centroids: FloatArray, part: int = 0, parts: int = 1
    ) -> npt.NDArray[np.int32]:
        """Return the nearest centroid of each embedding, in every `parts`-th chunk only.

        The chunks do not depend on `parts`, because rounding depends on the chunks.
        """
        levels = len(centroids) > TWO_LEVELS_ABOVE
        index = _cells_of(centroids, self.seed) if levels else flat_index(centroids)
        chunks = list(rows.chunks())[part::parts]
        found = [_nearest(index, rows[chunk]).astype(np.int32) for chunk in chunks]
        return np.concatenate([np.empty(0, dtype=np.int32), *found])

    def _finish(self, rows: UnitRows, labels: npt.NDArray[np.int32], number: int) -> PseudoLabels:
        """Remove empty clusters and compute the centroids of the others."""
        _check_use(np.bincount(labels, minlength=number))
        return _summarise(labels, np.ones(number, dtype=bool), rows, self.min_cluster_size)

    def number_for(self, count: int) -> int:
        """Return the number of clusters for `count` images."""
        if self.num_clusters != "auto":
            return int(self.num_clusters)
        wanted = auto_clusters(count)
        return wanted if self.max_points is None else min(wanted, self.max_points)

    def _start(
        self, rows: UnitRows, initial_centroids: Embeddings | None, number: int
    ) -> FloatArray | None:
        if initial_centroids is None:
            return None
        start = UnitRows("initial_centroids", initial_centroids, self.chunk_size).hold()
        if start.shape[1] != rows.dim:
            raise InputError(
                f"initial_centroids have {start.shape[1]} dimensions, embeddings {rows.dim}: "
                "pass the centroids of the same model, or None"
            )
        if len(start) > number:
            members = np.bincount(rows.nearest(start), minlength=len(start))
            start = start[np.sort(np.argsort(-members, kind="stable")[:number])]
        return start

    def _points(self, rows: UnitRows, number: int) -> FloatArray:
        """Return the embeddings that k-means trains on."""
        most = self.max_points or max(_MOST_POINTS, _POINTS_A_CLUSTER * number)
        if most >= len(rows):
            return rows.hold()
        rng = np.random.default_rng(self.seed)
        # Sorted, so that a memory map is read once from front to back.
        return rows.take(np.sort(rng.choice(len(rows), most, replace=False)))

    def _train(
        self, points: FloatArray, number: int, start: FloatArray | None = None
    ) -> FloatArray:
        kmeans = faiss.Kmeans(
            points.shape[1],
            number,
            niter=self.num_iterations,
            seed=self.seed,
            spherical=True,
            gpu=faiss.get_num_gpus() > 0,
            # faiss warns below the first limit and silently subsamples above the second.
            min_points_per_centroid=1,
            max_points_per_centroid=2**31 - 1,
        )
        kmeans.train(points, init_centroids=start)
        return np.asarray(kmeans.centroids, dtype=np.float32)

    def _train_levels(
        self, points: FloatArray, number: int, start: FloatArray | None
    ) -> FloatArray:
        """Cluster each group of a coarse k-means, then run k-means over all centroids."""
        rng, rounds = np.random.default_rng(self.seed), _ROUNDS
        if start is None:
            coarse = self._train(points, round(number**0.5))
            groups = flat_index(coarse).search(points, 1)[1][:, 0]
            members = np.split(
                np.argsort(groups, kind="stable"),
                np.cumsum(np.bincount(groups, minlength=len(coarse)))[:-1],
            )
            shares = _shares(number, [len(own) for own in members])
            parts = [
                points[own] if share == len(own) else self._train(points[own], share)
                for own, share in zip(members, shares, strict=True)
                if share
            ]
            centroids = np.concatenate(parts)
        else:
            others = rng.choice(len(points), number - len(start), replace=False)
            centroids = np.concatenate([start, points[np.sort(others)]])
            rounds = self.num_iterations
        for _ in range(rounds):
            index = _cells_of(centroids, self.seed)
            chunks = [slice(i, i + _CHUNK) for i in range(0, len(points), _CHUNK)]
            labels = np.concatenate([_nearest(index, points[chunk]) for chunk in chunks])
            sums = torch.zeros(number, points.shape[1])
            for chunk in chunks:
                own = torch.from_numpy(labels[chunk])
                sums.index_add_(0, own, torch.from_numpy(points[chunk]))
            means = sums.numpy()
            norms = np.linalg.norm(means, axis=1, keepdims=True)
            empty = norms[:, 0] < 1e-6
            centroids = np.where(empty[:, None], centroids, means / np.maximum(norms, 1e-6))
            # Move centroids of empty clusters to a point of a large cluster.
            counts = np.bincount(labels, minlength=number)
            large = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
            for place, cluster in zip(np.flatnonzero(empty), large, strict=False):
                centroids[place] = points[rng.choice(np.flatnonzero(labels == cluster))]
        return np.ascontiguousarray(centroids, dtype=np.float32)


def _shares(number: int, sizes: list[int]) -> list[int]:
    """Divide a number among groups in proportion to their sizes; no share exceeds its size."""
    exact = np.array(sizes) * (number / sum(sizes))
    shares = np.floor(exact).astype(np.int64)
    left = int(number - shares.sum())
    shares[np.argsort(shares - exact, kind="stable")[:left]] += 1
    return [int(share) for share in shares]


def _cells_of(centroids: FloatArray, seed: int) -> Any:
    """Return an inverted file of centroids, which searches the nearest cells only."""
    lists = max(1, round(len(centroids) ** 0.5))
    index: Any = faiss.index_factory(
        centroids.shape[1], f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT
    )
    index.cp.seed, index.cp.min_points_per_centroid, index.cp.spherical = seed, 1, True
    index.train(centroids)
    index.add(centroids)
    index.nprobe = min(lists, _CELLS_SEARCHED)
    return index


def _nearest(index: Any, rows: FloatArray) -> IntArray:
    labels = np.asarray(index.search(rows, 1)[1][:, 0])
    missed = labels < 0  # only empty cells were searched
    if missed.any():
        before, index.nprobe = index.nprobe, index.nlist
        labels[missed] = index.search(rows[missed], 1)[1][:, 0]
        index.nprobe = before
    return labels


def have_collapsed(embeddings: Embeddings) -> bool:
    """Return whether all embeddings (N, D) have the same direction up to rounding errors.

    Embeddings that are NaN, infinite or zero are ignored. Fewer than two count as collapsed.
    """
    rows = torch.as_tensor(embeddings)
    rows = rows[rows.isfinite().all(dim=1) & rows.any(dim=1)]
    return len(rows) < 2 or UnitRows("embeddings", rows, _CHUNK, check=False).check() < _COLLAPSED


def auto_clusters(count: int, least: int = 2) -> int:
    """Return the number of clusters for "auto": a tenth of the number of images.

    Args:
        count: number of images.
        least: smallest number of clusters. The largest is 10 000, or `least` if that is more.
    """
    return max(2, min(count // 10, _MOST_CLUSTERS), least)


def _check_use(members: IntArray) -> None:
    """Warn if few clusters are used, or if one of them has most images."""
    wanted, used = len(members), int((members > 0).sum())
    if 2 * used < wanted:
        trouble = (
            f"only {used} of {wanted} clusters are used: either the embeddings form fewer groups "
            "(lower num_clusters), or they are about to collapse (lower the learning rate)"
        )
    elif wanted > 3 and 2 * members.max() > members.sum():
        trouble = (
            f"one cluster contains {members.max()} of {members.sum()} images: most images look the "
            "same to the model; raise num_clusters, or look for duplicates"
        )
    else:
        return
    warnings.warn(trouble, stacklevel=4)


def _summarise(
    numbers: npt.NDArray[np.integer],
    usable: npt.NDArray[np.bool_],
    rows: UnitRows,
    min_cluster_size: int,
) -> PseudoLabels:
    """Drop small clusters, renumber the others, and compute their centroids and distances.

    Args:
        numbers: (N,), index of the cluster of each embedding.
        usable: (K,), False for clusters that are noise.
        rows: the embeddings.
        min_cluster_size: clusters with fewer members become noise.
    """
    members = np.bincount(numbers, minlength=len(usable))
    keep = usable & (members >= max(1, min_cluster_size))
    if not keep.any():
        raise InputError(
            f"all {len(numbers)} embeddings are noise: lower min_cluster_size={min_cluster_size} "
            "or the number of clusters, or give the clusterer looser settings"
        )
    number = int(keep.sum())
    new_label = np.full(len(usable), -1, dtype=np.int64)
    new_label[keep] = np.arange(number)
    labels = new_label[numbers]
    centroids = rows.means(labels, number)
    noise = labels < 0
    own = np.where(noise, rows.nearest(centroids), labels) if noise.any() else labels
    distances = np.empty(len(labels), dtype=np.float32)
    for chunk in rows.chunks():
        distances[chunk] = 1.0 - np.einsum("nd,nd->n", rows[chunk], centroids[own[chunk]])
    source = rows.source
    device = source.device if isinstance(source, Tensor) else torch.device("cpu")
    results = (labels, centroids, distances.clip(0.0, 2.0))
    return PseudoLabels(*(torch.from_numpy(result).to(device) for result in results))
