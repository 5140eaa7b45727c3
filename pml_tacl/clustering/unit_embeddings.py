"""L2-normalised embeddings, read from arrays, memory maps or tensors on any device."""

import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pml_tacl.utils.errors import InputError, InputTypeError
from pml_tacl.utils.neighbours import FloatArray, IntArray, flat_index

__all__ = ["Embeddings", "FloatArray", "IntArray", "UnitRows"]

Embeddings = Tensor | npt.NDArray[Any]


class UnitRows:
    """L2-normalised embeddings (N, D) that are read from their source on demand.

    Args:
        name: name of the argument, used in error messages.
        embeddings: array, memory map or tensor.
        chunk_size: number of embeddings in each slice of `chunks()`.
        index: (N,), the rows of `embeddings` that are used; None for all.
        check: check the embeddings now, with `check`.

    Raises:
        TypeError: if `embeddings` is neither a tensor nor an array, or not of real numbers.
        ValueError: if it is empty or not two-dimensional, or embeddings are NaN, infinite or
            zero.
    """

    def __init__(
        self,
        name: str,
        embeddings: Embeddings,
        chunk_size: int,
        index: IntArray | None = None,
        check: bool = True,
    ) -> None:
        if not isinstance(embeddings, Tensor | np.ndarray):
            raise InputTypeError(
                f"{name} must be a tensor or an array, got {type(embeddings).__name__}"
            )
        if not _is_real(embeddings):
            raise InputTypeError(f"{name} must be real numbers, got {embeddings.dtype}")
        if embeddings.ndim != 2 or 0 in embeddings.shape:
            raise InputError(f"{name} must be (N, D) and not empty, got {tuple(embeddings.shape)}")
        self.name = name
        self.source = embeddings
        self.index = index
        self.chunk_size = chunk_size
        self.dim = embeddings.shape[1]
        self._held: FloatArray | None = None
        if check:
            self.check()

    def check(self) -> float:
        """Read all embeddings and check them.

        Returns:
            Mean cosine distance of the embeddings to the direction of their mean.

        Raises:
            ValueError: if embeddings are NaN, infinite or zero.
        """
        not_finite = zero = 0
        total = np.zeros(self.dim)
        for chunk in self.chunks():
            rows = self._read(chunk)
            norms = np.sqrt(np.einsum("nd,nd->n", rows, rows))
            if not _ordinary(norms):
                largest = np.maximum(rows.max(axis=1), -rows.min(axis=1))
                not_finite += int((~np.isfinite(largest)).sum())
                zero += int((largest == 0).sum())
            if not not_finite + zero:
                total += _normalise(rows).sum(axis=0, dtype=np.float64)
        for bad, what, remedy in (
            (not_finite, "NaN or infinite", "look for NaN images or a diverged model"),
            (zero, "all zero", "check the model for a layer with zero output"),
        ):
            if bad:
                raise InputError(f"{bad} of {len(self)} rows of {self.name} are {what}: {remedy}")
        return 1.0 - float(np.linalg.norm(total)) / len(self)

    def __len__(self) -> int:
        return len(self.source) if self.index is None else len(self.index)

    def __getitem__(self, index: slice | IntArray) -> FloatArray:
        return _normalise(self._read(index)) if self._held is None else self._held[index]

    def chunks(self, count: int | None = None) -> Iterator[slice]:
        """Return slices that cover the first `count` embeddings, or all of them."""
        starts = range(0, len(self) if count is None else count, self.chunk_size)
        return (slice(start, start + self.chunk_size) for start in starts)

    def take(self, index: IntArray) -> FloatArray:
        """Return the embeddings at some indices, reading at most one chunk at a time."""
        taken = np.empty((len(index), self.dim), dtype=np.float32)
        for chunk in self.chunks(len(index)):
            taken[chunk] = self[index[chunk]]
        return taken

    def hold(self) -> FloatArray:
        """Load all embeddings into memory and return them."""
        if self._held is None:
            held = np.empty((len(self), self.dim), dtype=np.float32)
            for chunk in self.chunks():
                held[chunk] = self[chunk]
            self._held = held
        return self._held

    def nearest(self, centroids: FloatArray) -> IntArray:
        """Return the index (N,) of the centroid nearest to each embedding."""
        index = flat_index(centroids)
        labels = np.empty(len(self), dtype=np.int64)
        for chunk in self.chunks():
            labels[chunk] = index.search(self[chunk], 1)[1][:, 0]
        return labels

    def means(self, labels: IntArray, number: int) -> FloatArray:
        """Return the normalised means (number, D) of the members of each cluster."""
        sums = torch.zeros(number, self.dim, dtype=torch.float64)
        for chunk in self.chunks():
            member = np.flatnonzero(labels[chunk] >= 0)
            rows = torch.from_numpy(self[chunk][member])
            sums.index_add_(0, torch.from_numpy(labels[chunk][member]), rows.double())
        means = sums.numpy()
        # If the members cancel out, use the first one: their mean has no direction.
        for cluster in np.flatnonzero(np.linalg.norm(means, axis=1) < 1e-6):
            means[cluster] = self[np.flatnonzero(labels == cluster)[:1]][0]
        norms = np.linalg.norm(means, axis=1, keepdims=True)
        return np.asarray(means / norms, dtype=np.float32)

    def _read(self, index: slice | IntArray) -> FloatArray:
        source = self.source
        if self.index is not None:
            index = self.index[index]
        if isinstance(source, Tensor):
            where = index if isinstance(index, slice) else torch.from_numpy(index)
            rows = source[where].detach().cpu()
            if rows.dtype == torch.float64:
                return _as_float32(rows.numpy())
            return np.array(rows.float().numpy(), order="C")
        copied = _as_float32(source[index])
        if isinstance(source, np.memmap) and source.mode != "c":
            # Release the pages; otherwise they count as memory of this process.
            pages = getattr(source, "_mmap", None)
            if pages is not None and hasattr(mmap, "MADV_DONTNEED"):
                pages.madvise(mmap.MADV_DONTNEED)
        return copied


def _is_real(embeddings: Embeddings) -> bool:
    if isinstance(embeddings, Tensor):
        return not embeddings.is_complex()
    return embeddings.dtype.kind in "biuf"


def _as_float32(rows: npt.NDArray[Any]) -> FloatArray:
    """Copy rows as float32; rows beyond its range are scaled, because only directions matter."""
    if rows.dtype.kind == "f" and rows.dtype.itemsize > 4:
        largest = np.abs(rows).max(axis=1, keepdims=True)
        beyond = np.isfinite(largest) & ((largest > 1e30) | (largest < 1e-30)) & (largest > 0)
        if beyond.any():
            rows = np.where(beyond, rows / np.where(beyond, largest, 1), rows)
    return np.array(rows, dtype=np.float32, order="C")


def _ordinary(norms: FloatArray) -> bool:
    """Return whether no square underflows or overflows float32; False for NaN."""
    return bool(((norms > 1e-15) & (norms < 1e15)).all())


def _normalise(rows: FloatArray) -> FloatArray:
    """Divide rows by their norms, in place."""
    norms = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    if not _ordinary(norms):
        rows /= np.maximum(rows.max(axis=1), -rows.min(axis=1))[:, None]
        norms = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    rows /= norms[:, None]
    return rows
