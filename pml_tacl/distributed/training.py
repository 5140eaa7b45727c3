"""What a trainer in many processes does beside what it does in one; in one, nothing of it."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from pml_tacl.distributed.collectives import (
    equal_to_first,
    equalise_buffers,
    from_first,
    total,
    used_anywhere,
)
from pml_tacl.distributed.session import (
    check_same,
    is_first,
    naming,
    on_first,
    patient,
    rank,
    world_size,
)
from pml_tacl.trainers._order import draw_order
from pml_tacl.trainers.checkpoint import random_state, set_random_state


def begin_together(trainer: Any) -> None:
    """Same settings, same weights; on GPUs, BatchNorm over the batch of all processes.

    Raises:
        ValueError: if a process has other settings than the first.
    """
    if world_size() == 1:
        return
    modules = [*trainer.models.values(), *trainer.loss_funcs.values()]
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    settings = [len(trainer.labels), trainer.batch_size, trainer.iterations_per_epoch]
    settings += [trainer.loss_weights, [tuple(t.shape) for t in tensors]]
    check_same("settings", settings, "start all processes with the same arguments and pictures")
    if torch.device(trainer.data_device).type == "cuda":
        from timm.layers import convert_sync_batchnorm  # torch's own would lose activations

        for model in trainer.models.values():
            convert_sync_batchnorm(model)  # in place, parameters stay the same
    equal_to_first(tensors)


def sum_gradients(trainer: Any) -> None:
    """Each process has the gradients of its own images; a loss's parameters have seen all.

    A parameter that no image of one process has used, as in a branch that was dropped or a layer
    that was skipped, counts as zero there; one that none has used stays without gradient.
    """
    if world_size() == 1:
        return
    for modules, divisor in ((trainer.models, 1), (trainer.loss_funcs, world_size())):
        parameters = [p for module in modules.values() for p in module.parameters()]
        used = used_anywhere([p.grad is not None for p in parameters])
        together = [p for p, anywhere in zip(parameters, used, strict=True) if anywhere]
        for parameter in together:
            if parameter.grad is None:  # another process's images have used it
                parameter.grad = torch.zeros_like(parameter)
            elif parameter.grad.is_sparse:
                parameter.grad = parameter.grad.to_dense()
        total([p.grad for p in together if p.grad is not None], divisor)


def end_of_epoch(trainer: Any) -> bool:
    """Call test_hook, then end_of_epoch_hook in the first process alone; whether that ends it.

    All else that a checkpoint needs is gathered before: the hook may save one.
    """
    equalise(trainer)
    if trainer.test_hook is not None:
        trainer.test_hook(trainer)
    trainer.others = states_of_others(trainer)
    try:
        return on_first(lambda: trainer.end_of_epoch_hook(trainer) is False, "end_of_epoch_hook")
    finally:
        trainer.others = None


def equalise(trainer: Any) -> None:
    """One set of BatchNorm statistics for all processes."""
    modules = list(trainer.models.values())
    equalise_buffers(modules if trainer.average is None else [*modules, trainer.average])


def draw_together(trainer: Any) -> Tensor:
    """The order of an epoch, drawn by the first process; then each has random numbers of its own.

    Returns:
        (size, 2), as of :func:`draw_order`.
    """
    drawn = None
    if is_first():
        drawn = draw_order(
            trainer.labels,
            trainer.centroids is not None,
            trainer.iterations_per_epoch * trainer.batch_size,
            trainer.images_per_cluster,
            trainer.batch_size,
        )
    order = from_first([drawn])[0]
    assert order is not None
    seed_apart(order)
    return order


def share_of(order: Tensor, batch_size: int) -> Tensor:
    """This process's part of each batch of an order: (size / world_size, 2)."""
    shares = order.view(-1, world_size(), batch_size // world_size(), 2)
    return shares[:, rank()].flatten(0, 1)


def seed_apart(order: Tensor, at: int = 0) -> None:
    """Other random numbers in each process, by the epoch alone; the first goes on with its own."""
    if not is_first():
        seed = (int(order[at, 1]) + rank()) % 2**63
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.manual_seed(seed)


def states_of_others(trainer: Any) -> list[dict[str, Any]]:
    """Random state and unreadable pictures of each process but the first, on the first."""
    if world_size() == 1:
        return []
    own = {"random": random_state(), "unreadable": sorted(trainer.unreadable.known)}
    into: list[Any] | None = [None] * world_size() if is_first() else None
    with naming("gathering the state of the training"):
        distributed.gather_object(own, into, dst=0, group=patient())
    return (into or [])[1:]


def restore_random(state: dict[str, Any], batch_size: int) -> None:
    """The random state of this process in a checkpoint, perhaps of another number of them."""
    if is_first():
        set_random_state(state["random"])
    elif len(state["others"]) == world_size() - 1:
        set_random_state(state["others"][rank() - 1]["random"])
    elif state["order"] is not None:
        seed_apart(state["order"], state["iteration"] * batch_size - 1)
