"""Self-attention of a vision transformer as a map over its patches."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from pml_tacl.utils.checks import check_count
from pml_tacl.utils.errors import InputError

_ELSE = "give another block, or see the attention that forward_features returns"


@torch.no_grad()
def self_attention_map(model: nn.Module, images: Tensor, block: int = -1) -> Tensor:
    """Return the attention of the class token to each patch, averaged over heads.

    Without a class token, return the attention that each patch receives, averaged over all
    queries. Fused attention, which stores no weights, is switched off for this block and
    restored afterwards, also after an error. This runs the whole model again: use it to inspect
    a model, not during training.

    Args:
        model: a timm ViT, such as `Trunk.model`.
        images: (N, C, H, W), normalised.
        block: index of the block; negative counts from the end.

    Returns:
        (N, H', W') on the grid of the patches, non-negative, sums to 1.

    Raises:
        ValueError: if the model has no such block, or its attention weights cannot be read.
    """
    blocks = getattr(model, "blocks", None)
    if not hasattr(model, "forward_intermediates") or not isinstance(blocks, nn.Module):
        raise InputError(
            f"model must be a timm ViT, with blocks of self-attention, got {type(model).__name__}: "
            "see the attention that forward_features returns"
        )
    layers = list(blocks.children())
    check_count("block", block, -len(layers), most=len(layers) - 1)
    named = f"block={block} of {type(model).__name__}"
    attention = getattr(layers[block], "attn", None)
    dropout = getattr(attention, "attn_drop", None)
    if not isinstance(dropout, nn.Module):
        raise InputError(f"{named} has no readable self-attention: {_ELSE}")
    seen: list[Tensor] = []
    fused = getattr(attention, "fused_attn", False)
    # Only the dropout module receives the attention weights.
    hook = dropout.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        attention.fused_attn = False  # type: ignore[union-attr]
        maps = cast(Any, model).forward_intermediates(
            images, indices=[block % len(layers)], output_fmt="NCHW", intermediates_only=True
        )[0]
    finally:
        attention.fused_attn = fused  # type: ignore[union-attr]
        hook.remove()
    height, width = maps.shape[-2:]
    places = height * width
    if not seen or seen[0].ndim != 4 or seen[0].shape[-1] < places:
        raise InputError(f"{named} has no attention over all patches: {_ELSE}")
    weights = seen[0].float()
    # Some models add the class token only after this block.
    has_class = getattr(model, "cls_token", None) is not None and weights.shape[-1] > places
    rows = weights[:, :, 0] if has_class else weights.mean(2)
    onto_places = rows.mean(1)[:, -places:]
    return (onto_places / onto_places.sum(1, keepdim=True)).view(-1, height, width)
