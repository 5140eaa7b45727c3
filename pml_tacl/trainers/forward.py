"""Forward pass of a batch: precision, chunks and background swap."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from pml_tacl.distributed.collectives import broadcast, gather_batch, take_rows
from pml_tacl.distributed.session import is_main, rank, world_size
from pml_tacl.functional import background_score, border_similarity, sample_at_points
from pml_tacl.trainers.data import Batch
from pml_tacl.transforms import BackgroundSwap, SwapOutput, cell_weights
from pml_tacl.utils.errors import InputError
from pml_tacl.utils.modes import evaluating
from pml_tacl.utils.precision import at_least_float32


def in_precision(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Return an autocast context for a trainer's amp_dtype; it does nothing for None."""
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


class Features(NamedTuple):
    """Output of a model: embeddings (N, D) and feature maps, if the trunk returns them."""

    embeddings: Tensor
    feature_maps: Tensor | None


def forward_of(models: dict[str, nn.Module]) -> Callable[[Tensor], Features]:
    """Return a function from images (N, C, H, W) to :class:`Features`: trunk, then embedder."""

    def forward(images: Tensor) -> Features:
        output = models["trunk"](images)
        return Features(models["embedder"](output), getattr(output, "feature_maps", None))

    return forward


def forward_in_chunks(
    forward: Callable[[Tensor], Features], images: Tensor, chunks: int, models: list[nn.Module]
) -> Features:
    """Compute the features of a batch in chunks; only one chunk's activations are in memory.

    Losses still see every pair of the batch, and the gradient equals that of one pass over the
    batch, unless a layer mixes images: BatchNorm computes its statistics for each chunk. The
    backward pass computes each chunk a second time, with the same random numbers.

    Args:
        forward: function from :func:`forward_of`, possibly compiled.
        images: (N, C, H, W).
        chunks: number of chunks; 1 is a plain forward pass.
        models: models whose BatchNorm statistics the second forward pass must not change.

    Returns:
        Features of all N images.
    """
    if chunks == 1:
        return forward(images)

    def contexts() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
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


@torch.no_grad()
def swap_background(
    swap: BackgroundSwap,
    trunk: nn.Module,
    batch: Batch,
    grid: tuple[int, int] | None,
    chunks: int = 1,
    amp_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Swap the background of both views, within the batch of all ranks. Collective.

    Masks that are computed from feature maps need one more pass of the trunk over the original
    views, in evaluation mode.

    Args:
        swap: the swap to apply.
        trunk: model that returns feature maps.
        batch: both views, points and pseudo-labels.
        grid: (rows, columns) of the feature maps; None if no loss uses them.
        chunks: number of chunks for the pass of the trunk.
        amp_dtype: autocast type for the pass of the trunk; None for no autocast.

    Returns:
        Both views (N, 3, height, width), and the share of each cell of the first view that both
        views kept: (N, H*W) in [0, 1], or None without a grid.

    Raises:
        ValueError: if the mask needs feature maps and the trunk returns none.
    """
    ground: list[Tensor | None] = [None, None]
    if swap.mask != "centred":
        images = torch.cat([batch.views, batch.transformed])
        with evaluating(trunk), in_precision(images.device, amp_dtype):
            outputs = [trunk(part) for part in images.chunk(chunks)]
        if not hasattr(outputs[0], "feature_maps"):
            raise InputError(
                f"BackgroundSwap(mask={swap.mask!r}) needs a trunk with feature_maps: use "
                "AttentionEmbedder, or mask='centred'"
            )
        maps = at_least_float32(torch.cat([output.feature_maps for output in outputs]))
        for view, part in enumerate(maps.chunk(2)):
            border = swap.mask == "border"
            ground[view] = border_similarity(part) if border else _score(part, batch.labels)
    first = _swap(swap, batch.views, ground[0])
    second = _swap(swap, batch.transformed, ground[1])
    if grid is None:
        return first.images, second.images, None
    kept, _ = sample_at_points(second.masks, batch.points)
    return first.images, second.images, cell_weights(first.masks, grid) * kept


def _score(maps: Tensor, labels: Tensor) -> Tensor:
    """Return the background score against the batch of all ranks."""
    if world_size() == 1:
        return background_score(maps, labels)
    return background_score(maps, labels, gather_batch(maps), gather_batch(labels))


def _swap(swap: BackgroundSwap, images: Tensor, background: Tensor | None) -> SwapOutput:
    """Swap backgrounds with random numbers of the main process, the same as in one process."""
    if world_size() == 1:
        return swap(images, background, torch.default_generator)  # type: ignore[no-any-return]
    count = len(images)
    draws = broadcast([torch.rand(2, world_size() * count) if is_main() else None])[0]
    assert draws is not None
    own = slice(rank() * count, (rank() + 1) * count)
    return swap._swap(images, background, draws, own, take_rows)
