"""Detection of identical rows in an array."""

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
CHUNK = 16384


class Rows(Protocol):
    """Array (N, D) that is read in parts, such as a memory map."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> npt.NDArray[Any]: ...


def first_copies(rows: Rows, tolerance: float = 0.0) -> IntArray:
    """Find for each row the first row with the same bytes.

    Rows are read in chunks and compared by hash; rows with equal hashes are then compared fully.

    Args:
        rows: (N, D), float32 or float64.
        tolerance: for rows of unit norm: treat rows as equal if no number differs by more than
            this. Nearly all rows that differ by rounding alone are found.

    Returns:
        (N,) int64, the index of the first equal row.
    """
    hashes = np.empty(len(rows), dtype=np.uint64)
    for start in range(0, len(rows), CHUNK):
        hashes[start : start + CHUNK] = _hashes(rows[start : start + CHUNK])
    firsts = _firsts_of(hashes)
    later = np.flatnonzero(firsts != np.arange(len(firsts)))
    for start in range(0, len(later), CHUNK):
        part = later[start : start + CHUNK]
        same = (_words(rows[part]) == _words(rows[firsts[part]])).all(axis=1)
        firsts[part[~same]] = part[~same]
    return firsts if tolerance == 0 else _near_firsts(rows, firsts, tolerance)


def _near_firsts(rows: Rows, firsts: IntArray, tolerance: float) -> IntArray:
    """Also match rows that differ by at most a tolerance and are in the same cell of a grid."""
    distinct = np.flatnonzero(firsts == np.arange(len(firsts)))
    cells = np.empty(len(distinct), dtype=np.uint64)
    for start in range(0, len(distinct), CHUNK):
        there = distinct[start : start + CHUNK]
        cells[start : start + CHUNK] = _cells(rows[there], 100 * tolerance)
    leaders = distinct[_firsts_of(cells)]
    later = np.flatnonzero(leaders != distinct)
    for start in range(0, len(later), CHUNK):
        part = later[start : start + CHUNK]
        apart = np.abs(rows[distinct[part]] - rows[leaders[part]]).max(axis=1) > tolerance
        leaders[part[apart]] = distinct[part[apart]]
    return leaders[np.searchsorted(distinct, firsts)]


def _cells(rows: npt.NDArray[Any], width: float) -> npt.NDArray[np.uint64]:
    """Return a hash of each row's cell in a coarse grid along 4 random directions."""
    directions = np.random.default_rng(1).standard_normal((rows.shape[1], 4))
    directions /= np.linalg.norm(directions, axis=0)
    places = np.floor(rows.astype(np.float64) @ directions / width)
    return _hashes(places + 0.0)  # no -0


def _firsts_of(hashes: npt.NDArray[np.uint64]) -> IntArray:
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    return first[group].astype(np.int64)


def _words(rows: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    return np.ascontiguousarray(rows).view(np.uint32)


def _hashes(rows: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    words = _words(rows)
    factors = np.random.default_rng(0).integers(2**63, size=words.shape[1], dtype=np.uint64) * 2 + 1
    hashes = np.zeros(len(words), dtype=np.uint64)
    for start in range(0, len(words), 512):  # keeps the products in the cache
        part = words[start : start + 512].astype(np.uint64)
        hashes[start : start + 512] = (part * factors).sum(axis=1, dtype=np.uint64)
    return hashes
