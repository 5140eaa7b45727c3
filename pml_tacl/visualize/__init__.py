"""Figures of the attention of a model, its retrieved images, and its training.

Every function returns a :class:`matplotlib.figure.Figure` that is independent of pyplot: it opens
no window, changes no backend, and does not have to be closed. A notebook shows the figure, and
:func:`save_figure` writes it. Images are RGB: PIL images, uint8, or floats in [0, 1], as
(N, H, W, 3), (N, 3, H, W) or a list of images of any sizes. An image that is still normalised for
a network raises ValueError.
"""

from pml_tacl.utils.errors import MissingPackageError

try:
    import matplotlib  # noqa: F401
except ImportError as error:
    raise MissingPackageError(
        'pml_tacl.visualize needs matplotlib: pip install "pml_tacl[examples]"'
    ) from error

from pml_tacl.visualize._attention import (
    attention_overlay,
    cross_attention_pair,
    similar_regions,
)
from pml_tacl.visualize._curves import recall_curve, training_curves
from pml_tacl.visualize._drawing import RIGHT_COLOUR, WRONG_COLOUR
from pml_tacl.visualize._figures import save_figure
from pml_tacl.visualize._gallery import retrieval_gallery

__all__ = [
    "RIGHT_COLOUR",
    "WRONG_COLOUR",
    "attention_overlay",
    "cross_attention_pair",
    "recall_curve",
    "retrieval_gallery",
    "save_figure",
    "similar_regions",
    "training_curves",
]
