"""Files that are whole or not there."""

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
    """A binary file to write, which takes its name only once it is written and on the disk.

    A reader, also after a crash, sees the old file or the new one; if the block raises, the old
    one stays and nothing is left behind. Folders are made. Its mode is that of any new file, by
    the umask.
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
    """Write JSON atomically: a reader sees the old file or the new one, never half of it.

    NumPy's numbers are written as numbers; NaN and infinity, which JSON has not, as null.

    Raises:
        InputTypeError: for what JSON has no form for, naming where it is; nothing is written.
    """
    made = as_json(content, Path(path).stem)
    text = json.dumps(made, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        content = f"{text}\n".encode()
    except UnicodeEncodeError:  # the name of a file that is no text in any encoding
        content = f"{json.dumps(made, indent=2, allow_nan=False)}\n".encode()
    with atomic_write(path) as file:
        file.write(content)


def shown_name(name: str) -> str:
    """Return a file's name as text: bytes that are no text in any encoding as backslashes."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _sync_folder(folder: Path) -> None:
    """Make a file's new name safe from a loss of power, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
