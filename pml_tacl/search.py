"""Index of images that is searched by their embeddings."""

import json
import os
from array import array
from collections.abc import Iterable, Sequence
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, TypeVar

import faiss
import numpy as np

from pml_tacl.clustering.unit_embeddings import Embeddings, FloatArray, IntArray, UnitRows
from pml_tacl.datasets.image_files import ImageFiles
from pml_tacl.utils.checks import check_count
from pml_tacl.utils.copies import first_copies
from pml_tacl.utils.errors import InputError
from pml_tacl.utils.files import atomic_write
from pml_tacl.utils.names import Names
from pml_tacl.utils.runs import INDEX

# Up to this size an exact search takes hundredths of a second, and a graph would not be faster.
FLAT_UP_TO = 50_000
# A graph takes 4 D + 270 bytes of memory for each image: 2.3 GB at this size with D = 512.
HNSW_UP_TO = 1_000_000
# Each part of a code has 256 codewords, and faiss needs about 39 images to train each of them.
IVFPQ_FROM = 10_000
_KINDS = ("auto", "flat", "hnsw", "ivfpq")
# A narrower search would get stuck in groups of near copies, such as the frames of a film.
_LINKS, _BUILD_EFFORT, _SEARCH_EFFORT = 32, 100, 256
_ROUNDING = 1e-6  # embeddings of copies may differ by this much in each number
_EMBEDDINGS, _FILES = "embeddings.npy", "files.json"
_CHUNK = 16384
_DIMS_A_BYTE = 8  # dimensions that one byte of a code encodes
_POINTS_A_LIST, _LISTS_SEARCHED, _RANKED_AGAIN = 64, 32, 200
_Self = TypeVar("_Self", bound="ImageIndex")


class Changes(NamedTuple):
    """Differences between a folder and an index, as sorted files relative to its root.

    Files in ``changed`` are in both, with another size or modification time.
    """

    added: list[str]
    changed: list[str]
    removed: list[str]


