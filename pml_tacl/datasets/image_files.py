"""Images of a folder tree, which may contain broken or unknown files."""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset
from tqdm import tqdm

from pml_tacl.utils.errors import InputError
from pml_tacl.utils.images import to_rgb
from pml_tacl.utils.names import Names, Paths
from pml_tacl.utils.words import verbed

# Pillow recognises these by name only, or needs another program to draw them.
_NOT_DECODED = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
# Formats whose first bytes are too few or too common to recognise an image by its content.
_KNOWN_BY_ENDING = (
    "CUR", "DCX", "DIB", "FLI", "FTEX", "GBR", "ICO", "IM", "IMT", "IPTC", "MCIDAS", "MSP", "PCD",
    "PCX", "PIXAR", "SGI", "SPIDER", "SUN", "TGA", "XBM", "XPM", "XVTHUMB",
)  # fmt: skip
# Images for which Pillow needs a plugin, or of which it opens only a small preview (a TIFF).
_OTHER_IMAGES = (
    ".3fr", ".arw", ".avif", ".cr2", ".cr3", ".crw", ".dng", ".erf", ".heic", ".heif", ".hif",
    ".jxl", ".kdc", ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".srw", ".svg", ".svgz",
)  # fmt: skip
_SHOWN = 10
_LABELS = ("none", "folder")
_logger = logging.getLogger(__name__)


