"""Exhaustive nearest-neighbour search by cosine similarity among unit embeddings.

See :mod:`pml_tacl.evaluation.nearest` for a ranking with exact arithmetic, and
:class:`pml_tacl.search.ImageIndex` for an index that can be saved.
"""

from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


def flat_index(rows: FloatArray) -> Any:
    """Return a faiss index of unit embeddings (N, D) that compares a query with all of them."""
    index: Any = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    return index


def nearest_others(rows: FloatArray, which: IntArray, k: int) -> tuple[FloatArray, IntArray]:
    """Find the nearest neighbours of some embeddings among all others.

    Args:
        rows: embeddings (N, D), of unit norm.
        which: (Q,), indices of the queries.
        k: number of neighbours; at most N - 1 are returned.

    Returns:
        Similarities (Q, k), highest first, and indices (Q, k).
    """
    k = min(k, len(rows) - 1)
    similarities, found = flat_index(rows).search(rows[which], k + 1)
    # Drop the query itself, which need not come first among identical embeddings.
    own = found == which[:, None]
    own[~own.any(axis=1), -1] = True
    shape = (len(which), k)
    return similarities[~own].reshape(shape), found[~own].reshape(shape)
