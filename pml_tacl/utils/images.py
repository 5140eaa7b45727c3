"""The one conversion to RGB: whatever form an image comes in, the same pixels come out."""

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
_ROUNDING = 1e-3  # an interpolated image may leave [0, 1] by this much
# What white may be in an image of wide numbers: 1, 2, 4, 8, 10, 12, 14 or 16 bits.
_WHITES = (1, 3, 15, 255, 1023, 4095, 16383, 65535)
_ORIENTATION, _BITS_PER_SAMPLE, _PHOTOMETRIC = 0x0112, 258, 262  # tags of EXIF and TIFF
_SCALED = ("JPEG2000", "PPM")  # Pillow brings their samples to 16 bits


def to_rgb(image: AnyImage, name: str = "image") -> Image.Image:
    """Convert one image to an upright PIL image of mode RGB.

    A PIL image, an array and a tensor of the same content give the same pixels, and so does a
    file of it that :func:`pml_tacl.datasets.load_rgb` reads.

    - The EXIF orientation of a PIL image is applied.
    - What is transparent becomes white.
    - Numbers wider than 8 bits get a white point: the TIFF file's bits per sample if they are
      fewer than 16; else the least of 1, 3, 15, 255, 1023, 4095, 16383 and 65535 that is not
      below the values, a thousandth of them (at least one of 64) left out. 8-bit values that were
      widened (times 256 or 257) are white at 65535. Values below 0 or above 65535 are stretched
      from the least to the largest, the same thousandth left out at either end.
      Colour files of 16 bits are an exception: Pillow opens them as 8 bits, the high bytes.

    Args:
        image: a PIL image of any mode and size; or an array or tensor (H, W), (H, W, C) or
            (C, H, W) with C = 1, 3 or 4 (the last is alpha), of bool, uint8, wider integers, or
            floating point in [0, 1]. Where both layouts fit, an array is read as (H, W, C) and a
            tensor as (C, H, W).
        name: the argument that errors speak of.

    Returns:
        The image, mode RGB; the same object if it is that already.

    Raises:
        TypeError: if it is no image, or of another dtype.
        ValueError: for another shape, an empty image, NaN or infinite pixels, or an array or
            tensor of floats outside [0, 1].
        OSError: if a PIL image's file cannot be decoded.

    Example:
        >>> to_rgb(torch.tensor([[0, 2048, 4095]])).getpixel((1, 0))  # 12 bits
        (128, 128, 128)
    """
    if isinstance(image, Image.Image):
        return _from_pil(image, name)
    if isinstance(image, np.ndarray | Tensor):
        return _opaque(_from_array(image, name))
    raise InputTypeError(
        f"{name} must hold PIL images, arrays or tensors, got {type(image).__name__}: "
        "open files with PIL.Image.open first"
    )


def upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation of a PIL image; the same object if there is none to apply."""
    # Damaged EXIF data is no reason to lose an image whose pixels are whole.
    with suppress(Exception):
        if image.getexif().get(_ORIENTATION, 1) != 1:
            return ImageOps.exif_transpose(image)
    return image


def _from_pil(image: Image.Image, name: str) -> Image.Image:
    if 0 in image.size:
        raise InputError(f"{name} must hold pixels, got an image of {image.size} pixels")
    _load(image)
    # Turned upright, an image no longer knows its file.
    white = _white_of_file(image)
    negative = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0  # only 8 bits Pillow inverts
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
    # Pillow maps the file of an uncompressed TIFF into memory with height and width confused, if
    # its orientation swaps them; it reads the file instead where it knows no name.
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
    if image.mode == "La":  # Pillow has no way from here to RGBA but this
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
            f"{name} must hold images of shape (H, W, C) or (C, H, W) with 1, 3 or 4 channels, "
            f"got {array.shape}: give images of a batch one by one"
        )
    if channels_first and (not channels_last or isinstance(image, Tensor)):
        array = np.moveaxis(array, 0, 2)
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):  # NaN lands here too
            raise InputError(
                f"{name} holds values from {low:.3g} to {high:.3g}, floating-point images go "
                "from 0 to 1: undo the normalisation (x * std + mean) or divide by 255"
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
    """What the file says is white, or None."""
    if not image.mode.startswith("I"):
        return None
    if image.format in _SCALED:
        return 65535
    bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE)
    return 2 ** bits[0] - 1 if bits and 8 <= bits[0] < 16 else None


def _eight_bits(values: npt.NDArray[Any], name: str, white: int | None) -> npt.NDArray[np.uint8]:
    whole = np.issubdtype(values.dtype, np.integer)
    # Zeros in their place would train on an image that nobody took.
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
    """What is black and what is white in an image of wide numbers."""
    # A few hot or dead pixels decide nothing.
    apart = max(1, values.size // 1000) if values.size >= 64 else 0
    last = values.size - 1
    parted = np.partition(values, (apart, last - apart), axis=None)
    low, high = float(parted[apart]), float(parted[last - apart])
    slack = 0.0 if whole else _ROUNDING
    if low < -slack or high > _WHITES[-1]:
        return low, high
    white = next(white for white in _WHITES if high <= white * (1 + slack) or white == _WHITES[-1])
    if whole and 255 < white < _WHITES[-1]:
        # 8 bits widened to 16, of an image that is dark.
        for step in (256, 257):
            if np.count_nonzero(values % step) <= apart:
                return 0.0, float(_WHITES[-1])
    return 0.0, float(white)
