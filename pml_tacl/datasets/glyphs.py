"""Characters rendered from the TrueType faces that matplotlib ships."""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, features
from torch.utils.data import Dataset
from tqdm import tqdm

MIN_FACES = 8
# Bump when a change of the drawing code changes pixels: caches on disk are keyed by it.
RENDERING = 1
_SPLITS = ("train", "test", "all")
# The split never depends on the user's seed, or train (seed 0) and test (seed 1) would share classes.
_SPLIT_SEED = 2020
_REFERENCE_FACES = ("DejaVuSans.ttf", "DejaVuSerif.ttf", "STIXGeneral.ttf")
_SAME_SHAPE = 0.9
# Ranges of each colour channel: dark ink on light ground, so that colour varies but never the sign
# of the contrast, and raw pixels keep some head-room for a trained network to beat.
_GROUND, _INK = (205, 255), (0, 120)
_ASCII = [chr(c) for c in range(128) if chr(c).isalnum()]


class Glyphs(Dataset[tuple[Any, int]]):
    """Coloured, rotated, shifted characters on cluttered backgrounds, one class per character.

    A class is a letter or digit on at least eight of matplotlib's text faces, an image is one face
    of it; look-alikes are removed (see :func:`characters`). The two halves share no class. Every
    image depends on ``(seed, character, instance)`` alone: not on the order of access, the split
    or the number of classes. Images are rendered on first access and held in memory.

    Args:
        split: ``"train"`` or ``"test"`` (halves of the characters), or ``"all"``.
        size: Side of the square image in pixels, at least 16.
        seed: Seed of face order, position, angle, colours and background. Not of the split.
        num_classes: The first so many classes of the split; ``None`` for all.
        images_per_class: Images of each class; faces are reused if there are fewer.
            ``None`` takes each face of the character once (8 to 21 images).
        clutter: Contrast of the background's gradient, strokes and blobs, from 0 to 1.
        max_shift: Largest shift from the centre in pixels, along each axis.
        max_angle: Largest rotation in degrees, from 0 to 180.
        transform: Applied to the PIL RGB image.
        cache_dir: Folder to keep the rendered images in, one npz file for each set of parameters.
            The first access then renders (or loads) all of them.

    Attributes:
        labels: Zero-based class of each image, int64 (N,).
        classes: The character of each class.

    Raises:
        ValueError: If an argument is out of range.
        ImportError: If matplotlib, whose faces are drawn, is missing.

    Example:
        >>> image, label = Glyphs("test", num_classes=10)[0]
        >>> image.size, label
        ((64, 64), 0)
    """

    def __init__(
        self,
        split: str = "train",
        *,
        size: int = 64,
        seed: int = 0,
        num_classes: int | None = None,
        images_per_class: int | None = None,
        clutter: float = 0.25,
        max_shift: int = 4,
        max_angle: float = 10.0,
        transform: Callable[[Image.Image], Any] | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        if split not in _SPLITS:
            raise ValueError(f"split must be one of {', '.join(_SPLITS)}; got {split!r}")
        _check_range("size", size, 16, 1024)
        _check_range("seed", seed, 0, 2**63)
        _check_range("clutter", clutter, 0, 1)
        _check_range("max_shift", max_shift, 0, size // 2)
        _check_range("max_angle", max_angle, 0, 180)
        characters_of_split = split_characters(split)
        if num_classes is not None:
            _check_range("num_classes", num_classes, 1, len(characters_of_split))
        if images_per_class is not None:
            _check_range("images_per_class", images_per_class, 1, 10_000)

        self.split, self.size, self.seed = split, int(size), int(seed)
        self.clutter, self.max_shift, self.max_angle = clutter, max_shift, max_angle
        self.transform = transform
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.classes = characters_of_split[:num_classes]
        counts = [images_per_class or len(characters()[char]) for char in self.classes]
        self.labels: npt.NDArray[np.int64] = np.repeat(np.arange(len(counts)), counts)
        self._instances = np.concatenate([np.arange(count) for count in counts])
        self._images: npt.NDArray[np.uint8] | None = None
        self._boxes = np.zeros((len(self.labels), 4), np.float32)
        self._rendered = np.zeros(len(self.labels), bool)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        index = range(len(self))[index]
        if self.cache_dir is not None:
            self.preload(progress=False)
        image = Image.fromarray(self._render(index))
        return (image if self.transform is None else self.transform(image)), int(self.labels[index])

    @property
    def boxes(self) -> npt.NDArray[np.float32]:
        """Box of each glyph as x0, y0, x1, y1 in pixels (ends exclusive), (N, 4); renders all."""
        return self.preload(progress=False)._boxes

    @property
    def images(self) -> npt.NDArray[np.uint8]:
        """All images before the transform, uint8 RGB (N, size, size, 3); renders all."""
        images = self.preload(progress=False)._images
        assert images is not None  # for the type checker: preload always sets it
        return images

    def preload(self, progress: bool = True) -> Glyphs:
        """Renders every image now, or loads them from ``cache_dir``, and returns the data set.

        Args:
            progress: Show a progress bar while rendering.
        """
        if self._rendered.all():
            return self
        if self._load_cache():
            return self
        for index in tqdm(range(len(self)), "rendering glyphs", disable=not progress):
            self._render(index)
        self._save_cache()
        return self

    def _render(self, index: int) -> npt.NDArray[np.uint8]:
        if self._images is None:
            self._images = np.zeros((len(self), self.size, self.size, 3), np.uint8)
        if not self._rendered[index]:
            char, instance = self.classes[self.labels[index]], int(self._instances[index])
            faces = characters()[char]
            order = np.random.default_rng((self.seed, ord(char))).permutation(len(faces))
            face = faces[order[instance % len(faces)]]
            rng = np.random.default_rng((self.seed, ord(char), instance))
            mask = _place(rng, char, face, self.size, self.max_shift, self.max_angle)
            self._images[index] = np.asarray(_paint(rng, mask, self.clutter))
            self._boxes[index] = mask.getbbox()
            self._rendered[index] = True
        return self._images[index]

    def _cache_path(self) -> Path | None:
        if self.cache_dir is None:
            return None
        key = repr(
            [RENDERING, Image.__version__, features.version("freetype2"), self.size, self.seed]
            + [self.clutter, self.max_shift, self.max_angle, len(self), self.classes]
            + [characters()[char] for char in self.classes]
        )
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        return self.cache_dir / f"glyphs-{self.split}-{self.size}-{digest}.npz"

    def _load_cache(self) -> bool:
        path = self._cache_path()
        if path is None or not path.is_file():
            return False
        shape = (len(self), self.size, self.size, 3)
        try:
            with np.load(path) as file:
                images, boxes = file["images"], file["boxes"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return False  # a damaged cache is rendered again and replaced
        if images.shape != shape or boxes.shape != self._boxes.shape:
            return False
        self._images, self._boxes = images, boxes
        self._rendered[:] = True
        return True

    def _save_cache(self) -> None:
        path = self._cache_path()
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, images=self.images, boxes=self._boxes)
            os.replace(name, path)  # readers see the old file or the whole new one
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def split_characters(split: str) -> list[str]:
    """The characters of ``"train"``, ``"test"`` or ``"all"``, in a fixed shuffled order."""
    every = np.array(list(characters()))
    shuffled = every[np.random.default_rng(_SPLIT_SEED).permutation(len(every))].tolist()
    middle = len(shuffled) // 2
    return {"train": shuffled[:middle], "test": shuffled[middle:], "all": shuffled}[split]


@functools.cache
def characters() -> dict[str, tuple[str, ...]]:
    """Characters that can be told apart by their shape, each with the faces that have it.

    A face counts if it has every ASCII letter and digit under its own name, which leaves out the
    symbol faces that put other glyphs on those codes; Computer Modern is trusted for ASCII only.
    A character counts if it is a letter or digit (Unicode L* without modifiers, Nd) without a
    decomposition, since an accented letter, ligature or circled digit is another one in disguise,
    and on at least eight faces. Look-alikes go by measurement: each character is drawn on up to
    three reference faces, cropped to its ink and scaled to 24 x 24; in code point order, one whose
    cosine similarity to a character already kept is above 0.9 on any of them is dropped (o after
    O, Greek Alpha after A, l after 1).

    Raises:
        ImportError: If matplotlib is missing.
    """
    faces_of: dict[int, list[str]] = {}
    for name in sorted(path.name for path in _font_folder().glob("*.ttf")):
        for code in _usable_codes(name):
            faces_of.setdefault(code, []).append(name)
    codes = [code for code in sorted(faces_of) if len(faces_of[code]) >= MIN_FACES]
    similarity = np.zeros((len(codes), len(codes)), np.float32)
    for face in _REFERENCE_FACES:
        on_face = np.array([i for i, code in enumerate(codes) if face in faces_of[code]])
        shapes = np.stack([_shape(chr(codes[i]), face) for i in on_face])
        block = np.ix_(on_face, on_face)
        similarity[block] = np.maximum(similarity[block], shapes @ shapes.T)
    kept: list[int] = []
    for i in range(len(codes)):
        if not (similarity[i, kept] > _SAME_SHAPE).any():
            kept.append(i)
    return {chr(codes[i]): tuple(faces_of[codes[i]]) for i in kept}


def _font_folder() -> Path:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            'Glyphs draws with the fonts of matplotlib; run: pip install "pml_tacl[examples]"'
        ) from error
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def _usable_codes(face: str) -> list[int]:
    from matplotlib.ft2font import FT2Font

    font = FT2Font(str(_font_folder() / face))
    charmap = font.get_charmap()
    for char in _ASCII:
        own = char if char.isalpha() else unicodedata.name(char).split()[-1].lower()
        if ord(char) not in charmap or font.get_glyph_name(charmap[ord(char)]) != own:
            return []
    computer_modern = face.startswith("cm")
    return [code for code in charmap if (code < 128 or not computer_modern) and _is_plain(code)]


def _is_plain(code: int) -> bool:
    category = unicodedata.category(chr(code))
    letter = category == "Nd" or (category[0] == "L" and category != "Lm")
    return letter and not unicodedata.decomposition(chr(code))


@functools.lru_cache(maxsize=256)
def _font(face: str, pixels: int) -> ImageFont.FreeTypeFont:
    # The basic layout is in every build of Pillow; raqm would make pixels depend on the machine.
    path = str(_font_folder() / face)
    return ImageFont.truetype(path, pixels, layout_engine=ImageFont.Layout.BASIC)


def _ink(char: str, face: str, pixels: int) -> Image.Image:
    """The glyph in white on black, cropped to its ink."""
    font = _font(face, pixels)
    left, top, right, bottom = (int(v) for v in font.getbbox(char))
    image = Image.new("L", (right - left + 4, bottom - top + 4))
    ImageDraw.Draw(image).text((2 - left, 2 - top), char, 255, font)
    return image.crop(image.getbbox())


def _shape(char: str, face: str) -> npt.NDArray[np.float32]:
    ink = _ink(char, face, 64)
    side = max(ink.size)
    square = Image.new("L", (side, side))
    square.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    shape = np.asarray(square.resize((24, 24), Image.Resampling.BOX), np.float32).ravel()
    return shape / np.linalg.norm(shape)


def _place(
    rng: np.random.Generator, char: str, face: str, size: int, max_shift: int, max_angle: float
) -> Image.Image:
    """The glyph's coverage (L, size x size) after scaling, rotation and shift; wholly inside."""
    glyph = _ink(char, face, round(0.72 * size))
    glyph.thumbnail((round(0.72 * size),) * 2)
    angle = rng.uniform(-max_angle, max_angle)
    glyph = glyph.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    glyph.thumbnail((size, size))
    corner = []
    for extent in glyph.size:
        shift = int(rng.integers(-max_shift, max_shift + 1))
        corner.append(min(max((size - extent) // 2 + shift, 0), size - extent))
    mask = Image.new("L", (size, size))
    mask.paste(glyph, (corner[0], corner[1]))
    return mask


def _paint(rng: np.random.Generator, mask: Image.Image, clutter: float) -> Image.Image:
    """Colours the glyph and puts it on a background of a gradient, strokes and blobs."""
    size = mask.width
    ground = rng.uniform(*_GROUND, 3)
    ink = rng.uniform(*_INK, 3)
    ramp = np.linspace(-0.5, 0.5, size)
    angle = rng.uniform(0, 2 * np.pi)
    plane = np.cos(angle) * ramp[None, :] + np.sin(angle) * ramp[:, None]
    field = ground + clutter * 128 * plane[..., None]
    image = Image.fromarray(np.clip(field, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for number in range(8):
        colour = ground + clutter * (rng.uniform(0, 255, 3) - ground)
        fill = tuple(int(v) for v in colour)
        x0, y0, x1, y1 = (int(v) for v in rng.integers(0, size, 4))
        if number % 2:
            draw.line((x0, y0, x1, y1), fill, width=int(rng.integers(1, max(2, size // 16) + 1)))
        else:
            radius = int(rng.integers(size // 32 + 1, size // 8 + 2))
            draw.ellipse((x0 - radius, y0 - radius, x0 + radius, y0 + radius), fill)
    image.paste(tuple(int(v) for v in np.clip(ink, 0, 255)), (0, 0), mask)
    return image


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}; got {value!r}")
