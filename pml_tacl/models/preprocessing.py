"""Preprocessing of images for a model, following timm's data config."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tvf

from pml_tacl.utils.checks import as_pair
from pml_tacl.utils.errors import InputError
from pml_tacl.utils.images import to_rgb, upright

_LONGEST = 10  # longest side of an image before it is resized, as a multiple of its shorter side


class _AsTaken(v2.Transform):  # type: ignore[misc]
    """Convert an image to the channels of a model: RGB, grey, or the channels it already has."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, image: Any) -> Any:
        if self.channels in (1, 3):
            rgb = to_rgb(image)
            return rgb if self.channels == 3 else rgb.convert("L")
        return _with_channels(image, self.channels)


class _Shortened(v2.Transform):  # type: ignore[misc]
    """Crop very long images to their middle; leave other images unchanged.

    Otherwise an image of 1 x 30000 pixels would be resized to gigabytes before it is cropped.
    """

    def forward(self, image: Any) -> Any:
        sides = tvf.get_size(image)
        most = _LONGEST * min(sides)
        # Keep the parity of the length, so that the centre does not move.
        kept = [side if side <= most else most + (side - most) % 2 for side in sides]
        if kept == sides:
            return image
        offsets = [(side - keep) // 2 for side, keep in zip(sides, kept, strict=True)]
        return tvf.crop(image, *offsets, *kept)


def _with_channels(image: Any, channels: int) -> Any:
    """Return an image that must already have the channels of the model."""
    if isinstance(image, Image.Image):
        found = f"a PIL image of mode {image.mode}"
        if len(image.getbands()) == channels:
            return upright(image)
    elif isinstance(image, Tensor):
        found = f"a {image.dtype} tensor {tuple(image.shape)}"
        fits = image.ndim > 2 and image.shape[-3] == channels and image.numel() > 0
        if fits and image.is_floating_point():
            low, high = float(image.min()), float(image.max())
            found, fits = f"{found} from {low:.3g} to {high:.3g}", 0 <= low <= high <= 1
        if fits and (image.dtype == torch.uint8 or image.is_floating_point()):
            return image
    else:
        found = f"a {type(image).__name__}"
    raise InputError(
        f"image must be a PIL image of the model's {channels} channels, or a tensor ({channels}, "
        f"H, W) of uint8 or of floats in [0, 1], got {found}: for RGB, build it with in_chans=3"
    )


def size_in_pixels(config: dict[str, Any], image_size: Any = None) -> tuple[int, int]:
    """Return (height, width) in pixels for a side, a pair, or None (the size of the config).

    Raises:
        ValueError: if `image_size` is not a side or a pair of at least 1 pixel.
    """
    size = config["input_size"][1:] if image_size is None else image_size
    return as_pair("image_size", size)


def image_transform(
    config: dict[str, Any], training: bool = False, image_size: int | Sequence[int] | None = None
) -> v2.Transform:
    """Build a torchvision v2 transform from timm's data config.

    For 1 or 3 channels it accepts the same images as :func:`pml_tacl.utils.images.to_rgb`, one
    image at a time.

    Args:
        config: see `AttentionEmbedder.data_config`.
        training: random resized crop and horizontal flip instead of resize and central crop.
        image_size: side or (height, width) in pixels; None uses the config.

    Raises:
        ValueError: if `image_size` is not a side or a pair.
    """
    size = list(size_in_pixels(config, image_size))
    interpolation = (
        InterpolationMode(config["interpolation"])
        if config["interpolation"] in ("nearest", "bilinear", "bicubic")
        else InterpolationMode.BICUBIC
    )
    steps: list[v2.Transform] = [_AsTaken(config["input_size"][0])]
    if training:
        steps += [
            v2.RandomResizedCrop(size, interpolation=interpolation, antialias=True),
            v2.RandomHorizontalFlip(),
        ]
    elif config["crop_mode"] == "squash":
        steps.append(v2.Resize(size, interpolation=interpolation, antialias=True))
    else:
        larger = [int(side / config["crop_pct"]) for side in size]
        # For a square, keep the aspect ratio: torchvision resizes the shorter side to one number.
        target = larger[:1] if size[0] == size[1] else larger
        steps += [
            _Shortened(),
            v2.Resize(target, interpolation=interpolation, antialias=True),
            v2.CenterCrop(size),
        ]
    steps += [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(config["mean"], config["std"]),
        v2.ToPureTensor(),
    ]
    return v2.Compose(steps)


def as_seen(images: Tensor, config: dict[str, Any]) -> Tensor:
    """Undo the normalisation of `image_transform`: return images (..., C, H, W) in [0, 1].

    Args:
        images: (..., C, H, W), normalised by `image_transform`.
        config: see `AttentionEmbedder.data_config`.
    """
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    return (images * std + mean).clamp(0, 1)
