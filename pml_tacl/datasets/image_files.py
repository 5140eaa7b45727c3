"""A folder tree of pictures, read without trusting any of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset
from tqdm import tqdm

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_SHOWN = 10
_LABELS = ("none", "folder")
_logger = logging.getLogger(__name__)


class ImageFiles(Dataset[tuple[Any, int]]):
    """All pictures of a folder tree in sorted order, as RGB images with labels or without.

    Files that cannot be decoded are found once, at the start, named in one warning of the logger
    ``pml_tacl.datasets.image_files`` and left out. Hidden files and folders (a leading dot) are
    skipped; links to folders are followed, and each folder is read once. See :func:`load_rgb`
    for what happens to the modes.

    Args:
        root: Folder to search, with all its subfolders, for files ending in .jpg, .jpeg, .png,
            .webp, .bmp, .gif, .tif, .tiff or .ppm in any case.
        transform: Applied to the PIL RGB image.
        labels: ``"none"``: every label is -1. ``"folder"``: pictures in the same folder are one
            class, named by the folder's path below ``root`` (``"."`` for ``root`` itself).
        strict: Raise on broken files instead of leaving them out.
        check: Decode every file now. Without, a broken file shows when it is read.
        progress: Show a progress bar while checking.

    Attributes:
        paths: The pictures, sorted.
        labels: Zero-based class of each picture, or -1, int64 (N,).
        classes: Names of the classes, sorted; empty with ``labels="none"``.
        broken: What was left out, as (path, reason in one line).

    Raises:
        ValueError: If ``root`` is no folder or holds no readable picture, if a file is broken
            and ``strict`` is set, or if an argument is wrong.

    Example:
        >>> pictures = ImageFiles("photos", labels="folder")  # doctest: +SKIP
        >>> image, label = pictures[0]  # doctest: +SKIP
    """

    def __init__(
        self,
        root: str | Path,
        *,
        transform: Callable[[Image.Image], Any] | None = None,
        labels: str = "none",
        strict: bool = False,
        check: bool = True,
        progress: bool = True,
    ) -> None:
        if labels not in _LABELS:
            raise ValueError(f"labels must be one of {', '.join(_LABELS)}, got {labels!r}")
        if strict and not check:
            raise ValueError("strict=True finds broken files by decoding them; leave check=True")
        self.root, self.transform = Path(root), transform
        if not self.root.is_dir():
            raise ValueError(f"root must be a folder of pictures; {str(root)!r} is none")

        self.paths, self.broken = _find_pictures(self.root)
        if not self.paths and not self.broken:
            kinds = " ".join(EXTENSIONS)
            raise ValueError(f"no picture in {str(root)!r} or below it (looked for {kinds})")
        if check:
            reasons = _decode_all(self.paths, progress)
            self.broken += [(p, r) for p, r in zip(self.paths, reasons, strict=True) if r]
            self.paths = [p for p, r in zip(self.paths, reasons, strict=True) if not r]
        self._report(strict)

        self.classes: list[str] = []
        self.labels: npt.NDArray[np.int64] = np.full(len(self.paths), -1, np.int64)
        if labels == "folder":
            folders = [path.parent.relative_to(self.root).as_posix() for path in self.paths]
            names, ids = np.unique(folders, return_inverse=True)
            self.classes, self.labels = names.tolist(), ids.astype(np.int64)

    @property
    def names(self) -> list[str]:
        """Where each picture lies below the root, with slashes on every system."""
        return [path.relative_to(self.root).as_posix() for path in self.paths]

    def with_transform(self, transform: Callable[[Image.Image], Any] | None) -> ImageFiles:
        """The same pictures, not searched and checked again, through another transform."""
        other = copy(self)
        other.transform = transform
        return other

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = load_rgb(self.paths[index])
        return (image if self.transform is None else self.transform(image)), int(self.labels[index])

    def _report(self, strict: bool) -> None:
        named = "; ".join(f"{path} ({reason})" for path, reason in self.broken[:_SHOWN])
        if len(self.broken) > _SHOWN:
            named += f"; and {len(self.broken) - _SHOWN} more"
        if not self.paths:
            raise ValueError(f"no readable picture in {str(self.root)!r}: {named}")
        if self.broken and strict:
            raise ValueError(f"{len(self.broken)} broken files, and strict=True: {named}")
        if self.broken:
            total = len(self.broken) + len(self.paths)
            _logger.warning("left out %d of %d files: %s", len(self.broken), total, named)


def load_rgb(path: str | Path) -> Image.Image:
    """Reads a picture upright, as RGB, its first frame if there are more.

    The EXIF orientation is applied. What is transparent becomes white. 16-bit grey keeps its high
    byte; greys of more bits and floats are stretched from their least to their largest value.

    Args:
        path: The file.

    Returns:
        The decoded picture, mode RGB.

    Raises:
        OSError: If the file cannot be read or decoded, or has NaN or infinite pixels; the message
            names it.
    """
    try:
        if os.path.getsize(path) == 0:
            raise OSError("empty file")
        with Image.open(path) as image:
            image.load()
            return _to_rgb(_upright(image))
    # Pillow's decoders raise nearly anything on damaged bytes (SyntaxError, struct.error, ...).
    except Exception as error:
        raise OSError(f"cannot read {path}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a picture of a known format"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def _upright(image: Image.Image) -> Image.Image:
    # Damaged EXIF data is no reason to lose a picture whose pixels are whole.
    with suppress(Exception):
        return ImageOps.exif_transpose(image)
    return image.copy()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_to_eight_bits(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _to_eight_bits(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    whole = np.issubdtype(values.dtype, np.integer)
    if whole and values.min() >= 0 and values.max() < 2**16:
        high_byte: npt.NDArray[np.uint8] = (values >> 8).astype(np.uint8)
        return high_byte
    wide = values.astype(np.float64)
    # Zeros in their place would train on a picture that nobody took.
    if bad := int((~np.isfinite(wide)).sum()):
        raise OSError(f"{bad} of {wide.size} pixels are NaN or infinite")
    low, high = wide.min(), wide.max()
    stretched: npt.NDArray[np.uint8] = np.rint(
        (wide - low) * (255 / max(high - low, 1e-12))
    ).astype(np.uint8)
    return stretched


def _find_pictures(root: Path) -> tuple[list[Path], list[tuple[Path, str]]]:
    found: list[Path] = []
    closed: list[tuple[Path, str]] = []
    seen: set[str] = set()

    def remember(error: OSError) -> None:
        closed.append((Path(error.filename), error.strerror or "cannot be listed"))

    for folder, subfolders, files in os.walk(root, onerror=remember, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up the tree
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in files:
            path = Path(folder, name)
            wanted = path.suffix.lower() in EXTENSIONS and not name.startswith(".")
            if wanted and (path.is_file() or path.is_symlink()):
                found.append(path)
    return sorted(found), closed


def _decode_all(paths: list[Path], progress: bool) -> list[str]:
    """One line of what is wrong with each file, empty for the sound ones."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        reasons = pool.map(_what_is_wrong, paths)
        return list(tqdm(reasons, "checking pictures", len(paths), disable=not progress))


def _what_is_wrong(path: Path) -> str:
    try:
        load_rgb(path)
    except OSError as error:
        return _reason(error.__cause__ or error)
    return ""
