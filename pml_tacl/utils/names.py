"""Lists of names and paths for many files: one buffer of bytes instead of a Python object each."""

from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeVar, overload

import numpy as np
import numpy.typing as npt

_Item = TypeVar("_Item")
# Keeps every string, also names with undecodable bytes.
_CODING = ("utf-8", "surrogatepass")
_CHUNK = 16384


class _Column(Sequence[_Item]):
    """A read-only sequence that compares equal to any list or tuple of equal items."""

    @overload
    def __getitem__(self, index: int) -> _Item: ...

    @overload
    def __getitem__(self, index: slice) -> list[_Item]: ...

    def __getitem__(self, index: int | slice) -> _Item | list[_Item]:
        rows = range(len(self))[index]  # counts negative ones from the end, and raises IndexError
        return self._at(rows) if isinstance(rows, int) else [self._at(row) for row in rows]

    @abstractmethod
    def _at(self, row: int) -> _Item:
        """Return the item of a row in [0, N)."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Column | list | tuple):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self[:3]))
        return f"{type(self).__name__}([{shown}{', ...' if len(self) > 3 else ''}])"


class Names(_Column[str]):
    """Strings in one buffer of bytes, with 8 bytes more for each string.

    A list of Python strings takes about 60 bytes more for each string, and each process of a
    DataLoader copies the list as it reads it. This buffer is shared by the processes.

    Args:
        names: the strings.

    Example:
        >>> names = Names(["a.jpg", "b/c.jpg"])
        >>> names[1], names == ["a.jpg", "b/c.jpg"]
        ('b/c.jpg', True)
    """

    def __init__(self, names: Iterable[str]) -> None:
        text, ends = bytearray(), array("q", [0])
        for name in names:
            text += name.encode(*_CODING)
            ends.append(len(text))
        self._text = bytes(text)
        self._ends: npt.NDArray[np.int64] = np.frombuffer(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def _at(self, row: int) -> str:
        return self._text[self._ends[row] : self._ends[row + 1]].decode(*_CODING)

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _CHUNK):
            ends = self._ends[start : start + _CHUNK + 1].tolist()
            for first, last in pairwise(ends):
                yield self._text[first:last].decode(*_CODING)


class Paths(_Column[Path]):
    """Paths below one folder.

    Args:
        root: the folder.
        names: paths relative to it, with slashes.
    """

    def __init__(self, root: Path, names: Names) -> None:
        self._root, self._names = root, names

    def __len__(self) -> int:
        return len(self._names)

    def _at(self, row: int) -> Path:
        return self._root / self._names[row]

    def __iter__(self) -> Iterator[Path]:
        return (self._root / name for name in self._names)
