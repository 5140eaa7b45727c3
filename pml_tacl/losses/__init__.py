from pml_tacl.losses.attention_consistency_loss import AttentionConsistencyLoss
from pml_tacl.losses.contrastive_clustering_loss import ContrastiveClusteringLoss

__all__ = ["AttentionConsistencyLoss", "ContrastiveClusteringLoss"]