class ImageIndex:
    """Index for finding the images whose embeddings are most similar to those of a query.

    Similarity is the cosine of two embeddings.

    Args:
        embeddings: (N, D), array or tensor on any device; L2-normalised here.
        files: paths of the N images in the same order, relative to ``root``, each once.
        root: the folder that contains the images.
        kind: how the index is searched.

            - "flat" compares a query with every image.
            - "hnsw" searches a graph. It misses at most a few per cent of the neighbours and stays
              fast for millions of images.
            - "ivfpq" keeps a code of about D / 8 bytes per image in memory. It finds candidates by
              their codes and ranks them by their exact embeddings. These are read from the given
              array, which may be a memory map. Fewer than ``IVFPQ_FROM`` (10 000) images are too
              few to train codes, so the index is then flat.
            - "auto" is flat up to ``FLAT_UP_TO`` (50 000) images, hnsw up to ``HNSW_UP_TO``
              (1 000 000) and ivfpq above. The choice is made again when images are added or
              removed.

            Images with equal embeddings share one entry of the index, and a search finds all of
            them. In "hnsw", most embeddings that differ only by rounding share an entry too.
        exclude: patterns of files that :meth:`changes` ignores, see
            :class:`pml_tacl.datasets.ImageFiles`.
        fixed: True if the files were listed explicitly. :meth:`changes` then does not report new
            files.

    Attributes:
        files: the paths, as given: a sequence that compares equal to a list and takes less memory.
        root: as an absolute path; set it if the images have moved.

    Raises:
        ValueError: if embeddings are NaN, infinite or zero, their number differs from that of the
            files, a file is given twice, or the kind is unknown.

    Example:
        >>> import torch
        >>> index = ImageIndex(torch.eye(3), ["a.jpg", "b.jpg", "c/d.jpg"], "photos")
        >>> index.search(torch.eye(3)[[1]], k=1)  # similarities, and rows of index.files
        (array([[1.]], dtype=float32), array([[1]]))
    """

    files: Sequence[str]
    root: Path
    _index: Any
    _rows: "_Rows | None"  # unit embeddings (N, D), if _index holds only codes
    _entries: IntArray  # (N,), entry of each image in _index, which has each embedding once
    _firsts: tuple[IntArray, IntArray] | None  # the entries, and the first image of each
    _asked: str
    _stamps: IntArray  # (N, 2), size and modification time of each file; -1 if unknown
    _exclude: list[str]
    _fixed: bool

    def __init__(
        self,
        embeddings: Embeddings,
        files: Sequence[str],
        root: str | PathLike[str],
        *,
        kind: str = "auto",
        exclude: Sequence[str] = (),
        fixed: bool = False,
    ) -> None:
        if kind not in _KINDS:
            raise InputError(f"kind must be one of {', '.join(_KINDS)}, got {kind!r}")
        unit = _checked(embeddings, files)
        self._set(*_build(unit, _chosen(kind, len(unit))), files, root, kind)
        self._rows = unit if self.kind == "ivfpq" else None
        self._stamps = _stamps_of(self.root, self.files)
        self._exclude, self._fixed = [*exclude], fixed

    @classmethod
    def of(cls: type[_Self], images: ImageFiles, embeddings: Embeddings) -> _Self:
        """Index the images (N) of a folder by their embeddings (N, D), in the same order."""
        return cls(
            embeddings,
            images.names,
            images.root,
            exclude=images.exclude,
            fixed=images.listed is not None,
        )

    def __len__(self) -> int:
        return len(self.files)

    @property
    def kind(self) -> str:
        """Return the kind of the current index: "flat", "hnsw" or "ivfpq"."""
        if isinstance(self._index, faiss.IndexPreTransform):
            return "ivfpq"
        return "hnsw" if hasattr(self._index, "hnsw") else "flat"

    @property
    def embeddings(self) -> FloatArray:
        """Return all embeddings (N, D), float32, unit norm, in memory."""
        if self._rows is not None:
            return np.ascontiguousarray(self._rows[:])
        return np.asarray(self._index.reconstruct_n(0, self._index.ntotal))[self._entries]

    def embeddings_of(self, rows: Sequence[int] | IntArray) -> FloatArray:
        """Return the embeddings (M, D), with unit norm, of the images at some rows of ``files``."""
        if self._rows is not None:
            return np.ascontiguousarray(self._rows[np.asarray(rows)])
        return np.asarray(self._index.reconstruct_batch(self._entries[np.asarray(rows)]))

    def search(
        self, embeddings: Embeddings, k: int = 8, *, folder: str | None = None
    ) -> tuple[FloatArray, IntArray]:
        """Find the nearest images of each query.

        Args:
            embeddings: (Q, D) of the queries; L2-normalised here.
            k: number of images per query, at least 1; all images if there are fewer.
            folder: search only images in this folder or below it, relative to ``root``. Such a
                search is exact for every kind.

        Returns:
            Cosine similarities (Q, k) in [-1, 1], nearest image first, and rows (Q, k): the
            positions of these images in ``files``. Images with equal embeddings are in the order
            of ``files``.

        Raises:
            ValueError: if D differs from that of the index, embeddings are NaN or zero, or the
                folder has no indexed image.
        """
        check_count("k", k, 1)
        unit = UnitRows("embeddings", embeddings, _CHUNK)
        self._check_dim(unit)
        if folder is None:
            inside, wanted = np.arange(len(self)), min(k, self._index.ntotal)
            similarities, entries = self._look_up(unit.hold(), wanted)
            if (entries < 0).any():  # the graph search found fewer than k
                return self.search(embeddings, k, folder=".")
        else:
            inside = self.rows_in(folder)
            selected = np.unique(self._entries[inside])
            if self._rows is not None:
                wanted = min(k, len(selected))
                similarities, entries = self._look_through(unit.hold(), selected, wanted)
                return self._images(np.clip(similarities, -1.0, 1.0), entries, inside, k)
            chosen = faiss.SearchParameters(sel=faiss.IDSelectorBatch(selected))  # type: ignore
            flat = faiss.downcast_index(getattr(self._index, "storage", self._index))
            # PML loads faiss's extensions for torch, which hide the search method with params.
            search = getattr(flat, "search_numpy", flat.search)
            wanted = min(k, len(selected))
            similarities, entries = search(unit.hold(), wanted, params=chosen)
        return self._images(np.clip(similarities, -1.0, 1.0), entries, inside, k)

    def _look_up(self, queries: FloatArray, k: int) -> tuple[FloatArray, IntArray]:
        """Return similarities and entries (Q, k); candidates from codes are ranked exactly."""
        if self._rows is None:
            similarities, entries = self._index.search(queries, k)
            return similarities, entries
        candidates = min(_RANKED_AGAIN + 2 * k, self._index.ntotal)
        firsts = self._first_rows()
        similarities = np.full((len(queries), k), -np.inf, dtype=np.float32)
        entries = np.full((len(queries), k), -1, dtype=np.int64)
        step = max(1, _CHUNK // candidates)
        for start in range(0, len(queries), step):
            part = queries[start : start + step]
            found = self._index.search(part, candidates)[1]
            known, place = np.unique(found, return_inverse=True)
            exact = self._rows[firsts[np.maximum(known, 0)]]
            near = np.einsum("qd,qcd->qc", part, exact[place.reshape(found.shape)])
            near[found < 0] = -np.inf
            # Entries are in the order of the images, which decides ties.
            order = np.lexsort((found, -near))[:, :k]
            entries[start : start + step] = np.take_along_axis(found, order, axis=1)
            similarities[start : start + step] = np.take_along_axis(near, order, axis=1)
        return similarities, entries

    def _look_through(
        self, queries: FloatArray, selected: IntArray, k: int
    ) -> tuple[FloatArray, IntArray]:
        """Search the embeddings of some entries, given in ascending order, chunk by chunk."""
        assert self._rows is not None
        firsts = self._first_rows()[selected]
        best = faiss.ResultHeap(len(queries), k, keep_max=True)
        for start in range(0, len(firsts), _CHUNK):
            rows = self._rows[firsts[start : start + _CHUNK]]
            near, found = faiss.knn(
                queries, rows, min(k, len(rows)), metric=faiss.METRIC_INNER_PRODUCT
            )
            best.add_result(near, found + start)
        best.finalize()
        return best.D, selected[best.I]

    def _first_rows(self) -> IntArray:
        """Return the first image of each entry."""
        if self._firsts is None or self._firsts[0] is not self._entries:
            self._firsts = self._entries, np.unique(self._entries, return_index=True)[1]
        return self._firsts[1]

    def _images(
        self, similarities: FloatArray, entries: IntArray, inside: IntArray, k: int
    ) -> tuple[FloatArray, IntArray]:
        """Return the first k images of the entries found, limited to those inside a folder."""
        if len(inside) == self._index.ntotal == len(self):
            return similarities, entries
        k = min(k, len(inside))
        members = inside[np.argsort(self._entries[inside], kind="stable")]
        counts = np.bincount(self._entries[inside], minlength=self._index.ntotal)
        starts = np.cumsum(counts) - counts
        before = np.cumsum(counts[entries], axis=1) - counts[entries]
        taken = np.clip(k - before, 0, counts[entries]).ravel()  # images per entry, k per query
        number = np.arange(taken.sum()) - np.repeat(np.cumsum(taken) - taken, taken)
        rows = members[np.repeat(starts[entries.ravel()], taken) + number]
        return np.repeat(similarities.ravel(), taken).reshape(-1, k), rows.reshape(-1, k)

    def rows_in(self, folder: str) -> IntArray:
        """Return the rows (positions in ``files``) of the images in a folder or below it.

        The folder is relative to ``root``.

        Raises:
            ValueError: if there are none.
        """
        name = Path(folder).as_posix().rstrip("/")
        start = "" if name in ("", ".") else f"{name}/"
        rows = [row for row, file in enumerate(self.files) if file.startswith(start)]
        if not rows:
            there = sorted({file.rpartition("/")[0] or "." for file in self.files})
            named = ", ".join(there[:5]) + (", ..." if len(there) > 5 else "")
            raise InputError(
                f"folder={folder!r} contains no indexed image; the indexed folders are {named}"
            )
        return np.array(rows, dtype=np.int64)

    def paths(self, rows: Sequence[int] | IntArray) -> list[Path]:
        """Return the paths of the images at some rows of ``files``."""
        return [self.root / self.files[int(row)] for row in rows]

    def changes(self) -> Changes:
        """Return how the images under ``root`` differ from the indexed images.

        The pixels are not read.

        Raises:
            ValueError: if ``root`` is not a folder or contains no images.
        """
        if self._fixed:
            there = {file for file in self.files if (self.root / file).is_file()}
        else:
            there = {*ImageFiles(self.root, check=False, exclude=self._exclude).names}
        known = {file: row for row, file in enumerate(self.files)}
        both = sorted(there & known.keys())
        now = _stamps_of(self.root, both)
        differ = (now != self._stamps[[known[file] for file in both]]).any(axis=1)
        return Changes(
            sorted(there - known.keys()),
            [both[row] for row in np.flatnonzero(differ)],
            sorted(known.keys() - there),
        )

    def add(self, embeddings: Embeddings, files: Sequence[str]) -> None:
        """Add images, and replace those that are already in the index.

        Args:
            embeddings: (M, D), from the same model as the others; L2-normalised here.
            files: M files, relative to ``root``, each once.

        Raises:
            ValueError: as in the class, or if D differs. The index is then unchanged.
        """
        unit = _checked(embeddings, files)
        self._check_dim(unit)
        stamps = _stamps_of(self.root, files)
        given = set(files)
        kept = np.flatnonzero([file not in given for file in self.files])
        kind = _chosen(self._asked, len(kept) + len(unit))
        if kind == self.kind == "ivfpq":  # train new codes, and find copies among all images
            assert self._rows is not None
            self._rebuild(_Joined(_Chosen(self._rows, kept), unit), kind)
        elif kind == self.kind and len(kept) == len(self):
            entries = _add(self._index, unit)
            self._entries = np.concatenate([self._entries, entries])
        else:
            self._rebuild(np.concatenate([self.embeddings[kept], unit.hold()]), kind)
        self.files = Names(chain((self.files[row] for row in kept.tolist()), files))
        self._stamps = np.concatenate([self._stamps[kept], stamps])

    def remove(self, files: Sequence[str]) -> None:
        """Remove images, and rebuild the index: nodes cannot be removed from an hnsw graph.

        Raises:
            ValueError: if one of them is not in the index, or none would be left.
        """
        gone = set(files)
        if unknown := sorted(gone - set(self.files)):
            raise InputError(f"files: {unknown[0]!r} is not in the index")
        if not gone:
            return
        kept = np.flatnonzero([file not in gone for file in self.files])
        if not len(kept):
            raise InputError("files are all images of the index: delete the index instead")
        kind = _chosen(self._asked, len(kept))
        rows = self.embeddings if self._rows is None or kind != "ivfpq" else self._rows
        self._rebuild(_Chosen(rows, kept), kind)
        self.files = Names(self.files[row] for row in kept.tolist())
        self._stamps = self._stamps[kept]

    def _rebuild(self, rows: "_Rows", kind: str) -> None:
        index, self._entries = _build(rows, kind)
        self._index, self._rows = index, rows if kind == "ivfpq" else None

    def save(self, folder: str | PathLike[str]) -> None:
        """Write ``embeddings.npy``, ``files.json`` and ``index.faiss`` atomically.

        The index is written last, so if it exists, the other two exist too.
        """
        folder = Path(folder)
        with atomic_write(folder / _EMBEDDINGS) as file:
            if self._rows is None:
                np.save(file, self.embeddings)
            else:
                _save_in_parts(file, self._rows)
        listed: dict[str, Any] = {"root": str(self.root), "kind": self._asked}
        listed["files"] = Names(self.files)
        if self._exclude:
            listed["exclude"] = self._exclude
        if self._fixed:
            listed["fixed"] = True
        if self._index.ntotal < len(self):
            listed["entries"] = self._entries
        with atomic_write(folder / _FILES) as file:
            _save_columns(file, {**listed, "stamps": self._stamps})
        with atomic_write(folder / INDEX) as file:
            faiss.write_index(self._index, faiss.PyCallbackIOWriter(file.write))  # type: ignore

    @classmethod
    def load(cls: type[_Self], folder: str | PathLike[str]) -> _Self:
        """Read an index that :meth:`save` wrote.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if a file is damaged, or the numbers of embeddings and files differ.
        """
        folder = Path(folder)
        for name in (INDEX, _FILES):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder} contains no {name}: give the folder of a run that train or "
                    "index wrote"
                )
        try:
            listed = json.loads((folder / _FILES).read_text(encoding="ascii"))
            files, root = Names(listed.pop("files")), listed["root"]
            kind = listed.get("kind", "auto")
            unknown = [-1, -1]
            stamps = np.full((len(files), 2), -1, dtype=np.int64)
            if "stamps" in listed:
                known = (one or unknown for one in listed.pop("stamps"))
                flat = np.fromiter(chain.from_iterable(known), dtype=np.int64)
                stamps = flat.reshape(-1, 2)
            exclude, fixed = [*listed.get("exclude", [])], bool(listed.get("fixed"))
            entries = np.array(listed.get("entries", range(len(files))), dtype=np.int64)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{folder / _FILES} is not a list of images: {error}") from error
        try:
            index = faiss.read_index(str(folder / INDEX))
        except RuntimeError as error:
            raise InputError(f"{folder / INDEX} is not a faiss index, or is damaged") from error
        complete = np.array_equal(np.unique(entries), np.arange(index.ntotal))
        if not complete or not len(entries) == len(files) == len(stamps):
            raise InputError(
                f"{INDEX} and {_FILES} in {folder} do not fit together ({index.ntotal} "
                f"embeddings, {len(files)} images): train and index again"
            )
        loaded = cls.__new__(cls)
        loaded._set(index, entries, files, root, kind)
        loaded._stamps = stamps
        loaded._exclude, loaded._fixed = exclude, fixed
        if loaded.kind == "ivfpq":
            rows = _mapped(folder / _EMBEDDINGS)
            if rows.shape != (len(files), index.d):
                raise InputError(
                    f"{folder / _EMBEDDINGS} has the shape {rows.shape} and must have "
                    f"{(len(files), index.d)}: train and index again"
                )
            loaded._rows = rows
        return loaded

    def _set(
        self,
        index: Any,
        entries: IntArray,
        files: Sequence[str],
        root: str | PathLike[str],
        kind: str,
    ) -> None:
        self._index, self._entries, self._asked = index, entries, kind
        self._rows = self._firsts = None
        self.files = files if isinstance(files, Names) else Names(files)
        self.root = Path(root).absolute()

    def _check_dim(self, unit: UnitRows) -> None:
        if unit.dim != self._index.d:
            raise InputError(
                f"embeddings have {unit.dim} dimensions and the index {self._index.d}: embed "
                "with the model that made the index"
            )


