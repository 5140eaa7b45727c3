"""Train with a few known labels and guess the others, with a custom clusterer in the trainer.

    python examples/semi_supervised.py

The script prints R@1 on unseen characters after learning from clusters only, from the known labels
only, and from known and guessed labels.
"""

import copy

import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import pml_tacl
from pml_tacl.cli import run_folder as runs
from pml_tacl.clustering import PseudoLabels, pseudo_labels_from
from pml_tacl.datasets import Glyphs
from pml_tacl.evaluation import evaluate

CLASSES = 60
KNOWN = 3  # images of each class whose label is known
WARMUP_EPOCHS = 6
EPOCHS = 6
BATCH_SIZE = 64
LEARNING_RATE = 5e-3
WORKERS = 1
# Fraction of the other images whose labels are guessed, by epoch.
SHARES = (0.0, 0.0, 0.0, 0.3, 0.5, 0.7)
BACKBONE = {"channels": [16, 32, 64, 128], "stem_width": 8, "output_stride": 16}


class KnownLabels:
    """Clusterer that returns the known labels (N,), and -1 (noise) for all other images."""

    def __init__(self, known: Tensor) -> None:
        self.known = known

    def __call__(self, embeddings: Tensor, initial_centroids: Tensor | None = None) -> PseudoLabels:
        return pseudo_labels_from(self.known, embeddings)


class KnownAndSure(KnownLabels):
    """Clusterer that also assigns an unlabelled image to a class if the choice is clear.

    The choice is clear if the gap between the nearest and the second nearest centroid is large. A
    fraction of the images, which grows with each call, is assigned. Known labels never change,
    and all other images are noise.
    """

    def __init__(self, known: Tensor, shares: tuple[float, ...]) -> None:
        super().__init__(known)
        self.shares = list(shares)

    def __call__(self, embeddings: Tensor, initial_centroids: Tensor | None = None) -> PseudoLabels:
        share = self.shares.pop(0) if len(self.shares) > 1 else self.shares[0]
        # The centroids are the means of the known images of each class.
        centroids = super().__call__(embeddings).centroids
        nearest = (normalize(embeddings) @ centroids.T).topk(2)
        gap = (nearest.values[:, 0] - nearest.values[:, 1]).masked_fill(self.known >= 0, -1)
        sure = gap.topk(round(share * int((self.known < 0).sum()))).indices
        labels = self.known.clone()
        labels[sure] = nearest.indices[sure, 0]
        return pseudo_labels_from(labels, embeddings)


def main() -> dict[str, float]:
    runs.seed_everything(0)
    start = pml_tacl.AttentionEmbedder(
        "resnet10t", embedding_dim=64, pooling="covariance", **BACKBONE
    )
    plain, halves = start.transform(image_size=64), ("train", "train", "test")
    train, seen, test = (Glyphs(half, num_classes=CLASSES) for half in halves)
    seen.transform = test.transform = plain
    start.fit_projection(DataLoader(seen, BATCH_SIZE), progress=False)  # initial projection
    affine = v2.RandomAffine(15, (0.08, 0.08), scale=(0.7, 1.4), fill=220)
    colour = v2.Compose([v2.ColorJitter(0.5, 0.5, 0.5), v2.RandomChannelPermutation()])
    two_views = pml_tacl.SiameseTransform(64, 4, geometric=affine, photometric=colour, flip=False)
    labels = torch.from_numpy(train.labels)
    # The index of each image within its class.
    number = torch.arange(len(labels)) - torch.searchsorted(labels, labels)
    known = labels.where(number < KNOWN, -1)
    clusters = pml_tacl.KMeansPseudoLabeler("auto")

    def fit(model: nn.Module, labeler, epochs: int, warmup: int) -> float:
        trainer = pml_tacl.UnsupervisedTrainer(
            model,
            torch.optim.AdamW(model.parameters(), LEARNING_RATE),
            BATCH_SIZE,
            {"pairs": MultiSimilarityLoss(), "ccl": pml_tacl.ContrastiveClusteringLoss()},
            train,
            transform=two_views,
            eval_transform=plain,
            labeler=labeler,
            warmup_epochs=warmup,
            progress=False,
            dataloader_num_workers=WORKERS,
        )
        trainer.train(num_epochs=epochs)
        return evaluate(model, test, metrics=["recall_at_1"], progress=False)["recall_at_1"]

    found = {"two views alone": fit(start, clusters, WARMUP_EPOCHS, WARMUP_EPOCHS)}
    sources = {"clusters": clusters, "known labels": KnownLabels(known)}
    sources["known and sure labels"] = KnownAndSure(known, SHARES)
    for name, labeler in sources.items():
        found[name] = fit(copy.deepcopy(start), labeler, EPOCHS, 0)
    print(f"{int((known >= 0).sum())} of {len(known)} labels are known")
    for name, value in found.items():
        print(f"{name:<26} R@1 {100 * value:5.1f}")
    return found


if __name__ == "__main__":
    main()
