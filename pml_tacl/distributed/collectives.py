"""Tensors that the processes of a training exchange; no-ops in a training of one process.

Calls marked "collective" must be made by every process, in the same order.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from pml_tacl.distributed.session import device, in_use, is_main, naming, patient, rank, world_size

_BUCKET = 1 << 23  # numbers that travel at once, 32 MiB of float32


def broadcast(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The first process's tensors, of any shape and type, on all of them. Collective.

    Args:
        tensors: those to send; of the others' only the number counts.

    Returns:
        As given on the first process, on its own device; elsewhere on the CPU.
    """
    if not in_use():
        return list(tensors)
    kinds = [[None if t is None else (tuple(t.shape), t.dtype) for t in tensors]]
    received: list[Tensor | None] = []
    with naming("sending tensors from process 0"):
        distributed.broadcast_object_list(kinds, src=0, group=patient())
        for kind, own in zip(kinds[0], tensors, strict=True):
            if kind is None:
                received.append(None)
                continue
            if is_main() and own is not None:
                travelling = own.detach().to(device()).contiguous()
            else:
                travelling = torch.empty(kind[0], dtype=kind[1], device=device())
            distributed.broadcast(travelling, src=0)
            received.append(own if is_main() else travelling.cpu())
    return received


def shard(count: int, batch_size: int, of: int | None = None) -> Tensor:
    """Which of ``count`` rows this process embeds: whole batches, in turn.

    Batches are cut as one process would cut them: a row's embedding depends, in its last bits,
    on the others of its batch.

    Args:
        count: rows of all processes.
        batch_size: rows at once.
        of: another process than this one.

    Returns:
        (n,) int64, ascending.
    """
    mine = rank() if of is None else of
    starts = range(mine * batch_size, count, world_size() * batch_size)
    parts = [torch.arange(start, min(start + batch_size, count)) for start in starts]
    return torch.cat(parts) if parts else torch.arange(0)


def gather_rows(rows: Tensor, count: int, batch_size: int) -> Tensor | None:
    """Rows of all processes in their order, on the first one. Collective.

    Memory there is the result and a bucket of each process.

    Args:
        rows: (n, ...), those that :func:`shard` gave to this process; of one type on all.
        count: N, rows of all.
        batch_size: as given to :func:`shard`.

    Returns:
        (N, ...) on the CPU; None on the others.
    """
    if world_size() == 1:
        return rows
    # A process without a row does not know their shape; the first one has the first batch.
    known: list[Any] = [(tuple(rows.shape[1:]), rows.dtype)]
    with naming("gathering embeddings"):
        distributed.broadcast_object_list(known, src=0, group=patient())
    shape, dtype = known[0]
    rows = rows if len(rows) else torch.empty(0, *shape, dtype=dtype)
    where = [shard(count, batch_size, of) for of in range(world_size())]
    step = max(1, _BUCKET // max(1, world_size() * math.prod(shape)))
    whole = torch.empty(count, *shape, dtype=dtype) if is_main() else None
    for start in range(0, max(map(len, where)), step):
        stop = min(start + step, max(map(len, where)))
        padded = torch.zeros(stop - start, *shape, dtype=dtype, device=device())
        own = rows[start:stop]
        padded[: len(own)] = own.to(device())
        into = [torch.empty_like(padded) for _ in where] if is_main() else None
        with naming("gathering embeddings"):
            distributed.gather(padded, into, dst=0)
        if whole is not None and into is not None:
            for places, part in zip(where, into, strict=True):
                places = places[start:stop]
                whole[places] = part[: len(places)].cpu()
    return whole


def gather_batch(own: Tensor, views: int = 1) -> Tensor:
    """A tensor of the joined batch, through which the gradient reaches this process's rows.

    Every process computes the same loss of the same joined batch, each with the gradient of its
    own rows: their sum over the processes is the gradient of one process. Collective.

    Args:
        own: (views * n, ...), n alike on all processes, a view after the other.
        views: how many.

    Returns:
        (views * world_size * n, ...), a view after the other, each in the order of the processes.
    """
    if world_size() == 1:
        return own
    sent = own.detach().contiguous()
    parts = [torch.empty_like(sent) for _ in range(world_size())]
    with naming("gathering a batch"):
        distributed.all_gather(parts, sent)
    parts[rank()] = own
    return torch.cat([part.unflatten(0, (views, -1)) for part in parts], dim=1).flatten(0, 1)


def total(tensors: Iterable[Tensor], divisor: float = 1.0) -> None:
    """Replace tensors by their sums over the processes, over ``divisor``. Collective.

    They travel in flat buckets, so that many small ones cost no more than a large one.
    """
    if world_size() == 1:
        return
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    with torch.no_grad(), naming("summing over the processes"):
        for alike in kinds.values():
            for bucket in _buckets(alike):
                flat = torch.cat([tensor.detach().flatten() for tensor in bucket])
                distributed.all_reduce(flat)
                if divisor != 1:
                    flat /= divisor
                parts = flat.split([tensor.numel() for tensor in bucket])
                for tensor, part in zip(bucket, parts, strict=True):
                    tensor.copy_(part.view(tensor.shape))


def used_anywhere(used: Sequence[bool]) -> list[bool]:
    """Of each thing, whether any process has used it. Collective; as many on all of them."""
    if world_size() == 1 or not used:
        return list(used)
    counts = torch.tensor(used, dtype=torch.int32, device=device())
    with naming("agreeing on gradients"):
        distributed.all_reduce(counts, distributed.ReduceOp.MAX)
    return [bool(count) for count in counts.tolist()]


def mean_loss(own: Tensor) -> Tensor:
    """A loss of this process's images as a part of the mean over the processes. Collective.

    Returns:
        The mean; the gradient is of this process's part of it.
    """
    if world_size() == 1:
        return own
    part = own / world_size()
    mean = part.detach().clone()
    total([mean])
    return part + (mean - part.detach())


def equal_to_first(tensors: Iterable[Tensor]) -> None:
    """Give all processes the first one's values, in place. Collective."""
    tensors = list(tensors)
    with torch.no_grad():
        if not is_main():
            for tensor in tensors:
                tensor.zero_()
        total(tensors)


def equalise_buffers(modules: Iterable[nn.Module]) -> None:
    """Give all processes the mean of their running statistics. Collective.

    Statistics are running means: their mean over the processes is that of the joined batches'
    means, whenever and however often it is taken.
    """
    if world_size() == 1:
        return
    buffers = [b for module in modules for b in module.buffers() if b.is_floating_point()]
    wide = [buffer.double() for buffer in buffers]  # what is equal already stays, to the last bit
    total(wide, world_size())
    for buffer, mean in zip(buffers, wide, strict=True):
        buffer.copy_(mean)


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    held = 0
    for tensor in tensors:
        if bucket and held + tensor.numel() > _BUCKET:
            yield bucket
            bucket, held = [], 0
        bucket.append(tensor)
        held += tensor.numel()
    if bucket:
        yield bucket
