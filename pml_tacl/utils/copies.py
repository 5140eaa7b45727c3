"""Rows that are there more than once."""

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
CHUNK = 16384


class Rows(Protocol):
    """Rows of numbers (N, D), read a part at a time."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> npt.NDArray[Any]: ...


def first_copies(rows: Rows) -> IntArray:
    """Give for each row the index (N,) of the first one that has the same bytes.

    Rows are read in chunks and compared by a hash; those of one hash are then compared in full.

    Args:
        rows: (N, D), float32 or float64.
    """
    hashes = np.empty(len(rows), dtype=np.uint64)
    for start in range(0, len(rows), CHUNK):
        hashes[start : start + CHUNK] = _hashes(rows[start : start + CHUNK])
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    firsts = first[group].astype(np.int64)
    later = np.flatnonzero(firsts != np.arange(len(firsts)))
    for start in range(0, len(later), CHUNK):
        part = later[start : start + CHUNK]
        same = (_words(rows[part]) == _words(rows[firsts[part]])).all(axis=1)
        firsts[part[~same]] = part[~same]
    return firsts


def _words(rows: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    return np.ascontiguousarray(rows).view(np.uint32)


def _hashes(rows: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    words = _words(rows)
    factors = np.random.default_rng(0).integers(2**63, size=words.shape[1], dtype=np.uint64) * 2 + 1
    hashes = np.zeros(len(words), dtype=np.uint64)
    for start in range(0, len(words), 512):  # the products stay in the cache
        part = words[start : start + 512].astype(np.uint64)
        hashes[start : start + 512] = (part * factors).sum(axis=1, dtype=np.uint64)
    return hashes
