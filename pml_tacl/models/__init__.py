"""Models: backbones, their embeddings, and the projection used for retrieval."""

from pml_tacl.models.attention_embedder import AttentionEmbedder
from pml_tacl.models.attention_pooling import Embedder, EmbedderOutput
from pml_tacl.models.projection import Projection
from pml_tacl.models.trunk import Trunk, TrunkOutput

__all__ = [
    "AttentionEmbedder",
    "Embedder",
    "EmbedderOutput",
    "Projection",
    "Trunk",
    "TrunkOutput",
]
