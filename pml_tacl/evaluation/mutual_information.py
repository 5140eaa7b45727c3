"""Adjusted mutual information of two groupings, fast for thousands of groups."""

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from torch import Tensor

Counts = npt.NDArray[np.int64]
TINY = float(np.finfo(np.float64).eps)


def adjusted_mutual_information(first: Tensor, second: Tensor) -> float:
    """Return the same value as scikit-learn's adjusted_mutual_info_score, in less time.

    The expected mutual information depends only on the sizes of the groups, and thousands of
    groups have few different sizes. scikit-learn needs one step for each pair of groups: 144
    million steps for 12 000 classes.

    Args:
        first: (N,) int64, the group of each item.
        second: (N,) int64, likewise.

    Returns:
        1 for equal groupings, about 0 for random groupings; it may be slightly negative.
    """
    table = contingency_matrix(first.cpu().numpy(), second.cpu().numpy(), sparse=True)
    if 1 in table.shape:
        return float(table.shape == (1, 1))
    rows, columns = (np.asarray(table.sum(axis=axis)).ravel() for axis in (1, 0))
    expected = _expected_mutual_information(rows, columns)
    numerator = mutual_info_score(None, None, contingency=table) - expected
    denominator = (_entropy(rows) + _entropy(columns)) / 2 - expected
    # If both are zero up to rounding (all groups are single items), the groupings are equal.
    return float(_away_from_zero(numerator) / _away_from_zero(denominator))


def _away_from_zero(value: float) -> float:
    return min(value, -TINY) if value < 0 else max(value, TINY)


def _entropy(sizes: Counts) -> float:
    shares = sizes / sizes.sum()
    return float(-(shares * np.log(shares)).sum())


def _expected_mutual_information(rows: Counts, columns: Counts) -> float:
    """Return the mean over all tables with these sums (Vinh, Epps, Bailey 2010, equation 24)."""
    total = int(rows.sum())
    log_factorial = torch.lgamma(torch.arange(1, total + 2, dtype=torch.float64)).numpy()
    sizes, repeats = np.unique(columns, return_counts=True)
    expected = 0.0
    for size, times in zip(*np.unique(rows, return_counts=True), strict=True):
        # All possible overlaps for each of `sizes`, one range after the other.
        least = np.maximum(1, size + sizes - total)
        ways = np.minimum(size, sizes) - least + 1
        starts = np.cumsum(ways) - ways
        overlap = np.arange(ways.sum()) + np.repeat(least - starts, ways)
        other, weight = np.repeat(sizes, ways), np.repeat(repeats * times, ways)
        log_chance = (
            log_factorial[size]
            + log_factorial[other]
            + log_factorial[total - size]
            + log_factorial[total - other]
            - log_factorial[total]
            - log_factorial[overlap]
            - log_factorial[size - overlap]
            - log_factorial[other - overlap]
            - log_factorial[total - size - other + overlap]
        )
        information = overlap / total * np.log(total * overlap / (size * other))
        expected += float((weight * information * np.exp(log_chance)).sum())
    return expected
