"""Conversion of PIL images, arrays and tensors to RGB."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from pml_tacl.utils.errors import InputError, InputTypeError

AnyImage: TypeAlias = Image.Image | npt.NDArray[Any] | Tensor

_CHANNELS = (1, 3, 4)
_ROUNDING = 1e-3  # interpolated images may exceed [0, 1] by this much
# Possible white points of images with more than 8 bits: 1, 2, 4, 8, 10, 12, 14 or 16 bits.
_WHITES = (1, 3, 15, 255, 1023, 4095, 16383, 65535)
_ORIENTATION, _BITS_PER_SAMPLE, _PHOTOMETRIC = 0x0112, 258, 262  # tags of EXIF and TIFF
_SCALED = ("JPEG2000", "PPM")  # Pillow scales their samples to 16 bits


def to_rgb(image: AnyImage, name: str = "image") -> Image.Image:
    """Convert an image to an upright PIL image of mode RGB.

    A PIL image, an array and a tensor with the same content give the same pixels, and so does
    :func:`pml_tacl.datasets.load_rgb` for a file with that content.

    - The EXIF orientation of a PIL image is applied.
    - Transparent pixels become white.
    - Values with more than 8 bits are scaled by a white point. It is 65535 for JPEG 2000 and PPM
      files, and given by the bits per sample of a TIFF file with fewer than 16. Otherwise it is the
      smallest of 1, 3, 15, 255, 1023, 4095, 16383 and 65535 that is not below the values. The
      highest thousandth of the values is ignored (at least one value, in images of 64 pixels or
      more). For 8-bit values multiplied by 256 or 257 the white point is 65535. If values are below
      0 or above 65535, the range from smallest to largest is scaled, with a thousandth ignored at
      both ends. 16-bit colour files are an exception: Pillow opens them as 8 bits (the high bytes).

    Args:
        image: a PIL image of any mode and size; or an array or tensor (H, W), (H, W, C) or
            (C, H, W) with C = 1, 3 or 4 (the last is alpha), of bool, uint8, wider integers, or
            floating point in [0, 1]. If both layouts fit, an array is read as (H, W, C) and a
            tensor as (C, H, W).
        name: name of the argument, for messages.

    Returns:
        The image in mode RGB; the same object if it is upright RGB already.

    Raises:
        TypeError: if the input is not an image, or has another dtype.
        ValueError: for another shape, an empty image, NaN or infinite pixels, or an array or
            tensor of floats outside [0, 1].
        OSError: if the file of a PIL image cannot be decoded.

    Example:
        >>> to_rgb(torch.tensor([[0, 2048, 4095]])).getpixel((1, 0))  # 12 bits
        (128, 128, 128)
    """
    if isinstance(image, Image.Image):
        return _from_pil(image, name)
    if isinstance(image, np.ndarray | Tensor):
        return _opaque(_from_array(image, name))
    raise InputTypeError(
        f"{name} must be a PIL image, array or tensor, got {type(image).__name__}: "
        "open files with PIL.Image.open first"
    )


def upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation of a PIL image; return the same object if nothing changes."""
    # Ignore damaged EXIF data: the pixels may be fine.
    with suppress(Exception):
        if image.getexif().get(_ORIENTATION, 1) != 1:
            return ImageOps.exif_transpose(image)
    return image


def _from_pil(image: Image.Image, name: str) -> Image.Image:
    if 0 in image.size:
        raise InputError(f"{name} must contain pixels, got an image of {image.size} pixels")
    _load(image)
    # Read before the rotation, which drops the attributes of the file.
    white = _white_of_file(image)
    negative = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0  # Pillow inverts only 8 bits
    image = upright(image)
    if not image.mode.startswith(("I", "F")):
        return _opaque(image)
    values = np.asarray(image.convert("I") if image.mode.startswith("I;") else image)
    grey = _eight_bits(values, name, white)
    if negative:
        grey = 255 - grey
    if isinstance(key := image.info.get("transparency"), int):
        grey[values == key] = 255
    return Image.fromarray(grey).convert("RGB")


