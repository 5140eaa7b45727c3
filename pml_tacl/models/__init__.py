"""Models: a backbone with attention pooling."""

from pml_tacl.models.attention_embedder import AttentionEmbedder
from pml_tacl.models.attention_pooling import Embedder, EmbedderOutput
from pml_tacl.models.trunk import Trunk, TrunkOutput

__all__ = ["AttentionEmbedder", "Embedder", "EmbedderOutput", "Trunk", "TrunkOutput"]
