"""Cross-image attention of many pairs, with a backward pass that stores one index per cell."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pml_tacl.utils.errors import InputError
from pml_tacl.utils.precision import wide_dtype, without_autocast


def cross_attention(
    queries: Tensor,
    second_queries: Tensor | None,
    references: Tensor | None,
    anchors: Tensor,
    others: Tensor,
    temperature: float | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """Return the attention of ``queries[anchors]``, and of their second views, to ``others``.

    Args:
        queries: (N, C, H, W) feature maps.
        second_queries: (N, C, H', W') feature maps of the second views, or None.
        references: (M, C, H'', W'') feature maps; None compares ``queries`` with one another.
        anchors: (P,) indices into the queries.
        others: (P,) indices into the references.
        temperature: None for the hard maximum, else t > 0.
        chunk_size: number of pairs compared at once; None chooses it.

    Returns:
        (P, H, W) and (P, H', W') (empty without a second view), at least fp32.
    """
    check_options(temperature, chunk_size)
    with without_autocast(queries.device):
        first, second = _CrossAttention.apply(
            anchors, others, temperature, chunk_size, queries, second_queries, references
        )
    first = first.unflatten(1, queries.shape[2:])
    if second_queries is not None:
        second = second.unflatten(1, second_queries.shape[2:])
    return first, second


def check_options(temperature: float | None, chunk_size: int | None) -> None:
    """Raise ValueError if ``temperature`` or ``chunk_size`` is out of range."""
    if temperature is not None and not temperature > 0:
        raise InputError(f"temperature must be positive or None, got {temperature}")
    if chunk_size is not None and chunk_size < 1:
        raise InputError(f"chunk_size must be at least 1 or None, got {chunk_size}")


class _CrossAttention(torch.autograd.Function):
    """Cross-image attention with its own backward pass.

    The cells of all maps are stored as unit vectors in the rows of one table. The gradient of a
    maximum goes to one row per cell, so the backward pass is a weighted sum of rows
    (``embedding_bag``). It neither stores nor recomputes a similarity matrix.
    """

    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        others: Tensor,
        temperature: float | None,
        chunk_size: int | None,
        *given: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        _, second_queries, references = given
        maps = [m for m in given if m is not None]
        table, inverse_norms = unit_rows(maps)
        shapes = [m.shape for m in maps]
        r = 0 if references is None else len(maps) - 1
        num_queries = 1 if second_queries is None else 2
        views = _views(table, shapes)
        step = chunk_size or _pairs_at_once(shapes, table.device)

        attention = [inverse_norms.new_empty(len(anchors), v.shape[1]) for v in views[:num_queries]]
        nearest = [torch.empty_like(a, dtype=torch.long) for a in attention]
        for s in range(0, len(anchors), step):
            chunk = slice(s, s + step)
            other = views[r][others[chunk]].transpose(1, 2)
            for a, index, view in zip(attention, nearest, views, strict=False):
                similarity = torch.bmm(view[anchors[chunk]], other)
                if temperature is None:
                    a[chunk], index[chunk] = similarity.max(dim=2)
                else:
                    a[chunk] = soft_maximum(similarity.to(a.dtype), temperature)

        ctx.save_for_backward(table, inverse_norms, anchors, others, *attention, *nearest)
        ctx.layout = (shapes, r, step, temperature)
        ctx.channels_last = [_is_channels_last(m) for m in maps]
        ctx.present = [m is not None for m in given]
        ctx.set_materialize_grads(False)
        return attention[0], (attention[1] if num_queries == 2 else attention[0].new_empty(0))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        table, inverse_norms, anchors, others, *rest = ctx.saved_tensors
        shapes, r, step, temperature = ctx.layout
        attention, nearest = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        weights = [
            torch.zeros_like(a) if g is None else g for a, g in zip(attention, grads, strict=False)
        ]
        with without_autocast(table.device):
            if temperature is None:
                grad = _hard_backward(
                    table, inverse_norms, anchors, others, attention, nearest, weights, shapes, r
                )
            else:
                grad = _soft_backward(
                    table, inverse_norms, anchors, others, weights, shapes, r, step, temperature
                )
        parts = [
            _as_maps(part, shape, channels_last)
            for part, shape, channels_last in zip(
                _views(grad, shapes), shapes, ctx.channels_last, strict=True
            )
        ]
        return (*[None] * 4, *[parts.pop(0) if there else None for there in ctx.present])


def soft_maximum(similarity: Tensor, temperature: float) -> Tensor:
    """Return temperature * log(mean(exp(similarity / temperature))) over the last dimension."""
    count = torch.full_like(similarity[..., 0], similarity.shape[-1])
    return temperature * (torch.logsumexp(similarity / temperature, dim=-1) - count.log())


def _pairs_at_once(shapes: list[torch.Size], device: torch.device) -> int:
    places = max(shape[2] * shape[3] for shape in shapes)
    numbers = places * max(places, shapes[0][1])  # in the similarities or features of one pair
    # On a CPU, a chunk should fit into the second-level cache.
    return max(1, 2 ** (18 if device.type == "cpu" else 26) // max(1, numbers))


def _starts(shapes: list[torch.Size]) -> list[int]:
    """Return the first table row of each map, and the row after the last map."""
    starts = [0]
    for n, _, h, w in shapes:
        starts.append(starts[-1] + n * h * w)
    return starts


def _views(table: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    """Return a view (N, H * W, C) of each map in the table."""
    return [
        table[start : start + n * h * w].view(n, h * w, c)
        for start, (n, c, h, w) in zip(_starts(shapes), shapes, strict=False)
    ]


def unit_rows(maps: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the unit vectors (rows + 1, C) of all cells of all maps, and their inverse norms.

    The last row is zero. The inverse norm of a zero vector is set to zero.
    """
    shapes = [m.shape for m in maps]
    rows = _starts(shapes)[-1]
    table = maps[0].new_empty(rows + 1, shapes[0][1])
    table[rows] = 0
    for view, m in zip(_views(table, shapes), maps, strict=True):
        _copy_rows(m, view)
    wide = wide_dtype(table)
    norms = torch.linalg.vector_norm(table, dim=1, dtype=wide)
    inverse_norms = torch.where(norms > torch.finfo(wide).tiny, norms.reciprocal(), 0.0)
    # Normalise in slices that fit into the cache.
    step = max(1, 2**18 // max(1, table.shape[1]))
    for part, inverse in zip(table.split(step), inverse_norms.split(step), strict=True):
        part.mul_(inverse.unsqueeze(1))
    return table, inverse_norms


def _is_channels_last(m: Tensor) -> bool:
    return m.is_contiguous(memory_format=torch.channels_last)


def _copies_by_image(m: Tensor) -> bool:
    """Return whether copying one image at a time uses torch's fast 2D transpose."""
    if m.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return m.is_contiguous() and len(m) > 0


def _copy_rows(m: Tensor, rows: Tensor) -> None:
    """Copy m (N, C, H, W) into rows (N, H * W, C)."""
    if _copies_by_image(m):
        torch._foreach_copy_(list(rows), list(m.flatten(2).transpose(1, 2)))
    else:
        n, c, h, w = m.shape
        rows.view(n, h, w, c).copy_(m.permute(0, 2, 3, 1))


def _as_maps(rows: Tensor, shape: torch.Size, channels_last: bool) -> Tensor:
    """Return rows (N, H * W, C) as maps (N, C, H, W) in the same memory.

    The memory layout is that of the input maps. Otherwise the next backward step would copy the
    whole gradient, which is slower.
    """
    n, c, h, w = shape
    if channels_last or not _copies_by_image(rows):
        return rows.view(n, h, w, c).permute(0, 3, 1, 2)
    for part in rows.split(max(1, 2**18 // max(1, c * h * w))):
        copied = part.clone()
        torch._foreach_copy_(list(part.view(-1, c, h * w)), list(copied.transpose(1, 2)))
    return rows.view(n, c, h, w)


def _hard_backward(
    table: Tensor,
    inverse_norms: Tensor,
    anchors: Tensor,
    others: Tensor,
    attention: list[Tensor],
    nearest: list[Tensor],
    weights: list[Tensor],
    shapes: list[torch.Size],
    r: int,
) -> Tensor:
    """Return the gradient of all rows through the maximum and the normalisation x / |x|.

    The gradient of the normalisation is ``(g - (g . f) f) / |x|``. Because g is a weighted sum of
    rows, g . f is the sum of the same weights times the attention. This costs one more entry per
    bag, but no extra pass.
    """
    starts, zero_row = _starts(shapes), len(table) - 1
    rows = torch.arange(zero_row, device=table.device)
    targets, sources, factors = [rows], [rows], [torch.zeros_like(inverse_norms[:zero_row])]
    for q, (value, index, weight) in enumerate(zip(attention, nearest, weights, strict=True)):
        places = value.shape[1]
        query = (starts[q] + anchors[:, None] * places + rows[:places]).flatten()
        reference = (starts[r] + others[:, None] * (shapes[r][2] * shapes[r][3]) + index).flatten()
        targets += [query, reference]
        sources += [reference, query]
        factors += [weight.flatten()] * 2
        along = torch.where(weight != 0, weight * value, 0.0).flatten()
        factors[0].index_add_(0, query, -along).index_add_(0, reference, -along)
    target, order = torch.cat(targets).sort(stable=True)
    factor = torch.cat(factors)[order] * inverse_norms[target]
    # Skip rows with weight 0: they may be nan.
    source = torch.where(factor != 0, torch.cat(sources)[order], zero_row)
    return F.embedding_bag(
        source,
        table,
        torch.searchsorted(target, rows),
        mode="sum",
        per_sample_weights=factor.to(table.dtype),
    )


def _soft_backward(
    table: Tensor,
    inverse_norms: Tensor,
    anchors: Tensor,
    others: Tensor,
    weights: list[Tensor],
    shapes: list[torch.Size],
    r: int,
    step: int,
    temperature: float,
) -> Tensor:
    """Return the gradient of all rows for the soft maximum; recomputes the similarities."""
    grad = torch.zeros_like(table)
    views, sums = _views(table, shapes), _views(grad, shapes)
    for s in range(0, len(anchors), step):
        i, j = anchors[s : s + step], others[s : s + step]
        other = views[r][j]
        for view, total, weight in zip(views, sums, weights, strict=False):
            weight = weight[s : s + step].unsqueeze(2)
            # Skip rows with weight 0: they may be nan.
            query = view[i].masked_fill_(weight == 0, 0.0)
            share = torch.bmm(query, other.transpose(1, 2)).to(weight.dtype).div_(temperature)
            share = (share.softmax(dim=2) * weight).to(table.dtype)
            total.index_add_(0, i, torch.bmm(share, other))
            sums[r].index_add_(0, j, torch.bmm(share.transpose(1, 2), query))
    step = max(1, 2**18 // max(1, table.shape[1]))
    for g, f, inverse in zip(
        grad.split(step), table.split(step), inverse_norms.split(step), strict=True
    ):
        g.addcmul_(f, torch.linalg.vecdot(g, f).unsqueeze(1), value=-1)
        g.mul_(inverse.unsqueeze(1)).masked_fill_(inverse.unsqueeze(1) == 0, 0.0)
    return grad
