"""Two views of an image with tracked points, and the swap of backgrounds."""

from pml_tacl.transforms.background_swap import BackgroundSwap, SwapOutput, cell_weights
from pml_tacl.transforms.siamese import SiameseTransform

__all__ = ["BackgroundSwap", "SiameseTransform", "SwapOutput", "cell_weights"]
