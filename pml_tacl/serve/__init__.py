"""Local web page that searches a run: drop or choose an image to see similar images."""

from pml_tacl.serve._searcher import RunSearcher
from pml_tacl.serve._server import MAX_UPLOAD, SearchServer

__all__ = ["MAX_UPLOAD", "RunSearcher", "SearchServer"]
