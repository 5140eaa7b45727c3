"""Nearest embeddings by L2 distance, in the same order as with exact arithmetic.

A matrix product computes distances fast, with an error below a known fraction of
``|q|^2 + |r|^2``. Distances that differ by more than this error are in the right order. Only
distances that are too close to each other or to the k-th one are recomputed in float64, from the
differences of the embeddings. First a common offset is subtracted, which keeps all distances and
makes the error small. Embeddings whose squares do not fit into a float are scaled by a power of
two.
"""

from collections.abc import Callable
from math import frexp

import faiss
import numpy as np
import torch
from torch import Tensor

from pml_tacl.utils.copies import IntArray, first_copies
from pml_tacl.utils.precision import full_float32

# Entries of the largest array in memory: of distances, and of differences of embeddings.
DISTANCE_ENTRIES = 2**26
DIFFERENCE_ENTRIES = 2**22
# Number of embeddings converted at once, and number sampled for the common offset.
BLOCK = 2**14
SAMPLE = 1024
# Exponents of the largest entry for which squares and their sums fit into float32.
EXPONENTS = (-30, 10)
# Below these, products may have been rounded to zero.
UNDERFLOW = {torch.float32: 2.0**-100, torch.float64: 2.0**-900}

Engine = Callable[[Tensor, int, Tensor], tuple[Tensor, Tensor]]


