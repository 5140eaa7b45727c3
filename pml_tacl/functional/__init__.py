"""Pure torch functions for the losses and attention, without pytorch-metric-learning."""

from pml_tacl.functional.background import border_similarity, covariance_pooling
from pml_tacl.functional.consistency import (
    attention_consistency,
    background_score,
    contrastive_clustering,
    cross_image_attention,
    sample_at_points,
    to_image,
)

__all__ = [
    "attention_consistency",
    "background_score",
    "border_similarity",
    "contrastive_clustering",
    "covariance_pooling",
    "cross_image_attention",
    "sample_at_points",
    "to_image",
]
