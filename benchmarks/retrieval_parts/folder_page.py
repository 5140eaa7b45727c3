"""docs/results.md: retrieval on photographs, from the results of `retrieval.py folders`."""

from pathlib import Path


def write(results: Path, page: Path) -> None:
    """Write the page."""
    raise NotImplementedError
