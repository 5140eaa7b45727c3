"""What several drawings share: colours, strokes, embeddings and images to show."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from pml_tacl.datasets import Glyphs

BLUE, RED, GREEN, GREY, INK = "#1f77b4", "#d62728", "#2a9d5c", "#9aa0a6", "#333333"


def bare(axes: Axes, title: str = "") -> None:
    axes.set_axis_off()
    axes.set_aspect("equal")
    axes.set_title(title, fontsize=9, color=INK)


def arrow(axes: Axes, start: object, end: object, colour: str, **kwargs: object) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 10, "shrinkA": 4, "shrinkB": 4, **kwargs}
    axes.add_patch(FancyArrowPatch(start, end, color=colour, **style))


def on_circle(degrees: object) -> np.ndarray:
    radians = np.deg2rad(np.asarray(degrees, float))
    return np.stack([np.cos(radians), np.sin(radians)], axis=-1)


def clusters(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings (N, 2) on the unit circle, their clusters, and the centroids (K, 2)."""
    rng = np.random.default_rng(seed)
    angles = [20, 75, 150, 215, 300]
    labels = np.repeat(np.arange(5), 7)
    points = on_circle(np.repeat(angles, 7) + rng.normal(0, 11, 35))
    return points, labels, on_circle(angles)


def make_images(count: int, seed: int = 0) -> np.ndarray:
    glyphs = Glyphs("test", num_classes=count, images_per_class=2, size=96, seed=seed)
    return np.stack([np.asarray(glyphs[i][0]) for i in range(len(glyphs))])


def box(axes: Axes, x: float, y: float, text: str, colour: str = BLUE, width: float = 2.2) -> None:
    axes.add_patch(
        FancyBboxPatch((x, y - 0.45), width, 0.9, boxstyle="round,pad=0.06", fc="white", ec=colour)
    )
    axes.text(x + width / 2, y, text, ha="center", va="center", color=INK, fontsize=8)
