"""Process group of distributed training, and errors for lost processes.

Without distributed training all functions work for a single process, so callers need no special
case. All processes must call functions marked "collective", in the same order.
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
# The main process clusters and evaluates, which may take hours; the others wait. Dead ranks are
# detected immediately.
_PATIENCE = timedelta(days=7)
_LOST = re.compile(
    r"connection (closed|reset|refused)|timed? ?out|broken pipe|peer|socket|nccl|aborted", re.I
)
_TYPES: tuple[type[Exception], ...] = (
    InputError, InputTypeError, DivergedError, MissingPackageError,
    ValueError, TypeError, OSError, FloatingPointError, MemoryError, ImportError,
)  # fmt: skip


class ProcessLost(ConnectionError):
    """Error for a process of the training that has ended or does not respond."""


def in_use() -> bool:
    """Return whether a process group exists, even if it has only this process."""
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    """Return the rank of this process, from 0; 0 without distributed training."""
    return distributed.get_rank() if in_use() else 0


def world_size() -> int:
    """Return the number of processes; 1 without distributed training."""
    return distributed.get_world_size() if in_use() else 1


def is_main() -> bool:
    """Return whether this is the main process, which prints, clusters, evaluates and writes."""
    return rank() == 0


@contextmanager
def session(timeout: timedelta = timedelta(minutes=30)) -> Iterator[None]:
    """Create the process group of torchrun for the block; do nothing without torchrun.

    Each process uses the GPU of its local rank, if there are GPUs. CPU tensors are sent with
    gloo, which detects dead processes immediately, and GPU tensors with nccl. At the end of the
    block all processes wait for each other, and the process group is destroyed. Errors inside the
    block are passed to the caller.

    Args:
        timeout: for one exchange of tensors; a process that hangs longer counts as lost.

    Raises:
        SystemExit: if a machine has fewer GPUs than processes, or another process was lost; the
            code is a message of one line.
    """
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        yield
        return
    backend, gpus = "gloo", torch.cuda.device_count()
    if gpus:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= gpus:
            sys.exit(
                f"error: process {local} of this machine has no GPU (number of GPUs: {gpus}): give "
                f"torchrun --nproc-per-node {gpus}, or CUDA_VISIBLE_DEVICES= to train on the CPU"
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    failed = True
    try:
        with naming("joining the process group"):
            distributed.init_process_group(backend, timeout=timeout)
        yield
        barrier()
        failed = False
    except ProcessLost as error:
        sys.exit(f"error: {error}")
    finally:
        _leave(failed and bool(gpus))


def _leave(broken: bool) -> None:
    """Destroy the process group, so that none of its threads outlives the interpreter.

    Args:
        broken: whether nccl may still wait for lost processes; the group is left alone then,
            because destroying it would never return.
    """
    _patient_group.cache_clear()
    if in_use() and not broken:
        with suppress(RuntimeError):
            distributed.destroy_process_group()


def barrier() -> None:
    """Wait for all processes, up to 7 days. Collective."""
    if in_use():
        with naming("waiting for the others"):
            distributed.barrier(group=patient())


def run_on_main(function: Callable[[], _T], doing: str) -> _T:
    """Call a function on the main process and return its result on all processes. Collective.

    Args:
        function: called on the main process only; the others wait, up to 7 days.
        doing: what the function does, such as "clustering", for messages of other processes.

    Returns:
        The result of the function, which is sent as a pickle.

    Raises:
        Exception: the error of the function, on all processes. The other processes raise an error
            of a built-in type or of this package, with the same text followed by ``doing``.
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
    """Check that values are the same on all processes. Collective.

    Args:
        what: the noun for the message.
        values: tensors, whose bytes are compared, or other objects, whose repr is compared.
        remedy: advice for the message.

    Raises:
        ValueError: on all processes, with the ranks that differ from rank 0.
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
    """Return the maximum of an integer over ranks. Collective."""
    if world_size() == 1:
        return value
    said = torch.tensor([value])
    with naming("agreeing with the others"):
        distributed.all_reduce(said, distributed.ReduceOp.MAX, group=patient())
    return int(said)


def device() -> torch.device:
    """Return the device of tensors to send: the CPU, or CUDA if nccl is the only backend."""
    there = distributed.get_backend_config()
    return torch.device("cpu" if "cpu:" in there else "cuda")


def patient() -> Any:
    """Return a gloo group of all processes with a timeout of 7 days. It detects dead processes."""
    return _patient_group(distributed.group.WORLD)


@lru_cache(maxsize=1)
def _patient_group(_world: Any) -> Any:
    with naming("joining the process group"):
        return distributed.new_group(backend="gloo", timeout=_PATIENCE)


@contextmanager
def naming(doing: str) -> Iterator[None]:
    """Turn a backend's error about a lost process into a message of one line with advice."""
    try:
        yield
    except RuntimeError as error:
        if not _LOST.search(str(error)):
            raise
        reason = re.sub(r"^\[\S+\]\s*", "", " ".join(str(error).split())).split(". ")[0]
        raise ProcessLost(
            f"process {rank()} lost another of the {world_size()} processes while {doing} "
            f"({reason[:160]}): that process hangs, or has ended (see its own message; there is "
            "none if it was killed, often for lack of memory). Resume from the last checkpoint"
        ) from error
