"""Atomic writing of files."""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from pml_tacl.utils.plain import as_json


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[Any]]:
    """Open a binary file that replaces ``path`` only after it is complete and synced to disk.

    Readers see either the old or the new file, also after a crash. If the block raises, the old
    file stays and the temporary file is deleted. Missing parent folders are created. The file mode
    follows the umask, as for any new file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        _sync_folder(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write JSON atomically.

    NumPy numbers are written as numbers; NaN and infinity, which JSON lacks, as null.

    Raises:
        InputTypeError: for a type that JSON does not support, with its place in the content;
            nothing is written.
    """
    made = as_json(content, Path(path).stem)
    text = json.dumps(made, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        content = f"{text}\n".encode()
    except UnicodeEncodeError:  # a file name with bytes that are not valid text
        content = f"{json.dumps(made, indent=2, allow_nan=False)}\n".encode()
    with atomic_write(path) as file:
        file.write(content)


def shown_name(name: str) -> str:
    """Return a file's name as text; bytes that are not valid text become backslash escapes."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _sync_folder(folder: Path) -> None:
    """Sync a folder, so that a renamed file survives a power loss, if the system supports it."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
