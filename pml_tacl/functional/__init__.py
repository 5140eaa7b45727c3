"""The mathematics as pure functions of torch; nothing here imports pytorch-metric-learning."""

from pml_tacl.functional.background import border_similarity, covariance_pooling
from pml_tacl.functional.consistency import (
    attention_consistency,
    commonness,
    contrastive_clustering,
    cross_image_attention,
    sample_at_points,
    to_picture,
)

__all__ = [
    "attention_consistency",
    "border_similarity",
    "commonness",
    "contrastive_clustering",
    "covariance_pooling",
    "cross_image_attention",
    "sample_at_points",
    "to_picture",
]
