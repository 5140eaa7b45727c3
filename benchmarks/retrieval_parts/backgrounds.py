"""Busy backgrounds: crops of photographs, and patterns of noise, stripes and shapes."""

import functools

import numpy as np
from PIL import Image, ImageDraw

from pml_tacl.utils.errors import MissingPackageError

_PHOTOGRAPHS = (
    "astronaut",
    "brick",
    "camera",
    "chelsea",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "immunohistochemistry",
    "moon",
    "rocket",
)
_SHARE_OF_PHOTOGRAPHS = 0.7


@functools.cache
def _photographs() -> tuple[Image.Image, ...]:
    try:
        from skimage import data
    except ImportError as error:
        raise MissingPackageError(
            "photographs are scikit-image's: pip install scikit-image"
        ) from error
    return tuple(Image.fromarray(getattr(data, n)()).convert("RGB") for n in _PHOTOGRAPHS)


def background(rng: np.random.Generator, size: int) -> Image.Image:
    """Return a background (RGB, size x size), which depends only on `rng`."""
    draw = _photograph if rng.random() < _SHARE_OF_PHOTOGRAPHS else _pattern
    image = draw(rng, size)
    pixels = np.asarray(image)[..., rng.permutation(3)].astype(np.float32)
    pixels = (pixels - 128) * rng.uniform(0.6, 1.1) + 128 + rng.uniform(-30, 30)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _photograph(rng: np.random.Generator, size: int) -> Image.Image:
    photographs = _photographs()
    image = photographs[rng.integers(len(photographs))]
    side = int(rng.uniform(size, max(size + 1, min(image.size))))
    left, top = (int(rng.integers(0, max(1, extent - side))) for extent in image.size)
    box = (left, top, left + side, top + side)
    image = image.resize((size, size), Image.Resampling.BILINEAR, box, reducing_gap=2.0)
    return image.transpose(Image.Transpose(int(rng.integers(7))))


def _pattern(rng: np.random.Generator, size: int) -> Image.Image:
    noise = np.zeros((size, size, 3), np.float32)
    for octave in range(5):
        cells = rng.uniform(0, 255, (2**octave + 1, 2**octave + 1, 3)).astype(np.uint8)
        layer = Image.fromarray(cells).resize((size, size), Image.Resampling.BICUBIC)
        noise += np.asarray(layer, np.float32) * 0.6**octave
    noise *= 255 / noise.max()
    image = Image.fromarray(noise.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(4, 14))):
        fill = tuple(int(v) for v in rng.integers(0, 256, 3))
        corners = rng.integers(-size // 4, size + size // 4, 6).tolist()
        kind = rng.integers(3)
        if kind == 0:
            draw.line(corners[:4], fill, width=int(rng.integers(1, size // 10 + 2)))
        elif kind == 1:
            draw.polygon(corners, fill)
        else:
            (x, y), radius = corners[:2], int(rng.integers(size // 16 + 1, size // 4 + 2))
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill)
    return image
