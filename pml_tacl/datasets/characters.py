"""Characters of Glyphs that can be distinguished, and the font faces that contain them."""

from __future__ import annotations

import functools
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from pml_tacl.utils.errors import MissingPackageError

MIN_FACES = 8
_REFERENCE_FACES = ("DejaVuSans.ttf", "DejaVuSerif.ttf", "STIXGeneral.ttf")
_SAME_SHAPE = 0.9
_ASCII = [chr(code) for code in range(128) if chr(code).isalnum()]
# A fixed seed: with the user's seed, the training half of one seed would share classes with the
# test half of another.
_SPLIT_SEED = 2020


@functools.cache
def characters() -> dict[str, tuple[str, ...]]:
    """Return characters with different shapes, each with the font faces that contain it.

    A face is used if all its ASCII letters and digits have the right glyph names. This leaves out
    symbol faces, which have other glyphs at these codes. A character is used if it is a letter or
    digit (Unicode L* without modifiers, Nd), is in at least eight faces, and has no decomposition
    (accented letters and ligatures look like other characters).

    Characters that look alike are detected by measurement and removed. Each character is drawn with
    up to three reference faces, cropped, and scaled to 24 x 24. In code point order, a character is
    dropped if its cosine similarity to a kept character is above 0.9 in any of these faces (o after
    O, Greek Alpha after A, l after 1).

    Returns:
        File names of the faces by character, in code point order.

    Raises:
        ImportError: If matplotlib, which ships these faces, is missing.
    """
    faces_of: dict[int, list[str]] = {}
    for face in sorted(path.name for path in _font_folder().glob("*.ttf")):
        for code in _usable_codes(face):
            faces_of.setdefault(code, []).append(face)
    codes = [code for code in sorted(faces_of) if len(faces_of[code]) >= MIN_FACES]
    similarity = np.zeros((len(codes), len(codes)), np.float32)
    for face in _REFERENCE_FACES:
        on_face = np.array([i for i, code in enumerate(codes) if face in faces_of[code]])
        shapes = np.stack([shape(chr(codes[i]), face) for i in on_face])
        block = np.ix_(on_face, on_face)
        similarity[block] = np.maximum(similarity[block], shapes @ shapes.T)
    kept: list[int] = []
    for i in range(len(codes)):
        if not (similarity[i, kept] > _SAME_SHAPE).any():
            kept.append(i)
    return {chr(codes[i]): tuple(faces_of[codes[i]]) for i in kept}


def split_characters(split: str) -> list[str]:
    """Return the characters of ``"train"``, ``"test"`` or ``"all"``, in a fixed shuffled order."""
    every = list(characters())
    shuffled = [every[i] for i in np.random.default_rng(_SPLIT_SEED).permutation(len(every))]
    middle = len(shuffled) // 2
    return {"train": shuffled[:middle], "test": shuffled[middle:], "all": shuffled}[split]


def ink(char: str, face: str, pixels: int) -> Image.Image:
    """Draw a character in white on black (mode L) at a font size in pixels, cropped to its ink."""
    font = _font(face, pixels)
    left, top, right, bottom = (int(value) for value in font.getbbox(char))
    image = Image.new("L", (right - left + 4, bottom - top + 4))
    ImageDraw.Draw(image).text((2 - left, 2 - top), char, 255, font)
    return image.crop(image.getbbox())


def shape(char: str, face: str) -> npt.NDArray[np.float32]:
    """Return a character's ink, centred in a 24 x 24 square, as a unit vector (576,)."""
    glyph = ink(char, face, 64)
    side = max(glyph.size)
    square = Image.new("L", (side, side))
    square.paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
    small = square.resize((24, 24), Image.Resampling.BOX)
    pixels: npt.NDArray[np.float32] = np.asarray(small, np.float32).ravel()
    pixels /= np.linalg.norm(pixels)
    return pixels


def _font_folder() -> Path:
    try:
        import matplotlib
    except ImportError as error:
        raise MissingPackageError(
            'Glyphs draws with the fonts of matplotlib; run: pip install "pml_tacl[examples]"'
        ) from error
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def _usable_codes(face: str) -> list[int]:
    from matplotlib.ft2font import FT2Font

    font: Any = FT2Font(str(_font_folder() / face))
    charmap: dict[int, int] = font.get_charmap()
    for char in _ASCII:
        own_name = char if char.isalpha() else unicodedata.name(char).split()[-1].lower()
        if ord(char) not in charmap or font.get_glyph_name(charmap[ord(char)]) != own_name:
            return []
    return [code for code in charmap if _is_plain(chr(code))]


def _is_plain(char: str) -> bool:
    category = unicodedata.category(char)
    letter = category == "Nd" or (category[0] == "L" and category != "Lm")
    return letter and not unicodedata.decomposition(char)


@functools.lru_cache(maxsize=256)
def _font(face: str, pixels: int) -> ImageFont.FreeTypeFont:
    # Every build of Pillow has the basic layout; with raqm, pixels would depend on the machine.
    path = str(_font_folder() / face)
    return ImageFont.truetype(path, pixels, layout_engine=ImageFont.Layout.BASIC)
