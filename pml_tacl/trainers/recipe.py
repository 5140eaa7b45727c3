"""The defaults of a training, in one place: how fast, how long, and what the losses weigh."""

from dataclasses import dataclass, field

from torch import nn

from pml_tacl.clustering.kmeans import auto_clusters


@dataclass(frozen=True)
class Recipe:
    """Settings of a training that follow from where the network begins.

    `UnsupervisedTrainer`, the command line and `benchmarks/retrieval.py` take their defaults from
    here. Chosen on validation, see docs/results.md.

    Attributes:
        pooling: of the `AttentionEmbedder`.
        learning_rate: of the trunk, at its highest.
        head_rate: factor on it for the embedder's trained layers.
        weight_decay: of AdamW.
        batch_size: images in a batch, each in two views.
        images_per_cluster: images of one cluster in a batch.
        warmup: share of the epochs before the first clustering; each image is its own cluster.
        freeze_batchnorm: BatchNorm keeps its statistics and weights.
        centroid_momentum: of the centroids, which follow the batches; 1 keeps them.
        swap: share of the views whose background is swapped.
        guard: keep the better network by a criterion without labels, the untrained one included.
        trained_share: of the trained weights in the mean with the untrained ones that the guard
            keeps.
        loss_weights: of the metric loss, the clustering loss and the attention loss.
        least_steps: fewest optimizer steps.
        passes: passes over the images, where those are more steps.
    """

    learning_rate: float
    pooling: str = "backbone"
    head_rate: float = 1.0
    weight_decay: float = 1e-2
    batch_size: int = 64
    images_per_cluster: int = 4
    warmup: float = 0.0
    freeze_batchnorm: bool = True
    centroid_momentum: float = 0.0
    swap: float = 0.7
    guard: bool = True
    trained_share: float = 0.5
    loss_weights: dict[str, float] = field(
        default_factory=lambda: {
            "metric_loss": 1.0,
            "clustering_loss": 0.5,
            "attention_loss": 3.0,
        }
    )
    least_steps: int = 100
    passes: float = 3.0

    def steps(self, count: int) -> int:
        """Return the number of optimizer steps for `count` images."""
        return max(self.least_steps, round(self.passes * count / self.batch_size))

    def batch_size_for(self, count: int) -> int:
        """Return the largest batch size up to `batch_size` that `count` images can fill."""
        whole = min(self.batch_size, count) // self.images_per_cluster
        return max(1, whole) * self.images_per_cluster

    def epochs(self, count: int) -> int:
        """Return the number of epochs for `count` images."""
        return max(1, -(-self.steps(count) // max(1, count // self.batch_size_for(count))))

    def clusters(self, count: int) -> int:
        """Return the number of clusters for `count` images: a tenth, as many as a batch needs."""
        needed = self.batch_size_for(count) // self.images_per_cluster
        return auto_clusters(count, least=needed)

    def warmup_epochs(self, epochs: int) -> int:
        """Return how many of `epochs` pass before the first clustering."""
        return int(self.warmup * epochs)


PRETRAINED = Recipe(learning_rate=3e-4)
# Transformers and other networks of LayerNorm are trained at lower rates throughout the field.
PRETRAINED_LAYERNORM = Recipe(learning_rate=3e-5)
SCRATCH = Recipe(
    learning_rate=1e-3,
    pooling="covariance",
    warmup=0.5,
    freeze_batchnorm=False,
    guard=False,
    trained_share=1.0,
    least_steps=300,
    passes=10.0,
)


def recipe_for(model: nn.Module) -> Recipe:
    """Return the recipe of a model, by two questions that have plain answers.

    A model is from scratch if its attribute `from_scratch` says so, as that of an
    `AttentionEmbedder` built by name with `pretrained=False` does. Of the others, a network with
    BatchNorm is taken for a convolutional one.
    """
    if getattr(model, "from_scratch", False):
        return SCRATCH
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        return PRETRAINED
    return PRETRAINED_LAYERNORM
