"""Artificial embeddings, and two-level k-means."""

from typing import Any

import numpy as np

from pml_tacl import KMeansPseudoLabeler
from pml_tacl.clustering import pseudo_labels_from
from scaling_parts.config import PER_CENTROID, D


def rows(count: int, seed: int = 0) -> np.ndarray:
    """Return embeddings around random centres, about ten for each centre."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(1, count // 10), D), dtype=np.float32)
    found = rng.standard_normal((count, D), dtype=np.float32)
    found *= 0.8
    for start in range(0, count, 16384):
        part = found[start : start + 16384]
        part += centres[np.arange(start, start + len(part)) % len(centres)]
    return found


def two_level(embeddings: np.ndarray, clusters: int) -> Any:
    """Cluster by k-means on two levels; the work grows with the root of the number of clusters.

    Use it as a PseudoLabeler for many clusters:
    ``lambda embeddings, _: two_level(embeddings, 10**6)``.
    """
    coarse = KMeansPseudoLabeler(max(2, round(clusters**0.5)), max_points=PER_CENTROID * clusters)
    groups = coarse(embeddings).labels.numpy()
    labels, used = np.empty(len(groups), dtype=np.int64), 0
    for group in range(groups.max() + 1):
        members = np.flatnonzero(groups == group)
        share = max(1, round(clusters * len(members) / len(groups)))
        if share == 1 or share >= len(members):
            labels[members] = used if share == 1 else used + np.arange(len(members))
        else:
            labels[members] = used + KMeansPseudoLabeler(share)(embeddings[members]).labels.numpy()
        used = int(labels[members].max()) + 1
    return pseudo_labels_from(labels, embeddings)
