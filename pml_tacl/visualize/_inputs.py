"""Validate the images, maps and captions of figures, and convert them to one form."""

import unicodedata
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from pml_tacl.utils.errors import InputError
from pml_tacl.utils.images import AnyImage, to_rgb

Images: TypeAlias = AnyImage | Sequence[AnyImage]
Numbers: TypeAlias = npt.ArrayLike | torch.Tensor
Pixels: TypeAlias = npt.NDArray[np.uint8]

_LONGEST_SIDE = 640  # pixels; figures show no more, and large photographs would fill memory


def to_pixels(image: AnyImage, name: str = "image") -> Pixels:
    """Return an image as (H, W, 3) uint8, of at most 640 pixels in height and width.

    Args:
        image: an image that :func:`pml_tacl.utils.images.to_rgb` accepts.
        name: name of the argument, used in error messages.

    Raises:
        TypeError, ValueError: as :func:`pml_tacl.utils.images.to_rgb` does.
    """
    converted = to_rgb(image, name)
    shrink = _LONGEST_SIDE / max(converted.size)
    if shrink < 1:
        width, height = (max(1, round(side * shrink)) for side in converted.size)
        converted = converted.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return np.asarray(converted)


def to_images(images: Images, name: str = "images") -> list[Pixels]:
    """Return images as a list of (H, W, 3) uint8; a single image gives a list of one.

    Args:
        images: (N, H, W, C), (N, C, H, W), a sequence of images, or one image.
        name: name of the argument, used in error messages.

    Raises:
        TypeError, ValueError: as :func:`to_pixels` does.
    """
    if isinstance(images, Image.Image):
        return [to_pixels(images, name)]
    if isinstance(images, torch.Tensor | np.ndarray) and images.ndim in (2, 3):
        return [to_pixels(images, name)]
    return [to_pixels(image, name) for image in images]


def to_maps(maps: Numbers, count: int | None, name: str) -> npt.NDArray[np.float64]:
    """Return maps as (N, h, w) float64; a single map (h, w) gives a batch of one.

    Raises:
        ValueError: if the shape is wrong, N is not ``count``, or values are not finite.
    """
    array = to_numbers(maps)
    array = array[None] if array.ndim == 2 else array
    if array.ndim != 3 or 0 in array.shape[1:]:
        raise InputError(f"{name} must have shape (N, h, w) or (h, w), got {array.shape}")
    if count is not None and len(array) != count:
        raise InputError(f"{name} has {len(array)} maps for {count} images: give one for each")
    if not np.isfinite(array).all():
        raise InputError(f"{name} contains NaN or infinite values: draw finite maps only")
    return array


def to_numbers(values: Numbers) -> npt.NDArray[np.float64]:
    """Return an array, a tensor (any device, with or without graph) or a nested list as float64."""
    return _as_array(values).astype(np.float64)


def normalised(maps: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Scale each map (N, h, w) to [0, 1]; a map that is constant up to rounding becomes 0.5.

    Otherwise the rounding errors of a constant map, for example of an untrained attention
    pooling, would be drawn like attention.
    """
    low = maps.min(axis=(1, 2), keepdims=True)
    spread = maps.max(axis=(1, 2), keepdims=True) - low
    even = spread <= 1e-5 * np.abs(maps).max(axis=(1, 2), keepdims=True)
    stretched: npt.NDArray[np.float64] = np.where(
        even, 0.5, (maps - low) / np.where(even, 1.0, spread)
    )
    return stretched


def shortened(text: str, width: int) -> str:
    """Return ``text`` on one line of at most ``width`` columns; leave out the middle if needed.

    The ends of a file name are more useful than its middle. East Asian wide characters count
    double.
    """
    text = " ".join(text.split())
    if sum(map(_columns, text)) <= width:
        return text
    head, tail, room = "", "", width - 1
    while True:
        from_tail = len(tail) <= len(head)
        character = text[-len(tail) - 1] if from_tail else text[len(head)]
        room -= _columns(character)
        if room < 0:
            return f"{head}…{tail}"
        head, tail = (head, character + tail) if from_tail else (head + character, tail)


def _columns(character: str) -> int:
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _as_array(values: Any) -> npt.NDArray[Any]:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values  # NumPy has no bf16
        return np.asarray(values.numpy())
    if isinstance(values, list | tuple):
        return np.stack([_as_array(value) for value in values]) if values else np.empty(0)
    return np.asarray(values)


def require_some(values: Sequence[Any], name: str) -> None:
    """Raise ValueError if ``values`` is empty."""
    if not len(values):
        raise InputError(f"{name} is empty: give at least one image")


def require_count(values: Any, count: int, name: str, of: str) -> None:
    """Raise ValueError if ``values`` does not have ``count`` entries."""
    if len(values) != count:
        raise InputError(f"{name} has {len(values)} entries for {count} {of}: give one for each")


def rows_like(values: Any, rows: Sequence[Sequence[Any]], name: str) -> list[list[Any]] | None:
    """Return ``values`` as nested lists, or None for None.

    Raises:
        ValueError: if the number or the lengths of the lists differ from those of ``rows``.
    """
    if values is None:
        return None
    require_count(values, len(rows), name, "queries")
    nested = [list(row.tolist() if hasattr(row, "tolist") else row) for row in values]
    for index, (given, row) in enumerate(zip(nested, rows, strict=True)):
        require_count(given, len(row), f"{name}[{index}]", "neighbours")
    return nested
