"""What the page shows: the images of an index, their neighbours, and the model's attention."""

import base64
import io
import threading
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from pml_tacl.clustering.unit_embeddings import FloatArray
from pml_tacl.datasets.image_files import load_rgb, rgb_of_bytes
from pml_tacl.models import AttentionEmbedder
from pml_tacl.search import ImageIndex
from pml_tacl.utils.files import shown_name
from pml_tacl.visualize._overlays import attention_of

_SIDES = {"thumbnail": 320, "image": 1600}  # largest side in pixels
_KEPT = 512  # encoded images in the cache


class RunSearcher:
    """Search in an index by indexed or uploaded images. Thread-safe.

    Args:
        model: the model that made the index.
        image_size: (height, width) of the model's input in pixels.
        index: index of the images.
        also: further folders that links inside the index's root may lead to.
        name: name of the run for the page.
    """

    def __init__(
        self,
        model: AttentionEmbedder,
        image_size: tuple[int, int],
        index: ImageIndex,
        also: Iterable[str | Path] = (),
        name: str = "",
    ) -> None:
        self.index, self.name = index, name
        self._model, self._transform = model.eval(), model.transform(image_size=image_size)
        times = max(1, -(-_SIDES["thumbnail"] // min(image_size)))  # enlarges the overlay
        height, width = image_size
        self._shown = model.transform(image_size=(times * height, times * width))
        self._folders = [Path(folder).resolve() for folder in (index.root, *also)]
        self._lock = threading.Lock()  # around the model and the index
        self.drawn = lru_cache(_KEPT)(self._drawn)

    def sample(self, count: int, seed: int = 0, text: str = "") -> dict[str, Any]:
        """Return a random sample of images, in the order of the index.

        Args:
            count: largest number of images.
            seed: seed of the sample.
            text: only images whose file names contain this text, ignoring case.

        Returns:
            "all": number of images that match ``text``; "images": the sample.
        """
        wanted = text.casefold()
        rows = [row for row, file in enumerate(self.index.files) if wanted in file.casefold()]
        chosen = np.random.default_rng(seed).permutation(len(rows))[:count]
        images = [self._told(rows[at]) for at in sorted(chosen.tolist())]
        return {"all": len(rows), "images": images}

    def neighbours(self, row: int, k: int) -> dict[str, Any]:
        """Return the k images that are most similar to an indexed image, without that image.

        Raises:
            LookupError: for a row that is not in the index.
        """
        self._check(row)
        with self._lock:
            similarities, rows = self.index.search(self.index.embeddings_of([row]), k + 1)
        found = [pair for pair in self._pairs(similarities, rows) if pair["row"] != row]
        return {"query": self._told(row), "found": found[:k]}

    def neighbours_of(self, content: bytes, k: int) -> dict[str, Any]:
        """Return the k images that are most similar to an image, given as the bytes of its file.

        Raises:
            OSError: if the image cannot be read.
        """
        embeddings, seen, over = self._looked_at(rgb_of_bytes(content))
        with self._lock:
            similarities, rows = self.index.search(embeddings, k)
        query = {"row": None, "seen": _as_uri(seen), "attention": _as_uri(over)}
        return {"query": query, "found": self._pairs(similarities, rows)}

    def path(self, row: int) -> Path:
        """Return the path of an image, with links resolved.

        Raises:
            LookupError: for a row that is not in the index, or a file outside the allowed folders.
        """
        self._check(row)
        path = self.index.paths([row])[0].resolve()
        if not any(path.is_relative_to(folder) for folder in self._folders):
            raise LookupError(f"image {row} is outside the run's folder of images")
        return path

    def _drawn(self, kind: str, row: int) -> bytes:
        """Return an image as WebP: its "thumbnail", "image" or "attention".

        Raises:
            LookupError: see :meth:`path`.
            OSError: if the image cannot be read.
        """
        image = load_rgb(self.path(row))
        if kind == "attention":
            image = self._looked_at(image)[2]
        else:
            side = _SIDES[kind]
            image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
        return _encoded(image)

    def _looked_at(self, image: Image.Image) -> tuple[Tensor, Image.Image, Image.Image]:
        """Return the embedding (1, D), the image as the model sees it, and its overlay."""
        view, shown = self._transform(image)[None], self._shown(image)[None]
        with self._lock:
            embeddings, [(seen, over)] = attention_of(self._model, view, shown)
        return embeddings, seen, over

    def _check(self, row: int) -> None:
        if not 0 <= row < len(self.index):
            raise LookupError(f"image {row} does not exist: the index has {len(self.index)}")

    def _told(self, row: int) -> dict[str, Any]:
        return {"row": row, "file": shown_name(self.index.files[row])}

    def _pairs(self, similarities: FloatArray, rows: Any) -> list[dict[str, Any]]:
        return [
            {**self._told(int(row)), "similarity": round(float(value), 4)}
            for value, row in zip(similarities[0], rows[0], strict=True)
        ]


def _encoded(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "WEBP", quality=82, method=2)
    return content.getvalue()


def _as_uri(image: Image.Image) -> str:
    text = base64.b64encode(_encoded(ImageOps.contain(image, (640, 640)))).decode("ascii")
    return f"data:image/webp;base64,{text}"
