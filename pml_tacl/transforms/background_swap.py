"""Swap the backgrounds of the images in a batch."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from pml_tacl.functional import to_image
from pml_tacl.functional.background import foreground_scores
from pml_tacl.utils.checks import as_numbers, as_pair, check_number
from pml_tacl.utils.errors import InputError, InputTypeError


def as_offset(cell_offset: Sequence[float]) -> tuple[float, float]:
    """Return (x, y) in cells as floats; raise ValueError if one is outside [-2, 2]."""
    pair = as_numbers(cell_offset)
    if len(pair) == 2 and all(abs(value) <= 2 for value in pair):
        return pair[0], pair[1]
    raise InputError(f"cell_offset must be (x, y) in cells, each in [-2, 2], got {cell_offset!r}")


class SwapOutput(NamedTuple):
    """Output of `BackgroundSwap`.

    Attributes:
        images: (N, C, H, W), the batch with backgrounds swapped, in the dtype of the input.
        masks: (N, H, W) in [0, 1], float32: how much of each pixel is kept; 1 everywhere in
            images that were not swapped.
        swapped: (N,) bool: which images were swapped.
    """

    images: Tensor
    masks: Tensor
    swapped: Tensor


class BackgroundSwap(nn.Module):
    """Keep the foreground of each image and replace its background by that of another image.

    The new image is `m * x + (1 - m) * x_other`. The mask m has values from 0 (background) to 1
    (foreground). The idea (attention to what is common within a class and differs between classes)
    is from Li et al. 2020; the definition is our own.

    In an attention loss, cells whose background was replaced should not count. Pass weights that
    say how much of each cell was kept: `cell_weights(output.masks, grid)`. If the second view was
    swapped too, multiply the weights by `sample_at_points(second.masks, points)[0]`.

    Args:
        probability: probability that the background of an image is swapped, in [0, 1].
        mask: which part of an image counts as its foreground and is kept. "border" keeps cells that
            do not look like the image's own border. "distinctive" keeps cells that do not match
            images of other clusters. Both are `sigmoid(sharpness * z)`, where z is the negated
            `border_similarity` or `background_score`, standardised within each image and upsampled
            to its size. "centred" keeps the middle of the image, with a Gaussian that is 1 at the
            centre.
        sharpness: how sharp the edges of the "border" and "distinctive" masks are, above 0; larger
            values give sharper edges.
        sigma: standard deviation of the "centred" mask as a fraction of the image's sides, above 0.
        cell_offset: offset (x, y) of receptive-field centres from their cell centres, in cells, as
            `AttentionEmbedder.cell_offset` returns it.
        empty: first paint over the foreground of the other image with the colours around it, so
            that the result does not show both objects. False leaves this out.

    Raises:
        ValueError: for an argument out of range.

    Example:
        >>> swap = BackgroundSwap(probability=0.7, mask="centred")
        >>> images, masks, swapped = swap(torch.randn(8, 3, 64, 64))
        >>> weights = cell_weights(masks, grid=4)  # (8, 16)
    """

    def __init__(
        self,
        probability: float = 0.7,
        mask: Literal["border", "distinctive", "centred"] = "border",
        *,
        sharpness: float = 4.0,
        sigma: float = 0.25,
        cell_offset: tuple[float, float] = (0.0, 0.0),
        empty: bool = True,
    ) -> None:
        super().__init__()
        check_number("probability", probability, 0, most=1)
        if mask not in ("border", "distinctive", "centred"):
            raise InputError(f"mask must be 'border', 'distinctive' or 'centred', got {mask!r}")
        for name, value in (("sharpness", sharpness), ("sigma", sigma)):
            check_number(name, value, 0, above=True)
        self.probability = probability
        self.mask = mask
        self.sharpness = sharpness
        self.sigma = sigma
        self.cell_offset = as_offset(cell_offset)
        self.empty = empty

    def forward(
        self,
        images: Tensor,
        background: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> SwapOutput:
        """Swap the backgrounds of some images of a batch.

        Each swapped image gets the background of another image of the batch. A batch of a single
        image is returned unchanged. The CPU never waits for the device.

        Args:
            images: (N, C, H, W), of a floating dtype, normalised or not.
            background: (N, h, w), `border_similarity` or `background_score` (from
                `pml_tacl.functional`) of each image's feature map; not used by the "centred"
                mask. If it is constant within an image, the mask is 1/2 everywhere.
            generator: random number generator; None takes the default one of the images' device.
                A generator on the CPU gives the same random numbers for every device.

        Returns:
            SwapOutput(images, masks, swapped).

        Raises:
            TypeError: if images are not of a floating dtype.
            ValueError: if shapes do not match, or background is missing.
        """
        if images.ndim != 4:
            raise InputError(f"images must have the shape (N, C, H, W), got {tuple(images.shape)}")
        if not images.is_floating_point():
            raise InputTypeError(
                f"images must be of a floating dtype, got {images.dtype}; swap after normalising"
            )
        device = images.device if generator is None else generator.device
        draws = torch.rand(2, len(images), generator=generator, device=device)
        draws = draws.to(images.device, non_blocking=True)
        return self._swap(images, background, draws, slice(None), operator.getitem)

    def _swap(
        self,
        images: Tensor,
        background: Tensor | None,
        draws: Tensor,
        own: slice,
        take: Callable[[Tensor, Tensor], Tensor],
    ) -> SwapOutput:
        """Swap the backgrounds of images that are part of a larger batch.

        Args:
            images: (n, C, H, W).
            background: see `forward`.
            draws: (2, N) random numbers in [0, 1) for all images of the batch.
            own: place of `images` in the batch.
            take: backgrounds (n, C, H, W) and partners (N,) -> backgrounds (n, C, H, W) of the
                partners of `images`.
        """
        centred = self.mask == "centred"
        keep = self._centred(images) if centred else self._from_maps(images, background)
        # Each image takes from the next one in a random cycle, so never from itself.
        order = draws[1].argsort()
        partner = torch.empty_like(order).scatter_(0, order, order.roll(1))
        swapped = (draws[0] < self.probability) & (len(order) > 1)
        swapped = swapped[own].to(images.device, non_blocking=True)
        masks = torch.where(swapped[:, None, None], keep, 1.0)
        backgrounds = take(emptied(images, keep) if self.empty else images, partner)
        blended = torch.lerp(backgrounds, images, masks[:, None].to(images.dtype))
        return SwapOutput(
            torch.where(swapped[:, None, None, None], blended, images), masks, swapped
        )

    def extra_repr(self) -> str:
        """Return the arguments, for print()."""
        return (
            f"probability={self.probability}, mask={self.mask!r}, "
            f"sharpness={self.sharpness}, sigma={self.sigma}, cell_offset={self.cell_offset}, "
            f"empty={self.empty}"
        )

    def _from_maps(self, images: Tensor, background: Tensor | None) -> Tensor:
        if background is None:
            raise InputError(
                f"background must be given for mask={self.mask!r}; or use mask='centred'"
            )
        if background.ndim != 3 or len(background) != len(images) or 0 in background.shape[1:]:
            raise InputError(
                f"background must have the shape (N, h, w) with N = {len(images)} images, "
                f"got {tuple(background.shape)}"
            )
        z = foreground_scores(background.float())
        height, width = images.shape[-2:]
        z = to_image(z, (height, width), self.cell_offset)
        return torch.sigmoid(self.sharpness * z)

    def _centred(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        y = (torch.arange(height, device=images.device) + 0.5) / height - 0.5
        x = (torch.arange(width, device=images.device) + 0.5) / width - 0.5
        squared = y.square()[:, None] + x.square()
        return torch.exp(squared / (-2 * self.sigma**2)).expand(len(images), height, width)


def emptied(images: Tensor, keep: Tensor) -> Tensor:
    """Paint over the foreground of images (N, C, H, W), given by masks (N, H, W).

    The colours are background means over squares of increasing size. A larger square is used
    where the smaller ones contain too little background.
    """
    height, width = images.shape[-2:]
    # Paint over a margin as well, so that the colours do not come from the edge of the object.
    side = min(height, width) // 8 | 1
    over = nnf.max_pool2d(keep[:, None], side, 1, side // 2)
    weights = (1 - over).square() + 1e-6
    levels = [
        tuple(nnf.adaptive_avg_pool2d(x, cells) for x in (images.float() * weights, weights))
        for cells in (8, 4, 2, 1)
    ]
    colours = levels[-1][0] / levels[-1][1]
    for total, weight in reversed(levels[:-1]):
        colours = nnf.interpolate(colours, total.shape[-2:], mode="bilinear")
        colours = torch.lerp(colours, total / weight, weight / (weight + 0.05))
    colours = nnf.interpolate(colours, (height, width), mode="bilinear")
    return torch.lerp(images, colours.to(images.dtype), over.to(images.dtype))


def cell_weights(masks: Tensor, grid: int | Sequence[int]) -> Tensor:
    """Return how much of each grid cell was kept, as the weights of an attention loss.

    Args:
        masks: (N, H, W) in [0, 1], from `BackgroundSwap`.
        grid: number of cells, (rows, columns) or an int for both, as in `SiameseTransform`.

    Returns:
        (N, rows * columns), the mean of the mask over each cell, in row-major order.

    Raises:
        ValueError: if masks are not (N, H, W), or grid is not positive.

    Example:
        >>> cell_weights(torch.ones(2, 64, 64), grid=(4, 3)).shape
        torch.Size([2, 12])
    """
    if masks.ndim != 3:
        raise InputError(f"masks must have the shape (N, H, W), got {tuple(masks.shape)}")
    return nnf.adaptive_avg_pool2d(masks[:, None], as_pair("grid", grid)).flatten(1)
