"""Default settings of a training: learning rates, duration and loss weights."""

from dataclasses import dataclass, field

from torch import nn

from pml_tacl.clustering.kmeans import auto_clusters


@dataclass(frozen=True)
class Recipe:
    """Default settings of a training, which depend on the kind of network and its weights.

    `UnsupervisedTrainer`, the command line and `benchmarks/retrieval.py` take their defaults from
    here. They were chosen on validation data (see docs/results.md).

    Attributes:
        pooling: pooling of the `AttentionEmbedder`.
        learning_rate: highest learning rate of the trunk.
        head_rate: factor on the learning rate for the trained layers of the embedder.
        weight_decay: weight decay of AdamW.
        batch_size: images in a batch; each comes in two views.
        images_per_cluster: images of one cluster in a batch.
        warmup: share of the epochs that come before the first clustering. In these epochs, each
            image is its own cluster.
        freeze_batchnorm: do not train BatchNorm's statistics and weights.
        centroid_momentum: momentum, in [0, 1], with which the centroids follow the batches; 1 keeps
            them fixed.
        swap: share of the views whose background is swapped, in [0, 1].
        guard: select the best network, which may be the pretrained one, by a criterion without
            labels.
        trained_share: weight of the trained network in the mean that the guard keeps, in (0, 1].
        attention_temperature: temperature of the soft maximum in the attention loss; None for the
            hard maximum.
        loss_weights: weights of metric loss, clustering loss and attention loss.
        least_steps: smallest number of optimizer steps.
        passes: passes over the images, if that takes more than `least_steps`.
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
    trained_share: float = 0.75
    loss_weights: dict[str, float] = field(
        default_factory=lambda: {
            "metric_loss": 1.0,
            "clustering_loss": 0.5,
            "attention_loss": 3.0,
        }
    )
    attention_temperature: float | None = 0.3
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
        """Return the number of clusters: a tenth of `count`.

        It is at least what a batch needs, and at most 10 000.
        """
        needed = self.batch_size_for(count) // self.images_per_cluster
        return auto_clusters(count, least=needed)

    def warmup_epochs(self, epochs: int) -> int:
        """Return the number of epochs before the first clustering."""
        return int(self.warmup * epochs)


PRETRAINED = Recipe(learning_rate=3e-4)
# Transformers and other networks with LayerNorm are commonly trained at lower learning rates.
PRETRAINED_LAYERNORM = Recipe(learning_rate=3e-5)
SCRATCH = Recipe(
    learning_rate=1e-3,
    pooling="covariance",
    warmup=0.5,
    freeze_batchnorm=False,
    guard=False,
    trained_share=1.0,
    attention_temperature=None,
    least_steps=300,
    passes=10.0,
)


def recipe_for(model: nn.Module) -> Recipe:
    """Return the default recipe of a model.

    `SCRATCH` is for models whose attribute `from_scratch` is true, such as an `AttentionEmbedder`
    that was built by name with `pretrained=False`. Otherwise, `PRETRAINED` is for networks with
    BatchNorm and `PRETRAINED_LAYERNORM` for all others.
    """
    if getattr(model, "from_scratch", False):
        return SCRATCH
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        return PRETRAINED
    return PRETRAINED_LAYERNORM
