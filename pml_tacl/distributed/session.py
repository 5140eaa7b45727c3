"""Training in several processes: what they share, and how one that is lost ends the others.

Everything here is a no-op in a training of one process, so that callers have one code path. Calls
marked "collective" must be made by every process, in the same order.
"""

import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from pml_tacl.utils.errors import DivergedError, InputError, InputTypeError, MissingPackageError

_T = TypeVar("_T")
# Clustering and evaluation are the first process's, and may take hours; who dies is seen at once.
_PATIENCE = timedelta(days=7)
_LOST = re.compile(
    r"connection (closed|reset|refused)|timed? ?out|broken pipe|peer|socket|nccl|aborted", re.I
)
_TYPES: tuple[type[Exception], ...] = (
    InputError, InputTypeError, DivergedError, MissingPackageError,
    ValueError, TypeError, OSError, FloatingPointError, MemoryError, ImportError,
)  # fmt: skip


class ProcessLost(ConnectionError):
    """Another process of the training has ended, or no longer answers."""


def in_use() -> bool:
    """Whether this process trains together with others (or alone in a process group)."""
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    """Number of this process, from 0."""
    return distributed.get_rank() if in_use() else 0


def world_size() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if in_use() else 1


def is_main() -> bool:
    """Whether this process is the one that prints, clusters, evaluates and writes."""
    return rank() == 0


@contextmanager
def session(timeout: timedelta = timedelta(minutes=30)) -> Iterator[None]:
    """Join the processes that torchrun started; without torchrun, nothing.

    Each process takes the GPU of its local rank, if there are GPUs. CPU tensors travel by gloo,
    which notices at once that a process has died, GPU tensors by nccl. At the end of the block the
    processes wait for each other and part; what follows it runs in each of them by itself. An
    error within the block goes on to the caller.

    Args:
        timeout: for one exchange of tensors in training; a process that hangs longer is lost.

    Raises:
        SystemExit: if a machine has fewer GPUs than processes, or another process was lost; the
            code is one line that says so.
    """
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        yield
        return
    backend, gpus = "gloo", torch.cuda.device_count()
    if gpus:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= gpus:
            sys.exit(
                f"error: process {local} of this machine has no GPU, there are {gpus}: give "
                f"torchrun --nproc-per-node {gpus}, or CUDA_VISIBLE_DEVICES= to train on the CPU"
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    failed = True
    try:
        with naming("meeting the others"):
            distributed.init_process_group(backend, timeout=timeout)
        yield
        barrier()
        failed = False
    except ProcessLost as error:
        sys.exit(f"error: {error}")
    finally:
        _leave(failed and bool(gpus))


def _leave(broken: bool) -> None:
    """End the exchange, so that no thread of it outlives the interpreter.

    Args:
        broken: whether nccl may still wait for others; it would do so for ever.
    """
    _patient_group.cache_clear()
    if in_use() and not broken:
        with suppress(RuntimeError):
            distributed.destroy_process_group()


def barrier() -> None:
    """Wait for all processes, however long the first one works. Collective."""
    if in_use():
        with naming("waiting for the others"):
            distributed.barrier(group=patient())


def run_on_main(function: Callable[[], _T], doing: str) -> _T:
    """What a function gives on the first process, on all of them. Collective.

    Args:
        function: called on the first process alone; the others wait, however long it takes.
        doing: for the message of the others, such as "clustering".

    Returns:
        Its result, which travels as a pickle.

    Raises:
        Exception: what the function raised, on all processes, so that none waits for ever; on
            the others of a common type and with the first one's words.
    """
    if not in_use():
        return function()
    sent: list[Any] = [None]
    error: Exception | None = None
    if is_main():
        try:
            sent = [(function(), None, "")]
        except Exception as raised:
            error = raised
            kind = next((known for known in _TYPES if isinstance(raised, known)), RuntimeError)
            sent = [(None, kind, " ".join(str(raised).split()))]
    with naming(f"waiting for {doing}"):
        distributed.broadcast_object_list(sent, src=0, group=patient())
    if error is not None:
        raise error
    result, raised_as, text = sent[0]
    if raised_as is not None:
        raise raised_as(f"{text} (in {doing} on process 0)")
    return result  # type: ignore[no-any-return]


def check_same(what: str, values: Iterable[Any], remedy: str) -> None:
    """Raise on every process unless all of them have the same values. Collective.

    Args:
        what: named in the message.
        values: tensors, whose bytes are compared, or anything with a repr.
        remedy: what to do about it.

    Raises:
        ValueError: naming the processes that differ from the first.
    """
    if not in_use():
        return
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            whole = value.detach().cpu().contiguous()
            digest.update(f"{tuple(whole.shape)} {whole.dtype}".encode())
            digest.update(whole.flatten().view(torch.uint8).numpy().data)
        else:
            digest.update(repr(value).encode("utf-8", "replace"))
    own = torch.tensor(list(digest.digest()), dtype=torch.uint8, device=device())
    all_of_them = torch.empty(world_size(), len(own), dtype=torch.uint8, device=device())
    with naming(f"comparing {what}"):
        distributed.all_gather(list(all_of_them.unbind()), own)
    other = (all_of_them != all_of_them[0]).any(dim=1).nonzero().flatten().tolist()
    if other:
        raise InputError(
            f"{what} of process{'es' if len(other) > 1 else ''} {', '.join(map(str, other))} "
            f"differ from process 0's: {remedy}"
        )


def all_reduce_max(value: int) -> int:
    """The largest of the processes' numbers. Collective."""
    if world_size() == 1:
        return value
    said = torch.tensor([value])
    with naming("agreeing with the others"):
        distributed.all_reduce(said, distributed.ReduceOp.MAX, group=patient())
    return int(said)


def device() -> torch.device:
    """Where tensors must lie to travel: the CPU unless nccl is all there is."""
    there = distributed.get_backend_config()
    return torch.device("cpu" if "cpu:" in there else "cuda")


def patient() -> Any:
    """A group of all processes whose members wait for days; they notice a death at once."""
    return _patient_group(distributed.group.WORLD)


@lru_cache(maxsize=1)
def _patient_group(_world: Any) -> Any:
    with naming("meeting the others"):
        return distributed.new_group(backend="gloo", timeout=_PATIENCE)


@contextmanager
def naming(doing: str) -> Iterator[None]:
    """Turn what a backend throws when a process is gone into one line that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if not _LOST.search(str(error)):
            raise
        reason = re.sub(r"^\[\S+\]\s*", "", " ".join(str(error).split())).split(". ")[0]
        raise ProcessLost(
            f"process {rank()} lost another of the {world_size()} processes while {doing} "
            f"({reason[:160]}): it has ended, see its own message (none if it was killed, often "
            "for lack of memory), or hangs; resume from the last checkpoint"
        ) from error
