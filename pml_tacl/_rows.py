"""Rows of embeddings, read in chunks from arrays, memory maps or tensors on any device."""

from collections.abc import Iterator
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
Embeddings = Tensor | npt.NDArray[Any]


def check_count(name: str, value: object, least: int, alternative: str = "") -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        also = f" {alternative}" if alternative else ""
        raise ValueError(f"{name} must be an integer of at least {least}{also}, got {value!r}")


def check_embeddings(name: str, embeddings: Embeddings) -> None:
    if not isinstance(embeddings, Tensor | np.ndarray):
        raise TypeError(f"{name} must be a tensor or an array, got {type(embeddings).__name__}")
    if embeddings.ndim != 2 or 0 in embeddings.shape:
        raise ValueError(
            f"{name} must be (rows, dimensions) and not empty, got {tuple(embeddings.shape)}"
        )


def chunks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))


def rows_of(embeddings: Embeddings, index: slice | IntArray) -> FloatArray:
    if isinstance(embeddings, Tensor):
        where = index if isinstance(index, slice) else torch.from_numpy(index)
        embeddings = embeddings[where].detach().to("cpu", torch.float32).numpy()
        return np.array(embeddings, dtype=np.float32, order="C")
    return np.array(embeddings[index], dtype=np.float32, order="C")


def unit_rows(embeddings: Embeddings, index: slice | IntArray) -> FloatArray:
    rows = rows_of(embeddings, index)
    # Largest entry first, so that tiny and huge rows neither underflow nor overflow.
    rows /= np.maximum(rows.max(axis=1), -rows.min(axis=1))[:, None]
    rows /= np.sqrt(np.einsum("nd,nd->n", rows, rows))[:, None]
    return rows


def check_rows(name: str, embeddings: Embeddings, chunk_size: int) -> float:
    """Raise for rows without a direction; return the mean cosine distance to the mean."""
    not_finite = zero = 0
    total = np.zeros(embeddings.shape[1])
    for chunk in chunks(len(embeddings), chunk_size):
        rows = rows_of(embeddings, chunk)
        finite = np.isfinite(rows).all(axis=1)
        nonzero = rows.any(axis=1)
        not_finite += int((~finite).sum())
        zero += int((~nonzero).sum())
        if not not_finite + zero:
            total += unit_rows(rows, slice(None)).sum(axis=0, dtype=np.float64)
    for bad, what, remedy in (
        (not_finite, "NaN or infinite", "look for NaN images or a diverged model"),
        (zero, "all zero", "they have no direction, look for a dead layer"),
    ):
        if bad:
            raise ValueError(f"{bad} of {len(embeddings)} rows of {name} are {what}: {remedy}")
    return 1.0 - float(np.linalg.norm(total)) / len(embeddings)


def nearest(
    embeddings: Embeddings, centroids: FloatArray, chunk_size: int
) -> tuple[IntArray, FloatArray]:
    """Index of and cosine to the nearest centroid of each row, chunk by chunk."""
    index = faiss.IndexFlatIP(centroids.shape[1])
    index.add(centroids)
    labels = np.empty(len(embeddings), dtype=np.int64)
    cosines = np.empty(len(embeddings), dtype=np.float32)
    for chunk in chunks(len(embeddings), chunk_size):
        found, closest = index.search(unit_rows(embeddings, chunk), 1)
        cosines[chunk], labels[chunk] = found[:, 0], closest[:, 0]
    return labels, cosines


def means_of(labels: IntArray, embeddings: Embeddings, number: int, chunk_size: int) -> FloatArray:
    """Normalised means of the normalised members of each cluster: (number, D)."""
    sums = torch.zeros(number, embeddings.shape[1], dtype=torch.float64)
    for chunk in chunks(len(labels), chunk_size):
        clustered = labels[chunk] >= 0
        rows = unit_rows(embeddings, chunk)[clustered]
        members = torch.from_numpy(labels[chunk][clustered])
        sums.index_add_(0, members, torch.from_numpy(rows).double())
    means = sums.numpy()
    norms = np.linalg.norm(means, axis=1)
    # Members that cancel out have no mean direction: their first member stands for them.
    for cluster in np.flatnonzero(norms < 1e-6):
        first = np.flatnonzero(labels == cluster)[:1]
        means[cluster] = unit_rows(embeddings, first)[0]
        norms[cluster] = np.linalg.norm(means[cluster])
    return np.asarray(means / norms[:, None], dtype=np.float32)
