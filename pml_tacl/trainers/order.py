"""Drawing the order of an epoch with array operations, for large data sets."""

import numpy as np
import numpy.typing as npt

from pml_tacl.utils.errors import InputError

IntArray = npt.NDArray[np.int64]
_CELLS = 1 << 22  # largest number of array elements in one step


def draw_by_clusters(
    labels: npt.NDArray[np.integer],
    images_per_cluster: int,
    batch_size: int,
    size: int,
    generator: np.random.Generator,
) -> IntArray:
    """Draw batches with several images per cluster, similar to PML's MPerClassSampler.

    Each batch has ``batch_size / images_per_cluster`` different clusters; all sets of clusters are
    equally likely. The images of a cluster are used in turn, in a random order that each call
    draws. No image is repeated in a batch, or before all others of its cluster were used, unless
    the cluster is smaller than ``images_per_cluster``. In that case, the numbers of times that its
    images occur in a batch differ by at most one. PML's sampler draws each batch independently, so
    it uses some images often and others never.

    Time and memory depend on the number of images and ``size``, not on the number of clusters.

    Args:
        labels: (N,), -1 for noise, which is excluded.
        images_per_cluster: images of one cluster in a batch; must divide ``batch_size``.
        batch_size: images in a batch.
        size: number of images to draw; a multiple of ``batch_size``.
        generator: source of all random numbers.

    Returns:
        (size,) int64, indices of images; images of one cluster in a batch are adjacent.

    Raises:
        ValueError: for fewer clusters than a batch needs, or sizes that do not divide each other.
    """
    of_batch, rest = divmod(batch_size, images_per_cluster)
    if rest or size % batch_size:
        raise InputError(
            f"batch_size={batch_size} must be a multiple of images_per_cluster="
            f"{images_per_cluster}, and size={size} one of batch_size"
        )
    members, starts, counts = _members(labels, generator)
    if len(counts) < of_batch:
        raise InputError(
            f"a batch of {batch_size} with images_per_cluster={images_per_cluster} needs "
            f"{of_batch} clusters, got {len(counts)}: lower batch_size"
        )
    clusters = _subsets(len(counts), of_batch, size // batch_size, generator).ravel()
    turns = _number_among_equal(clusters, len(counts))
    order = np.empty((len(clusters), images_per_cluster), dtype=np.int64)
    step = max(1, _CELLS // images_per_cluster)
    for start in range(0, len(clusters), step):
        part = clusters[start : start + step, None]
        place = turns[start : start + step, None] * images_per_cluster
        # Consecutive images of a cycle are different, also where the cycle starts again.
        place = (place + np.arange(images_per_cluster)) % counts[part]
        order[start : start + step] = members[starts[part] + place]
    return order.ravel()


def _members(
    labels: npt.NDArray[np.integer], generator: np.random.Generator
) -> tuple[IntArray, IntArray, IntArray]:
    """Return image indices grouped by cluster in random order, and start and size of each group."""
    members = generator.permutation(np.flatnonzero(labels >= 0))
    own = labels[members]
    order = np.argsort(own, kind="stable")
    members, own = members[order], own[order]
    starts = np.flatnonzero(np.diff(own, prepend=-1))
    return members, starts, np.diff(starts, append=len(own))


def _subsets(count: int, size: int, rows: int, generator: np.random.Generator) -> IntArray:
    """Draw sets of distinct integers below ``count``, uniformly: (rows, size).

    The method is Floyd's algorithm, applied to all rows at once (Bentley & Floyd 1987).
    """
    chosen = np.empty((rows, size), dtype=np.int64)
    for done, last in enumerate(range(count - size, count)):
        drawn = generator.integers(last + 1, size=rows)
        step = max(1, _CELLS // max(1, done))
        for start in range(0, rows, step):
            part = slice(start, start + step)
            taken = (chosen[part, :done] == drawn[part, None]).any(axis=1)
            chosen[part, done] = np.where(taken, last, drawn[part])
    return chosen


def _number_among_equal(values: IntArray, count: int) -> IntArray:
    """Return for each value below ``count`` the number of equal values before it."""
    order = np.argsort(values, kind="stable")
    counts = np.bincount(values, minlength=count)
    firsts = np.cumsum(counts) - counts
    number = np.empty(len(values), dtype=np.int64)
    number[order] = np.arange(len(values)) - np.repeat(firsts, counts)
    return number
