"""Maps for the masks of swapped backgrounds; high values mean background."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from pml_tacl import AttentionEmbedder
from pml_tacl.functional import background_score, border_similarity

Normalise = Callable[[Tensor], Tensor]
# (maps of all images (N, C, h, w), pseudo-labels or None, references wanted, seed) -> (N, h, w)
MaskFunction = Callable[[Tensor, Tensor | None, int, int], Tensor]


def distinctive(maps: Tensor, labels: Tensor | None, references: int, seed: int) -> Tensor:
    """Return the background score of each cell against random images of other clusters."""
    rows = torch.randperm(len(maps), generator=torch.Generator().manual_seed(seed))[:references]
    rows = rows.to(maps.device)
    if labels is None:
        # Each image as its own cluster, so that none is found in itself.
        labels = torch.arange(len(maps))
    labels = labels.to(maps.device)
    return background_score(maps, labels, maps[rows], labels[rows])


def border(maps: Tensor, labels: Tensor | None, references: int, seed: int) -> Tensor:
    """Return the similarity of each cell to the image's own border."""
    return border_similarity(maps)


# To try another mask, add a function here.
MASKS: dict[str, MaskFunction] = {"border": border, "distinctive": distinctive}


def chunks(images: Tensor, size: int = 128) -> Iterator[Tensor]:
    yield from images.split(size)


@torch.no_grad()  # not inference mode: the result is used in training
def feature_maps(
    model: AttentionEmbedder, images: Tensor, normalise: Normalise, index: int, scale: int
) -> Tensor:
    """Return maps (N, C, h, w) of images (N, 3, S, S) uint8, from stage `index` of the backbone."""
    training = model.training
    model.eval()
    found = []
    for part in chunks(images):
        pixels = normalise(part.float() / 255)
        if scale > 1:
            pixels = F.interpolate(pixels, scale_factor=float(scale), mode="bicubic")
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        if index < 0:
            maps = model.trunk(pixels).feature_maps
        else:
            maps = model.trunk.model.forward_intermediates(
                pixels, indices=[index], output_fmt="NCHW", intermediates_only=True
            )[0]
        found.append(maps.float())
    model.train(training)
    return torch.cat(found)


def image_masks(
    model: AttentionEmbedder,
    images: Tensor,
    normalise: Normalise,
    labels: Tensor | None,
    kind: str,
    *,
    index: int,
    scale: int,
    references: int,
    seed: int,
) -> Tensor:
    """Return the background scores (N, h, w) of all images, for `BackgroundSwap`."""
    maps = feature_maps(model, images, normalise, index, scale)
    return MASKS[kind](maps, labels, references, seed)
