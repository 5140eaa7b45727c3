"""Images as a model sees them, with its attention over them."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pml_tacl.models import AttentionEmbedder
from pml_tacl.models.preprocessing import as_seen
from pml_tacl.utils.modes import evaluating
from pml_tacl.visualize._attention import _overlaid
from pml_tacl.visualize._inputs import normalised, to_pixels


def attention_of(
    model: AttentionEmbedder, views: Tensor, shown: Tensor | None = None
) -> tuple[Tensor, list[tuple[Image.Image, Image.Image]]]:
    """Embed images and draw the attention of the model over each.

    Args:
        model: on any device.
        views: (N, C, H, W), transformed for the model.
        shown: the same images in another size, to draw the attention over.

    Returns:
        Embeddings (N, D) on the CPU, the images as the model sees them, and the same images with
        the attention over them, each scaled to its own range.
    """
    device = next(model.parameters()).device
    with evaluating(model), torch.inference_mode():
        out = model.forward_features(views.to(device))
        offset = model.cell_offset((views.shape[-2], views.shape[-1]))
    maps = normalised(out.attention.float().cpu().numpy().astype(np.float64))
    seen = [
        to_pixels(view) for view in as_seen(views if shown is None else shown, model.data_config)
    ]
    overlays = [
        (Image.fromarray(pixels), Image.fromarray(_overlaid(pixels, single, offset)))
        for pixels, single in zip(seen, maps, strict=True)
    ]
    return out.embeddings.float().cpu(), overlays
