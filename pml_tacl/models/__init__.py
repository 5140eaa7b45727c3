from pml_tacl.models.attention_embedder import AttentionEmbedder, EmbedderOutput

__all__ = ["AttentionEmbedder", "EmbedderOutput"]