class ImageFiles(Dataset[tuple[Any, int]]):
    """All images of a folder tree in sorted order, as RGB images with or without labels.

    It reads all files that Pillow can open: files with an ending that Pillow knows (in upper or
    lower case), and files with another ending or none whose content starts like an image. Files
    that cannot be decoded are found once, at the start, and left out. The logger
    ``pml_tacl.datasets.image_files`` names them in one warning. Images that Pillow does not open,
    such as .heic and raw files of cameras, are also left out. A second warning gives the number of
    files that are not images, and up to ten of their names. Hidden files and folders (with a
    leading dot) are skipped. Links to folders are followed, and each folder is read once.
    :func:`load_rgb` describes the conversion of image modes.

    Args:
        root: Folder to search, with all its subfolders.
        transform: Applied to the PIL RGB image.
        labels: ``"none"``: every label is -1. ``"folder"``: each folder in ``root`` is a class that
            contains all images below it. An image in ``root`` itself has no class: it is left out
            and named like a broken file. A folder to which several classes link belongs to each
            of them.
        exclude: Patterns of files to leave out, in the syntax of :mod:`fnmatch`. A pattern with a
            slash is compared with the path of a file or folder relative to ``root``, a pattern
            without a slash with each part of that path: ``"thumbs"``, ``"*_small.jpg"``,
            ``"2019/*.png"``.
        files: Use only these images: paths below ``root``, relative to it or absolute, or the path
            of a text file that lists them, one per line.
        strict: Raise on broken files instead of leaving them out.
        check: Decode every file now. If False, a broken file raises when it is read.
        progress: Show a progress bar while checking.

    Attributes:
        paths: The images, sorted: a sequence that compares equal to a list and takes less memory.
        labels: Zero-based class of each image, or -1, int64 (N,).
        classes: Names of the classes, sorted; empty with ``labels="none"``.
        broken: Images that were left out, as (path, reason in one line).
        skipped: Files that are not images.

    Raises:
        ValueError: If ``root`` is not a folder or contains no readable image, if one of ``files``
            is outside of it or none of them is an image, if a file is broken and ``strict`` is
            set, if ``labels="folder"`` and all images are in ``root`` itself, or if an argument is
            invalid.

    Example:
        >>> images = ImageFiles("photos", labels="folder")  # doctest: +SKIP
        >>> image, label = images[0]  # doctest: +SKIP
    """

    def __init__(
        self,
        root: str | Path,
        *,
        transform: Callable[[Image.Image], Any] | None = None,
        labels: str = "none",
        exclude: Sequence[str] = (),
        files: Sequence[str | Path] | str | Path | None = None,
        strict: bool = False,
        check: bool = True,
        progress: bool = True,
    ) -> None:
        if labels not in _LABELS:
            raise InputError(f"labels must be one of {', '.join(_LABELS)}, got {labels!r}")
        if strict and not check:
            raise InputError("strict=True needs check=True, which decodes files to check them")
        self.root, self.transform = Path(root), transform
        if not self.root.is_dir():
            raise InputError(f"{str(root)!r} is not a folder: give a folder of images")

        names, self.broken, self.skipped = _find_images(self.root, labels == "folder")
        self.exclude, self.listed = [exclude] if isinstance(exclude, str) else [*exclude], files
        self._keep(self._choose(names))
        if not self.paths and not self.broken:
            others = f" ({len(self.skipped)} files are not images)" if self.skipped else ""
            raise InputError(f"no image in {str(root)!r} or below it{others}")
        if not self.paths and all(reason == _NO_CLASS for _, reason in self.broken):
            raise InputError(
                f"images are not in a sub-folder of {str(root)!r} ({len(self.broken)} images): "
                "sort them into one sub-folder for each class"
            )
        if check:
            reasons = _decode_all(self.paths, progress)
            if any(reasons):
                self.broken += [(p, r) for p, r in zip(self.paths, reasons, strict=True) if r]
                self._keep(n for n, r in zip(self.names, reasons, strict=True) if not r)
        self._report(strict)

        self.classes: list[str] = []
        self.labels: npt.NDArray[np.int64] = np.full(len(self.paths), -1, np.int64)
        if labels == "folder":
            folders = [name.partition("/")[0] for name in self.names]
            self.classes = sorted(set(folders))
            number = {folder: label for label, folder in enumerate(self.classes)}
            self.labels[:] = [number[folder] for folder in folders]

    @property
    def names(self) -> Names:
        """Return the path of each image relative to the root, with slashes on every system."""
        return self._names

    def with_transform(self, transform: Callable[[Image.Image], Any] | None) -> ImageFiles:
        """Return the same images with another transform, without another search and check."""
        other = copy(self)
        other.transform = transform
        return other

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = load_rgb(self.paths[index])
        return (image if self.transform is None else self.transform(image)), int(self.labels[index])

    def _keep(self, names: Iterable[str]) -> None:
        self._names = Names(names)
        self.paths = Paths(self.root, self._names)

    def _choose(self, names: list[str]) -> list[str]:
        """Apply ``exclude`` and ``files``; return the names that are left."""
        if not self.exclude and self.listed is None:
            return names
        skipped = {self._name_of(path) for path in self.skipped}
        there = {*names, *skipped, *(self._name_of(path) for path, _ in self.broken)}
        used = dict.fromkeys(self.exclude, False)
        gone = set()
        for name in there if used else ():
            parts = tuple(name.split("/"))
            found = [one for one in used if _matches(parts, one)]
            used.update(dict.fromkeys(found, True))
            if found:
                gone.add(name)
        for pattern in (one for one, was in used.items() if not was):
            _logger.warning("exclude=%r matches nothing in %s", pattern, str(self.root))
        if self.listed is not None:
            wanted = _listed(self.root, self.listed)
            missing = sorted(str(self.root / name) for name in wanted - there | wanted & skipped)
            if len(missing) == len(wanted):
                raise InputError(
                    f"files={_shown_list(self.listed)} names no image in {str(self.root)!r} or "
                    f"below it (first path: {missing[0]}): give paths below that folder, one per "
                    "line"
                )
            if missing:
                _logger.warning(
                    "files=%s names %d paths that are not images of %r: %s",
                    _shown_list(self.listed), len(missing), str(self.root), _named(missing),
                )  # fmt: skip
            gone |= there - wanted
        names = [name for name in names if name not in gone]
        self.broken = [(p, reason) for p, reason in self.broken if self._name_of(p) not in gone]
        self.skipped = [path for path in self.skipped if self._name_of(path) not in gone]
        if gone and not names and not self.broken:
            raise InputError(
                f"exclude={self.exclude} leaves no image of {str(self.root)!r}: exclude fewer"
            )
        return names

    def _name_of(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _report(self, strict: bool) -> None:
        named = _named([f"{path} ({reason})" for path, reason in self.broken])
        if not self.paths:
            raise InputError(f"no readable image in {str(self.root)!r}: {named}")
        if self.broken and strict:
            raise InputError(
                f"{verbed(len(self.broken), 'file', 'is', 'are')} broken (strict=True): {named}"
            )
        if self.broken:
            total = len(self.broken) + len(self.paths)
            _logger.warning("left out %d of %d files: %s", len(self.broken), total, named)
        if self.skipped:
            named = _named(list(map(str, self.skipped)))
            _logger.warning(
                "skipped %s: %s",
                verbed(len(self.skipped), "file", "that is not an image", "that are not images"),
                named,
            )


def _matches(parts: tuple[str, ...], pattern: str) -> bool:
    """Return whether a pattern matches the path of a file below the root, or one of its folders."""
    pattern = pattern.strip("/")
    if "/" not in pattern:
        return any(fnmatchcase(part, pattern) for part in parts)
    places = ("/".join(parts[:count]) for count in range(1, len(parts) + 1))
    return any(fnmatchcase(place, pattern) for place in places)


def _listed(root: Path, files: Sequence[str | Path] | str | Path) -> set[str]:
    """Return the names of listed images, relative to the root, in the form of `_find_images`."""
    given = files
    if isinstance(files, str | Path):
        try:
            lines = Path(files).read_text("utf-8-sig", "surrogateescape").splitlines()
        except OSError as error:
            raise InputError(f"files={str(files)!r} cannot be read: {error.strerror}") from error
        files = [line.strip() for line in lines if line.strip()]
    if not files:
        raise InputError(
            f"files={_shown_list(given)} names no image: give paths below the folder, one per line"
        )
    found = set()
    for file in files:
        place = Path(os.path.normpath(file))
        if place.is_absolute():
            for top in (root.absolute(), root.resolve()):
                if place.is_relative_to(top):
                    place = place.relative_to(top)
                    break
        if place.is_absolute() or ".." in place.parts:
            raise InputError(
                f"files={_shown_list(given)} names {str(file)!r}, which is not in {str(root)!r}: "
                "give paths below that folder"
            )
        found.add(place.as_posix())
    return found


def _shown_list(files: Sequence[str | Path] | str | Path) -> str:
    """Return the path of a list file in quotes, or "[...]" for a list of paths."""
    return repr(str(files)) if isinstance(files, str | Path) else "[...]"


def _named(things: list[str]) -> str:
    more = [f"and {len(things) - _SHOWN} more"] if len(things) > _SHOWN else []
    return "; ".join(things[:_SHOWN] + more)


def load_rgb(path: str | Path) -> Image.Image:
    """Read the first frame of an image file as an upright RGB image.

    The conversion is that of :func:`pml_tacl.utils.images.to_rgb`, as everywhere in the package.
    The EXIF orientation is applied, transparent areas become white, and grey values of more than
    8 bits are converted to 8 bits with a white point that is robust to single pixels.

    Args:
        path: The file.

    Returns:
        The decoded image, mode RGB.

    Raises:
        OSError: If the file cannot be read or decoded, or has NaN or infinite pixels; the message
            names it.
    """
    try:
        if os.path.getsize(path) == 0:
            raise OSError("empty file")
        return _decode(path)
    # On damaged bytes, Pillow's decoders raise many types (SyntaxError, struct.error, ...).
    except Exception as error:
        raise OSError(f"cannot read {path}: {_reason(error)}") from error


def rgb_of_bytes(content: bytes) -> Image.Image:
    """Decode the bytes of an image file; see :func:`load_rgb`.

    Raises:
        OSError: If they cannot be decoded; the message is the reason.
    """
    try:
        return _decode(io.BytesIO(content))
    except Exception as error:  # many types, as above
        raise OSError(_reason(error)) from error


def _decode(source: str | Path | io.BytesIO) -> Image.Image:
    with Image.open(source, formats=_formats()) as image:
        rgb = to_rgb(image)
        return rgb.copy() if rgb is image else rgb


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


_NO_CLASS = "in no sub-folder, so it has no class"


def _formats() -> tuple[str, ...]:
    """Return the formats that Pillow decodes itself, in its order, including registered plugins."""
    Image.init()
    return tuple(name for name in Image.ID if name not in _NOT_DECODED)


def _endings() -> frozenset[str]:
    known = frozenset(_formats())
    registered = Image.registered_extensions().items()
    return frozenset(ending for ending, name in registered if name in known)


def _find_images(
    root: Path, by_class: bool
) -> tuple[list[str], list[tuple[Path, str]], list[Path]]:
    """Return images, unreadable images with reasons, and other files, each sorted.

    Images are names relative to the root, with slashes.
    """
    found: list[str] = []
    broken: list[tuple[Path, str]] = []
    skipped: list[Path] = []
    endings = _endings()

    def remember(error: OSError) -> None:
        broken.append((Path(error.filename), error.strerror or "cannot be listed"))

    def sort(folders: Iterable[tuple[str, list[str]]]) -> Iterator[str]:
        for folder, files in folders:
            below = folder[len(os.fspath(root)) :].replace(os.sep, "/").strip("/")
            for file in files:
                reason = _what_is_it(os.path.join(folder, file), endings)
                if reason is None:
                    skipped.append(Path(folder, file))
                elif reason:
                    broken.append((Path(folder, file), reason))
                else:
                    yield f"{below}/{file}" if below else file

    if not by_class:
        found += sort(_files_below(os.fspath(root), set(), remember))
    else:
        entries = os.walk(root, onerror=remember, followlinks=True)
        top, folders, files = next(entries, (os.fspath(root), [], []))
        broken += [(root / name, _NO_CLASS) for name in sort([(top, _shown(files))])]
        for folder in _shown(folders):
            below = _files_below(os.path.join(root, folder), {os.path.realpath(root)}, remember)
            found += sort(below)
    found.sort(key=listing_place)
    return found, sorted(broken), sorted(skipped)


def listing_place(name: str) -> str:
    """Return a key that sorts names as paths, folder by folder."""
    name = name.replace("/", "\0")
    return name.lower() if os.name == "nt" else name


def _files_below(
    top: str, seen: set[str], onerror: Callable[[OSError], None]
) -> Iterator[tuple[str, list[str]]]:
    """Yield a folder and all folders below it, each with its files."""
    for folder, subfolders, files in os.walk(top, onerror=onerror, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a folder that was read already
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(_shown(subfolders))
        yield folder, _shown(files)


def _shown(names: list[str]) -> list[str]:
    return [name for name in names if not name.startswith(".")]


def _what_is_it(path: str, endings: frozenset[str]) -> str | None:
    """Return "" for a readable image, a reason for an unreadable one, None for other files."""
    ending = os.path.splitext(path)[1].lower()
    if ending in endings:
        return "" if os.path.isfile(path) or os.path.islink(path) else None
    other = f"{ending} files are not read: convert them to .png or .jpg"
    reason = other if ending in _OTHER_IMAGES else None
    if not os.path.isfile(path):
        return reason if os.path.islink(path) else None
    left_out = (*_KNOWN_BY_ENDING, *(["TIFF"] if reason else []))
    formats = [name for name in _formats() if name not in left_out]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are raised again when the file is read
            Image.open(path, formats=formats).close()
    except UnidentifiedImageError:
        return reason
    except OSError as error:
        return _reason(error)
    except Exception:  # it starts like an image; reading it raises the error
        return ""
    return ""


def _decode_all(paths: Sequence[Path], progress: bool) -> list[str]:
    """Return one line per file that describes its error, or an empty string."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        reasons = pool.map(_what_is_wrong, paths)
        bar = tqdm(
            reasons, "checking images", len(paths), unit="img", disable=not progress, leave=False
        )
        return list(bar)


def _what_is_wrong(path: Path) -> str:
    try:
        load_rgb(path)
    except OSError as error:
        return _reason(error.__cause__ or error)
    return ""
