"""Building of models for the commands."""

from typing import Any

from pml_tacl.models import AttentionEmbedder
from pml_tacl.models.weights import fixed_size
from pml_tacl.trainers.recipe import PRETRAINED, SCRATCH


def sized_model(
    name: str,
    weights: bool | str,
    image_size: int | tuple[int, int] | None = None,
    **settings: Any,
) -> AttentionEmbedder:
    """Build a model for images of a given size, including transformers with a fixed input size.

    Args:
        name: timm name.
        weights: `pretrained` of :class:`AttentionEmbedder`.
        image_size: side or (height, width) in pixels; None for the model's own size.
        **settings: further arguments of :class:`AttentionEmbedder`.

    Raises:
        InputError: for an unknown name, or a size that the model does not support.
    """
    if image_size is not None:
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if fixed_size(name) not in (None, size):
            settings["img_size"] = size
    return AttentionEmbedder(name, weights, **settings)


def training_model(config: dict[str, Any], weights: bool | str) -> AttentionEmbedder:
    """Build the model for `pml-tacl train`.

    Args:
        config: "backbone", "weights", "image_size", "embedding_dim" and "freeze_batchnorm" of the
            run.
        weights: `pretrained` of :class:`AttentionEmbedder`; False on resume, where the weights
            come from a checkpoint.
    """
    scratch = config["weights"] is False
    rule = SCRATCH if scratch else PRETRAINED
    frozen, size = config["freeze_batchnorm"], config["image_size"]
    model = sized_model(
        config["backbone"],
        weights,
        tuple(size) if isinstance(size, list | tuple) else size,
        embedding_dim=config["embedding_dim"],
        pooling=rule.pooling,
        freeze_batchnorm=rule.freeze_batchnorm if frozen is None else frozen,
    )
    model.from_scratch = scratch
    return model
