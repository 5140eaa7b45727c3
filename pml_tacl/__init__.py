"""Image embeddings without labels: a plugin for pytorch-metric-learning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pml_tacl.clustering import KMeansPseudoLabeler
    from pml_tacl.evaluation import RetrievalCalculator
    from pml_tacl.losses import AttentionConsistencyLoss, ContrastiveClusteringLoss
    from pml_tacl.miners import AttentionConsistencyMiner, ContrastiveClusteringMiner
    from pml_tacl.models import AttentionEmbedder
    from pml_tacl.trainers import UnsupervisedTrainer
    from pml_tacl.transforms import BackgroundSwap, SiameseTransform

__version__ = "0.1.0"

# Names are imported on first use: a single loss then does not import faiss, timm or record-keeper.
_HOME_OF = {
    "AttentionConsistencyLoss": "losses",
    "AttentionConsistencyMiner": "miners",
    "AttentionEmbedder": "models",
    "ContrastiveClusteringLoss": "losses",
    "ContrastiveClusteringMiner": "miners",
    "KMeansPseudoLabeler": "clustering",
    "RetrievalCalculator": "evaluation",
    "SiameseTransform": "transforms",
    "BackgroundSwap": "transforms",
    "UnsupervisedTrainer": "trainers",
}

__all__ = [
    "AttentionConsistencyLoss",
    "AttentionConsistencyMiner",
    "AttentionEmbedder",
    "BackgroundSwap",
    "ContrastiveClusteringLoss",
    "ContrastiveClusteringMiner",
    "KMeansPseudoLabeler",
    "RetrievalCalculator",
    "SiameseTransform",
    "UnsupervisedTrainer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