def faiss_engine(queries: Tensor, k: int, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Return squared distances (Q, k) and indices (Q, k) of the nearest embeddings, in float32."""
    distances, indices = faiss.knn(queries.cpu().numpy(), reference.cpu().numpy(), k)
    device = queries.device
    return torch.from_numpy(distances).to(device), torch.from_numpy(indices).to(device)


def torch_engine(queries: Tensor, k: int, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same as `faiss_engine` on any device, by a matrix product and topk."""
    squares = reference.square().sum(dim=1)
    parts = []
    with full_float32(queries.device):
        for rows in queries.split(max(1, DISTANCE_ENTRIES // len(reference))):
            distances = torch.addmm(squares, rows, reference.T, alpha=-2)
            values, indices = distances.topk(k, dim=1, largest=False)
            parts.append((values + rows.square().sum(dim=1, keepdim=True), indices))
    values, indices = (torch.cat(each) for each in zip(*parts, strict=True))
    return values, indices


class Frame:
    """Shift and scale of embeddings, which keep their distances up to a common factor.

    Args:
        query: (Q, D) float32 or float64, finite.
        reference: (R, D), likewise.

    Attributes:
        scale: a power of two, 1 unless squares would not fit into float32.
        offset: (D,) float64, the median of the scaled reference, or 0 if that is as good.
    """

    def __init__(self, query: Tensor, reference: Tensor) -> None:
        ends = (*query.aminmax(), *reference.aminmax())
        largest = max(abs(float(end)) for end in ends)
        exponent = frexp(largest)[1] if largest else 0
        fits = EXPONENTS[0] <= exponent <= EXPONENTS[1]
        self.scale = 1.0 if fits else 2.0 ** max(-1000, min(1000, -exponent))
        sample = reference[:: max(1, len(reference) // SAMPLE)].double() * self.scale
        middle = sample.median(dim=0).values
        spread = (sample - middle).square().sum(dim=1).median()
        self.offset = middle if middle.square().sum() > spread else torch.zeros_like(middle)

    def double(self, rows: Tensor) -> Tensor:
        """Return embeddings in this frame as float64."""
        return rows.double() * self.scale - self.offset

    def single(self, rows: Tensor) -> Tensor:
        """Return embeddings in this frame as float32, without a copy if nothing changes."""
        if rows.dtype == torch.float32 and self.scale == 1.0 and not self.offset.any():
            return rows
        moved = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
        for start in range(0, len(rows), BLOCK):
            moved[start : start + BLOCK] = self.double(rows[start : start + BLOCK])
        return moved


class Nearest:
    """Search for the nearest embeddings in a reference; equal distances are ordered by index.

    Args:
        query: (Q, D) float32 or float64, finite.
        reference: (R, D), likewise.
        engine: function that returns squared distances and indices of the nearest embeddings in
            float32.
    """

    def __init__(self, query: Tensor, reference: Tensor, engine: Engine) -> None:
        self.query, self.reference, self.engine = query, reference, engine
        self.frame = Frame(query, reference)
        self._query = self.frame.single(query)
        self._reference = self._query if query is reference else self.frame.single(reference)
        self.query_squares = _squares(self._query)
        self.reference_squares = _squares(self._reference)
        firsts = first_copies(reference.cpu().numpy())
        number = _number_among_copies(firsts)
        self._firsts = torch.from_numpy(firsts).to(reference.device)
        self._number = torch.from_numpy(number).to(reference.device)
        self._copies = int(number.max()) + 1

    def __call__(self, rows: Tensor, k: int) -> Tensor:
        """Return the indices (len(rows), k) of the nearest embeddings in the reference.

        Args:
            rows: indices into the query.
            k: number of neighbours, at most R.
        """
        # Of identical embeddings, the first k are enough.
        kept = None if self._copies <= k else torch.nonzero(self._number < k)[:, 0]
        count = len(self.reference) if kept is None else len(kept)
        looked_at = k + max(8, k // 4)
        if 2 * looked_at > count:
            return self._in_double(rows, k, kept)
        found, certain = self._in_single(rows, k, looked_at, kept)
        if not certain.all():
            found[~certain] = self._in_double(rows[~certain], k, kept)
        return found

    def _in_single(
        self, rows: Tensor, k: int, looked_at: int, kept: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return indices, and for each query whether they are certain to be the nearest."""
        reference = self._reference if kept is None else self._reference[kept]
        distances, indices = self.engine(self._query[rows], looked_at, reference)
        if kept is not None:
            indices = kept[indices]
        distances, squares = distances.double(), self.query_squares[rows][:, None]
        radius = self._radius(torch.float32, squares + self.reference_squares[indices])
        # |r| <= |q| + distance, which bounds the error of embeddings that were not returned.
        beyond = distances.amax(dim=1) - self._radius(torch.float32, 3 * squares[:, 0])
        beyond /= 1 + 2 * self._part(torch.float32)
        distances, radius, indices = self._ordered(rows, distances, radius, indices)
        return indices[:, :k], (distances + radius)[:, k - 1] < beyond

    def _in_double(self, rows: Tensor, k: int, kept: Tensor | None) -> Tensor:
        reference = torch.arange(len(self.reference), device=rows.device) if kept is None else kept
        found = []
        for part in rows.split(max(1, DISTANCE_ENTRIES // 8 // len(reference))):
            query = self.frame.double(self.query[part])
            squares = query.square().sum(dim=1, keepdim=True)
            distances = squares.new_empty(len(part), len(reference))
            radius = torch.empty_like(distances)
            for start in range(0, len(reference), BLOCK):
                block = self.frame.double(self.reference[reference[start : start + BLOCK]])
                sums = squares + block.square().sum(dim=1)
                distances[:, start : start + BLOCK] = sums - 2 * (query @ block.T)
                radius[:, start : start + BLOCK] = sums
            radius = self._radius(torch.float64, radius)
            edge = (distances + radius).kthvalue(k, dim=1, keepdim=True).values
            inside = distances - radius <= edge
            widest = int(inside.sum(dim=1).max())
            chosen = distances.masked_fill(~inside, torch.inf).topk(widest, largest=False).indices
            distances, radius = distances.gather(1, chosen), radius.gather(1, chosen)
            found.append(self._ordered(part, distances, radius, reference[chosen])[2][:, :k])
        return torch.cat(found)

    def _ordered(
        self, rows: Tensor, distances: Tensor, radius: Tensor, indices: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sort by distance, and equal distances by index.

        Distances that are too close for their order to be certain are recomputed exactly.
        """
        order = distances.argsort(dim=1)
        distances, radius, indices = (x.gather(1, order) for x in (distances, radius, indices))
        reached = (distances + radius).cummax(dim=1).values
        ahead = (distances - radius).flip(1).cummin(dim=1).values.flip(1)
        apart = torch.ones(len(rows), distances.shape[1] + 1, dtype=torch.bool, device=rows.device)
        apart[:, 1:-1] = ahead[:, 1:] > reached[:, :-1]
        row, column = torch.nonzero(~(apart[:, :-1] & apart[:, 1:]), as_tuple=True)
        if not len(row):
            return distances, radius, indices
        count = len(self.reference)
        pairs = rows[row] * count + self._firsts[indices[row, column]]
        pairs, back = pairs.unique(return_inverse=True)
        exact = self.exact(pairs // count, pairs % count)[back]
        distances[row, column], radius[row, column] = exact, self._part(torch.float64) * exact
        by_index = indices.argsort(dim=1)
        distances, radius, indices = (x.gather(1, by_index) for x in (distances, radius, indices))
        order = distances.argsort(dim=1, stable=True)
        return distances.gather(1, order), radius.gather(1, order), indices.gather(1, order)

    def exact(self, rows: Tensor, others: Tensor) -> Tensor:
        """Return squared distances (N,) of queries at rows (N,) to references at others (N,).

        They are float64, computed from differences, in the unit of ``query_squares``.
        """
        size = max(1, DIFFERENCE_ENTRIES // self.query.shape[1])
        found = [torch.empty(0, dtype=torch.float64, device=rows.device)]
        for row, other in zip(rows.split(size), others.split(size), strict=True):
            query = self.query[row].double() * self.frame.scale
            there = self.reference[other].double() * self.frame.scale
            found.append((query - there).square().sum(dim=1))
        return torch.cat(found)

    def _part(self, dtype: torch.dtype) -> float:
        """Return the largest error of a distance as a fraction of the sum of the squares."""
        return (self.query.shape[1] + 8) * torch.finfo(dtype).eps

    def _radius(self, dtype: torch.dtype, squares: Tensor) -> Tensor:
        return squares * self._part(dtype) + UNDERFLOW[dtype]


def _number_among_copies(firsts: IntArray) -> IntArray:
    """Return the number of copies before each embedding."""
    order = np.argsort(firsts, kind="stable")
    starts = np.flatnonzero(np.diff(firsts[order], prepend=-1))
    sizes = np.diff(starts, append=len(order))
    number = np.empty(len(order), dtype=np.int64)
    number[order] = np.arange(len(order)) - np.repeat(starts, sizes)
    return number


def _squares(rows: Tensor) -> Tensor:
    """Return squared norms (N,) in float64."""
    return torch.cat([part.double().square().sum(dim=1) for part in rows.split(BLOCK)])
