"""Words in messages."""


def counted(count: int, noun: str) -> str:
    """Return a number with its noun: "1 epoch", "2 epochs"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def verbed(count: int, noun: str, one: str, several: str) -> str:
    """Return a number with its noun and a verb: "1 file is", "2 files are"."""
    return f"{counted(count, noun)} {one if count == 1 else several}"
