"""Versions of installed packages."""

import sys
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = (
    "pml_tacl",
    "pytorch-metric-learning",
    "torch",
    "torchvision",
    "timm",
    "faiss-cpu",
    "record-keeper",
)


def versions() -> dict[str, str]:
    """Return the versions of Python, this package and its core dependencies."""
    found = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found
