"""From pictures to what a model takes, as timm's data config says."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2


class _PilMode(v2.Transform):  # type: ignore[misc]
    """PIL images to the mode with the model's channels; anything else as it is."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, image: Any) -> Any:
        if isinstance(image, Image.Image) and image.mode != self.mode:
            return image.convert(self.mode)
        return image


def size_in_pixels(config: dict[str, Any], image_size: Any = None) -> tuple[int, int]:
    """(height, width) of a side or a pair in pixels, or of the config for None.

    Raises:
        ValueError: if `image_size` is no side and no pair of at least 1 pixel.
    """
    size = config["input_size"][1:] if image_size is None else image_size
    pair = tuple(size) if isinstance(size, tuple | list) else (size, size)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise ValueError(f"image_size must be pixels or (height, width), got {image_size!r}")
    return pair


def image_transform(
    config: dict[str, Any], training: bool = False, image_size: int | Sequence[int] | None = None
) -> v2.Transform:
    """A torchvision v2 transform from timm's data config.

    Args:
        config: see `AttentionEmbedder.data_config`.
        training: random resized crop and horizontal flip instead of resize and central crop.
        image_size: side or (height, width) in pixels; None takes the config's.

    Raises:
        ValueError: if `image_size` is no side and no pair.
    """
    channels = config["input_size"][0]
    size = list(size_in_pixels(config, image_size))
    interpolation = (
        InterpolationMode(config["interpolation"])
        if config["interpolation"] in ("nearest", "bilinear", "bicubic")
        else InterpolationMode.BICUBIC
    )
    steps: list[v2.Transform] = []
    if channels in (1, 3):
        steps.append(_PilMode("L" if channels == 1 else "RGB"))
    if training:
        steps += [
            v2.RandomResizedCrop(size, interpolation=interpolation, antialias=True),
            v2.RandomHorizontalFlip(),
        ]
    elif config["crop_mode"] == "squash":
        steps.append(v2.Resize(size, interpolation=interpolation, antialias=True))
    else:
        larger = [int(side / config["crop_pct"]) for side in size]
        # A square keeps the picture's proportions; torchvision takes one side as the shorter one.
        target = larger[:1] if size[0] == size[1] else larger
        steps += [
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
    """Pictures in [0, 1] from what a model takes, both (..., C, H, W).

    Args:
        images: normalised as `image_transform` does.
        config: see `AttentionEmbedder.data_config`.
    """
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    return (images * std + mean).clamp(0, 1)
