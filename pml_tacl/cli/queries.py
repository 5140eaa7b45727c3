"""Queries of a search: an image, a folder of images, or piped input."""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from PIL import Image
from torch.utils.data import Dataset

from pml_tacl.datasets.image_files import ImageFiles, load_rgb
from pml_tacl.utils.errors import InputError

_logger = logging.getLogger(__name__)


class ImageList(Dataset[tuple[Any, int]]):
    """Data set of images with label -1.

    Args:
        paths: paths of the images.
        transform: transform of the PIL RGB image.
        strict: raise on a broken file instead of leaving it out with a warning.

    Attributes:
        paths: paths of the readable images, in order.

    Raises:
        OSError: if a file is broken and ``strict`` is set.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        transform: Callable[[Image.Image], Any] | None = None,
        *,
        strict: bool = True,
    ) -> None:
        self.paths, self.transform = [], transform
        for path in paths:
            try:
                load_rgb(path)
            except OSError as error:
                if strict:
                    raise
                _logger.warning("left out: %s", error)
            else:
                self.paths.append(path)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = load_rgb(self.paths[index])
        return (image if self.transform is None else self.transform(image)), -1


def query_paths(
    query: str | Path, piped: IO[bytes], scratch: Path, progress: bool = True
) -> Sequence[Path]:
    """Return the paths of the images of a query.

    Args:
        query: an image, a folder of images, or "-" for piped input: the bytes of one image, or
            paths of images, one per line.
        piped: standard input, as bytes.
        scratch: folder in which a piped image is saved.
        progress: show a progress bar while the images of a folder are checked.

    Raises:
        ValueError: for an empty pipe, or a folder without images.
    """
    if str(query) != "-":
        path = Path(query)
        return ImageFiles(path, progress=progress).paths if path.is_dir() else [path]
    content = piped.read()
    if not content.strip():
        raise InputError("query is - but the piped input is empty: pipe an image, or image paths")
    lines = [line for line in content.splitlines() if line.strip()]
    paths = [Path(os.fsdecode(line)) for line in lines if b"\0" not in line]
    # Testing one path is enough: the bytes of an image do not begin with the path of a file.
    if paths and len(paths) == len(lines) and (_is_file(paths[0]) or _is_text(content)):
        return paths
    image = scratch / "piped in"
    image.write_bytes(content)
    return [image]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # too long for a name
        return False


def _is_text(content: bytes) -> bool:
    try:
        return content.decode("utf-8").replace("\n", "").replace("\r", "").isprintable()
    except UnicodeDecodeError:
        return False