def _load(image: Image.Image) -> None:
    # Pillow maps uncompressed TIFF files into memory, but swaps height and width wrongly if the
    # orientation exchanges them. Without a file name it reads the file instead.
    if image.format != "TIFF":
        image.load()
        return
    opened: Any = image
    name, opened.filename = opened.filename, ""
    try:
        image.load()
    finally:
        opened.filename = name


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # Pillow converts La to RGBA only via LA
        image = image.convert("LA")
    has_alpha = image.mode.endswith(("A", "a")) or "transparency" in image.info
    if has_alpha or (image.palette is not None and image.palette.mode.endswith("A")):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_array(image: npt.NDArray[Any] | Tensor, name: str) -> Image.Image:
    array = _as_array(image, name)
    channels_last = array.ndim == 3 and array.shape[2] in _CHANNELS
    channels_first = array.ndim == 3 and array.shape[0] in _CHANNELS
    if 0 in array.shape or not (array.ndim == 2 or channels_last or channels_first):
        raise InputError(
            f"{name} must contain images of shape (H, W, C) or (C, H, W) with 1, 3 or 4 channels, "
            f"got {array.shape}: give images of a batch one by one"
        )
    if channels_first and (not channels_last or isinstance(image, Tensor)):
        array = np.moveaxis(array, 0, 2)
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):  # NaN lands here too
            raise InputError(
                f"{name} contains values from {low:.3g} to {high:.3g}, but floating-point images "
                "go from 0 to 1: undo the normalisation (x * std + mean) or divide by 255"
            )
        array = _eight_bits(array, name, 1)
    elif array.dtype == bool:
        array = array * np.uint8(255)
    elif not np.issubdtype(array.dtype, np.integer) or array.dtype == np.int8:
        raise InputTypeError(
            f"{name} must be uint8, wider integers, bool or floating point in [0, 1], "
            f"got {array.dtype}"
        )
    elif array.dtype != np.uint8:
        array = _eight_bits(array, name, None)
    array = np.ascontiguousarray(array)
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)


def _as_array(image: npt.NDArray[Any] | Tensor, name: str) -> npt.NDArray[Any]:
    if isinstance(image, np.ndarray):
        return image
    if image.layout is not torch.strided or image.is_quantized or image.is_meta:
        raise InputTypeError(
            f"{name} must be plain tensors, got {image.layout} of {image.dtype} on {image.device}"
        )
    image = image.detach().as_subclass(Tensor).cpu()
    if image.is_floating_point() and image.dtype != torch.float64:
        image = image.float()  # NumPy has no bfloat16
    array: npt.NDArray[Any] = image.numpy()
    return array


def _white_of_file(image: Image.Image) -> int | None:
    """Return the white point that follows from the file, or None."""
    if not image.mode.startswith("I"):
        return None
    if image.format in _SCALED:
        return 65535
    bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE)
    return 2 ** bits[0] - 1 if bits and 8 <= bits[0] < 16 else None


def _eight_bits(values: npt.NDArray[Any], name: str, white: int | None) -> npt.NDArray[np.uint8]:
    whole = np.issubdtype(values.dtype, np.integer)
    # Raise instead of replacing them, which would change the image silently.
    if not whole and (bad := int((~np.isfinite(values)).sum())):
        raise InputError(f"{name} is NaN or infinite in {bad} of {values.size} pixels")
    low, high = 0.0, float(white or 0)
    if white is None:
        low, high = _range(values, whole)
    if whole and low == 0 and high in _WHITES and high >= 255:
        shift = int(high + 1).bit_length() - 9
        shifted: npt.NDArray[np.uint8] = (values.clip(0, int(high)) >> shift).astype(np.uint8)
        return shifted
    wide = values.clip(low, high).astype(np.float64)
    scaled: npt.NDArray[np.uint8] = np.rint((wide - low) * (255 / max(high - low, 1e-12))).astype(
        np.uint8
    )
    return scaled


def _range(values: npt.NDArray[Any], whole: bool) -> tuple[float, float]:
    """Return black and white point of an image with more than 8 bits."""
    # Ignore a few hot or dead pixels.
    apart = max(1, values.size // 1000) if values.size >= 64 else 0
    last = values.size - 1
    parted = np.partition(values, (apart, last - apart), axis=None)
    low, high = float(parted[apart]), float(parted[last - apart])
    slack = 0.0 if whole else _ROUNDING
    if low < -slack or high > _WHITES[-1]:
        return low, high
    white = next(white for white in _WHITES if high <= white * (1 + slack) or white == _WHITES[-1])
    if whole and 255 < white < _WHITES[-1]:
        # A dark image of 8 bits that were scaled to 16.
        for step in (256, 257):
            if np.count_nonzero(values % step) <= apart:
                return 0.0, float(_WHITES[-1])
    return 0.0, float(white)
