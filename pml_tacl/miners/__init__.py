from pml_tacl.miners.attention_consistency_miner import AttentionConsistencyMiner
from pml_tacl.miners.contrastive_clustering_miner import ContrastiveClusteringMiner

__all__ = ["AttentionConsistencyMiner", "ContrastiveClusteringMiner"]
