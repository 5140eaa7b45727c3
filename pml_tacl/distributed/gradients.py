"""What ranks agree on in training: weights at the start, gradients, statistics of BatchNorm."""

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
    """Check that all ranks have the same settings, and give them the same weights. Collective.

    On GPUs BatchNorm becomes that of the batch of all ranks.

    Args:
        models: by name.
        losses: by name.
        settings: compared by their text.
        device: of the models.

    Raises:
        ValueError: if a rank has other settings than the first.
    """
    if world_size() == 1:
        return
    modules = [*models.values(), *losses.values()]
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    shapes = [tuple(t.shape) for t in tensors]
    remedy = "start all processes with the same arguments and images"
    check_same("settings", [*settings, shapes], remedy)
    if device.type == "cuda":
        from timm.layers import convert_sync_batchnorm  # torch's own would lose activations

        for model in models.values():
            convert_sync_batchnorm(model)  # in place, parameters stay the same
    equal_to_first(tensors)


def sum_gradients(models: Modules, losses: Modules) -> None:
    """Sum gradients of models over ranks, and average those of losses' parameters. Collective.

    Each rank has the gradients of its own images, while a loss's parameters have seen all of
    them. A parameter that no image of one rank has used, as in a branch that was dropped or a
    layer that was skipped, counts as zero there; one that none has used stays without gradient.
    """
    if world_size() == 1:
        return
    for modules, divisor in ((models, 1), (losses, world_size())):
        parameters = [p for module in modules.values() for p in module.parameters()]
        used = used_anywhere([p.grad is not None for p in parameters])
        shared = [p for p, anywhere in zip(parameters, used, strict=True) if anywhere]
        for parameter in shared:
            if parameter.grad is None:  # another rank's images have used it
                parameter.grad = torch.zeros_like(parameter)
            elif parameter.grad.is_sparse:
                parameter.grad = parameter.grad.to_dense()
        total([p.grad for p in shared if p.grad is not None], divisor)


def equalise(models: Iterable[nn.Module | None]) -> None:
    """Give all ranks one set of BatchNorm statistics. Collective."""
    equalise_buffers([model for model in models if model is not None])
