"""Nearest neighbours by cosine similarity among unit rows, by looking at all of them.

:mod:`pml_tacl.evaluation.nearest` ranks by distance in the order that exact arithmetic gives, and
:class:`pml_tacl.search.ImageIndex` keeps an index.
"""

from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


def flat_index(rows: FloatArray) -> Any:
    """Return faiss's index of unit rows (N, D), which compares a query with all of them."""
    index: Any = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    return index


def nearest_others(rows: FloatArray, which: IntArray, k: int) -> tuple[FloatArray, IntArray]:
    """Find the nearest others of some of the rows.

    Args:
        rows: (N, D), of unit norm.
        which: (Q,), the rows that ask.
        k: neighbours of each; at most N - 1 are given.

    Returns:
        Similarities (Q, k), the highest first, and rows (Q, k).
    """
    k = min(k, len(rows) - 1)
    similarities, found = flat_index(rows).search(rows[which], k + 1)
    # The row itself is left out; among identical rows it need not come first.
    own = found == which[:, None]
    own[~own.any(axis=1), -1] = True
    shape = (len(which), k)
    return similarities[~own].reshape(shape), found[~own].reshape(shape)
