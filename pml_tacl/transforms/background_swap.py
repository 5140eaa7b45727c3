"""Images on one another's background, on whole batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from pml_tacl.functional import to_image
from pml_tacl.functional.background import foreground_scores
from pml_tacl.utils.checks import as_numbers, as_pair, check_number
from pml_tacl.utils.errors import InputError, InputTypeError


def as_offset(cell_offset: Sequence[float]) -> tuple[float, float]:
    """(x, y) in cells as floats; ValueError unless both lie within a cell or two."""
    pair = as_numbers(cell_offset)
    if len(pair) == 2 and all(abs(value) <= 2 for value in pair):
        return pair[0], pair[1]
    raise InputError(f"cell_offset must be (x, y) in cells, each in [-2, 2], got {cell_offset!r}")


class SwapOutput(NamedTuple):
    """What `BackgroundSwap` returns.

    Attributes:
        images: (N, C, H, W), the batch with backgrounds swapped, dtype as given.
        masks: (N, H, W) in [0, 1], float32: how much of each pixel is the image's own; 1
            everywhere in an image that was not swapped.
        swapped: (N,) bool: which images were swapped.
    """

    images: Tensor
    masks: Tensor
    swapped: Tensor


class BackgroundSwap(nn.Module):
    """Keep what is distinctive in each image and put it on another image's background.

    After Li et al. 2020 (attention to what is discriminative between classes and consistent
    within them); the definition is ours: `m * x + (1 - m) * x_other`, with a soft mask m. The
    attention pattern must survive the swap, so weigh the cells of an attention loss by what was
    kept: `cell_weights(output.masks, grid)`, and with `sample_at_points` of the second view's
    masks if that was swapped too.

    Args:
        probability: of each image being swapped, in [0, 1].
        mask: "border" keeps what does not look like the image's own border, "distinctive" what it
            has not in common with other clusters: `sigmoid(sharpness * z)`, where z is the negated
            `border_similarity` or `background_score`, standardised within each image and upsampled
            to its size. "centred" keeps the middle: a Gaussian, 1 at the centre.
        sharpness: of the masks that come from maps, above 0; the larger, the nearer to hard.
        sigma: deviation of the "centred" mask as a fraction of the image's sides, above 0.
        cell_offset: where the cells of the maps look, (x, y) in cells off their middle, as of
            `AttentionEmbedder.cell_offset`.
        empty: first paint over what the other image keeps, with the colours around it, so that
            its object does not show beside the own one. False takes it as it is.

    Raises:
        ValueError: for an argument out of its range.

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

        Every swapped image gets those of another one; a single image cannot, and is returned as
        it is. Nothing here waits for the device.

        Args:
            images: (N, C, H, W), of a floating dtype, normalised or not.
            background: (N, h, w), of each image's own feature map: `border_similarity` or
                `background_score` of `pml_tacl.functional`; the "centred" mask does not read it.
                Where it is constant the mask is 1/2.
            generator: source of the random numbers; the default one of the images' device if
                None. One on the CPU gives the same draws for every device.

        Returns:
            SwapOutput(images, masks, swapped).

        Raises:
            TypeError: if images are not of a floating dtype.
            ValueError: if shapes do not fit, or background is missing.
        """
        if images.ndim != 4:
            raise InputError(f"images must have the shape (N, C, H, W), got {tuple(images.shape)}")
        if not images.is_floating_point():
            raise InputTypeError(
                f"images must be of a floating dtype, got {images.dtype}; swap after normalising"
            )
        centred = self.mask == "centred"
        keep = self._centred(images) if centred else self._from_maps(images, background)
        count = len(images)
        device = images.device if generator is None else generator.device
        draws = torch.rand(2, count, generator=generator, device=device)
        draws = draws.to(images.device, non_blocking=True)
        swapped = (draws[0] < self.probability) & (count > 1)
        # Everyone takes from the next in a random circle: no image meets itself.
        order = draws[1].argsort()
        partner = torch.empty_like(order).scatter_(0, order, order.roll(1))
        masks = torch.where(swapped[:, None, None], keep, 1.0)
        backgrounds = emptied(images, keep) if self.empty else images
        blended = torch.lerp(backgrounds[partner], images, masks[:, None].to(images.dtype))
        return SwapOutput(
            torch.where(swapped[:, None, None, None], blended, images), masks, swapped
        )

    def extra_repr(self) -> str:
        """The arguments, for print()."""
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
    """Images (N, C, H, W) with what masks (N, H, W) keep painted over by what lies around it.

    The colours are means over ever larger squares, each where the smaller ones hold too little.
    """
    height, width = images.shape[-2:]
    # A rim wider, or the object's own edge would colour its place.
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
    """How much of each grid cell was kept: the weights of an attention loss.

    Args:
        masks: (N, H, W) in [0, 1], of `BackgroundSwap`.
        grid: cells, (rows, columns) or an int for both, as of `SiameseTransform`.

    Returns:
        (N, rows * columns), the mean of the mask over each cell, row by row.

    Raises:
        ValueError: if masks are not (N, H, W), or grid is not positive.

    Example:
        >>> cell_weights(torch.ones(2, 64, 64), grid=(4, 3)).shape
        torch.Size([2, 12])
    """
    if masks.ndim != 3:
        raise InputError(f"masks must have the shape (N, H, W), got {tuple(masks.shape)}")
    return nnf.adaptive_avg_pool2d(masks[:, None], as_pair("grid", grid)).flatten(1)