def _checked(embeddings: Embeddings, files: Sequence[str]) -> UnitRows:
    unit = UnitRows("embeddings", embeddings, _CHUNK)
    if len(files) != len(unit):
        raise InputError(
            f"files must have one entry for each of the {len(unit)} embeddings, got {len(files)}"
        )
    hashes = np.sort(np.fromiter(map(hash, files), dtype=np.int64, count=len(files)))
    if (hashes[1:] == hashes[:-1]).any() and len(set(files)) != len(files):
        raise InputError("files must contain each image once, but some occur twice")
    return unit


def _chosen(kind: str, count: int) -> str:
    if kind == "auto":
        kind = "flat" if count <= FLAT_UP_TO else "hnsw" if count <= HNSW_UP_TO else "ivfpq"
    return "flat" if kind == "ivfpq" and count < IVFPQ_FROM else kind


class _Rows(Protocol):
    """Unit embeddings (N, D) that are read in parts."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> FloatArray: ...


class _Chosen:
    """Selection of rows, in ascending order."""

    def __init__(self, rows: _Rows, index: IntArray) -> None:
        self.rows, self.index = rows, index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: slice | IntArray) -> FloatArray:
        return self.rows[self.index[index]]


class _Held:
    """Entries of an index, as rows."""

    def __init__(self, index: Any) -> None:
        self.index = index

    def __len__(self) -> int:
        return int(self.index.ntotal)

    def __getitem__(self, index: IntArray) -> FloatArray:
        return np.asarray(self.index.reconstruct_batch(index))


class _Joined:
    """Concatenation of two sets of rows."""

    def __init__(self, rows: _Rows, others: _Rows) -> None:
        self.rows, self.others = rows, others

    def __len__(self) -> int:
        return len(self.rows) + len(self.others)

    def __getitem__(self, index: slice | IntArray) -> FloatArray:
        if isinstance(index, slice):
            index = np.arange(*index.indices(len(self)))
        known = index < len(self.rows)
        if not known.any():
            return self.others[index - len(self.rows)]
        if known.all():
            return self.rows[index]
        first, second = self.rows[index[known]], self.others[index[~known] - len(self.rows)]
        taken = np.empty((len(index), first.shape[1]), dtype=np.float32)
        taken[known], taken[~known] = first, second
        return taken


def _dim(rows: _Rows) -> int:
    return int(rows[:1].shape[1])


def _build(rows: _Rows, kind: str) -> tuple[Any, IntArray]:
    """Return an index that holds each distinct row once, and the entry of each row."""
    dim = _dim(rows)
    index: Any = faiss.IndexFlatIP(dim)
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, _LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = _BUILD_EFFORT, _SEARCH_EFFORT
    if kind == "ivfpq":
        firsts = first_copies(rows)
        fresh = np.flatnonzero(firsts == np.arange(len(rows)))
        if len(fresh) >= IVFPQ_FROM:
            index = _trained(rows, fresh)
        for start in range(0, len(fresh), _CHUNK):
            index.add(rows[fresh[start : start + _CHUNK]])
        return index, np.searchsorted(fresh, firsts)
    return index, _add(index, rows)


def _trained(rows: _Rows, fresh: IntArray) -> Any:
    """Train an empty index of codes on a sample of rows.

    A random rotation comes first. It pads D to a multiple of the code size, and distributes the
    variance evenly over the parts of a vector, each of which becomes one byte of the code.
    """
    dim, count = _dim(rows), len(fresh)
    code = -(-dim // _DIMS_A_BYTE)
    lists = min(round(4 * count**0.5), count // 39)
    index: Any = faiss.index_factory(
        dim, f"RR{code * _DIMS_A_BYTE},IVF{lists},PQ{code}", faiss.METRIC_INNER_PRODUCT
    )
    size = min(count, max(_POINTS_A_LIST * lists, 256 * 64))
    chosen = np.random.default_rng(0).choice(count, size, replace=False)
    points = np.empty((size, dim), dtype=np.float32)
    where = fresh[np.sort(chosen)]  # sorted, so that a memory map is read in order
    for start in range(0, size, _CHUNK):
        points[start : start + _CHUNK] = rows[where[start : start + _CHUNK]]
    inverted: Any = faiss.downcast_index(faiss.extract_index_ivf(index))
    inverted.pq.cp.niter = 10  # as for the lists; enough, since candidates are ranked again
    # This takes most of the time and serves searches by Hamming distance, which are not used.
    inverted.do_polysemous_training = False
    index.train(points)
    inverted.nprobe = min(lists, _LISTS_SEARCHED)
    return index


def _save_in_parts(file: IO[Any], rows: _Rows) -> None:
    """Write rows in the format of ``np.save``, in chunks."""
    header = {"descr": "<f4", "fortran_order": False, "shape": (len(rows), _dim(rows))}
    np.lib.format.write_array_header_1_0(file, header)
    for start in range(0, len(rows), _CHUNK):
        file.write(np.ascontiguousarray(rows[start : start + _CHUNK], dtype="<f4").data)


def _mapped(path: Path) -> FloatArray:
    """Return a memory map of the embeddings that :meth:`ImageIndex.save` wrote."""
    try:
        rows = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: give the folder of a whole index") from None
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{path} is not an array, or damaged: {error}") from error
    return np.asarray(rows) if rows.ndim != 2 else rows


def _add(index: Any, rows: _Rows) -> IntArray:
    """Add the rows that an index does not contain, and return the entry of each row."""
    known = int(index.ntotal)
    # Many copies reduce the recall of a graph, also if they differ by rounding.
    tolerance = _ROUNDING if hasattr(index, "hnsw") else 0.0
    firsts = first_copies(_Joined(_Held(index), rows), tolerance)[known:]
    fresh = firsts == np.arange(known, known + len(rows))
    new = np.flatnonzero(fresh)
    for start in range(0, len(new), _CHUNK):
        index.add(rows[new[start : start + _CHUNK]])
    of_fresh = known + np.cumsum(fresh) - 1
    inside = firsts < known
    return np.where(inside, firsts, of_fresh[np.where(inside, 0, firsts - known)])


def _stamps_of(root: Path, files: Iterable[str]) -> IntArray:
    """Return size and modification time (N, 2), which change if an image is edited."""
    stamps, top = array("q"), os.fspath(root)
    for file in files:
        try:
            found = os.stat(os.path.join(top, file))
            stamps.extend((found.st_size, found.st_mtime_ns))
        except (OSError, ValueError):
            stamps.extend((-1, -1))
    return np.array(stamps, dtype=np.int64).reshape(-1, 2)


def _save_columns(file: IO[Any], columns: dict[str, Any]) -> None:
    """Write a JSON object, with names and arrays in chunks."""

    def write(text: str) -> None:
        file.write(text.encode("ascii"))  # with escapes, which also keep undecodable bytes

    for number, (name, value) in enumerate(columns.items()):
        write(f'{"," if number else "{"}\n "{name}": ')
        if not isinstance(value, Names | np.ndarray):
            write(json.dumps(value))
            continue
        for start in range(0, len(value), _CHUNK):
            part: Any = value[start : start + _CHUNK]
            if isinstance(part, np.ndarray):
                part = [None if one == [-1, -1] else one for one in part.tolist()]
            text = json.dumps(part, separators=(",\n  ", ": "))
            write(("," if start else "[") + f"\n  {text[1:-1]}")
        write("\n ]" if len(value) else "[]")
    write("\n}\n")
