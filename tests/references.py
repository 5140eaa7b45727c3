"""The mathematics once more, as loops in float64 written straight from the formulas."""

import math
import os

import numpy as np
import torch
from hypothesis import settings

# The long run: HYPOTHESIS_EXAMPLES=2000 pytest tests/test_functional_properties.py
examples = settings(
    max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "20")),
    derandomize="HYPOTHESIS_EXAMPLES" not in os.environ,
    deadline=None,
)


def as_array(x):
    return x.detach().double().numpy()


def cosine(a, b):
    return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))


def cross_image_attention(first, other, temperature=None):
    """(H, W) attention of maps (C, H, W) seen against maps (C, H', W')."""
    _, height, width = first.shape
    attention = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            found = [
                cosine(first[:, y, x], other[:, v, u])
                for v in range(other.shape[1])
                for u in range(other.shape[2])
            ]
            if temperature is None:
                attention[y, x] = max(found)
            else:
                total = sum(math.exp(c / temperature) for c in found)
                attention[y, x] = temperature * (math.log(total) - math.log(len(found)))
    return attention


def sample(values, x, y):
    """Bilinear reading of (H, W) at (x, y) in [-1, 1], corners not aligned; None outside."""
    if not (abs(x) <= 1 and abs(y) <= 1):
        return None
    height, width = values.shape
    column = min(max(((x + 1) * width - 1) / 2, 0), width - 1)
    row = min(max(((y + 1) * height - 1) / 2, 0), height - 1)
    left, top = math.floor(column), math.floor(row)
    right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
    across, down = column - left, row - top
    upper = (1 - across) * values[top, left] + across * values[top, right]
    lower = (1 - across) * values[bottom, left] + across * values[bottom, right]
    return (1 - down) * upper + down * lower


def attention_consistency(first, second, points, i, j, weights=None, temperature=None):
    """One pair's loss: maps (N, C, H, W) and (N, C, H', W'), points (N, H * W, 2)."""
    seen = cross_image_attention(first[i], first[j], temperature)
    followed = cross_image_attention(second[i], first[j], temperature)
    total = count = 0.0
    for cell, (x, y) in enumerate(points[i]):
        value = sample(followed, x, y)
        if value is not None:
            weight = 1.0 if weights is None else weights[i, cell]
            total += weight * (seen.flatten()[cell] - value) ** 2
            count += weight
    return total / count if count > 0 else 0.0


def background_score(maps, labels, references, reference_labels, temperature=None):
    result = np.zeros((len(maps), *maps.shape[2:]))
    for i in range(len(maps)):
        others = [
            cross_image_attention(maps[i], references[j], temperature)
            for j in range(len(references))
            if reference_labels[j] >= 0 and reference_labels[j] != labels[i]
        ]
        if others:
            result[i] = sum(others) / len(others)
    return result


def normalise(x, p=2):
    return x / (np.abs(x) ** p).sum() ** (1 / p)


# Less is nearer; a similarity is negated. The distances normalise what they compare.
DISTANCES = {
    "cosine": lambda a, b: -cosine(a, b),
    "cosine cubed": lambda a, b: -(cosine(a, b) ** 3),
    "l1-normalised dot": lambda a, b: -float(np.dot(normalise(a, 1), normalise(b, 1))),
    "dot": lambda a, b: -float(np.dot(a, b)),
    "l2": lambda a, b: np.linalg.norm(normalise(a) - normalise(b)),
    "l2 squared": lambda a, b: np.linalg.norm(normalise(a) - normalise(b)) ** 2,
    "l1": lambda a, b: np.abs(normalise(a, 1) - normalise(b, 1)).sum(),
    "snr": lambda a, b: np.var(normalise(a) - normalise(b), ddof=1) / np.var(normalise(a), ddof=1),
    "euclidean": lambda a, b: np.linalg.norm(a - b),
}


def batch_means(embeddings, labels, normalised=True, p=2):
    """Centre of each label >= 0: the mean of its embeddings."""
    rows = [normalise(e, p) if normalised else e for e in embeddings]
    return {
        label: np.mean([r for r, y in zip(rows, labels, strict=True) if y == label], axis=0)
        for label in sorted({y for y in labels if y >= 0})
    }


def contrastive_clustering(embedding, label, centroids, num_negatives, margin, distance="cosine"):
    """One embedding's loss; ``centroids`` are by label."""
    measure = DISTANCES[distance]
    others = sorted(measure(embedding, c) for y, c in centroids.items() if y != label)
    nearest = others[:num_negatives]
    if not nearest:
        return 0.0
    own = measure(embedding, centroids[label])
    return max(0.0, own - sum(nearest) / len(nearest) + margin)


def grid_points(height, width, dtype=torch.float64):
    """(H * W, 2) coordinates (x, y) of the cells of a grid, row-major."""
    y = (2 * torch.arange(height, dtype=dtype) + 1) / height - 1
    x = (2 * torch.arange(width, dtype=dtype) + 1) / width - 1
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([columns, rows], dim=-1).view(-1, 2)
