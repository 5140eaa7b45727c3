"""Collective operations on tensors. They do nothing without distributed training.

All processes must call functions marked "collective", in the same order.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from pml_tacl.distributed.session import (
    barrier,
    device,
    in_use,
    is_main,
    naming,
    patient,
    rank,
    world_size,
)

_BUCKET = 1 << 23  # numbers sent at once, 32 MiB of float32
_Place = TypeVar("_Place", int, Tensor)


def broadcast(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Send tensors of the main process to all processes. Collective.

    Args:
        tensors: tensors of any shape and dtype, or None. On other processes only their number
            matters.

    Returns:
        On the main process the tensors as given; on the others copies of them on the CPU.
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
    """Return the indices of the images that a process embeds: every world_size-th batch.

    The batches are those of a single process, because the last bits of an embedding depend on the
    other images of its batch.

    Args:
        count: number of images of all processes.
        batch_size: images in a batch.
        of: rank of the process; None for this one.

    Returns:
        (n,) int64, ascending.
    """
    own = OwnImages(count, batch_size, of)
    return own.at(torch.arange(len(own)))


class OwnImages(Sequence[int]):
    """The indices of :func:`shard` with the same arguments, computed when they are asked for."""

    def __init__(self, count: int, batch_size: int, of: int | None = None) -> None:
        self.rank = rank() if of is None else of
        self.world_size, self.batch_size = world_size(), batch_size
        rounds, rest = divmod(count, self.world_size * batch_size)
        last = min(max(rest - self.rank * batch_size, 0), batch_size)
        self._length = rounds * batch_size + last

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        places = range(len(self))[index]
        return self.at(places) if isinstance(places, int) else [self.at(one) for one in places]

    def at(self, place: _Place) -> _Place:
        """Return the index at a place in [0, n), or (n,) for a tensor of places."""
        batch = place // self.batch_size * self.world_size + self.rank
        return batch * self.batch_size + place % self.batch_size


def gather_rows(rows: Tensor, count: int, batch_size: int) -> Tensor | None:
    """Gather the embeddings or labels of all processes on the main process. Collective.

    The main process needs memory for the result and one bucket of each process.

    Args:
        rows: (n, ...), for the indices from :func:`shard`; the same dtype on all processes.
        count: N, number of images of all processes.
        batch_size: the value given to :func:`shard`.

    Returns:
        (N, ...) on the CPU, in the order of the data set; None on the other processes.
    """
    if world_size() == 1:
        return rows
    barrier()  # processes may differ in speed, and the timeout of gathering is shorter
    # A process without images does not know the shape; the main process has the first batch.
    known: list[Any] = [(tuple(rows.shape[1:]), rows.dtype)]
    with naming("gathering embeddings"):
        distributed.broadcast_object_list(known, src=0, group=patient())
    shape, dtype = known[0]
    rows = rows if len(rows) else torch.empty(0, *shape, dtype=dtype)
    where = [OwnImages(count, batch_size, of) for of in range(world_size())]
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
            for own_images, part in zip(where, into, strict=True):
                places = own_images.at(torch.arange(start, min(stop, len(own_images))))
                whole[places] = part[: len(places)].cpu()
    return whole


def gather_batch(own: Tensor, views: int = 1) -> Tensor:
    """Gather a batch from all processes; gradients flow to this process's part. Collective.

    Each process computes the same loss on the whole batch, but only the gradient of its own part.
    The sum of these gradients over ranks equals the gradient of a single process.

    Args:
        own: (views * n, ...), one view after the other; n is the same on all processes.
        views: number of views.

    Returns:
        (views * world_size * n, ...), one view after the other, each in the order of the ranks.
    """
    if world_size() == 1:
        return own
    sent = own.detach().contiguous()
    parts = [torch.empty_like(sent) for _ in range(world_size())]
    with naming("gathering a batch"):
        distributed.all_gather(parts, sent)
    parts[rank()] = own
    return torch.cat([part.unflatten(0, (views, -1)) for part in parts], dim=1).flatten(0, 1)


def take_rows(own: Tensor, index: Tensor) -> Tensor:
    """Return rows of a batch that is divided among the ranks. Collective.

    Each rank receives only the rows that it asks for.

    Args:
        own: (n, ...), this rank's part of the batch; n is the same on all ranks.
        index: (world_size * n,) int64 on the CPU, the same on all ranks: rows of the whole batch,
            n for each rank, in the order of the ranks.

    Returns:
        (n, ...), the rows that ``index`` names for this rank.
    """
    wanted = index.view(world_size(), -1)
    owner = wanted // len(own)
    mine = owner == rank()
    sent = own[(wanted[mine] - rank() * len(own)).to(own.device, non_blocking=True)]
    received = own.new_empty(own.shape)
    counts = owner[rank()].bincount(minlength=world_size()).tolist()
    with naming("exchanging parts of a batch"):
        distributed.all_to_all_single(received, sent.contiguous(), counts, mine.sum(dim=1).tolist())
    # Rows arrive in the order of their owners.
    place = owner[rank()].argsort(stable=True).argsort()
    return received[place.to(own.device, non_blocking=True)]


def total(tensors: Iterable[Tensor], divisor: float = 1.0) -> None:
    """Replace tensors by their sums over ranks, divided by ``divisor``. In place. Collective.

    Tensors are sent in flat buckets, so many small tensors take as long as one large tensor.
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
    """Return for each entry whether it is true on any rank. Collective.

    Args:
        used: flags, as many on all ranks.
    """
    if world_size() == 1 or not used:
        return list(used)
    counts = torch.tensor(used, dtype=torch.int32, device=device())
    with naming("agreeing on gradients"):
        distributed.all_reduce(counts, distributed.ReduceOp.MAX)
    return [bool(count) for count in counts.tolist()]


def mean_loss(own: Tensor) -> Tensor:
    """Average a loss over ranks. Collective.

    Args:
        own: the loss of this process's images.

    Returns:
        The mean over ranks; its gradient is that of this process's share of the mean.
    """
    if world_size() == 1:
        return own
    part = own / world_size()
    mean = part.detach().clone()
    total([mean])
    return part + (mean - part.detach())


def equal_to_first(tensors: Iterable[Tensor]) -> None:
    """Copy the values of the main process to all processes, in place. Collective."""
    tensors = list(tensors)
    with torch.no_grad():
        if not is_main():
            for tensor in tensors:
                tensor.zero_()
        total(tensors)


def equalise_buffers(modules: Iterable[nn.Module]) -> None:
    """Average floating-point buffers (running statistics) over ranks, in place. Collective.

    Running statistics are means, so averaging them, at any time and any number of times, gives
    the mean over the batches of all ranks.
    """
    if world_size() == 1:
        return
    buffers = [b for module in modules for b in module.buffers() if b.is_floating_point()]
    wide = [buffer.double() for buffer in buffers]  # equal values stay bit-identical
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
