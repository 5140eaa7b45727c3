"""Cross-image attention of many pairs, with a backward pass that keeps one index per place."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_attention(
    queries: Tensor,
    second_queries: Tensor | None,
    references: Tensor | None,
    anchors: Tensor,
    others: Tensor,
    temperature: float | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """Attention of ``queries[anchors]`` (and of a second view of them) against ``others``.

    Args:
        queries: (N, C, H, W).
        second_queries: (N, C, H', W') or None.
        references: (M, C, H'', W''); None compares with ``queries`` themselves.
        anchors: (P,) rows of the queries.
        others: (P,) rows of the references.
        temperature: None or t > 0.
        chunk_size: pairs at once or None.

    Returns:
        (P, H, W) and (P, H', W') (empty without a second view), at least fp32.
    """
    if temperature is not None and temperature <= 0:
        raise ValueError(f"temperature must be positive or None, got {temperature}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 or None, got {chunk_size}")
    with torch.autocast(queries.device.type, enabled=False):
        first, second = _CrossAttention.apply(
            queries, second_queries, references, anchors, others, temperature, chunk_size
        )
    first = first.unflatten(1, queries.shape[2:])
    if second_queries is not None:
        second = second.unflatten(1, second_queries.shape[2:])
    return first, second


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _pairs_at_once(channels: int, places: int, device: torch.device) -> int:
    if device.type == "cpu" and not torch.compiler.is_compiling():
        # The features of a chunk should stay in the second-level cache.
        return max(1, 2**18 // max(1, channels * places))
    return max(1, 2**26 // max(1, places * places))


class _CrossAttention(torch.autograd.Function):
    """All maps become rows of one table of unit vectors; a place is a row number.

    The gradient of a maximum goes to one row per place, so the backward pass is a weighted sum
    of rows (``embedding_bag``): no similarity matrix is kept or recomputed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        second_queries: Tensor | None,
        references: Tensor | None,
        anchors: Tensor,
        others: Tensor,
        temperature: float | None,
        chunk_size: int | None,
    ) -> tuple[Tensor, Tensor]:
        parts = [p for p in (queries, second_queries, references) if p is not None]
        table, norms = _unit_rows(parts)
        starts = [0]
        for part in parts:
            starts.append(starts[-1] + len(part) * part.shape[2] * part.shape[3])
        places = [part.shape[2] * part.shape[3] for part in parts]
        views = [
            table[a:b].view(-1, hw, table.shape[1])
            for a, b, hw in zip(starts, starts[1:], places, strict=False)
        ]
        num_queries = 2 if second_queries is not None else 1
        r = 0 if references is None else len(parts) - 1
        step = chunk_size or _pairs_at_once(table.shape[1], max(places), table.device)
        dtype = _wide(table.dtype)

        attention = [
            torch.empty(len(anchors), hw, dtype=dtype, device=table.device)
            for hw in places[:num_queries]
        ]
        arg_max = [torch.empty_like(a, dtype=torch.long) for a in attention]
        for s in range(0, len(anchors), step):
            chunk = slice(s, s + step)
            other = views[r][others[chunk]].transpose(1, 2)
            for a, index, view in zip(attention, arg_max, views, strict=False):
                similarity = torch.bmm(view[anchors[chunk]], other)
                if temperature is None:
                    value, index[chunk] = similarity.max(dim=2)
                    a[chunk] = value
                else:
                    soft = torch.logsumexp(similarity.to(dtype) / temperature, dim=2)
                    a[chunk] = temperature * (soft - torch.log(soft.new_tensor(places[r])))

        ctx.save_for_backward(table, norms, anchors, others, *arg_max)
        ctx.layout = (starts, places, r, step, temperature, [p.shape for p in parts])
        ctx.present = [p is not None for p in (queries, second_queries, references)]
        return attention[0], (
            attention[1] if num_queries == 2 else attention[0].new_empty(len(anchors), 0)
        )

    @staticmethod
    def backward(ctx: Any, *grad_attention: Tensor) -> tuple[Tensor | None, ...]:
        table, norms, anchors, others, *arg_max = ctx.saved_tensors
        starts, places, r, step, temperature, shapes = ctx.layout
        if temperature is None:
            grad = _hard_backward(
                table, anchors, others, arg_max, grad_attention, starts, places, r
            )
        else:
            grad = _soft_backward(
                table, anchors, others, grad_attention, starts, places, r, step, temperature
            )
        # Through the normalisation x / |x|, in place: g <- (g - f (f . g)) / |x|.
        # In slices, so that no third table is held.
        step = max(1, 2**20 // table.shape[1])
        for g, f, norm in zip(grad.split(step), table.split(step), norms.split(step), strict=True):
            g.addcmul_(f, torch.linalg.vecdot(g, f).unsqueeze(1), value=-1).div_(norm.unsqueeze(1))
        pieces = iter(
            grad[a:b].view(n, h, w, c).permute(0, 3, 1, 2)
            for a, b, (n, c, h, w) in zip(starts, starts[1:], shapes, strict=False)
        )
        return (*(next(pieces) if there else None for there in ctx.present), *[None] * 4)


def _unit_rows(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(rows, C) unit vectors of all places of all maps, and their (rows,) norms."""
    counts = [len(p) * p.shape[2] * p.shape[3] for p in parts]
    table = parts[0].new_empty(sum(counts), parts[0].shape[1])
    norms = parts[0].new_empty(sum(counts))
    start = 0
    for part, count in zip(parts, counts, strict=True):
        norm = torch.linalg.vector_norm(part, dim=1, dtype=_wide(part.dtype))
        norm = norm.clamp(min=1e-12 if part.dtype != torch.float16 else 1e-6).to(part.dtype)
        rows = table[start : start + count].view(len(part), *part.shape[2:], -1)
        rows.copy_(part.permute(0, 2, 3, 1)).div_(norm.unsqueeze(-1))
        norms[start : start + count] = norm.flatten()
        start += count
    return table, norms


def _hard_backward(
    table: Tensor,
    anchors: Tensor,
    others: Tensor,
    arg_max: list[Tensor],
    grads: tuple[Tensor, ...],
    starts: list[int],
    places: list[int],
    r: int,
) -> Tensor:
    sources, targets, weights = [], [], []
    for q, index in enumerate(arg_max):
        query = starts[q] + anchors[:, None] * places[q]
        query = (query + torch.arange(places[q], device=table.device)).flatten()
        reference = (starts[r] + others[:, None] * places[r] + index).flatten()
        sources += [reference, query]
        targets += [query, reference]
        weights += [grads[q].flatten()] * 2
    target, order = torch.cat(targets).sort(stable=True)
    rows = torch.arange(len(table), device=table.device)
    weight = torch.cat(weights)[order].to(table.dtype)
    return F.embedding_bag(
        torch.cat(sources)[order],
        table,
        torch.searchsorted(target, rows),
        mode="sum",
        per_sample_weights=weight,
    )


def _soft_backward(
    table: Tensor,
    anchors: Tensor,
    others: Tensor,
    grads: tuple[Tensor, ...],
    starts: list[int],
    places: list[int],
    r: int,
    step: int,
    temperature: float,
) -> Tensor:
    total = torch.zeros_like(table)
    views, sums = (
        [
            t[a:b].view(-1, hw, t.shape[1])
            for a, b, hw in zip(starts, starts[1:], places, strict=False)
        ]
        for t in (table, total)
    )
    for s in range(0, len(anchors), step):
        i, j = anchors[s : s + step], others[s : s + step]
        other = views[r][j]
        for view, sum_, grad in zip(views, sums, grads, strict=False):
            if grad.shape[1] == 0:
                continue
            query = view[i]
            soft = torch.bmm(query, other.transpose(1, 2)).to(grad.dtype).div_(temperature)
            soft = (soft.softmax(dim=2) * grad[s : s + step].unsqueeze(2)).to(table.dtype)
            sum_.index_add_(0, i, torch.bmm(soft, other))
            sums[r].index_add_(0, j, torch.bmm(soft.transpose(1, 2), query))
    return total
