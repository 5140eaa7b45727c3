"""Embeddings in one file, which every process writes a part of and reads without holding it."""

import mmap
import os
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pml_tacl.utils.errors import InputError

IN_MEMORY_UP_TO = 1_000_000
"""Images up to which a training keeps embeddings in memory: 2 GB of 512 numbers each."""
_TYPES: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype("<f4"),
    torch.float16: np.dtype("<f2"),
}


class EmbeddingFile:
    """Embeddings (N, D) in an .npy file on a disk that all processes see.

    Processes write different rows, so that none waits for another. Rows that nobody has written
    are zero. ``numpy.load(path, mmap_mode="r")`` reads it too.

    Args:
        path: of a file that :meth:`create` has made.

    Raises:
        ValueError: if the file holds something else.
        FileNotFoundError: if there is none.

    Attributes:
        rows: (N, D), float32 or float16, mapped from the file for reading and writing.
    """

    rows: npt.NDArray[Any]

    def __init__(self, path: str | PathLike[str]) -> None:
        try:
            self.rows = np.load(path, mmap_mode="r+")
        except (ValueError, EOFError) as error:
            raise InputError(f"{path} is no file of embeddings, or damaged: {error}") from error
        if self.rows.ndim != 2 or self.rows.dtype not in _TYPES.values():
            raise InputError(
                f"{path} must hold (N, D) float32 or float16, and holds {self.rows.dtype} of shape "
                f"{self.rows.shape}: give another file"
            )

    @classmethod
    def create(
        cls, path: str | PathLike[str], count: int, dim: int, dtype: torch.dtype = torch.float32
    ) -> "EmbeddingFile":
        """Make a file of zeros, in the place of one that may be there; one process does.

        It takes no room on the disk before rows are written, where the system can do so. Who has
        mapped a file that was there keeps it.

        Args:
            path: of the file; its folder is made.
            count: N.
            dim: D.
            dtype: torch.float32, or torch.float16 for half of the room.

        Raises:
            ValueError: for another dtype.
        """
        if dtype not in _TYPES:
            raise InputError(f"dtype must be torch.float32 or torch.float16, got {dtype}")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.tmp")
        made = np.lib.format.open_memmap(
            unfinished, mode="w+", dtype=_TYPES[dtype], shape=(count, dim)
        )
        del made
        os.replace(unfinished, path)
        return cls(path)

    def __len__(self) -> int:
        return len(self.rows)

    def write(self, start: int, rows: Tensor) -> None:
        """Write rows (n, D) of any type and device to the places from ``start`` on."""
        stop = start + len(rows)
        if rows.shape[1:] != self.rows.shape[1:] or not 0 <= start <= stop <= len(self):
            raise InputError(
                f"rows must fit into {self.rows.shape} from row {start} on, got {tuple(rows.shape)}"
            )
        self.rows[start:stop] = rows.detach().to("cpu", torch.float32).numpy()

    def flush(self) -> None:
        """Bring what was written to the disk, and let go of the memory that it takes here."""
        assert isinstance(self.rows, np.memmap)
        self.rows.flush()
        pages = getattr(self.rows, "_mmap", None)
        if pages is not None and hasattr(mmap, "MADV_DONTNEED"):
            pages.madvise(mmap.MADV_DONTNEED)

    def tensor(self) -> Tensor:
        """The file as a tensor (N, D) on the CPU; what is written to it is written there."""
        return torch.from_numpy(self.rows)
