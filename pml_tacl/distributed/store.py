"""Embeddings in a memory-mapped file that all processes write and read."""

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
"""Largest data set, in images, whose embeddings a training keeps in memory (2 GB at D = 512)."""
_WRITTEN_AT_ONCE = 1 << 25  # bytes written before the memory of their pages is released
_TYPES: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype("<f4"),
    torch.float16: np.dtype("<f2"),
}


class EmbeddingFile:
    """Embeddings (N, D) in an .npy file on a disk that all processes can access.

    Processes write different rows and do not wait for each other. Rows that have not been written
    are zero. ``numpy.load(path, mmap_mode="r")`` also reads the file.

    Args:
        path: path of a file from :meth:`create`.

    Raises:
        ValueError: if the file contains anything else.
        FileNotFoundError: if the file does not exist.

    Attributes:
        rows: (N, D), float32 or float16, mapped from the file for reading and writing.
    """

    rows: npt.NDArray[Any]

    def __init__(self, path: str | PathLike[str]) -> None:
        try:
            self.rows = np.load(path, mmap_mode="r+")
        except (ValueError, EOFError) as error:
            raise InputError(f"{path} is damaged, or not a file of embeddings: {error}") from error
        self._held = 0  # bytes written whose pages are mapped
        if self.rows.ndim != 2 or self.rows.dtype not in _TYPES.values():
            raise InputError(
                f"{path} must contain (N, D) float32 or float16, and contains {self.rows.dtype} of "
                f"shape {self.rows.shape}: give another file"
            )

    @classmethod
    def create(
        cls, path: str | PathLike[str], count: int, dim: int, dtype: torch.dtype = torch.float32
    ) -> "EmbeddingFile":
        """Create a file of zeros, and replace an existing one. Only one process may call this.

        If the file system supports sparse files, the file uses disk space only for written rows.
        Processes that have mapped an existing file keep the old contents.

        Args:
            path: path of the file; its folder is created if needed.
            count: number of rows, N.
            dim: number of dimensions, D.
            dtype: torch.float32, or torch.float16 for half the size.

        Returns:
            The open file.

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
        """Write rows (n, D), of any dtype and device, starting at row ``start``.

        Raises:
            ValueError: if the rows do not fit into the file.
        """
        stop = start + len(rows)
        if rows.shape[1:] != self.rows.shape[1:] or not 0 <= start <= stop <= len(self):
            raise InputError(
                f"rows must fit into {self.rows.shape} from row {start} on, got {tuple(rows.shape)}"
            )
        self.rows[start:stop] = rows.detach().to("cpu", torch.float32).numpy()
        self._held += self.rows[start:stop].nbytes
        if self._held > _WRITTEN_AT_ONCE:
            self._release()  # the operating system writes the pages to the disk later

    def flush(self) -> None:
        """Write changes to the disk, and release the memory of the mapped pages."""
        assert isinstance(self.rows, np.memmap)
        self.rows.flush()
        self._release()

    def _release(self) -> None:
        self._held = 0
        pages = getattr(self.rows, "_mmap", None)
        if pages is not None and hasattr(mmap, "MADV_DONTNEED"):
            pages.madvise(mmap.MADV_DONTNEED)

    def tensor(self) -> Tensor:
        """Return the file as a tensor (N, D) on the CPU; writing to it changes the file."""
        return torch.from_numpy(self.rows)
