"""An index of pictures that finds those with the nearest embeddings."""

import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import faiss
import numpy as np

from pml_tacl._files import written_whole
from pml_tacl._rows import Embeddings, FloatArray, IntArray, UnitRows, check_count

_EMBEDDINGS, _FILES, _INDEX = "embeddings.npy", "files.json", "index.faiss"
_CHUNK = 16384
_Self = TypeVar("_Self", bound="PictureIndex")


class PictureIndex:
    """Pictures by their embeddings, searched exactly and by cosine similarity.

    Args:
        embeddings: (N, D), array or tensor on any device; L2-normalised here.
        files: of the N pictures, relative to ``root``.
        root: the folder that they lie in.

    Attributes:
        files: as given.
        root: as an absolute path; set it if the pictures have moved.

    Raises:
        ValueError: for embeddings that are NaN, infinite, zero or of another count than the files.

    Example:
        >>> index = PictureIndex(torch.eye(3), ["a.jpg", "b.jpg", "c/d.jpg"], "photos")
        >>> similarities, rows = index.search(torch.tensor([[0.0, 2.0, 0.0]]), k=1)
        >>> index.files[rows[0, 0]], float(similarities[0, 0])
        ('b.jpg', 1.0)
    """

    def __init__(
        self, embeddings: Embeddings, files: Sequence[str], root: str | PathLike[str]
    ) -> None:
        unit = UnitRows("embeddings", embeddings, _CHUNK)
        if len(files) != len(unit):
            raise ValueError(f"files must be as many as embeddings, {len(unit)}, got {len(files)}")
        index = faiss.IndexFlatIP(unit.dim)
        for chunk in unit.chunks():
            index.add(unit[chunk])
        self._set(index, files, root)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def embeddings(self) -> FloatArray:
        """(N, D) float32, unit norm."""
        return np.asarray(self._index.reconstruct_n(0, len(self)))

    def search(self, embeddings: Embeddings, k: int = 8) -> tuple[FloatArray, IntArray]:
        """Find the nearest pictures of each query.

        Args:
            embeddings: (Q, D) of the queries; L2-normalised here.
            k: pictures for each query, at least 1; all there are if there are fewer.

        Returns:
            Cosine similarities (Q, k) in [-1, 1], nearest first, and rows (Q, k) of ``files``.

        Raises:
            ValueError: for another D than the index has, or embeddings that are NaN or zero.
        """
        check_count("k", k, 1)
        unit = UnitRows("embeddings", embeddings, _CHUNK)
        if unit.dim != self._index.d:
            raise ValueError(
                f"embeddings have {unit.dim} dimensions and the index {self._index.d}: embed the "
                "queries with the model that made the index"
            )
        similarities, rows = self._index.search(unit.hold(), min(k, len(self)))
        return np.clip(similarities, -1.0, 1.0), rows

    def paths(self, rows: Sequence[int] | IntArray) -> list[Path]:
        """Where the pictures of some rows lie."""
        return [self.root / self.files[int(row)] for row in rows]

    def save(self, folder: str | PathLike[str]) -> None:
        """Write ``embeddings.npy``, ``files.json`` and ``index.faiss``, each whole or not at all.

        The index comes last: where it is, the other two are.
        """
        folder = Path(folder)
        with written_whole(folder / _EMBEDDINGS) as file:
            np.save(file, self.embeddings)
        # As ASCII, which keeps also names that are no text in any encoding.
        text = json.dumps({"root": str(self.root), "files": self.files}, indent=1)
        with written_whole(folder / _FILES) as file:
            file.write(text.encode("ascii"))
        with written_whole(folder / _INDEX) as file:
            writer = faiss.PyCallbackIOWriter(file.write)  # type: ignore[attr-defined]
            faiss.write_index(self._index, writer)

    @classmethod
    def load(cls: type[_Self], folder: str | PathLike[str]) -> _Self:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if a file is damaged, or the index is of another count than the files.
        """
        folder = Path(folder)
        for name in (_INDEX, _FILES):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder} holds no {name}: give the folder of a training that has ended"
                )
        try:
            listed = json.loads((folder / _FILES).read_text(encoding="ascii"))
            files, root = listed["files"], listed["root"]
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{folder / _FILES} is no list of pictures: {error}") from error
        try:
            index = faiss.read_index(str(folder / _INDEX))
        except RuntimeError as error:
            raise ValueError(f"{folder / _INDEX} is no index of faiss's, or damaged") from error
        if index.ntotal != len(files):
            raise ValueError(
                f"{folder} holds {index.ntotal} embeddings in {_INDEX} and {len(files)} pictures "
                f"in {_FILES}: they are of two runs, train again with --overwrite"
            )
        loaded = cls.__new__(cls)
        loaded._set(index, files, root)
        return loaded

    def _set(self, index: Any, files: Sequence[str], root: str | PathLike[str]) -> None:
        self._index = index
        self.files = list(files)
        self.root = Path(root).absolute()
