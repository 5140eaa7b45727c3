"""Data sets: rendered characters, folders of images, and benchmarks of metric learning."""

from typing import TYPE_CHECKING, Any

from pml_tacl.datasets.glyphs import Glyphs
from pml_tacl.datasets.image_files import ImageFiles, load_rgb

if TYPE_CHECKING:
    from pml_tacl.datasets.benchmarks import (
        CUB,
        Benchmark,
        Cars196,
        InShop,
        StanfordOnlineProducts,
    )

__all__ = [
    "CUB",
    "Benchmark",
    "Cars196",
    "Glyphs",
    "ImageFiles",
    "InShop",
    "StanfordOnlineProducts",
    "load_rgb",
]


def __getattr__(name: str) -> Any:
    # Only the benchmarks need PML.
    if name in __all__:
        from pml_tacl.datasets import benchmarks

        return getattr(benchmarks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
