"""A batch through the model, whole or in chunks that need less memory and learn the same."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def in_precision(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast to a trainer's amp_dtype; None is none."""
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


class Features(NamedTuple):
    """What the losses read: embeddings (N, D) and, if the trunk gives them, feature maps."""

    embeddings: Tensor
    feature_maps: Tensor | None


def forward_of(models: dict[str, nn.Module]) -> Callable[[Tensor], Features]:
    """Images (N, C, H, W) -> Features, by trunk and embedder."""

    def forward(images: Tensor) -> Features:
        output = models["trunk"](images)
        return Features(models["embedder"](output), getattr(output, "feature_maps", None))

    return forward


def forward_in_chunks(
    forward: Callable[[Tensor], Features], images: Tensor, chunks: int, models: list[nn.Module]
) -> Features:
    """Features of a batch, of which the backward pass holds the activations of one chunk at a time.

    A loss over all of them sees every pair of the batch, and its gradient is that of one pass
    over the batch (where no layer mixes images: BatchNorm's statistics are each chunk's). The
    price is a second forward of each chunk, with the first one's random numbers.

    Args:
        forward: as of :func:`forward_of`, perhaps compiled.
        images: (N, C, H, W).
        chunks: how many; 1 is a plain forward.
        models: whose BatchNorm statistics the second forward must leave alone.
    """
    if chunks == 1:
        return forward(images)

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _kept_statistics(models)

    parts = [
        checkpoint(forward, part, use_reentrant=False, context_fn=contexts)
        for part in images.chunk(chunks)
    ]
    embeddings, maps = zip(*parts, strict=True)
    return Features(torch.cat(embeddings), None if maps[0] is None else torch.cat(maps))


@contextmanager
def _kept_statistics(models: list[nn.Module]) -> Iterator[None]:
    norms = [m for model in models for m in model.modules() if isinstance(m, _BatchNorm)]
    kept = [(m, m.momentum, m.num_batches_tracked) for m in norms]
    counts = [count if count is None else count.clone() for *_, count in kept]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for (norm, momentum, tracked), count in zip(kept, counts, strict=True):
            norm.momentum = momentum
            if tracked is not None and count is not None:
                tracked.copy_(count)
