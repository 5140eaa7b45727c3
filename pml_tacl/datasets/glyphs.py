"""Characters rendered with the TrueType faces that matplotlib ships."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image, ImageDraw, features
from torch.utils.data import Dataset
from tqdm import tqdm

from pml_tacl.datasets.characters import characters, ink, split_characters
from pml_tacl.utils.checks import check_count
from pml_tacl.utils.errors import InputError
from pml_tacl.utils.files import atomic_write

# Increase this if a change of the drawing code changes pixels: it is part of the cache key.
_RENDERING = 1
_SPLITS = ("train", "test", "all")
# Ranges of each colour channel: dark ink on a light background, so that colours vary and the sign
# of the contrast does not. Raw pixels then reach R@1 25 % on the test half, which leaves room to
# learn.
_BACKGROUND, _INK = (205, 255), (0, 120)
# Font size and largest side of a glyph as fractions of the image: a rotated glyph still fits.
_GLYPH = 0.72


class Glyphs(Dataset[tuple[Any, int]]):
    """Coloured, rotated, shifted characters on cluttered backgrounds, one class per character.

    A class is a letter or digit that is in at least eight of matplotlib's text fonts; each image
    shows it in one font. Characters that look alike are detected by measurement and left out
    (``pml_tacl.datasets.characters``). The two halves have 280 characters each and share no class.
    For given drawing arguments, an image depends only on ``(seed, character, instance)``, not on
    the order of access, the split or the number of classes. Images are rendered on first access
    (0.4 ms at 64 pixels) and kept in memory. Call :meth:`preload` before you pass the data set to
    the workers of a loader; otherwise each worker renders its own images.

    Args:
        split: ``"train"`` or ``"test"`` (halves of the characters), or ``"all"``.
        size: Side of the square image in pixels, from 16 to 1024.
        seed: Seed of font order, position, angle, colours and background, at least 0. The split
            is the same for every seed.
        num_classes: Use only the first classes of the split; ``None`` for all.
        images_per_class: Images of each class; faces are repeated if there are fewer.
            ``None`` uses each face of the character once (8 to 21 images).
        clutter: Contrast of the background's gradient, strokes and blobs, from 0 to 1.
        max_shift: Largest shift from the centre in pixels, along each axis.
        max_angle: Largest rotation in degrees, from 0 to 180.
        transform: Applied to the PIL RGB image.
        cache_dir: Folder for the rendered images, with one npz file for each set of parameters.
            The first access then renders (or loads) all images.

    Attributes:
        labels: Zero-based class of each image, int64 (N,).
        classes: The character of each class.

    Raises:
        ValueError: If an argument is out of range, or a count is not an integer.
        ImportError: If matplotlib, which ships the faces, is missing.

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
            raise InputError(f"split must be one of {', '.join(_SPLITS)}, got {split!r}")
        check_count("size", size, 16, most=1024)
        check_count("seed", seed, 0, most=2**63)
        check_count("max_shift", max_shift, 0, most=size // 2)
        _check_range("clutter", clutter, 0, 1)
        _check_range("max_angle", max_angle, 0, 180)
        available = split_characters(split)
        if num_classes is not None:
            check_count("num_classes", num_classes, 1, most=len(available))
        if images_per_class is not None:
            check_count("images_per_class", images_per_class, 1, most=10_000)

        self.split, self.size, self.seed = split, int(size), int(seed)
        self.clutter, self.max_shift, self.max_angle = clutter, max_shift, max_angle
        self.transform = transform
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.classes = available[:num_classes]
        counts = [images_per_class or len(characters()[char]) for char in self.classes]
        self.labels: npt.NDArray[np.int64] = np.repeat(np.arange(len(counts)), counts)
        self._instances = np.concatenate([np.arange(count) for count in counts])
        self._boxes = np.zeros((len(self.labels), 4), np.float32)
        self._rendered = np.zeros(len(self.labels), bool)
        # Allocate on first access, so that a new data set is cheap to send to a worker.
        self._pixels: npt.NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        index = range(len(self))[index]
        if self.cache_dir is not None:
            self.preload(progress=False)
        image = Image.fromarray(self._render(index))
        return (image if self.transform is None else self.transform(image)), int(self.labels[index])

    @property
    def images(self) -> npt.NDArray[np.uint8]:
        """Return all images before the transform, uint8 RGB (N, size, size, 3)."""
        self.preload(progress=False)
        return self._memory()

    @property
    def boxes(self) -> npt.NDArray[np.float32]:
        """Return glyph boxes (N, 4), float32: x0, y0, x1, y1 in pixels, ends exclusive."""
        self.preload(progress=False)
        return self._boxes

    def preload(self, progress: bool = True) -> None:
        """Render all images now, or load them from ``cache_dir``.

        Args:
            progress: Show a progress bar while rendering.
        """
        if self._rendered.all() or self._load_cache():
            return
        for index in tqdm(
            range(len(self)), "rendering glyphs", unit="img", disable=not progress, leave=False
        ):
            self._render(index)
        self._save_cache()

    def _memory(self) -> npt.NDArray[np.uint8]:
        if self._pixels is None:
            self._pixels = np.zeros((len(self), self.size, self.size, 3), np.uint8)
        return self._pixels

    def _render(self, index: int) -> npt.NDArray[np.uint8]:
        pixels: npt.NDArray[np.uint8] = self._memory()[index]
        if not self._rendered[index]:
            char, instance = self.classes[self.labels[index]], int(self._instances[index])
            faces = characters()[char]
            order = np.random.default_rng((self.seed, ord(char))).permutation(len(faces))
            face = faces[order[instance % len(faces)]]
            rng = np.random.default_rng((self.seed, ord(char), instance))
            mask = _place(rng, char, face, self.size, self.max_shift, self.max_angle)
            pixels[:] = np.asarray(_paint(rng, mask, self.clutter))
            self._boxes[index] = mask.getbbox()
            self._rendered[index] = True
        return pixels

    def _cache_path(self, folder: Path) -> Path:
        drawing = [_RENDERING, PIL.__version__, features.version("freetype2")]
        parameters = [self.size, self.seed, self.clutter, self.max_shift, self.max_angle]
        content = [len(self), [(char, characters()[char]) for char in self.classes]]
        key = hashlib.sha256(repr([drawing, parameters, content]).encode()).hexdigest()[:16]
        return folder / f"glyphs-{self.split}-{self.size}-{key}.npz"

    def _load_cache(self) -> bool:
        if self.cache_dir is None:
            return False
        try:
            # Open the file here, because NumPy does not close a damaged file.
            with self._cache_path(self.cache_dir).open("rb") as stream, np.load(stream) as file:
                pixels, boxes = file["images"], file["boxes"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return False  # missing or damaged: render again and replace it
        self._pixels, self._boxes = pixels, boxes
        self._rendered[:] = True
        return True

    def _save_cache(self) -> None:
        if self.cache_dir is None:
            return
        # Write atomically: two processes may render at the same time.
        with atomic_write(self._cache_path(self.cache_dir)) as file:
            np.savez(file, images=self._memory(), boxes=self._boxes)


def _place(
    rng: np.random.Generator, char: str, face: str, size: int, max_shift: int, max_angle: float
) -> Image.Image:
    """Draw a glyph (mode L, size x size), scaled, rotated and shifted, fully inside."""
    side = round(_GLYPH * size)
    glyph = ink(char, face, side)
    glyph.thumbnail((side, side))
    angle = rng.uniform(-max_angle, max_angle)
    glyph = glyph.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    glyph = glyph.crop(glyph.getbbox())  # the shift then applies to the ink
    glyph.thumbnail((size, size))
    shifts = rng.integers(-max_shift, max_shift + 1, 2)
    left, top = (
        min(max((size - extent) // 2 + int(shift), 0), size - extent)
        for extent, shift in zip(glyph.size, shifts, strict=True)
    )
    mask = Image.new("L", (size, size))
    mask.paste(glyph, (left, top))
    return mask


def _paint(rng: np.random.Generator, mask: Image.Image, clutter: float) -> Image.Image:
    """Draw the glyph in a colour on a background of a gradient, strokes and blobs, RGB."""
    size = mask.width
    background, colour = rng.uniform(*_BACKGROUND, 3), rng.uniform(*_INK, 3)
    ramp, direction = np.linspace(-0.5, 0.5, size), rng.uniform(0, 2 * np.pi)
    plane = np.cos(direction) * ramp[None, :] + np.sin(direction) * ramp[:, None]
    shaded = np.clip(background + clutter * 128 * plane[..., None], 0, 255)
    image = Image.fromarray(shaded.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for number in range(8):
        fill = _rgb(background + clutter * (rng.uniform(0, 255, 3) - background))
        x0, y0, x1, y1 = rng.integers(0, size, 4).tolist()
        if number % 2:
            draw.line((x0, y0, x1, y1), fill, width=int(rng.integers(1, size // 16 + 2)))
        else:
            radius = int(rng.integers(size // 32 + 1, size // 8 + 2))
            draw.ellipse((x0 - radius, y0 - radius, x0 + radius, y0 + radius), fill)
    image.paste(_rgb(colour), (0, 0, size, size), mask)
    return image


def _rgb(colour: npt.NDArray[np.float64]) -> tuple[int, int, int]:
    red, green, blue = colour.astype(int).tolist()
    return red, green, blue


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise InputError(f"{name} must be from {low} to {high}, got {value!r}")
