"""Data sets of the benchmark: uint8 images in memory, in splits that share no class."""

import hashlib
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pml_tacl.datasets import Glyphs
from pml_tacl.utils.errors import InputError
from pml_tacl.utils.files import atomic_write
from retrieval_parts import emoji, folders, photos
from retrieval_parts.backgrounds import background

SPLITS = ("train", "validation", "test")
DRAWN = ("openemoji", "openemoji-busy")
NAMES = ("glyphs", *DRAWN, *photos.PHOTOS)
DEFAULT_CACHE = Path.home() / ".cache" / "pml_tacl"
_DRAWING = 2  # part of the cache key: increase it if a change of the code changes pixels
_SPLIT_SEED = 2020


class Images(NamedTuple):
    """Images with labels.

    Attributes:
        images: (N, 3, S, S) uint8.
        labels: (N,) int64 from zero. In the training third, only supervised training and the
            report of purity use them.
        queries: (N,) bool, which images are queries and search among the others; None: each
            image searches among all others.
    """

    images: Tensor
    labels: Tensor
    queries: Tensor | None = None


def load(
    name: str,
    split: str,
    size: int,
    cache: Path = DEFAULT_CACHE,
    limit: int | None = None,
    data_root: Path | None = None,
) -> Images:
    """Return a split of a data set.

    Args:
        name: one of NAMES.
        split: "train", "validation" or "test".
        size: side of the images.
        cache: folder for archives and for images computed from them.
        limit: use only this number of classes.
        data_root: folder of the photograph data sets, each in a folder with its name.

    Raises:
        ValueError: for an unknown name or split.
        FileNotFoundError: if photographs are missing.
    """
    own = data_root is not None and name in ("glyphs", *DRAWN) and (data_root / name).is_dir()
    if data_root is not None and (own or name not in NAMES):
        return _folder(name, split, size, cache, data_root)
    if split not in SPLITS:
        raise InputError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    if name == "glyphs":
        images = _glyphs(split, size, limit)
    elif name in DRAWN:
        images = _open_emoji(name, split, size, cache)
    elif name in photos.PHOTOS:
        images = _photographs(name, split, size, cache, data_root)
    else:
        raise InputError(f"dataset={name!r} is none of {', '.join(NAMES)}")
    if limit is None:
        return images
    kept = images.labels < limit
    return Images(*(part if part is None else part[kept] for part in images))


def third(count: int, split: str) -> slice:
    """Return the range of a split among `count` classes in their fixed order."""
    part = SPLITS.index(split)
    return slice(count * part // 3, count * (part + 1) // 3)


def _glyphs(split: str, size: int, limit: int | None) -> Images:
    # Glyphs orders its classes: its own training half holds the first third and half the second.
    glyphs = Glyphs("all", size=size)
    part = third(len(glyphs.classes), split)
    stop = part.stop if limit is None else min(part.stop, part.start + limit)
    rows = np.where((glyphs.labels >= part.start) & (glyphs.labels < stop))[0]
    images = np.stack([np.asarray(glyphs[int(row)][0]) for row in rows])
    return _images(images, glyphs.labels[rows] - part.start)


def _open_emoji(name: str, split: str, size: int, cache: Path) -> Images:
    made = repr((_DRAWING, emoji.SETS, emoji.SIDE, name, size))
    key = hashlib.sha256(made.encode()).hexdigest()[:12]
    paths = {s: cache / f"{name}-{s}-{size}-{key}.npz" for s in SPLITS}
    if not paths[split].is_file():
        found = emoji.drawings(cache)
        for other, path in paths.items():  # all at once: opening the drawings is the slow part
            _draw(found, name, other, size, path)
    with np.load(paths[split]) as file:
        return _images(file["images"], file["labels"])


def _draw(found: dict[str, list], name: str, split: str, size: int, path: Path) -> None:
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(found))
    codes = [list(found)[row] for row in order[third(len(found), split)]]
    place = place_busy if name.endswith("busy") else place_on_white
    images = [
        np.asarray(place(np.random.default_rng((zlib.crc32(code.encode()), number)), drawing, size))
        for code in codes
        for number, drawing in enumerate(found[code])
    ]
    labels = np.repeat(np.arange(len(codes)), [len(found[code]) for code in codes])
    with atomic_write(path) as file:
        np.savez(file, images=np.stack(images), labels=labels)


def _photographs(name: str, split: str, size: int, cache: Path, data_root: Path | None) -> Images:
    if data_root is None:
        raise FileNotFoundError(f"dataset={name!r} needs --data-root with a folder {name}/")
    found = photos.listed(name, data_root, split)
    return _read_listed(found, f"{name}-{split}", size, cache)


def _folder(name: str, split: str, size: int, cache: Path, data_root: Path) -> Images:
    found = folders.listed(data_root / name, split)
    return _read_listed(found, f"folder-{name}-{split}", size, cache)


def _read_listed(
    found: photos.Listed | folders.Listed, name: str, size: int, cache: Path
) -> Images:
    state = [(path, Path(path).stat().st_mtime_ns) for path in found.paths]
    key = hashlib.sha256(repr((_DRAWING, state, size)).encode()).hexdigest()[:12]
    path = cache / f"{name}-{size}-{key}.npz"
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            np.savez(file, images=photos.read(found.paths, size))
    with np.load(path) as stored:
        images = _images(stored["images"], found.labels)
    queries = None if found.queries is None else torch.from_numpy(found.queries)
    return images._replace(queries=queries)


def place_on_white(rng: np.random.Generator, drawing: Image.Image, size: int) -> Image.Image:
    """Place the drawing in the centre of a white image, with a longer side of 0.8 images."""
    return _paste(Image.new("RGB", (size, size), "white"), drawing, round(0.8 * size), None)


def place_busy(rng: np.random.Generator, drawing: Image.Image, size: int) -> Image.Image:
    """Place the drawing at random on a busy background; its longer side is 0.65 to 0.9 images."""
    return _paste(background(rng, size), drawing, round(rng.uniform(0.65, 0.9) * size), rng)


def _paste(
    canvas: Image.Image, drawing: Image.Image, side: int, rng: np.random.Generator | None
) -> Image.Image:
    scale = side / max(drawing.size)
    width, height = (max(1, round(scale * extent)) for extent in drawing.size)
    drawing = drawing.resize((width, height), Image.Resampling.BICUBIC)
    free = (canvas.width - width, canvas.height - height)
    left, top = (gap // 2 if rng is None else int(rng.integers(gap + 1)) for gap in free)
    canvas.paste(drawing, (left, top), drawing)
    return canvas


def _images(images: np.ndarray, labels: np.ndarray) -> Images:
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return Images(pixels, torch.from_numpy(labels.astype(np.int64)))
