"""Ranks of the right answers, one chunk of queries at a time: nothing of size N x N, or N x k."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

from pml_tacl.clustering.unit_embeddings import Embeddings

# Entries of the largest array held at once, in search results and in the distances of torch.
RESULT_ENTRIES = 2**22
DISTANCE_ENTRIES = 2**26
CHUNK = 2**14
# How much further to look, each time, for the first right answer of queries that have none yet.
WIDEN = 16

Search = Callable[[Tensor, int, Tensor], Tensor]


def faiss_search(queries: Tensor, k: int, reference: Tensor) -> Tensor:
    """Indices (Q, k) of the nearest rows of `reference` by L2, ties by index."""
    _, indices = faiss.knn(queries.cpu().numpy(), reference.cpu().numpy(), k)
    return torch.from_numpy(indices).to(queries.device)


def torch_search(queries: Tensor, k: int, reference: Tensor) -> Tensor:
    """The same on any device, through a matrix product and topk."""
    squares = reference.square().sum(dim=1)
    chunks = queries.split(max(1, DISTANCE_ENTRIES // len(reference)))
    # The query's own norm moves all distances of a row alike, so it is left out.
    found = [_smallest(torch.addmm(squares, rows, reference.T, alpha=-2), k) for rows in chunks]
    return torch.cat(found)


def _smallest(distances: Tensor, k: int) -> Tensor:
    """Indices of the k smallest of each row, equal ones by index, which topk leaves open."""
    values, indices = distances.topk(k, dim=1, largest=False)
    by_index = indices.argsort(dim=1)
    indices, values = indices.gather(1, by_index), values.gather(1, by_index)
    indices = indices.gather(1, values.argsort(dim=1, stable=True))
    cut = (distances <= values.amax(dim=1, keepdim=True)).sum(dim=1) > k
    if cut.any():
        indices[cut] = distances[cut].argsort(dim=1, stable=True)[:, :k]
    return indices


def per_query_metrics(
    names: Sequence[str],
    queries: Tensor,
    query_classes: Tensor,
    reference: Tensor,
    reference_classes: Tensor,
    relevant: Tensor,
    *,
    ref_includes_query: bool,
    depth: int | None,
    search: Search,
) -> dict[str, Tensor]:
    """Compute metrics for each query that has a right answer.

    Args:
        names: of metrics, `recall_at_<k>` for any k among them.
        queries: (Q, D) float32.
        query_classes: (Q,) int64.
        reference: (R, D) float32; its first Q rows are the queries if `ref_includes_query`.
        reference_classes: (R,) int64.
        relevant: (Q,) int64, right answers of each query; queries without one are skipped.
        ref_includes_query: whether to leave the query itself out of its answers.
        depth: how far mean_reciprocal_rank and mean_average_precision look; None is to the end.
        search: gives the indices of the nearest rows.

    Returns:
        One (Q,) float64 tensor for each name, NaN for skipped queries.
    """
    gallery = len(reference) - int(ref_includes_query)
    results = {
        name: torch.full((len(queries),), torch.nan, dtype=torch.float64, device=queries.device)
        for name in names
    }

    def hits_of(rows: Tensor, k: int) -> Tensor:
        indices = search(queries[rows], k + int(ref_includes_query), reference)
        if ref_includes_query:
            indices = _without_self(indices, rows)
        # An approximate search may come back short, with -1.
        return (reference_classes[indices] == query_classes[rows, None]) & (indices >= 0)

    fixed = max([_fixed_depth(name) for name in names])
    if "mean_average_precision" in names:
        fixed = max(fixed, gallery if depth is None else depth)
    elif "mean_reciprocal_rank" in names and depth is not None:
        fixed = max(fixed, depth)
    to_r = any(name in ("r_precision", "mean_average_precision_at_r") for name in names)
    # Ascending in right answers, so that one large class does not widen the search of all.
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
    """Cut queries, ascending in how far they look, into (start, stop, k) of bounded size."""
    start = 0
    while start < len(wanted):
        stop = min(start + CHUNK, len(wanted))
        while stop - start > 1 and (stop - start) * wanted[stop - 1] > RESULT_ENTRIES:
            stop = start + (stop - start) // 2
        yield start, stop, wanted[stop - 1]
        start = stop


def _without_self(indices: Tensor, rows: Tensor) -> Tensor:
    """Drop the query; where more than k copies crowded it out, drop the last instead."""
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


def finite_rows(name: str, embeddings: Embeddings, device: torch.device) -> Tensor:
    """Embeddings as contiguous float32 on a device, or a ValueError that names what is wrong."""
    if isinstance(embeddings, np.ndarray):
        # torch warns about arrays it may not write to, such as memory maps.
        embeddings = torch.from_numpy(np.require(embeddings, np.float32, ["C", "W"]))
    rows = torch.as_tensor(embeddings).detach()
    if rows.ndim != 2 or 0 in rows.shape:
        raise ValueError(
            f"{name} must be (rows, dimensions) and not empty, got {tuple(rows.shape)}"
        )
    rows = rows.to(device, torch.float32).contiguous()
    # A sum is much quicker to check than its parts; when in doubt, count.
    bad = 0
    if not torch.isfinite(rows.sum(dim=1)).all():
        bad = len(rows) - int(torch.isfinite(rows).all(dim=1).sum())
    if bad:
        raise ValueError(
            f"{bad} of {len(rows)} rows of {name} are NaN or infinite: "
            "look for NaN images or a diverged model"
        )
    return rows


def whole_labels(name: str, labels: Any, count: int) -> Tensor:
    """Labels as int64, so that large ids stay apart, or a ValueError."""
    given = torch.as_tensor(labels)
    if given.ndim not in (1, 2) or len(given) != count:
        raise ValueError(
            f"{name}_labels must be ({count},) like {name}, got shape {tuple(given.shape)}"
        )
    whole = given.long()
    if given.is_complex() or not torch.equal(whole.to(given.dtype), given):
        raise ValueError(f"{name}_labels must be whole numbers, got dtype {given.dtype}")
    return whole


def check_fit(
    query: Tensor, query_labels: Tensor, reference: Tensor, reference_labels: Tensor
) -> None:
    """Raise unless queries and reference have as many dimensions and label levels."""
    if query.shape[1] != reference.shape[1]:
        raise ValueError(
            f"query has {query.shape[1]} dimensions, reference {reference.shape[1]}: "
            "embed both with the same model"
        )
    if query_labels.shape[1:] != reference_labels.shape[1:]:
        raise ValueError(
            f"query_labels have the shape {tuple(query_labels.shape)}, reference_labels "
            f"{tuple(reference_labels.shape)}: give both as many levels"
        )


def check_included(
    query: Tensor, query_labels: Tensor, reference: Tensor, reference_labels: Tensor
) -> None:
    """Raise unless the reference starts with the queries."""
    head, head_labels = reference[: len(query)], reference_labels[: len(query)]
    if torch.equal(query_labels, head_labels) and (
        # The first is much quicker, and nearly always enough.
        torch.equal(query, head) or (query.shape == head.shape and torch.allclose(query, head))
    ):
        return
    raise ValueError(
        "ref_includes_query=True, but the first rows of reference and reference_labels are not "
        "query and query_labels: put the queries first or pass ref_includes_query=False"
    )
