"""Pictures that were readable when a training began, and no longer are."""

import logging

_LOGGER = logging.getLogger(__name__)


class Unreadable:
    """What was unreadable so far, each told once, up to a bound.

    Args:
        most: how many pictures are tolerated.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.known: set[str] = set()

    def add(self, trouble: str) -> None:
        """Note one line about a picture; OSError if there are too many."""
        if trouble in self.known:
            return
        self.known.add(trouble)
        count = len(self.known)
        if count > self.most:
            raise OSError(
                f"{count} pictures cannot be read, more than max_unreadable={self.most}: mend the "
                f"storage and resume, or raise it; the last is {trouble}"
            )
        _LOGGER.warning(
            "another picture takes the place of one (%d of at most %d): %s",
            count,
            self.most,
            trouble,
        )
