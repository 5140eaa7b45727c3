"""Pseudo-labels from embeddings, and the cluster centroids that losses and miners use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pml_tacl.clustering.kmeans import (
        KMeansPseudoLabeler,
        PseudoLabeler,
        PseudoLabels,
        pseudo_labels_from,
    )

__all__ = ["KMeansPseudoLabeler", "PseudoLabeler", "PseudoLabels", "pseudo_labels_from"]


def __getattr__(name: str) -> Any:
    """Import k-means on first use: it imports faiss, which the losses do not need."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.kmeans"), name)
    globals()[name] = value
    return value
