"""Synchronisation of ranks in training: initial weights, gradients and BatchNorm statistics."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from pml_tacl.distributed.collectives import (
    equal_to_first,
    equalise_buffers,
    total,
    used_anywhere,
)
from pml_tacl.distributed.session import check_same, world_size

Modules = Mapping[str, nn.Module]


def start_alike(
    models: Modules, losses: Modules, settings: Sequence[object], device: torch.device
) -> None:
    """Check that all ranks have the same settings, and copy the weights of rank 0. Collective.

    On GPUs BatchNorm is converted to synchronised BatchNorm.

    Args:
        models: models by name.
        losses: losses by name.
        settings: values that must agree; they are compared by their repr.
        device: device of the models.

    Raises:
        ValueError: if the settings of a rank differ from those of rank 0.
    """
    if world_size() == 1:
        return
    modules = [*models.values(), *losses.values()]
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    shapes = [tuple(t.shape) for t in tensors]
    remedy = "start all processes with the same arguments and images"
    check_same("settings", [*settings, shapes], remedy)
    if device.type == "cuda":
        from timm.layers import convert_sync_batchnorm  # torch's version drops activations

        for model in models.values():
            convert_sync_batchnorm(model)  # in place, keeps the parameters
    equal_to_first(tensors)


def sum_gradients(models: Modules, losses: Modules) -> None:
    """Sum model gradients over ranks; average the gradients of loss parameters. Collective.

    Model gradients come from a rank's own images. Loss parameters have the gradient of the whole
    batch on each rank. A parameter without gradient on one rank, such as in a skipped layer,
    counts as zero there. A parameter without gradient on any rank stays without one.
    """
    if world_size() == 1:
        return
    for modules, divisor in ((models, 1), (losses, world_size())):
        parameters = [p for module in modules.values() for p in module.parameters()]
        used = used_anywhere([p.grad is not None for p in parameters])
        shared = [p for p, anywhere in zip(parameters, used, strict=True) if anywhere]
        for parameter in shared:
            if parameter.grad is None:  # used on another rank
                parameter.grad = torch.zeros_like(parameter)
            elif parameter.grad.is_sparse:
                parameter.grad = parameter.grad.to_dense()
        total([p.grad for p in shared if p.grad is not None], divisor)


def equalise(models: Iterable[nn.Module | None]) -> None:
    """Average BatchNorm statistics over ranks. Collective."""
    equalise_buffers([model for model in models if model is not None])
