"""Data sets: rendered characters that need no download, and folders of pictures."""

from pml_tacl.datasets.glyphs import Glyphs

__all__ = ["Glyphs"]
