"""Find groups of near-duplicate images by their embeddings."""

from typing import NamedTuple

import numpy as np

from pml_tacl.clustering.unit_embeddings import Embeddings, FloatArray, IntArray, UnitRows
from pml_tacl.utils.checks import check_number
from pml_tacl.utils.copies import first_copies
from pml_tacl.utils.neighbours import flat_index, nearest_others

_PAIRS = 2**24  # largest number found in one step, which bounds memory
_QUERIES = 1024
_CHUNK = 16384
_ROUNDING = 1e-6  # of a similarity in float32


class Group(NamedTuple):
    """Group of near-duplicate images.

    Attributes:
        rows: (M,) indices of the images, ascending, at least two.
        similarities: (M,) highest cosine similarity of each image to another of the group.
    """

    rows: IntArray
    similarities: FloatArray


def find_duplicates(embeddings: Embeddings, threshold: float = 0.95) -> list[Group]:
    """Find groups of near-duplicates.

    Two images are linked if their cosine similarity reaches the threshold. A group contains all
    images that are linked directly or through others. faiss finds the pairs in steps, so the
    matrix of all pairs is never in memory. The time grows with the square of the number of
    distinct embeddings.

    Args:
        embeddings: (N, D), array or tensor on any device; L2-normalised here.
        threshold: cosine similarity, above 0 and at most 1; 1 finds images that are equal up to
            rounding.

    Returns:
        The groups, the largest first; groups of equal size by their first row.

    Raises:
        InputError: if the threshold is out of range, or embeddings are NaN, infinite or zero.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]])
        >>> find_duplicates(rows)[0].rows.tolist()
        [0, 2]
    """
    check_number("threshold", threshold, 0, 1, above=True)
    rows = UnitRows("embeddings", embeddings, _CHUNK).hold()
    firsts = first_copies(rows)
    different = np.unique(firsts)
    parents = _joined(rows[different], threshold - _ROUNDING)
    group = parents[np.searchsorted(different, firsts)]
    order = np.argsort(group, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(group[order])) + 1)
    found = sorted((part for part in parts if len(part) > 1), key=lambda p: (-len(p), p[0]))
    return [Group(part, _highest(rows[part])) for part in found]


def _highest(rows: FloatArray) -> FloatArray:
    """Return the highest similarity of each embedding to another."""
    similarities, _ = nearest_others(rows, np.arange(len(rows)), 1)
    return np.clip(similarities[:, 0], -1.0, 1.0)


def _joined(rows: FloatArray, radius: float) -> IntArray:
    """Return for each row the first row of its group."""
    index = flat_index(rows)
    parents = np.arange(len(rows))
    step = max(1, min(_QUERIES, _PAIRS // len(rows)))
    for start in range(0, len(rows), step):
        ends, _, found = index.range_search(rows[start : start + step], radius)
        for at in np.flatnonzero(np.diff(ends.astype(np.int64)) > 1):
            roots = _roots(
                parents, found[int(ends[at]) : int(ends[at + 1])]
            )  # includes the row itself
            parents[roots] = roots.min()
    return _roots(parents, np.arange(len(rows)))


def _roots(parents: IntArray, rows: IntArray) -> IntArray:
    while True:
        above = parents[rows]
        if (above == rows).all():
            return above
        rows = above
