"""Defaults for the trainer's optional arguments, taken from the recipe of the model."""

from collections.abc import Callable
from typing import Any

import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from pml_tacl.clustering import KMeansPseudoLabeler, PseudoLabeler
from pml_tacl.losses import AttentionConsistencyLoss, ContrastiveClusteringLoss
from pml_tacl.miners import AttentionConsistencyMiner
from pml_tacl.models import AttentionEmbedder
from pml_tacl.models.preprocessing import size_in_pixels
from pml_tacl.trainers.recipe import Recipe
from pml_tacl.transforms import BackgroundSwap, SiameseTransform
from pml_tacl.utils.errors import InputError
from pml_tacl.utils.words import counted

SCHEDULE = "trunk_scheduler_by_iteration"
_LEAST_IMAGES = 8


def check_enough(count: int) -> None:
    """Raise InputError if there are too few images to train with the defaults."""
    if count < _LEAST_IMAGES:
        raise InputError(
            f"dataset contains {counted(count, 'image')}, and training needs at "
            f"least {_LEAST_IMAGES} (a few thousand to be worth it): add images, or search without "
            "training (pml-tacl index)"
        )


def default_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return AdamW with the recipe's learning rates and weight decay."""
    rate = recipe.learning_rate
    if isinstance(model, AttentionEmbedder):
        groups: Any = model.parameter_groups(rate, head_lr=recipe.head_rate * rate)
    else:
        groups = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(groups, rate, weight_decay=recipe.weight_decay)


def default_schedule(optimizer: torch.optim.Optimizer, steps: int) -> OneCycleLR:
    """Return one cycle of learning rates over `steps`; the optimizer's rates are the maxima."""
    rates = [group["lr"] for group in optimizer.param_groups]
    rises = 0.1 if steps > 9 else 2 / (steps + 1)  # a rise of 1 step or more, or torch divides by 0
    return OneCycleLR(optimizer, rates, total_steps=steps + 1, pct_start=rises)


def default_losses(recipe: Recipe) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Return the default losses, and the miner that matches image pairs."""
    losses = {
        "metric_loss": MultiSimilarityLoss(),
        "clustering_loss": ContrastiveClusteringLoss(),
        "attention_loss": AttentionConsistencyLoss(recipe.attention_temperature),
    }
    return losses, {"attention_miner": AttentionConsistencyMiner()}


def default_transforms(
    model: nn.Module, image_size: Any
) -> tuple[Callable[[Any], tuple[Tensor, Tensor, Tensor]], Callable[[Any], Tensor]]:
    """Return the transform that makes two views, and the transform of the embedding pass."""
    if not isinstance(model, AttentionEmbedder):
        raise InputError(
            f"transform and eval_transform must be given for {type(model).__name__}: only an "
            "AttentionEmbedder has defaults for them"
        )
    size = size_in_pixels(model.data_config, image_size)
    return SiameseTransform.for_model(model, size), model.transform(image_size=size)


def default_labeler(recipe: Recipe, count: int) -> PseudoLabeler:
    """Return k-means with the recipe's number of clusters."""
    return KMeansPseudoLabeler(recipe.clusters(count))


def default_swap(recipe: Recipe, transform: Any) -> BackgroundSwap | None:
    """Return the background swap, or None if the transform does not track feature map cells."""
    offset = getattr(transform, "cell_offset", None)
    if recipe.swap == 0 or offset is None:
        return None
    return BackgroundSwap(recipe.swap, cell_offset=offset)
