"""A loader's process that was lost, told in one line."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lost_workers_named() -> Iterator[None]:
    """Turn torch's error about a killed loader's process into an OSError that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise ChildProcessError(
            f"a process that reads pictures was lost ({reason}), perhaps for want of memory: "
            "resume, with smaller dataloader_num_workers if it happens again"
        ) from error
