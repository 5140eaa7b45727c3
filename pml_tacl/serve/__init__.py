"""A local page that searches a run: drop an image or choose one, and see what is like it."""

from pml_tacl.serve._searcher import RunSearcher
from pml_tacl.serve._server import MAX_UPLOAD, SearchServer

__all__ = ["MAX_UPLOAD", "RunSearcher", "SearchServer"]
