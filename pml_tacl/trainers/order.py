"""The order of an epoch of many images, drawn in arrays: PML draws it cluster by cluster."""

import numpy as np
import numpy.typing as npt

from pml_tacl.utils.errors import InputError

IntArray = npt.NDArray[np.int64]
_CELLS = 1 << 22  # entries of the largest array of one step


def draw_by_clusters(
    labels: npt.NDArray[np.integer],
    images_per_cluster: int,
    batch_size: int,
    size: int,
    generator: np.random.Generator,
) -> IntArray:
    """Draw batches of some images of some clusters, as PML's MPerClassSampler does.

    Each batch takes ``batch_size / images_per_cluster`` different clusters, every set of them
    equally likely. A cluster gives its images in turn, in a random order that is drawn anew by
    each call: none comes twice in a batch or again before all others have come, unless the
    cluster is smaller than ``images_per_cluster``. Then a batch holds each of them as often as
    any other of them, give or take one. PML draws the images of each batch by themselves, so
    that some come often and others never.

    Time and memory grow with the images and the size, not with the number of clusters.

    Args:
        labels: (N,), -1 for noise, which is left out.
        images_per_cluster: in a batch; divides ``batch_size``.
        batch_size: images in a batch.
        size: images to draw, whole batches.
        generator: where all numbers come from.

    Returns:
        (size,) int64, indices of images; those of one cluster in a batch are neighbours.

    Raises:
        ValueError: for fewer clusters than a batch takes, or sizes that do not divide each other.
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
            f"{len(counts)} clusters are fewer than the {of_batch} that a batch of {batch_size} "
            f"with images_per_cluster={images_per_cluster} needs: lower batch_size"
        )
    clusters = _subsets(len(counts), of_batch, size // batch_size, generator).ravel()
    turns = _number_among_equal(clusters, len(counts))
    order = np.empty((len(clusters), images_per_cluster), dtype=np.int64)
    step = max(1, _CELLS // images_per_cluster)
    for start in range(0, len(clusters), step):
        part = clusters[start : start + step, None]
        place = turns[start : start + step, None] * images_per_cluster
        # Neighbours in a cycle are different images, also where the cycle begins again.
        place = (place + np.arange(images_per_cluster)) % counts[part]
        order[start : start + step] = members[starts[part] + place]
    return order.ravel()


def _members(
    labels: npt.NDArray[np.integer], generator: np.random.Generator
) -> tuple[IntArray, IntArray, IntArray]:
    """Indices of the images of each cluster in random order, where they start and how many."""
    members = generator.permutation(np.flatnonzero(labels >= 0))
    own = labels[members]
    order = np.argsort(own, kind="stable")
    members, own = members[order], own[order]
    starts = np.flatnonzero(np.diff(own, prepend=-1))
    return members, starts, np.diff(starts, append=len(own))


def _subsets(count: int, size: int, rows: int, generator: np.random.Generator) -> IntArray:
    """Draw sets of different numbers below ``count``, each set equally likely: (rows, size).

    Floyd's algorithm, on all rows at once (Bentley & Floyd 1987).
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
    """Tell of each value below ``count`` how many equal ones come before it."""
    order = np.argsort(values, kind="stable")
    counts = np.bincount(values, minlength=count)
    firsts = np.cumsum(counts) - counts
    number = np.empty(len(values), dtype=np.int64)
    number[order] = np.arange(len(values)) - np.repeat(firsts, counts)
    return number
