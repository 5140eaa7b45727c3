"""Ranks of the correct results, by chunks of queries: no array of size N x N or N x k."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

# Entries of the largest array of search results in memory.
RESULT_ENTRIES = 2**21
CHUNK = 2**14
# Factor by which each round deepens the search, for queries without a correct result so far.
WIDEN = 16

# (indices of queries (N,), k) -> indices (N, k) of the nearest references, nearest first.
Search = Callable[[Tensor, int], Tensor]


def per_query_metrics(
    names: Sequence[str],
    query_classes: Tensor,
    reference_classes: Tensor,
    relevant: Tensor,
    *,
    ref_includes_query: bool,
    depth: int | None,
    search: Search,
) -> dict[str, Tensor]:
    """Return metrics of each query that has a correct result.

    Args:
        names: names of metrics, including `recall_at_<k>` for any k.
        query_classes: (Q,) int64.
        reference_classes: (R,) int64; the first Q are those of the queries if
            `ref_includes_query`.
        relevant: (Q,) int64, number of correct results of each query; queries without one are
            skipped.
        ref_includes_query: whether to leave the query itself out of its results.
        depth: depth of the ranking for mean_reciprocal_rank and mean_average_precision; None is
            the whole ranking.
        search: function that returns the indices (N, k) of the references nearest to some
            queries, given the indices (N,) of the queries and k.

    Returns:
        One (Q,) float64 tensor for each name, NaN for skipped queries.
    """
    gallery = len(reference_classes) - int(ref_includes_query)
    results = {
        name: torch.full(relevant.shape, torch.nan, dtype=torch.float64, device=relevant.device)
        for name in names
    }

    def hits_of(rows: Tensor, k: int) -> Tensor:
        indices = search(rows, k + int(ref_includes_query))
        if ref_includes_query:
            indices = _without_self(indices, rows)
        # An approximate search may return fewer results, marked by -1.
        return (reference_classes[indices] == query_classes[rows, None]) & (indices >= 0)

    fixed = max([_fixed_depth(name) for name in names])
    if "mean_average_precision" in names:
        fixed = max(fixed, gallery if depth is None else depth)
    elif "mean_reciprocal_rank" in names and depth is not None:
        fixed = max(fixed, depth)
    to_r = any(name in ("r_precision", "mean_average_precision_at_r") for name in names)
    # Sort by the number of correct results, so that one large class does not deepen all searches.
    order = relevant.argsort(stable=True)
    order = order[relevant[order] > 0]
    wanted = relevant[order].clamp(min=fixed) if to_r else torch.full_like(order, fixed)
    unresolved = []
    for start, stop, k in _plan(wanted.clamp(max=gallery).tolist()):
        rows = order[start:stop]
        hits = hits_of(rows, k)
        for name in names:
            results[name][rows] = _metric(name, hits, relevant[rows], depth)
        unresolved.append(rows[~hits.any(dim=1)])
    if "mean_reciprocal_rank" in names and depth is None and unresolved:
        k, rows = min(max(fixed, 1), gallery), torch.cat(unresolved)
        while len(rows) and k < gallery:
            k = min(k * WIDEN, gallery)
            missing = []
            for start, stop, _ in _plan([k] * len(rows)):
                part = rows[start:stop]
                hits = hits_of(part, k)
                results["mean_reciprocal_rank"][part] = _reciprocal_rank(hits)
                missing.append(part[~hits.any(dim=1)])
            rows = torch.cat(missing)
    return results


def _fixed_depth(name: str) -> int:
    return int(name.rsplit("_", 1)[1]) if name.startswith("recall_at_") else 1


def _plan(wanted: list[int]) -> Iterator[tuple[int, int, int]]:
    """Split queries, sorted by search depth, into chunks (start, stop, k) of bounded size."""
    start = 0
    while start < len(wanted):
        stop = min(start + CHUNK, len(wanted))
        while stop - start > 1 and (stop - start) * wanted[stop - 1] > RESULT_ENTRIES:
            stop = start + (stop - start) // 2
        yield start, stop, wanted[stop - 1]
        start = stop


def _without_self(indices: Tensor, rows: Tensor) -> Tensor:
    """Drop the query itself, or the last result if copies displaced the query."""
    itself = indices == rows[:, None]
    itself[:, -1] |= ~itself.any(dim=1)
    return indices[~itself].view(len(rows), -1)


def _reciprocal_rank(hits: Tensor) -> Tensor:
    rank = hits.byte().argmax(dim=1) + 1
    return hits.any(dim=1) / rank.double()


def _metric(name: str, hits: Tensor, relevant: Tensor, depth: int | None) -> Tensor:
    if name == "precision_at_1":
        return hits[:, 0].double()
    if name == "mean_reciprocal_rank":
        return _reciprocal_rank(hits[:, :depth])
    if name.startswith("recall_at_"):
        return hits[:, : _fixed_depth(name)].any(dim=1).double()
    if name == "mean_average_precision":
        hits = hits[:, :depth]
    ranks = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    if name != "mean_average_precision":
        hits = hits & (ranks <= relevant[:, None])
    if name == "r_precision":
        return hits.sum(dim=1) / relevant.double()
    return (hits.cumsum(dim=1) * hits / ranks.double()).sum(dim=1) / relevant.double()
