"""Images as data URIs: thumbnails, overlays, and sheets of many small images."""

import base64
import io
from collections.abc import Callable, Sequence

import torch
from PIL import Image, ImageDraw, ImageOps

from pml_tacl.report._sources import Run
from pml_tacl.visualize._overlays import attention_of

TILE = 64  # pixels; a multiple of 16, so that WebP compression does not mix tiles
COLUMNS = 40
_LARGEST = 16383  # side of a WebP image in pixels
_THUMBNAIL = 128
_QUALITIES = (72, 60, 48, 36, 24, 14)


def uri(image: Image.Image) -> str:
    """Encode an image as a WebP data URI."""
    return _as_uri(_encoded(image, _QUALITIES[0]))


def thumbnail(image: Image.Image, side: int = _THUMBNAIL) -> Image.Image:
    """Return a copy of an image that fits into a square of ``side`` pixels."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return small


def opened(open_row: Callable[[int], Image.Image], row: int) -> Image.Image:
    """Open an image; return a crossed grey square if it cannot be read."""
    try:
        return open_row(row)
    except OSError:
        empty = Image.new("RGB", (_THUMBNAIL, _THUMBNAIL), "#c8c8c8")
        drawing = ImageDraw.Draw(empty)
        for ends in ((0, 0, _THUMBNAIL, _THUMBNAIL), (0, _THUMBNAIL, _THUMBNAIL, 0)):
            drawing.line(ends, "#8a8a8a", 2)
        return empty


def sheet(
    open_row: Callable[[int], Image.Image], rows: Sequence[int], budget: int
) -> tuple[str, int]:
    """Draw small square images on one sheet, with ``COLUMNS`` images per line.

    Args:
        open_row: function that opens an image by its index.
        rows: indices of the images.
        budget: largest size of the data URI in bytes; if needed, first the quality is reduced,
            then the last images are dropped.

    Returns:
        The data URI, and the number of images on it.
    """
    rows = rows[: COLUMNS * (_LARGEST // TILE)]
    count = len(rows)
    tiles = [
        ImageOps.fit(opened(open_row, row).convert("RGB"), (TILE, TILE), Image.Resampling.LANCZOS)
        for row in rows
    ]
    while True:
        board = Image.new("RGB", (TILE * min(COLUMNS, count), TILE * -(-count // COLUMNS)))
        for at, tile in enumerate(tiles[:count]):
            board.paste(tile, (TILE * (at % COLUMNS), TILE * (at // COLUMNS)))
        for quality in _QUALITIES:
            content = _encoded(board, quality)
            if len(content) * 4 / 3 <= budget or (count == 1 and quality == _QUALITIES[-1]):
                return _as_uri(content), count
        count = max(1, int(0.9 * count * budget / (len(content) * 4 / 3)))


def attention_overlays(
    run: Run, open_row: Callable[[int], Image.Image], rows: Sequence[int]
) -> list[tuple[Image.Image, Image.Image]]:
    """Return for each index the image as the model sees it, and its attention overlay."""
    views = torch.stack([run.transform(opened(open_row, row).convert("RGB")) for row in rows])
    return attention_of(run.model, views)[1]


def _encoded(image: Image.Image, quality: int) -> bytes:
    content = io.BytesIO()
    image.save(content, "WEBP", quality=quality, method=4)
    return content.getvalue()


def _as_uri(content: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(content).decode('ascii')}"
